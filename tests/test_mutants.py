import ast
from pathlib import Path

import pytest
from mutants import MUTANTS

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("optimizers", "framework", "models", "launch", "configs")


def test_the_list_is_long_and_names_are_unique():
    """Faults: entries are deleted whenever code moves; two entries share a name."""
    assert len(MUTANTS) >= 60
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS)
    assert len({(mutant.file, mutant.before, mutant.after) for mutant in MUTANTS}) == len(MUTANTS)


@pytest.mark.parametrize("package", PACKAGES)
def test_every_package_has_faults(package):
    """Fault: no test of a package is checked against a fault."""
    assert any(mutant.file.startswith(f"{package}/") for mutant in MUTANTS)


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_fault_changes_one_place_and_can_be_parsed(mutant):
    """Faults: an entry matches nothing or two places because the code changed; the mutant is a syntax error."""
    text = (ROOT / mutant.file).read_text()
    assert text.count(mutant.before) == 1, f"{mutant.file} must have this exactly once: {mutant.before!r}"
    assert mutant.after != mutant.before
    ast.parse(text.replace(mutant.before, mutant.after))
    assert mutant.fault.endswith(".")


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_the_tests_of_a_fault_exist(mutant):
    """Fault: a test was renamed, and an entry selects no test."""
    assert mutant.tests
    for test in mutant.tests:
        file, _, function = test.partition("::")
        assert (ROOT / file).is_file(), f"{test}: there is no such file"
        assert not function or f"\ndef {function}(" in (ROOT / file).read_text(), f"{test}: the file has no such test"
