import argparse
import dataclasses

from shampax.benchmarks import input as reading


def test_a_slow_disk_costs_one_wait_for_many_rows(monkeypatch):
    """Faults: batches are read row by row; the benchmark measures what is read ahead, or no wait."""
    few = {name: dataclasses.replace(kind, rows=512) for name, kind in reading.KINDS.items()}
    monkeypatch.setattr(reading, "KINDS", few)
    options = argparse.Namespace(kinds=["clicks"], latency=2, seconds=0.1, threads=8, workers=0, ahead=1)
    result = reading.measure(options)
    rows, shards = result["clicks, rows/s"]["2 ms a call"].values()
    assert rows <= 2 / 2e-3 * 1.1
    assert shards > 4 * rows
