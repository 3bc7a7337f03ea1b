"""Compare the losses of the sample configs on eight devices of one process and of several processes.

    python tests/support/topologies.py --steps=20 --configs=lm,translation,bert,dlrm,resnet --topologies=2x4,4x2

Every run is the real command with an unchanged sample, except for the length of the run and its schedule. launch.local
starts the single process, too. A process without jax.distributed is also compared: there XLA sums over devices in
another order. Prints JSON: for each config and topology (processes x devices), the largest relative difference of a
step's loss from that of one process, and the step. Exits with 1 if a difference is above 1e-6.
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
# Overrides that make runs short: a short warm-up, short translations.
CHANGES: dict[str, tuple[str, ...]] = {
    "lm": (),
    "translation": ("task.beam_size=1", "task.decode_length=2"),
    "bert": ("schedule.warmup=5 steps",),
    "dlrm": (),
    "resnet": (),
}


def losses(workdir: Path) -> list[float]:
    """Return the training losses of a workdir that logs every step."""
    points = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [point["train/loss"] for point in points if "train/loss" in point]


def furthest(mine: list[float], reference: list[float]) -> tuple[float, int]:
    """Return the largest relative difference of two histories of equal length, and its step."""
    assert len(mine) == len(reference), (len(mine), len(reference))
    return max((abs(a - b) / abs(b), step) for step, (a, b) in enumerate(zip(mine, reference, strict=True), 1))


def run(name: str, changes: tuple[str, ...], processes: int, workdir: Path) -> list[float]:
    """Train a sample on eight devices in this many processes of launch.local, 0 for none; return the losses."""
    command = [f"--config=shampax/configs/{name}.py:sample", f"--workdir={workdir}"]
    command += [f"--config.{change}" for change in changes]
    if processes:
        local = [f"--processes={processes}", f"--devices={DEVICES // processes}", "--", "train"]
        command = ["shampax.launch.local", *local, *command]
    else:
        command = ["shampax.launch.train", *command]
    environment = {**os.environ, "JAX_NUM_CPU_DEVICES": str(DEVICES), "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-m", *command], env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    return losses(workdir)


def main() -> int:
    """Run the command and return the exit code."""
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
            one, alone = (run(name, changes, processes, Path(folder) / f"{name}_{processes}") for processes in (1, 0))
            for processes, devices in topologies:
                mine = run(name, changes, processes, Path(folder) / f"{name}_{processes}")
                difference, step = furthest(mine, one)
                line = {"config": name, "topology": f"{processes}x{devices}", "steps": len(mine)}
                line |= {"largest_relative_difference": difference, "at_step": step}
                line["from one that is started by itself"] = furthest(mine, alone)[0]
                fine &= difference <= BOUND
                print(json.dumps(line), flush=True)
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main())
