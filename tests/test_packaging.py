"""Check the lock, the list of packages, and a wheel installed in another folder."""

import os
import pathlib
import shutil
import subprocess
import sys
import tomllib
import zipfile

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = pathlib.Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
SOURCES = ("launch", "configs", "framework", "models", "optimizers", "benchmarks")
SAMPLE = "framework/data/samples/enwiki-106.txt.xz"
NOTICE = "framework/data/samples/LICENSES.md"


def locked():
    """Return every line of the lock as a requirement."""
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    return [Requirement(line) for line in lines if line and not line.lstrip().startswith("#")]


def run(*command, cwd, **environment):
    """Run a command that must succeed. Return its standard output."""
    done = subprocess.run(
        list(map(str, command)),
        cwd=cwd,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_lock_pins_everything_and_has_no_urls_or_paths():
    assert all([specifier.operator for specifier in pin.specifier] == ["=="] for pin in locked())
    text = (ROOT / "requirements.lock").read_text()
    for place in ("://", "--index-url", "--find-links", "file:", "/home", "/root", str(ROOT)):
        assert place not in text


def test_lock_satisfies_every_dependency():
    pins = {}
    for pin in locked():
        pins.setdefault(canonicalize_name(pin.name), []).append(next(iter(pin.specifier)).version)
    project = PROJECT["project"]
    for text in project["dependencies"] + project["optional-dependencies"]["dev"]:
        wanted = Requirement(text)
        if wanted.name == project["name"]:  # one of our own extras
            continue
        versions = pins.get(canonicalize_name(wanted.name), [])
        assert versions, f"{text} is not locked; run make lock"
        assert all(map(wanted.specifier.contains, versions)), f"{text} is locked at {versions}; run make lock"


def test_every_package_is_listed():
    found = {
        ".".join(["shampax", *path.parent.relative_to(ROOT).parts])
        for source in SOURCES
        for path in (ROOT / source).rglob("__init__.py")
    }
    assert found | {"shampax"} == set(PROJECT["tool"]["setuptools"]["packages"])


def test_every_folder_with_modules_is_a_package():
    folders = {path.parent for source in SOURCES for path in (ROOT / source).rglob("*.py")}
    assert [folder for folder in folders if not (folder / "__init__.py").exists()] == []


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Build a wheel without network from a copy of the sources, without files of earlier builds."""
    copy, wheels = tmp_path_factory.mktemp("copy"), tmp_path_factory.mktemp("wheels")
    ignore = shutil.ignore_patterns("__pycache__")
    for name in SOURCES:
        shutil.copytree(ROOT / name, copy / name, ignore=ignore)
    for name in ("__init__.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    pip = (sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-index", "--no-build-isolation")
    run(*pip, f"--wheel-dir={wheels}", ".", cwd=copy)
    (built,) = wheels.iterdir()
    return built


@pytest.mark.slow
def test_wheel_has_modules_samples_and_licences(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        assert archive.read(f"shampax/{SAMPLE}") == (ROOT / SAMPLE).read_bytes()
        licences = [name for name in names if ".dist-info/licenses/" in name]
        texts = {archive.read(name) for name in licences}
    assert {(ROOT / "LICENSE").read_bytes(), (ROOT / NOTICE).read_bytes()} <= texts
    modules = {str(path.relative_to(ROOT)) for source in SOURCES for path in (ROOT / source).rglob("*.py")}
    scripts = {str(path.relative_to(ROOT)) for path in (ROOT / "launch" / "clusters").iterdir() if path.is_file()}
    scripts.add("framework/reporting/page.html")
    assert {f"shampax/{file}" for file in modules | scripts} <= names
    assert not [name for name in names if "tests/" in name or name.startswith("shampax/shampax")]


@pytest.mark.slow
def test_installed_wheel_imports_from_another_folder(wheel, tmp_path):
    site, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    elsewhere.mkdir()
    # A wheel is a zip file of the contents of site-packages.
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    program = (
        "import importlib.resources, lzma, shampax, shampax.launch.report, shampax.optimizers.plan.patterns\n"
        "samples = importlib.resources.files('shampax.framework.data.samples')\n"
        "text = lzma.decompress((samples / 'enwiki-106.txt.xz').read_bytes()).decode()\n"
        "print(shampax.__file__, shampax.launch.report.__file__, len(text.split('\\n\\f')))"
    )
    front, report, documents = run(sys.executable, "-c", program, cwd=elsewhere, PYTHONPATH=str(site)).split()
    assert pathlib.Path(front) == site / "shampax" / "__init__.py"
    assert pathlib.Path(report).is_relative_to(site)
    assert int(documents) >= 106
