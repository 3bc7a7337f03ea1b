"""Format Markdown tables, and replace sections of a document."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from ..framework.base.errors import UserError


class Section:
    """The part of a document between the lines `<!-- NAME begin -->` and `<!-- NAME end -->`."""

    def __init__(self, name: str):
        self.begin, self.end = f"<!-- {name} begin -->", f"<!-- {name} end -->"

    def replace(self, document: str, content: str) -> str:
        """Return the document with new content in the section.

        Raises:
          UserError: the document does not have each of the two lines once, in order.
        """
        begin, end = self.begin, self.end
        if document.count(begin) != 1 or document.count(end) != 1 or document.index(begin) > document.index(end):
            raise UserError(f"--markdown: the file must have the lines {begin} and {end}, each once. Add them")
        before, rest = document.split(begin)
        return f"{before}{begin}\n{content}{end}{rest.split(end)[1]}"


def write(path: Path, contents: Mapping[Section, str]) -> None:
    """Write all sections of a file, or none if one is missing.

    Raises:
      UserError: the file does not exist or lacks a section.
    """
    if not path.is_file():
        lines = " and ".join(f"{section.begin} {section.end}" for section in contents)
        raise UserError(f"--markdown={path}: the file does not exist. Create it with the lines {lines}")
    document = path.read_text()
    for section, content in contents.items():
        document = section.replace(document, content)
    path.write_text(document)


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Format a Markdown table."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
