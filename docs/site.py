"""Make the pages of the site that are not in docs/, and the links to them. mkdocs calls these functions.

README.md, CONTRIBUTING.md and CHANGELOG.md become pages. A file of the repository that a page links to becomes a page
that shows its text. All error messages become a page.
"""

import posixpath
import re
import runpy
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[1]
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "docs/errors.py": "errors.md",
}
LINK = re.compile(r"\]\(([^)\s#:]+)(#[^)\s]*)?\)")


def on_files(files, config):
    """Add the pages."""
    errors = runpy.run_path(str(ROOT / "docs" / "errors.py"))
    texts = {of: (ROOT / path).read_text() for path, of in PAGES.items()} | {"errors.md": errors["page"]()}
    for page in files.documentation_pages():
        texts[page.src_uri] = page.content_string
    shown = {_target(page, link) for page, text in texts.items() for link, _ in LINK.findall(text)}
    for path in [path for path in shown if (ROOT / path).is_dir()]:
        shown |= {f"{path}/{inside.name}" for inside in (ROOT / path).glob("*.py")}
    texts |= {_page(path): _source(path) for path in shown if _page(path).startswith("source/")}
    for page, text in texts.items():
        if files.get_file_from_path(page) is None:
            files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown, page, config, files):
    """Point links to files of the repository to their pages."""
    here = page.file.src_uri

    def link(match):
        to = _page(_target(here, match[1]))
        return f"]({posixpath.relpath(to, posixpath.dirname(here) or '.')}{match[2] or ''})"

    return LINK.sub(link, markdown)


def _target(page, link):
    """Return the path in the repository to which a page links."""
    origin = {of: path for path, of in PAGES.items()}.get(page, f"docs/{page}")
    return posixpath.normpath(posixpath.join(posixpath.dirname(origin), link))


def _page(path):
    """Return the page or file of the site for a path in the repository."""
    if path.startswith("docs/") and path not in PAGES:
        return path.removeprefix("docs/")
    return PAGES.get(path, f"source/{path}.md")


def _source(path):
    """Return a page with the text of a file, or with links to the Python files of a folder."""
    file = ROOT / path
    title = f"---\nsearch:\n  exclude: true\n---\n\n# {path}\n\n"
    if file.is_dir():
        return title + "\n".join(
            f"- [{inside.name}]({file.name}/{inside.name}.md)" for inside in sorted(file.glob("*.py"))
        )
    language = {".py": "python", ".yaml": "yaml", ".sh": "sh", ".sbatch": "sh"}.get(file.suffix, "text")
    return f"{title}````{language}\n{file.read_text()}````\n"
