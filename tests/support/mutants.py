"""Put faults into copies of the tree, one at a time, and report which ones the tests catch.

    python tests/support/mutants.py [--only=PART] [--workers=N] [--fast] [--clean] [--json=FILE] [--programs=FOLDER]

`mutant_list` has the faults. Each runs its own tests: first the fast ones and, if these pass, the slow ones. A fault is
caught if a test fails, or does not end within five minutes. Prints a table and the share of caught faults. Exits with 1
if a fault is broken: its text is not in the file exactly once, no test is selected, or pytest cannot run. With --clean
the tests run once without any fault and must pass, because a test that always fails would catch every fault.
"""

import argparse
import json
import os
import queue
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from mutant_list import MUTANTS, Mutant

__all__ = ["MUTANTS", "Mutant"]

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "shampax"
TIMEOUT = 300.0
SHOWN = 25  # lines of output shown of a broken fault
# Exit codes of pytest, https://docs.pytest.org/en/stable/reference/exit-codes.html.
PASSED, FAILED, NOTHING_SELECTED = 0, 1, 5


class Outcome(NamedTuple):
    """The outcome of a fault.

    Attributes:
      name: name of the fault.
      verdict: "caught", "caught (hung)", "survived" or "broken".
      tier: "fast" or "slow" if it is caught, else "".
      seconds: time of all its tests.
      detail: the test that failed if the fault is caught, the end of pytest's output if it is broken.
    """

    name: str
    verdict: str
    tier: str
    seconds: float
    detail: str = ""

    @property
    def caught(self) -> bool:
        """Whether a test has caught it."""
        return self.verdict.startswith("caught")


