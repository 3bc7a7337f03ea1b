"""The sample configs on eight devices: of one process, and divided over several; their losses must be the same.

    python tests/support/topologies.py --steps=20 --configs=lm,translation,bert,dlrm,resnet --topologies=2x4,4x2

Every run is the real command in processes of its own, and the samples are as they are, except for the length of the
run and what that asks of the schedule. Prints JSON: for each config and topology, processes x devices, the largest
relative difference of a step's loss from that of one process, and the step. XLA adds up what devices have in another
order where they are of several processes. One process that has been told that it may have others uses that order too,
and is the second reference: a difference from it is a fault of ours. Exits with 1 where one is above 1e-6.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

DEVICES = 8
BOUND = 1e-6
QUIET = ("evaluation.every=0 steps", "evaluation.batches=1", "checkpoint.every=0 steps", "log.every=1 steps")
# The command of one process whose devices add up as those of several do.
JOINED = """
import socket, sys
import jax
with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    address = "127.0.0.1:%d" % free.getsockname()[1]
jax.distributed.initialize(address, 1, 0, cluster_detection_method="deactivate")
from shampax.launch import train
sys.exit(train.main())
"""
# What the samples need for so few steps, or to leave out what is no training.
CHANGES: dict[str, tuple[str, ...]] = {
    "lm": (),
    "translation": ("task.beam_size=1", "task.decode_length=2"),
    "bert": ("schedule.warmup=5 steps",),
    "dlrm": (),
    "resnet": (),
}


def losses(workdir: Path) -> list[float]:
    """The training losses of a workdir whose every step is logged."""
    points = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [point["train/loss"] for point in points if "train/loss" in point]


def furthest(mine: list[float], reference: list[float]) -> tuple[float, int]:
    """The largest relative difference of two histories of one length, and its step."""
    assert len(mine) == len(reference), (len(mine), len(reference))
    return max((abs(a - b) / abs(b), step) for step, (a, b) in enumerate(zip(mine, reference, strict=True), 1))


def run(name: str, changes: tuple[str, ...], processes: int, workdir: Path, *, joined: bool = False) -> list[float]:
    """Train a sample in so many processes, of eight devices together; the losses."""
    arguments = [f"--config=shampax/configs/{name}.py:sample", f"--workdir={workdir}"]
    arguments += [f"--config.{change}" for change in changes]
    if joined:
        command = ["-c", JOINED, *arguments]
    elif processes == 1:
        command = ["-m", "shampax.launch.train", *arguments]
    else:
        local = ["-m", "shampax.launch.local", f"--processes={processes}", f"--devices={DEVICES // processes}", "--"]
        command = [*local, "train", *arguments]
    environment = {**os.environ, "JAX_NUM_CPU_DEVICES": str(DEVICES), "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    return losses(workdir)


def main() -> int:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--configs", default=",".join(CHANGES))
    parser.add_argument("--topologies", default="2x4,4x2", help="processes x devices of each, eight together")
    options = parser.parse_args()
    topologies = [tuple(map(int, text.split("x"))) for text in options.topologies.split(",")]
    assert all(processes * devices == DEVICES for processes, devices in topologies), options.topologies
    fine = True
    with tempfile.TemporaryDirectory() as folder:
        for name in options.configs.split(","):
            changes = (*QUIET, *CHANGES[name], f"duration={options.steps} steps")
            alone = run(name, changes, 1, Path(folder) / f"{name}_alone")
            joined = run(name, changes, 1, Path(folder) / f"{name}_joined", joined=True)
            for processes, devices in topologies:
                mine = run(name, changes, processes, Path(folder) / f"{name}_{processes}")
                line = {"config": name, "topology": f"{processes}x{devices}", "steps": len(mine)}
                for title, reference in {"of one process": alone, "of one that is told of others": joined}.items():
                    difference, step = furthest(mine, reference)
                    line[title] = {"largest_relative_difference": difference, "at_step": step}
                    fine &= difference <= BOUND
                print(json.dumps(line), flush=True)
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main())
