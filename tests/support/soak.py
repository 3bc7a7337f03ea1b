"""Kill runs at random moments, resume them, and compare them bit for bit with an undisturbed run.

    python tests/support/soak.py --kills=50 --terms=50

Every run is the real command, in one process or in two, with a checkpoint every third step. Its optimizer is AdamW, or
Shampoo with staggered refreshes or with roots on the host, which are in flight at almost every step. A process of a
killed run gets SIGKILL, at a random moment of its training, of its whole life including start-up, or of writing a
checkpoint. That happens two to five times, then the run resumes to the end. A terminated run gets SIGTERM and must not
repeat any step. Prints JSON; exits with 1 if any run ends differently from the undisturbed one of its kind.
"""

import argparse
import contextlib
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
from processes import free_port

STEPS = 90
HERE = Path(__file__).resolve().parent
# Import path of the processes: the package, this folder and the toy tasks.
SEARCHED = [str(HERE), str(HERE / "toys"), *sys.path]
CONFIG = """
from shampax.configs import base

OPTIMIZERS = {
    "adamw": base.component(base.ADAMW),
    "staggered": base.component(base.SHAMPOO, block_size=8, interval=4, early_intervals=()),
    "host": base.component(base.SHAMPOO, block_size=8, interval=4, refresh="host", delay=2),
}

def get_config(arg):
    config = base.get_config()
    config.task = base.component("toy:ToyTask", nan_steps=(7, 40))
    config.data = base.component("slow_toy:SlowData")
    config.optimizer = OPTIMIZERS[arg]
    config.duration = "STEPS steps"
    config.batch_size = 8
    config.evaluation.every = "20 steps"
    config.checkpoint.every = "3 steps"
    config.log.every = "1 steps"
    config.processes.waiting_seconds = 60.0  # for a process that was killed before it connected
    return config
"""
HUNG = 1000  # in place of the exit code of a process that does not end
MOMENTS = ("saving", "training", "life")
# (optimizer, processes), in the order in which runs take them
KINDS = [("host", 1), ("adamw", 2), ("staggered", 1), ("host", 2), ("adamw", 1), ("staggered", 2)]