class Copy:
    """A copy of the tree for one worker.

    Args:
      folder: an empty folder. The copy is `folder/shampax`, so that `folder` in PYTHONPATH makes it the package.
      programs: folder of compiled programs, shared by all workers.
    """

    def __init__(self, folder: Path, programs: Path):
        self.path = folder / PACKAGE
        self._environment = {**os.environ, "PYTHONPATH": str(folder), "JAX_COMPILATION_CACHE_DIR": str(programs)}
        for name in tracked():
            target = self.path / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target)
        self._check()

    def _check(self) -> None:
        """Exit if Python would import another copy of the package, such as an installed one."""
        _, found = self._run(["-c", f"import {PACKAGE}; print({PACKAGE}.__file__)"])
        if Path(found.strip()).parent.resolve() != self.path.resolve():
            raise SystemExit(f"error: {self.path} is not what Python imports as {PACKAGE}: {found.strip()}")

    @contextmanager
    def with_fault(self, mutant: Mutant) -> Iterator[None]:
        """Put the fault into the copy while entered.

        Raises:
          ValueError: the text to change does not occur exactly once.
        """
        path = self.path / mutant.file
        text, stat = path.read_text(), path.stat()
        count = text.count(mutant.before)
        if count != 1:
            raise ValueError(f"{mutant.file} has the text to change {count} times, not once: {mutant.before!r}")
        path.write_text(text.replace(mutant.before, mutant.after))
        try:
            yield
        finally:
            path.write_text(text)
            os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))

    def test(self, tests: Sequence[str], *options: str, timeout: float | None = TIMEOUT) -> tuple[int | None, str]:
        """Run tests; return the exit code, or None after the time limit, and the output."""
        return self._run(["-m", "pytest", "-q", "-p", "no:cacheprovider", *options, *tests], timeout)

    def _run(self, arguments: Sequence[str], timeout: float | None = TIMEOUT) -> tuple[int | None, str]:
        # Use a file instead of a pipe: processes that a test leaves behind would hold the pipe open.
        with tempfile.TemporaryFile() as output:
            process = subprocess.Popen(
                [sys.executable, *arguments],
                cwd=self.path,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            _running.add(process.pid)
            code = None
            try:
                code = process.wait(timeout)
            except subprocess.TimeoutExpired:
                pass
            finally:
                kill_session(process.pid)
                process.wait()
                _running.discard(process.pid)
            output.seek(0)
            return code, output.read().decode(errors="replace")


_running: set[int] = set()  # session leaders


def kill_session(leader: int) -> None:
    """Kill the processes of a session."""
    try:
        os.killpg(leader, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        return


def tracked() -> list[str]:
    """Return the files of the tree, including new ones that git does not ignore."""
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split("\0")
    return [name for name in names if name and (ROOT / name).is_file()]


def judge(mutant: Mutant, copy: Copy, *, fast: bool) -> Outcome:
    """Run the fast tests of a fault and, if they pass, its slow tests."""
    begun, selected = time.perf_counter(), False

    def outcome(verdict: str, tier: str = "", detail: str = "") -> Outcome:
        return Outcome(mutant.name, verdict, tier, round(time.perf_counter() - begun, 1), detail)

    try:
        with copy.with_fault(mutant):
            for tier, marker in (("fast", "not slow"), ("slow", "slow")):
                if fast and tier == "slow":
                    break
                code, output = copy.test(mutant.tests, "-x", "-m", marker)
                if code is None:
                    return outcome("caught (hung)", tier)
                if code == FAILED:
                    failed = [each for each in output.splitlines() if each.startswith(("FAILED", "ERROR"))]
                    return outcome("caught", tier, *failed[:1])
                if code not in (PASSED, NOTHING_SELECTED):
                    return outcome("broken", detail="\n".join(output.splitlines()[-SHOWN:]))
                selected |= code == PASSED
    except (OSError, ValueError) as error:
        return outcome("broken", detail=str(error))
    return outcome("survived") if selected or fast else outcome("broken", detail="no test is selected")


def run(mutants: Sequence[Mutant], *, workers: int, fast: bool, programs: Path) -> list[Outcome]:
    """Judge all faults, each in a worker's own copy; return the outcomes in the order of the faults."""
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(workers) as pool:
        copies: queue.SimpleQueue[Copy] = queue.SimpleQueue()
        for number in range(workers):
            copies.put(Copy(Path(folder) / str(number), programs))

        def work(mutant: Mutant) -> Outcome:
            copy = copies.get()
            try:
                return judge(mutant, copy, fast=fast)
            finally:
                copies.put(copy)

        futures = [pool.submit(work, mutant) for mutant in mutants]
        try:
            for number, future in enumerate(as_completed(futures), start=1):
                found = future.result()
                print(f"{number}/{len(mutants)} {line(found)}", file=sys.stderr, flush=True)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for leader in [*_running]:
                kill_session(leader)
            raise
        return [future.result() for future in futures]


def clean(mutants: Sequence[Mutant], *, fast: bool, programs: Path) -> int:
    """Run the tests of all faults without any fault, print the output, and return the exit code."""
    tests = sorted({test for mutant in mutants for test in mutant.tests})
    with tempfile.TemporaryDirectory() as folder:
        copy = Copy(Path(folder), programs)
        code, output = copy.test(tests, *(["-m", "not slow"] if fast else []), timeout=None)
    print(output)
    return FAILED if code is None else code


def line(outcome: Outcome) -> str:
    """Return a line of the table."""
    by = f"{outcome.verdict} by {outcome.tier} tests" if outcome.caught else outcome.verdict
    return f"{outcome.name:<42} {by:<28} {outcome.seconds:>6.1f} s"


def totals(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Return numbers and percentages of caught faults, in total and by the fast tier."""
    count = len(outcomes)
    caught = sum(outcome.caught for outcome in outcomes)
    by_fast = sum(outcome.caught and outcome.tier == "fast" for outcome in outcomes)
    return {
        "mutants": count,
        "caught": caught,
        "caught_percent": round(100 * caught / max(count, 1), 1),
        "caught_by_fast": by_fast,
        "caught_by_fast_percent": round(100 * by_fast / max(count, 1), 1),
        "survived": sum(outcome.verdict == "survived" for outcome in outcomes),
        "broken": sum(outcome.verdict == "broken" for outcome in outcomes),
        "seconds": round(sum(outcome.seconds for outcome in outcomes), 1),
    }


def main() -> int:
    """Run the command and return its exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", action="append", metavar="PART", help="run only faults whose names contain this; can be repeated"
    )
    parser.add_argument("--workers", type=int, default=2, metavar="N", help="number of copies to test at a time (2)")
    parser.add_argument("--fast", action="store_true", help="run no slow tests")
    parser.add_argument("--clean", action="store_true", help="run the tests once without any fault")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the outcomes as JSON")
    parser.add_argument(
        "--programs", type=Path, metavar="FOLDER", help="folder of compiled programs; temporary by default"
    )
    options = parser.parse_args()
    chosen = [mutant for mutant in MUTANTS if any(part in mutant.name for part in options.only or [""])]
    if not chosen:
        parser.error(f"--only: no fault has {' or '.join(options.only)} in its name")
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    with tempfile.TemporaryDirectory() as folder:
        programs = (options.programs or Path(folder)).absolute()
        if options.clean:
            return clean(chosen, fast=options.fast, programs=programs)
        outcomes = run(chosen, workers=max(options.workers, 1), fast=options.fast, programs=programs)
    for outcome in outcomes:
        print(line(outcome))
        if outcome.verdict == "broken":
            print("  " + outcome.detail.replace("\n", "\n  "))
    found = totals(outcomes)
    print(
        f"\n{found['caught']} of {found['mutants']} caught ({found['caught_percent']} %), "
        f"{found['caught_by_fast']} by the fast tier ({found['caught_by_fast_percent']} %); "
        f"{found['survived']} survived, {found['broken']} broken"
    )
    if options.json:
        options.json.write_text(json.dumps(found | {"outcomes": [x._asdict() for x in outcomes]}, indent=2) + "\n")
    return 1 if found["broken"] else 0


if __name__ == "__main__":
    sys.exit(main())
