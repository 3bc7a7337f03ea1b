"""Put faults into copies of the tree, one at a time, and report which of them the tests notice.

    python tests/support/mutants.py [--only=PART] [--workers=N] [--fast] [--clean] [--json=FILE] [--programs=FOLDER]

The faults are those of `mutant_list`. Each runs its own tests: first those without the marker `slow`, and where these
pass, those with it. A fault is caught where a test fails, or does not end within five minutes. Prints a table and the
share that is caught. Exits with 1 if a fault is broken: its text is not in the file exactly once, no test is selected,
or pytest cannot run them. With --clean the tests run once without any fault, and must pass: one that fails anyway would
catch everything.
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
SHOWN = 25  # lines of a broken fault's output
# Exit codes of pytest, https://docs.pytest.org/en/stable/reference/exit-codes.html.
PASSED, FAILED, NOTHING_SELECTED = 0, 1, 5


class Outcome(NamedTuple):
    """What became of a fault.

    Attributes:
      name: of the fault.
      verdict: "caught", "caught (hung)", "survived" or "broken".
      tier: "fast" or "slow", where it is caught; else "".
      seconds: of all its tests together.
      told: by pytest: the test that failed where the fault is caught, the end of its output where it is broken.
    """

    name: str
    verdict: str
    tier: str
    seconds: float
    told: str = ""

    @property
    def caught(self) -> bool:
        """Whether a test has noticed it."""
        return self.verdict.startswith("caught")


class Copy:
    """A copy of the tree that a worker has for itself.

    Args:
      folder: an empty one. The copy is `folder/shampax`, so that `folder` in PYTHONPATH makes it the package.
      programs: where compiled programs are kept, for all workers.
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
        """The copy has the fault while entered.

        Raises:
          ValueError: the text that is to change does not occur exactly once.
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
        """Run tests: (exit code, None where time ran out; what pytest said)."""
        return self._run(["-m", "pytest", "-q", "-p", "no:cacheprovider", *options, *tests], timeout)

    def _run(self, arguments: Sequence[str], timeout: float | None = TIMEOUT) -> tuple[int | None, str]:
        # A file and no pipe: what a test leaves behind may hold a pipe open for as long as it lives.
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


_running: set[int] = set()  # leaders of sessions


def kill_session(leader: int) -> None:
    """Kill what is left of a process and of what it has started."""
    try:
        os.killpg(leader, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        return


def tracked() -> list[str]:
    """Files of the tree, new ones that git does not ignore among them."""
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split("\0")
    return [name for name in names if name and (ROOT / name).is_file()]


def judge(mutant: Mutant, copy: Copy, *, fast: bool) -> Outcome:
    """Run a fault's tests: those that are fast, and if they do not notice it, those that are slow."""
    begun, selected = time.perf_counter(), False

    def outcome(verdict: str, tier: str = "", told: str = "") -> Outcome:
        return Outcome(mutant.name, verdict, tier, round(time.perf_counter() - begun, 1), told)

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
                    return outcome("broken", told="\n".join(output.splitlines()[-SHOWN:]))
                selected |= code == PASSED
    except (OSError, ValueError) as error:
        return outcome("broken", told=str(error))
    return outcome("survived") if selected or fast else outcome("broken", told="no test is selected")


def run(mutants: Sequence[Mutant], *, workers: int, fast: bool, programs: Path) -> list[Outcome]:
    """Judge all, each in a copy that a worker has for itself; outcomes in the order of the faults."""
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
    """Run the tests of all faults without any, and print what pytest says; returns its exit code."""
    tests = sorted({test for mutant in mutants for test in mutant.tests})
    with tempfile.TemporaryDirectory() as folder:
        copy = Copy(Path(folder), programs)
        code, output = copy.test(tests, *(["-m", "not slow"] if fast else []), timeout=None)
    print(output)
    return FAILED if code is None else code


def line(outcome: Outcome) -> str:
    """One line of the table."""
    by = f"{outcome.verdict} by {outcome.tier} tests" if outcome.caught else outcome.verdict
    return f"{outcome.name:<42} {by:<28} {outcome.seconds:>6.1f} s"


def totals(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """How many are caught, in all and by the fast tier, and their shares in per cent."""
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
    """Run the command; see the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", action="append", metavar="PART", help="faults whose names contain this; may be given several times"
    )
    parser.add_argument("--workers", type=int, default=2, metavar="N", help="copies that are tested at a time (2)")
    parser.add_argument("--fast", action="store_true", help="run no slow tests")
    parser.add_argument("--clean", action="store_true", help="run the tests once without any fault")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the outcomes as JSON, too")
    parser.add_argument("--programs", type=Path, metavar="FOLDER", help="of compiled programs; by default temporary")
    options = parser.parse_args()
    chosen = [mutant for mutant in MUTANTS if any(part in mutant.name for part in options.only or [""])]
    if not chosen:
        parser.error(f"no fault has {' or '.join(options.only)} in its name")
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    with tempfile.TemporaryDirectory() as folder:
        programs = (options.programs or Path(folder)).absolute()
        if options.clean:
            return clean(chosen, fast=options.fast, programs=programs)
        outcomes = run(chosen, workers=max(options.workers, 1), fast=options.fast, programs=programs)
    for outcome in outcomes:
        print(line(outcome))
        if outcome.verdict == "broken":
            print("  " + outcome.told.replace("\n", "\n  "))
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
