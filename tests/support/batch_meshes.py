"""Read rows of a batch on every kind of mesh, in one process or several."""

import hashlib

import jax
import numpy as np

from shampax.framework.data.pipeline import Batches, HeldoutBatches
from shampax.framework.sharding import meshes
from shampax.framework.sharding.global_batch import Share

BATCH, EXAMPLES, STEPS = 12, 31, (0, 2, 3, 17)  # batches 2 and 17 are in two epochs


MESHES = {
    "data=4": ({"data": 4}, (0, 1, 2, 3)),
    "data=4, interleaved devices of processes": ({"data": 4}, (0, 2, 1, 3)),
    "data=2 fsdp=2": ({"data": 2, "fsdp": 2}, (0, 1, 2, 3)),
    "data=2 expert=2": ({"data": 2, "expert": 2}, (0, 1, 2, 3)),
    "data=2 tensor=2": ({"data": 2, "tensor": 2}, (0, 1, 2, 3)),
    "tensor=4": ({"tensor": 4}, (0, 1, 2, 3)),  # devices of two processes have the whole batch
    "sequence=4": ({"sequence": 4}, (0, 1, 2, 3)),
}


class Source:
    """Examples that are a function of their index, and a count of reads."""

    def __init__(self):
        self.reads = 0

    def __len__(self):
        return EXAMPLES

    def __getitem__(self, index):
        self.reads += 1
        return {"x": np.random.default_rng(index).normal(size=3).astype(np.float32), "index": np.int32(index + 1)}


def digest(array):
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()[:16]


def batches_on(sizes, order):
    """Return the shards of this process on a mesh over the first four devices, and the number of examples read.

    Returns:
      Digests by "batch array rows", and the number of reads for each training batch.
    """
    devices = [jax.devices()[index] for index in order]
    mesh = meshes.make_mesh(dict.fromkeys(("data", "expert", "fsdp", "sequence", "tensor"), 1) | sizes, devices)
    share, source = Share(BATCH, mesh), Source()
    wanted = {"global_batch_size": BATCH, "rows": share.rows}
    batches, heldout = Batches(source, seed=5, **wanted), HeldoutBatches(source, **wanted)
    source.reads = 0
    read = {f"step {step}": batches[step] for step in STEPS}
    reads = source.reads / len(STEPS)
    read |= {f"held out {number}": batch for number, batch in enumerate(heldout)}
    held = {}
    for name, local in read.items():
        for key, array in share.to_devices(local).items():
            assert array.shape[0] == BATCH
            assert array.sharding == meshes.batch_sharding(mesh)
            for shard in array.addressable_shards:
                rows = range(BATCH)[shard.index[0]]
                held[f"{name} {key} {rows.start}:{rows.stop} device {shard.device.id}"] = digest(shard.data)
    return held, reads


def all_meshes():
    return {name: batches_on(*mesh) for name, mesh in MESHES.items()}
