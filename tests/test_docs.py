import functools
import importlib
import inspect
import re
import runpy
import shlex
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from shampax import optimizers
from shampax.framework.config import check, overrides
from shampax.launch import main
from shampax.optimizers import baselines

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


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_commands_name_configs_and_knobs_that_exist(page, monkeypatch):
    """Faults: a knob or a variant has been renamed, or a value is refused, and a page still shows the old command."""
    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(ROOT)
    text = page.read_text().replace("\\\n", "")
    for spec, flags in re.findall(r"--config=((?:shampax/)?[a-z][\w./]*:?[a-z]\w+|examples/\S+)(.*)", text):
        keys = {*re.findall(r"--config\.([\w.]+)=", flags), *re.findall(r"(?:--over|--change) '?([\w.]+)=", flags)}
        known = dict(overrides.flat(configured(spec)))
        for key in keys - {"KEY"}:
            assert key in known, f"{spec}: {key}"
        set_to = re.findall(r"""--config\.([\w.]+=(?:'[^']*'|"[^"]*"|[^\s`]+))""", flags)
        values = [shlex.split(each)[0] for each in set_to if not re.search(r"=[A-Z]+$", each)]  # rate=RATE
        assert configured(spec, *values)


@functools.cache
def configured(spec, *changes):
    return check.load(spec, changes)


def public():
    """Yield import path and object of each name that users may import."""
    lists = {
        "optimizers": optimizers.__all__,
        "optimizers.roots": ("RootResult", "inverse_pth_root"),
        "optimizers.baselines": [name for name in vars(baselines) if re.fullmatch("(?!Shampoo).*Options", name)],
        "configs.base": ("component", "get_config"),
        "framework.train": ("train",),
        "framework.base.errors": ("TrainingStopped", "UserError"),
        "framework.dataset": ("Codec",),
        "models.linen_task": ("LinenTask",),
        "models.nnx_task": ("NNXTask",),
    }
    for module, names in lists.items():
        for name in names:
            yield f"shampax.{module}.{name}", getattr(importlib.import_module(f"shampax.{module}"), name)
    for module in ("task", "dataset", "optimizer"):
        for name, each in vars(importlib.import_module(f"shampax.framework.{module}")).items():
            if getattr(each, "_is_protocol", False) and each.__module__ == f"shampax.framework.{module}":
                yield f"{each.__module__}.{name}", each


def lacks(function, text):
    """Return what the documentation of a function does not tell: parameters, unless there is one, and errors."""
    parameters = [name for name in inspect.signature(function).parameters if name not in ("self", "cls")]
    missing = [name for name in parameters if len(parameters) > 1 and not re.search(rf"\b{name}\b", text)]
    raises = re.search(r"^ +raise \w+\(", inspect.getsource(function), re.MULTILINE) and "Raises:" not in text
    return missing + ["Raises"] * bool(raises) + ["text"] * (not function.__doc__)


def test_the_reference_has_every_public_name():
    """Faults: a name that users may import is not in the reference; its documentation omits a parameter or an error."""
    reference = (ROOT / "docs" / "reference.md").read_text()
    for path, each in public():
        assert f"::: {path}\n" in reference, path
        assert each.__doc__, path
        if inspect.isfunction(each):
            assert lacks(each, each.__doc__) == [], path
        elif getattr(each, "_is_protocol", False) or each is optimizers.DistributedShampoo:
            for name, method in vars(each).items():
                if inspect.isfunction(method) and not name.startswith("_"):
                    assert lacks(method, method.__doc__ or "") == [], f"{path}.{name}"
    assert re.findall(r"^\| `(\w+)` \|", reference, re.MULTILINE) == list(main.VERBS)
    named = re.findall(r"^::: shampax\.([\w.]+)\.(\w+)$", reference, re.MULTILINE)
    assert all(hasattr(importlib.import_module(f"shampax.{module}"), name) for module, name in named)


def test_the_list_of_errors_has_every_message():
    """Fault: a message is built in a way that the page does not follow, so that users do not find it."""
    errors = runpy.run_path(str(ROOT / "docs" / "errors.py"))
    rooms = dict(errors["by_room"]())
    assert sum(map(len, rooms.values())) > 300
    assert "config.batch_size={batch_size}: must be divisible by {by}. Use {fix}." in rooms["framework/sharding"]
    assert "{path} has no variant {variant}. Did you mean {name}?" in rooms["framework/config"]
    assert errors["halves"]("--jobs={jobs}: must be at least 1.") == ("--jobs={jobs}:", "must be at least 1.")
    assert errors["halves"]("{path} has no weights. Use others, e.g. x.") == (
        "{path} has no weights.",
        "Use others, e.g. x.",
    )


def test_every_page_has_a_place_in_the_site():
    """Fault: `make docs` refuses a new page that mkdocs.yml does not name, or readers cannot find it."""
    nav = (ROOT / "mkdocs.yml").read_text().partition("\nnav:")[2]
    pages = [page.relative_to(ROOT / "docs").as_posix() for page in (ROOT / "docs").rglob("*.md")]
    assert [page for page in pages if not re.search(rf"[ ]{page}$", nav, re.MULTILINE)] == []


def test_the_first_screen_of_the_readme_is_short():
    """Fault: what shampax is, what it costs and how to begin do not fit on one screen."""
    first = (ROOT / "README.md").read_text().partition("\n## ")[0]
    assert first.count("\n") <= 60
    assert "make train" in first and "optimizers_loss.png" in first


@pytest.mark.slow
@pytest.mark.parametrize("page", ["adamw.md", "coming_from.md", "your_optimizer.md"])
def test_python_of_the_pages_runs(page):
    """Fault: a reader copies a program that does not run, or that does not train."""
    names = {}
    for block in re.findall(r"^```python\n(.*?)^```", (ROOT / "docs" / page).read_text(), re.DOTALL | re.MULTILINE):
        exec(compile(block, page, "exec"), names)
    if page == "adamw.md":
        params = names["params"]
        before, after = (float(names["loss"](each)) for each in (jax.tree.map(jnp.zeros_like, params), params))
        assert after < before and len(jax.tree.leaves(params)[0].sharding.device_set) == jax.device_count()
