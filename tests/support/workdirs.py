"""Read and copy the workdirs of runs."""

import json
import shutil
from pathlib import Path


def history(workdir: Path, key: str) -> list[float]:
    """Return the values of a metric, in order of steps."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [line[key] for line in lines if key in line]


def cut_short(whole: Path, copy: Path, step: int) -> Path:
    """Copy the workdir of a complete run as if the run had died at the checkpoint of `step`."""
    shutil.copytree(whole, copy)
    (copy / "result.json").unlink()
    assert (copy / "checkpoints" / str(step)).exists()
    for path in (copy / "checkpoints").iterdir():
        if int(path.name) > step:
            shutil.rmtree(path)
    lines = (copy / "metrics.jsonl").read_text().splitlines(keepends=True)
    (copy / "metrics.jsonl").write_text("".join(line for line in lines if json.loads(line)["step"] <= step))
    return copy
