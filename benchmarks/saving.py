"""Measure how much saving a checkpoint slows down the train steps that it overlaps.

    python -m shampax.benchmarks.saving

Turns without a save alternate with turns that begin with a save, in one process, on one device. By default, a turn is
as long as the sample's interval between checkpoints. A save overlaps the first steps of its turn, up to the step during
which the checkpoint becomes complete. These steps are compared with the first steps of turns without a save. Prints
JSON.

    python -m shampax.benchmarks.saving --memory=600 --variant=sample_host
    python -m shampax.benchmarks.saving --memory=1000 --every=1

print the resident memory of the training command over 600 steps without a save, and over 1,000 saves.
"""

import argparse
import contextlib
import dataclasses
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ..configs import lm
from ..framework.base.errors import UserError
from ..framework.checkpoint import takeover
from ..framework.checkpoint.record import Ranking, Record
from ..framework.checkpoint.saving import Checkpoints
from ..framework.config import components
from ..framework.config.check import check
from ..framework.data import pipeline
from ..framework.sharding import meshes
from ..framework.sharding.global_batch import Share
from ..framework.step.program import Program
from ..framework.step.schedule import make_schedule
from ..framework.step.state import make_initial
from ..optimizers.plan import patterns
from . import command

_READINGS = 20  # of the memory


def measure(options: argparse.Namespace, place: Path) -> dict[str, Any]:
    """Measure turns with and without a save. Return the result as JSON."""
    config = lm.get_config(options.variant)
    check(config)
    task, data, chosen = components.build_all(config)
    mesh = meshes.make_mesh({"data": -1, "fsdp": 1, "tensor": 1}, jax.devices()[:1])
    data.prepare(place / "data")
    share = Share(config.batch_size, mesh)
    batches = pipeline.Batches(
        data.examples("train", place / "data"),
        seed=0,
        global_batch_size=config.batch_size,
        rows=share.rows.tolist(),
    )
    ready = [share.to_devices(batches[step]) for step in range(8)]
    spec = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), ready[0])
    rate = make_schedule(1e-3, warmup_steps=0, total_steps=10**6, decay="constant", final_fraction=0.0)
    with jax.set_mesh(mesh):
        program = Program(config, task, chosen, mesh, spec, rate)
        tx, abstract = program.tx, program.abstract
        compiled = program.train_step.lower(abstract, spec).compile()
        names = patterns.paths(abstract)
        arrays = make_initial(task, tx, spec, abstract, 0, names)()
        state = jax.tree.unflatten(jax.tree.structure(abstract), [arrays[name] for name in names])
        manifest = takeover.describe(tx, config.optimizer.name, abstract.params, mesh.shape)
        saver = Checkpoints(place, keep_last=2, keep_best=0, ranking=Ranking())
        record, taken = Record(), 0
        plain, saved, overlapped, writes = [], [], [], []  # the first two: end times of the steps of each turn
        for turn in range(2 * options.turns + 2):
            begun = time.perf_counter()
            saves = turn % 2 == 1
            if saves:
                record = dataclasses.replace(record, step=record.step + 1)
                saver.save(state, record, manifest)
            seen = None
            ends = []
            for _ in range(options.steps):
                state, metrics = compiled(state, ready[taken % len(ready)])
                if seen is not None:
                    jax.block_until_ready(seen)
                    ends.append(time.perf_counter() - begun)
                seen, taken = metrics, taken + 1
            jax.block_until_ready(seen)
            ends.append(time.perf_counter() - begun)
            if turn < 2:  # warm-up
                saver.confirm()
                continue
            if saves:
                saver.confirm()
                writes.append(saver.metrics())
                steps = int(np.searchsorted(ends, writes[-1]["checkpoint/seconds"])) + 1
                saved.append(ends)
                overlapped.append(min(steps, len(ends)))
            else:
                plain.append(ends)
        saver.close()
    without, with_save = np.median(plain, axis=0), np.median(saved, axis=0)
    added = [ends[steps - 1] / without[steps - 1] - 1 for ends, steps in zip(saved, overlapped, strict=True)]
    return {
        "device": f"one {jax.devices()[0].platform} device",
        "variant": options.variant,
        "turns": options.turns,
        "steps of a turn": options.steps,
        "step ms": 1e3 * float(without[-1]) / options.steps,
        "checkpoint bytes": int(writes[-1]["checkpoint/bytes"]),
        "blocked ms": 1e3 * float(np.median([each["checkpoint/blocked_seconds"] for each in writes])),
        "save ms": 1e3 * float(np.median([each["checkpoint/seconds"] for each in writes])),
        "turn without ms": 1e3 * float(without[-1]),
        "turn with ms": 1e3 * float(with_save[-1]),
        "added to a turn": float(with_save[-1] / without[-1]) - 1,
        "steps overlapped": float(np.median(overlapped)),
        "added to the steps overlapped": float(np.median(added)),
    }


def memory(options: argparse.Namespace, place: Path) -> dict[str, Any]:
    """Run the training command and read its resident memory. Return the least between reported steps as JSON."""
    knobs = {"duration": f"{options.memory} steps", "checkpoint.every": f"{options.every} steps"}
    knobs |= {"log.every": f"{max(1, options.memory // _READINGS)} steps", "evaluation.every": "0 steps"}
    words = [sys.executable, "-m", "shampax.launch.train", f"--config={lm.__file__}:{options.variant}"]
    words += [f"--workdir={place / 'run'}", *(f"--config.{name}={value}" for name, value in knobs.items())]
    resident, readings = {}, []

    def read() -> None:
        with contextlib.suppress(FileNotFoundError):  # it has ended
            while status := Path(f"/proc/{run.pid}/status").read_text().partition("VmRSS:")[2]:
                readings.append(int(status.split()[0]) / 1e3)
                time.sleep(0.02)

    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as run:
        assert run.stdout
        threading.Thread(target=read, daemon=True).start()
        for line in run.stdout:
            if found := re.match(r"step +(\d+)/", line):
                resident[int(found[1])] = round(min(readings), 1)
                readings.clear()
                print(f"{line.rstrip()}  {resident[int(found[1])]} MB", file=sys.stderr, flush=True)
    if run.returncode:
        raise UserError(f"{' '.join(words)}: ended with code {run.returncode}.")
    later = {step: megabytes for step, megabytes in resident.items() if step > options.memory / 3}
    growth = float(np.polyfit(list(later), list(later.values()), 1)[0])
    return {"variant": options.variant, "steps from one save to the next": options.every, "resident MB": resident} | {
        "MB added by 1,000 steps after the first third": round(1e3 * growth, 1)
    }


def main(arguments: Sequence[str]) -> int:
    """Run the command line. Return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variant", default="sample", help="variant of configs/lm.py")
    parser.add_argument("--turns", type=int, default=20, help="turns with a save, and as many without")
    parser.add_argument("--steps", type=int, default=20, help="steps per turn")
    parser.add_argument("--memory", type=int, default=0, metavar="N", help="read the memory over N steps instead")
    parser.add_argument("--every", type=int, default=0, help="steps from one save to the next for --memory; 0: never")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as place:
        return command.report(lambda: (memory if options.memory else measure)(options, Path(place)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
