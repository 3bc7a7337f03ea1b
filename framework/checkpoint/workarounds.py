"""Work around faults of Orbax, TensorStore and glibc that show on a full disk, and after hundreds of saves."""

import ast
import contextlib
import ctypes
import logging
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

import tensorstore

_SECONDS = 300  # that a process waits for the others, where Orbax does not say


def apply() -> None:
    """Hide what they print beside the errors that they raise, and stop their leak of memory; see `reach_buckets`."""
    reach_buckets()
    for name in ("absl", "asyncio"):
        logging.getLogger(name).addFilter(_is_of_others)
    sys.unraisablehook = _unraisable
    # TensorStore never frees the Python objects that it makes from JSON: 30 to 250 kB in each save.
    tensorstore.Spec.to_json = tensorstore.KvStore.Spec.to_json = _to_json  # pyright: ignore
    with contextlib.suppress(ImportError):
        from orbax.checkpoint._src.serialization import tensorstore_utils

        tensorstore_utils.get_tensorstore_raw_bytes = lambda direction=None: 0  # for Orbax's log alone


def reach_buckets() -> None:
    """Let Orbax keep arrays in s3:// as it does in gs://. Without this, it takes s3:// for a relative path."""
    with contextlib.suppress(ImportError):
        from orbax.checkpoint._src.path import gcs_utils
        from orbax.checkpoint._src.serialization import tensorstore_utils

        gcs_utils._GCS_PATH_PREFIX = ("gs://", "s3://")  # pyright: ignore[reportAttributeAccessIssue]
        gcs_utils.get_kvstore_for_gcs = kvstore
        tensorstore_utils._use_gcs_driver = lambda directory: "://" in directory
        tensorstore_utils._normalize_path = lambda path: os.path.normpath(path).replace(":/", "://")


def kvstore(path: str) -> dict[str, Any]:
    """Return TensorStore's spec of a folder in a bucket or, with a leading /, of this machine."""
    scheme, _, place = path.rpartition("://")
    if not scheme:
        return {"driver": "file", "path": path}
    bucket, _, inside = place.partition("/")
    if scheme == "gs":
        return {"driver": os.environ.get("TENSORSTORE_GCS_BACKEND", "gcs"), "bucket": bucket, "path": inside}
    # TensorStore does not take these from the environment.
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    found = {key: value for key, value in (("endpoint", endpoint), ("aws_region", region)) if value}
    return {"driver": "s3", "bucket": bucket, "path": inside, **found}


@contextlib.contextmanager
def meeting_by(wait: Callable[[float], None]) -> Iterator[None]:
    """Let the processes of a save meet by `wait(seconds)`, not in collectives, where a failed process is missing."""
    with contextlib.ExitStack() as end:
        with contextlib.suppress(ImportError):
            from orbax.checkpoint._src.multihost import multihost

            def meet(name: str, *, timeout: int | None = None, **others: Any) -> None:
                wait(timeout or _SECONDS)

            end.callback(setattr, multihost, "sync_global_processes", multihost.sync_global_processes)
            multihost.sync_global_processes = meet
        yield


def release() -> None:
    """Tell Orbax after an error that the folders of a save exist, because other processes wait for them for minutes."""
    with contextlib.suppress(ImportError):
        from orbax.checkpoint._src.futures import future
        from orbax.checkpoint._src.futures.synchronization import OperationIdGenerator

        signals = future.AwaitableSignalsContract.get_awaitable_signals_from_contract()
        future.set_signals(signals, operation_id=OperationIdGenerator.get_current_operation_id())


def return_free_memory() -> None:
    """Give the memory that malloc keeps for later back to the system, where the C library can.

    A save allocates in dozens of short-lived threads. glibc spreads them over its arenas, whose free memory grows by
    40 MB in 1,000 saves of the sample and reaches 900 MB after compilation, while what is in use stays level.
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def _is_of_others(record: logging.LogRecord) -> bool:
    return "orbax" not in record.pathname and "exception was never retrieved" not in record.getMessage()


def _unraisable(unraisable: Any) -> None:
    if str(unraisable.exc_value) != "Event loop is closed":  # TensorStore raises this once for each array
        sys.__unraisablehook__(unraisable)


def _to_json(spec: Any, include_defaults: bool = False) -> Any:
    del include_defaults  # Orbax does not ask for them
    _, _, literal = repr(spec).partition("(")
    return ast.literal_eval(literal.removesuffix(")"))
