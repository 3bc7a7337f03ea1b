"""Emulated buckets on loopback: gcp-storage-emulator for gs://, moto's server for s3://."""

import contextlib
import logging
import os
from collections.abc import Iterator

from processes import free_port

# gcsfs asks Google itself for the kind of a bucket, unless this is set before it is imported.
os.environ["GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"] = "false"


@contextlib.contextmanager
def google(bucket: str) -> Iterator[dict[str, str]]:
    """Serve a bucket in this process while entered, and yield the variables with which programs find it."""
    from gcp_storage_emulator import server
    from gcp_storage_emulator.handlers import objects

    logging.getLogger("gcp_storage_emulator").setLevel(logging.ERROR)

    def with_generation(request, response, storage, *args, **kwargs):
        """Add a header of the real service, without which TensorStore reads nothing."""
        objects_download(request, response, storage, *args, **kwargs)
        with contextlib.suppress(Exception):
            found = storage.get_file_obj(request.params["bucket_name"], request.params["object_id"])
            response["x-goog-generation"] = found["generation"]

    objects_download = objects.download
    objects.download = with_generation
    port = free_port()
    running = server.create_server("127.0.0.1", port, in_memory=True, default_bucket=bucket)
    running.start()
    address = f"http://127.0.0.1:{port}"
    try:
        yield {
            "STORAGE_EMULATOR_HOST": address,  # gcsfs and google-cloud-storage
            "TENSORSTORE_GCS_HTTP_URL": address,
            "GOOGLE_CLOUD_PROJECT": "emulated",
            "FSSPEC_GS": '{"use_listings_cache": false, "token": "anon"}',
        }
    finally:
        running.stop()
        objects.download = objects_download


@contextlib.contextmanager
def amazon(bucket: str) -> Iterator[dict[str, str]]:
    """Serve a bucket in this process while entered, and yield the variables with which programs find it."""
    import boto3
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    port = free_port()
    running = ThreadedMotoServer("127.0.0.1", port)
    running.start()
    keys = {"aws_access_key_id": "emulated", "aws_secret_access_key": "emulated", "region_name": "us-east-1"}
    try:
        boto3.client("s3", endpoint_url=f"http://127.0.0.1:{port}", **keys).create_bucket(Bucket=bucket)
        yield {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
            "AWS_ACCESS_KEY_ID": "emulated",
            "AWS_SECRET_ACCESS_KEY": "emulated",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }
    finally:
        running.stop()