@dataclasses.dataclass
class Run:
    """One run: its kind, its workdir, and what became of it."""

    kind: tuple[str, int]
    workdir: Path
    moments: list[str] = dataclasses.field(default_factory=list)
    codes: list[list[int]] = dataclasses.field(default_factory=list)  # of the processes of each start
    steps: list[list[int]] = dataclasses.field(default_factory=list)  # reported by each start
    cut_short: int = 0  # saves that a kill interrupted

    def resume(self, config: Path, disturb=None) -> None:
        """Start the run's processes, disturb one or none, and wait until all have ended."""
        optimizer, count = self.kind
        logs = [self.workdir.with_suffix(f".{len(self.codes)}.{index}.log") for index in range(count)]
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(SEARCHED),
            "PYTHONUNBUFFERED": "1",
            "PYTHONFAULTHANDLER": "1",
            "JAX_PLATFORMS": "cpu",
            "JAX_NUM_CPU_DEVICES": str(2 // count),
            "NPROC": "32",
            "JAX_COMPILATION_CACHE_DIR": str(config.parent / f"programs{count}"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
        if count > 1:
            environment |= {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{free_port()}", "JAX_NUM_PROCESSES": str(count)}
        command = [sys.executable, "-m", "shampax.launch.train", f"--config={config}:{optimizer}"]
        processes = []
        try:
            for index, log in enumerate(logs):
                with log.open("w") as out:
                    own = environment | ({"JAX_PROCESS_ID": str(index)} if count > 1 else {})
                    whole = [*command, f"--workdir={self.workdir}"]
                    processes.append(subprocess.Popen(whole, env=own, stdout=out, stderr=subprocess.STDOUT))
            if disturb is not None:
                disturb(processes, logs[0])
            self.codes.append([ended(process) for process in processes])
        finally:
            for process in processes:
                process.kill()
                process.wait()
        saves = self.workdir / "checkpoints"
        self.cut_short += any(not [*path.glob("SHA256SUMS-*")] for path in saves.glob("*"))
        self.steps.append([int(step) for step in re.findall(r"^step +(\d+)/", logs[0].read_text(), re.M)])


def ended(process: subprocess.Popen, seconds: float = 900.0) -> int:
    """Return the exit code of a process. One that hangs is aborted, so that its log shows where its threads are."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        return process.wait(seconds)
    process.send_signal(signal.SIGABRT)
    process.wait(seconds)
    return HUNG


def kill_at(moment: str, chance: random.Random, workdir: Path):
    """Return a function that kills a random process of a run at a random moment of a kind."""

    def disturb(processes: list[subprocess.Popen], log: Path) -> None:
        process = chance.choice(processes)
        if moment != "life":
            wait_until(lambda: "first step done" in log.read_text() or process.poll() is not None)
            time.sleep(chance.uniform(0.0, 2.0))
        else:
            time.sleep(chance.uniform(0.0, 8.0))
        if moment == "saving":
            store = workdir / "checkpoints"
            wait_until(lambda: any("tmp" in path.name for path in store.glob("*")) or process.poll() is not None)
            time.sleep(chance.uniform(0.0, 0.03))
        process.send_signal(signal.SIGKILL)

    return disturb


def terminate(chance: random.Random):
    """Return a function that asks a random process of a run to stop at a random moment of its training."""

    def disturb(processes: list[subprocess.Popen], log: Path) -> None:
        process = chance.choice(processes)
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
    if any(HUNG in codes for codes in run.codes):
        return [f"a process hung; exit codes {run.codes}"]
    if any(run.codes[-1]):
        return [f"its last processes ended with {run.codes[-1]}"]
    mine = arrays_of(run.workdir)
    found = [f"{name} differs" for name in whole if mine[name].tobytes() != whole[name].tobytes()]
    return found + (["the history differs"] if losses(run.workdir) != history else [])


def losses(workdir: Path) -> list:
    """Return (step, loss) and (step, held-out loss), in the order of the history."""
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return [(line["step"], line.get("train/loss"), line.get("heldout/loss")) for line in lines]


def soak(place: Path, *, kills: int, terms: int, seed: int = 0, at_once: int = 2, each=(2, 3, 4, 5)) -> dict:
    """Make the runs in a directory and return their outcomes; a run is killed one of `each` times."""
    config = place / "soak_config.py"
    config.write_text(CONFIG.replace("STEPS", str(STEPS)))
    kind_of = {number: KINDS[number % len(KINDS)] for number in range(max(kills, terms))}
    undisturbed = {}

    def whole(kind: tuple[str, int]) -> None:
        run = Run(kind, place / f"whole-{kind[0]}-{kind[1]}")
        run.resume(config)
        assert run.codes == [[0] * kind[1]] and run.steps == [[*range(1, STEPS + 1)]], (run, config)
        undisturbed[kind] = arrays_of(run.workdir), losses(run.workdir)

    def checked(run: Run) -> list[str]:
        return differences(run, *undisturbed[run.kind])

    def killed(number: int) -> Run:
        chance, run = random.Random(f"{seed} {number}"), Run(kind_of[number], place / f"kill{number}")
        for _ in range(chance.choice(each)):
            moment = MOMENTS[(number // 2 + len(run.moments)) % len(MOMENTS)]
            run.moments.append(moment)
            run.resume(config, kill_at(moment, chance, run.workdir))
        run.resume(config)
        print(run.workdir.name, *run.kind, run.moments, run.codes, checked(run) or "equal", file=sys.stderr, flush=True)
        return run

    def terminated(number: int) -> Run:
        chance = random.Random(f"{seed} term {number}")
        run = Run(kind_of[number], place / f"term{number}", ["SIGTERM"])
        run.resume(config, terminate(chance))
        run.resume(config)
        return run

    with ThreadPoolExecutor(at_once) as pool:
        list(pool.map(whole, sorted(set(kind_of.values()))))
        of_kill, of_term = (list(pool.map(work, range(n))) for work, n in ((killed, kills), (terminated, terms)))
    faults = {run.workdir.name: checked(run) for run in (*of_kill, *of_term)}
    for run in of_term:
        taken = [step for steps in run.steps for step in steps]
        if 143 in run.codes[0] and taken != [*range(1, STEPS + 1)]:
            faults[run.workdir.name].append(f"steps taken by its processes: {run.steps}")
    got = [(run.kind, -signal.SIGKILL in codes) for run in of_kill for codes in run.codes[:-1]]
    return {
        "killed runs": kills,
        "kills": sum(hit for _, hit in got),
        "kills by kind": {f"{kind[0]}, {kind[1]} processes": got.count((kind, True)) for kind in KINDS},
        "kills by moment": {name: sum(run.moments.count(name) for run in of_kill) for name in MOMENTS},
        "starts that ended before they were killed": sum(not hit for _, hit in got),
        "exit codes of the other processes": sorted(
            {code for run in of_kill for codes in run.codes[:-1] for code in codes if code != -signal.SIGKILL}
        ),
        "saves cut short": sum(run.cut_short for run in of_kill),
        "terminated runs": terms,
        "stopped by SIGTERM": sum(143 in run.codes[0] for run in of_term),
        "bitwise equal": sum(not found for found in faults.values()),
        "faults": {name: found for name, found in faults.items() if found},
    }


def main() -> int:
    """Run the command and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50, help="runs that are killed, two to five times each")
    parser.add_argument("--terms", type=int, default=50, help="runs that are terminated")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--at_once", type=int, default=2)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        result = soak(Path(place), kills=options.kills, terms=options.terms, seed=options.seed, at_once=options.at_once)
    print(json.dumps(result, indent=2))
    return 1 if result["faults"] else 0


if __name__ == "__main__":
    sys.exit(main())
