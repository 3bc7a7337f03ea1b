import pytest

from shampax.benchmarks.documents import Section, table, write
from shampax.framework.base.errors import UserError


def test_only_the_section_is_replaced():
    """Fault: the rest of a document is lost, or content is written outside its section."""
    section = Section("grid")
    begin, end = "<!-- grid begin -->", "<!-- grid end -->"
    old = f"before\n{begin}\nold\n{end}\nafter\n"
    new = section.replace(old, "table\n")
    assert new == f"before\n{begin}\ntable\n{end}\nafter\n"
    assert section.replace(new, "table\n") == new
    for wrong in ("", begin, f"{end}{begin}", old + old):
        with pytest.raises(UserError, match="Add them"):
            section.replace(wrong, "table\n")


def test_all_sections_are_written_or_none(tmp_path):
    """Fault: the file lacks a section, and only the others are updated."""
    first, second = Section("first"), Section("second")
    path = tmp_path / "results.md"
    path.write_text(f"{first.begin}\nold\n{first.end}\n")
    with pytest.raises(UserError, match="second begin"):
        write(path, {first: "new\n", second: "new\n"})
    assert "old" in path.read_text()
    write(path, {first: "new\n"})
    assert path.read_text() == f"{first.begin}\nnew\n{first.end}\n"
    with pytest.raises(UserError, match="does not exist"):
        write(tmp_path / "none.md", {first: "new\n"})


def test_a_table_is_markdown():
    """Fault: Markdown does not recognise the heading."""
    assert table(["a", "b"], [["1", "2"]]) == "| a | b |\n| --- | --- |\n| 1 | 2 |"
