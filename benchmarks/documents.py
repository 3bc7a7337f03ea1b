"""Tables in Markdown, and the section of a document that a benchmark rewrites."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from ..framework.base.errors import UserError


class Section:
    """What stands between the lines `<!-- NAME begin -->` and `<!-- NAME end -->` of a document."""

    def __init__(self, name: str):
        self.begin, self.end = f"<!-- {name} begin -->", f"<!-- {name} end -->"

    def replace(self, document: str, content: str) -> str:
        """The document with other content in the section.

        Raises:
          UserError: it does not hold each of the two lines once, in order.
        """
        begin, end = self.begin, self.end
        if document.count(begin) != 1 or document.count(end) != 1 or document.index(begin) > document.index(end):
            raise UserError(f"the --markdown file must hold the lines {begin} and {end}, each once; add them")
        before, rest = document.split(begin)
        return f"{before}{begin}\n{content}{end}{rest.split(end)[1]}"


def write(path: Path, contents: Mapping[Section, str]) -> None:
    """Put contents into their sections of a file: all of them or, where one is refused, none.

    Raises:
      UserError: there is no such file, or it lacks a section.
    """
    if not path.is_file():
        lines = " and ".join(f"{section.begin} {section.end}" for section in contents)
        raise UserError(f"there is no {path}; make it with the lines {lines}")
    document = path.read_text()
    for section, content in contents.items():
        document = section.replace(document, content)
    path.write_text(document)


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Rows of ready text under their headings."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
