import json

import pytest
from batch_meshes import BATCH, MESHES, STEPS, Source, batches_on, digest
from processes import run_together

from shampax.framework.data.pipeline import Batches, HeldoutBatches


@pytest.fixture(scope="module")
def two_processes():
    script = "import json, batch_meshes; print(json.dumps(batch_meshes.all_meshes()))"
    return [json.loads(out.splitlines()[-1]) for out in run_together(script, processes=2, devices=2)]


@pytest.mark.parametrize("name", MESHES)
def test_rows_have_one_order_on_any_mesh_and_number_of_processes(two_processes, name):
    """Faults: the order of rows depends on processes; two processes disagree about a row that both hold."""
    whole = Batches(Source(), seed=5, global_batch_size=BATCH, rows=range(BATCH))
    heldout = HeldoutBatches(Source(), global_batch_size=BATCH, rows=range(BATCH))
    expected = {f"step {step}": whole[step] for step in STEPS}
    expected |= {f"held out {number}": batch for number, batch in enumerate(heldout)}
    alone, _ = batches_on(*MESHES[name])
    # Devices of a second process have other numbers.
    together = two_processes[0][name][0] | two_processes[1][name][0]
    assert len(alone) == len(together) == 4 * 2 * len(expected)
    for held in (alone, together):
        for place, found in held.items():
            batch, key, rows = place.partition(" device ")[0].rsplit(" ", 2)
            start, stop = map(int, rows.split(":"))
            assert found == digest(expected[batch][key][start:stop]), place


def test_a_process_reads_each_row_of_its_devices_once(two_processes):
    """Faults: each process reads the whole batch; rows on two of its devices are read twice."""
    reads = {name: [results[name][1] for results in two_processes] for name in MESHES}
    assert reads == {name: [12, 12] if name in ("tensor=4", "sequence=4") else [6, 6] for name in MESHES}
