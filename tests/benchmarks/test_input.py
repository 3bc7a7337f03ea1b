import dataclasses

from shampax.benchmarks import input as reading
from shampax.framework.data.pipeline import Reading


def test_rows_per_core():
    """Fault: windows or mixtures are not measured, or measured on rows that are not read."""
    found = reading.per_core(0.0)
    assert [*found] == ["shuffled", "windows of 4 shards", "3 sources in windows"] and min(found.values()) > 0


def test_a_slow_disk_costs_one_wait_for_many_rows(tmp_path, monkeypatch):
    """Faults: batches are read row by row; the emulated disk is not waited for, or the two sides read alike."""
    read, calls, slept = reading._Slow.read, [], []
    monkeypatch.setattr(reading._Slow, "read", lambda self, rows: calls.append(len(rows)) or read(self, rows))
    monkeypatch.setattr(reading.time, "sleep", slept.append)
    kind = dataclasses.replace(reading.KINDS["clicks"], rows=512, batch=256)
    files = reading.write(kind, tmp_path)
    rows = reading.SlowRows(files, kind.decode, 0, 512)
    rows.latency = 0.03
    sizes = []
    for source in (reading.OneByOne(rows), rows):
        calls.clear()
        assert reading.rate(kind, source, Reading(2, 0, 1), 0.0) > 0
        sizes.append(max(calls))
    assert sizes[0] == 1
    assert sizes[1] > 8
    assert set(slept) == {0.03}
