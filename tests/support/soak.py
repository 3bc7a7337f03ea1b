"""Kill runs at random moments, resume them, and compare them bit for bit with an undisturbed run.

    python tests/support/soak.py --kills=50 --terms=50

Every run is the real command in a separate process: Distributed Shampoo with roots on the host, which are in flight at
almost every step, and a checkpoint every third step. A killed run gets SIGKILL up to three times, at a random moment of
its training, of its whole life including start-up, or of writing a checkpoint, and then resumes to the end. A
terminated run gets SIGTERM and must not repeat any step. Prints JSON; exits with 1 if any run ends differently from the
undisturbed one.
"""

import argparse
import dataclasses
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import numpy as np

STEPS = 90
HERE = Path(__file__).resolve().parent
# Import path of the processes: the package, this folder and the toy tasks.
SEARCHED = [str(HERE), str(HERE / "toys"), *sys.path]
CONFIG = f"""
from shampax.configs import base

def get_config(arg=""):
    config = base.get_config()
    config.task = base.component("toy:ToyTask", nan_steps=(7, 40))
    config.data = base.component("slow_toy:SlowData")
    config.optimizer = base.component(
        "shampax.optimizers.shampoo:ShampooOptions", block_size=8, interval=4, refresh="host", delay=2)
    config.duration = "{STEPS} steps"
    config.batch_size = 8
    config.evaluation.every = "20 steps"
    config.checkpoint.every = "3 steps"
    config.log.every = "1 steps"
    return config
"""
MOMENTS = ("saving", "training", "life")


