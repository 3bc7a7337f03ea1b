import re
from pathlib import Path

import pytest

from shampax.launch import main

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
FOLDERS = "launch|configs|framework|models|optimizers|examples|benchmarks|tests|docs"


def anchors(page):
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_and_files_exist(page):
    """Fault: a page names a file that has moved, or links to a heading that is gone."""
    text, broken = page.read_text(), []
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, anchor = link.partition("#")
        target = (page.parent / path) if path else page
        if "://" not in link and (not target.exists() or (anchor and anchor not in anchors(target))):
            broken.append(link)
    for path in re.findall(rf"`((?:{FOLDERS})/[\w/.-]*\w(?:\.\w+)?/?)[:`]", text):
        if not (ROOT / path).exists():
            broken.append(path)
    for module in re.findall(r"python -m shampax\.([\w.]+)", text):
        if not (ROOT / (module.replace(".", "/") + ".py")).exists():
            broken.append(module)
    for verb in re.findall(r"\bshampax ((?!VERB)[a-z]+) (?:-|\[|[A-Z])", text):
        if verb not in main.VERBS:
            broken.append(verb)
    assert broken == []
