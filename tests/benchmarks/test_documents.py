import pytest

from shampax.benchmarks.documents import Section, table
from shampax.framework.errors import UserError


def test_only_the_section_is_replaced():
    """Fault: the rest of a document is lost, or content is written where nobody asked for it."""
    section = Section("grid")
    begin, end = "<!-- grid begin -->", "<!-- grid end -->"
    old = f"before\n{begin}\nold\n{end}\nafter\n"
    new = section.replace(old, "table\n")
    assert new == f"before\n{begin}\ntable\n{end}\nafter\n"
    assert section.replace(new, "table\n") == new
    for wrong in ("", begin, f"{end}{begin}", old + old):
        with pytest.raises(UserError, match="add them"):
            section.replace(wrong, "table\n")


def test_a_table_is_markdown():
    """Fault: a heading line that Markdown does not take for one."""
    assert table(["a", "b"], [["1", "2"]]) == "| a | b |\n| --- | --- |\n| 1 | 2 |"