@dataclasses.dataclass
class Run:
    """One run: its workdir, and the outcomes of its processes."""

    workdir: Path
    moments: list[str] = dataclasses.field(default_factory=list)
    codes: list[int] = dataclasses.field(default_factory=list)
    steps: list[list[int]] = dataclasses.field(default_factory=list)  # reported by each process
    cut_short: int = 0  # saves that a kill interrupted

    def resume(self, config: Path, disturb=None) -> None:
        """Run one process, disturbed or not, to its end."""
        log = self.workdir.with_suffix(f".{len(self.codes)}.log")
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(SEARCHED),
            "PYTHONUNBUFFERED": "1",
            "JAX_PLATFORMS": "cpu",
            "JAX_NUM_CPU_DEVICES": "2",
            "NPROC": "32",
            "JAX_COMPILATION_CACHE_DIR": str(config.parent / "programs"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
        command = [sys.executable, "-m", "shampax.launch.train", f"--config={config}", f"--workdir={self.workdir}"]
        with log.open("w") as out:
            process = subprocess.Popen(command, env=environment, stdout=out, stderr=subprocess.STDOUT)
            try:
                if disturb is not None:
                    disturb(process, log)
                self.codes.append(process.wait(180))
            finally:
                process.kill()
                process.wait()
        saves = self.workdir / "checkpoints"
        self.cut_short += any(not [*path.glob("SHA256SUMS-*")] for path in saves.glob("*"))
        self.steps.append([int(step) for step in re.findall(r"^step +(\d+)/", log.read_text(), re.M)])


def kill_at(moment: str, chance: random.Random, workdir: Path):
    """Return a function that kills a process at a random moment of a kind."""

    def disturb(process: subprocess.Popen, log: Path) -> None:
        if moment != "life":
            wait_until(lambda: "first step done" in log.read_text() or process.poll() is not None)
            time.sleep(chance.uniform(0.0, 2.0))
        else:
            time.sleep(chance.uniform(0.0, 8.0))
        if moment == "saving":
            store = workdir / "checkpoints"
            wait_until(lambda: any("tmp" in path.name for path in store.iterdir()) or process.poll() is not None)
            time.sleep(chance.uniform(0.0, 0.03))
        process.send_signal(signal.SIGKILL)

    return disturb


def terminate(chance: random.Random):
    """Return a function that asks a process to stop at a random moment of its training."""

    def disturb(process: subprocess.Popen, log: Path) -> None:
        wait_until(lambda: "first step done" in log.read_text() or process.poll() is not None)
        time.sleep(chance.uniform(0.0, 2.0))
        process.send_signal(signal.SIGTERM)

    return disturb


def wait_until(condition, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.002)


def arrays_of(workdir: Path) -> dict[str, np.ndarray]:
    """Return all arrays of a run's last checkpoint."""
    from shampax.framework.checkpoint import store

    path = store.checkpoints(workdir)[-1]
    assert path.name == str(STEPS), path
    return store.read(path, dict.fromkeys(store.arrays(path)))


def differences(run: Run, whole: dict[str, np.ndarray], history: list) -> list[str]:
    """Return the differences of a run from the undisturbed one."""
    if run.codes[-1] != 0:
        return [f"its last process ended with {run.codes[-1]}"]
    mine = arrays_of(run.workdir)
    found = [f"{name} differs" for name in whole if mine[name].tobytes() != whole[name].tobytes()]
    return found + (["the history differs"] if losses(run.workdir) != history else [])


def losses(workdir: Path) -> list:
    """Return (step, loss) and (step, held-out loss), in the order of the history."""
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return [(line["step"], line.get("train/loss"), line.get("heldout/loss")) for line in lines]


def soak(place: Path, *, kills: int, terms: int, seed: int = 0, at_once: int = 2) -> dict:
    """Make the runs in a directory and return their outcomes."""
    config = place / "soak_config.py"
    config.write_text(CONFIG)
    whole = Run(place / "whole")
    whole.resume(config)
    assert whole.codes == [0] and whole.steps == [[*range(1, STEPS + 1)]], (whole, config)
    arrays, history = arrays_of(whole.workdir), losses(whole.workdir)

    def killed(number: int) -> Run:
        chance, run = random.Random(f"{seed} {number}"), Run(place / f"kill{number}")
        for _ in range(chance.choice((1, 1, 2, 3))):
            moment = MOMENTS[(number + len(run.moments)) % len(MOMENTS)]
            run.moments.append(moment)
            run.resume(config, kill_at(moment, chance, run.workdir))
        run.resume(config)
        return run

    def terminated(number: int) -> Run:
        chance, run = random.Random(f"{seed} term {number}"), Run(place / f"term{number}", ["SIGTERM"])
        run.resume(config, terminate(chance))
        run.resume(config)
        return run

    with ThreadPoolExecutor(at_once) as pool:
        of_kill, of_term = (list(pool.map(work, range(n))) for work, n in ((killed, kills), (terminated, terms)))
    faults = {run.workdir.name: differences(run, arrays, history) for run in (*of_kill, *of_term)}
    for run in of_term:
        taken = [step for steps in run.steps for step in steps]
        if 143 in run.codes and taken != [*range(1, STEPS + 1)]:
            faults[run.workdir.name].append(f"steps taken by its processes: {run.steps}")
    codes = [code for run in of_kill for code in run.codes[:-1]]
    return {
        "killed runs": kills,
        "kills": codes.count(-signal.SIGKILL),
        "kills by moment": {name: sum(run.moments.count(name) for run in of_kill) for name in MOMENTS},
        "processes that ended before they were killed": len(codes) - codes.count(-signal.SIGKILL),
        "saves cut short": sum(run.cut_short for run in of_kill),
        "terminated runs": terms,
        "stopped by SIGTERM": sum(143 in run.codes for run in of_term),
        "bitwise equal": sum(not found for found in faults.values()),
        "faults": {name: found for name, found in faults.items() if found},
    }


def main() -> int:
    """Run the command and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--terms", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        result = soak(Path(place), kills=options.kills, terms=options.terms, seed=options.seed)
    print(json.dumps(result, indent=2))
    return 1 if result["faults"] else 0


if __name__ == "__main__":
    sys.exit(main())
