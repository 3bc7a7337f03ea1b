"""The report in a real browser: no error, every control works, it fits a phone, and it opens fast."""

import pathlib
import time

import chromium
import numpy as np
import pytest

from shampax.framework.reporting.page import page
from shampax.framework.reporting.runs import LAYER_METRICS, Layers, Points, Run

pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(chromium.missing()), reason=chromium.missing())]
STEPS, RUNS, LAYERS = 100_000, 10, 40


def a_long_run(number):
    """Return a run of 100,000 measured steps, 20 measurements each."""
    draw = np.random.default_rng(number)
    step = np.arange(1.0, STEPS + 1)
    every, tenth = np.arange(STEPS, dtype=np.int32), np.arange(999, STEPS, 1000, dtype=np.int32)
    loss = 2 + number / 10 + 5 * step**-0.2
    columns = {
        f"train/{name}": (every, loss * draw.uniform(0.9, 1.1, STEPS)) for name in ("loss", "gradient_norm", "a", "b")
    }
    columns |= {
        f"throughput/{name}": (every, draw.uniform(9, 11, STEPS)) for name in ("tokens_per_second", "c", "d", "e")
    }
    columns |= {
        f"optimizer/8x8/{name}": (every, draw.uniform(1, 2, STEPS)) for name in ("residual", "failures", "f", "g")
    }
    columns |= {"heldout/loss": (tenth, loss[tenth]), "train/skipped": (every, 0 * step)}
    values = {name: draw.uniform(1, 1e4, (LAYERS, 200)) for name in LAYER_METRICS[:-1]} | {
        "fallbacks": np.zeros((LAYERS, 200))
    }
    layers = Layers(tuple(f"layers/mlp/up/kernel {i}" for i in range(LAYERS)), np.linspace(1, STEPS, 200), values)
    config = {"rate": number, "data": {"source": "x" * 200}}
    result = {"steps": STEPS, "seconds": STEPS / 2, "stopped": None}
    points = Points({"step": step, "seconds": step / 2, "tokens": 1000 * step}, columns)
    return Run(pathlib.Path(f"/runs/run{number}"), points, config, result, layers=layers)


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    path = tmp_path_factory.mktemp("report") / "index.html"
    path.write_text(page([a_long_run(number) for number in range(RUNS)]), encoding="utf-8")
    return path.as_uri()


@pytest.fixture(scope="module")
def opened():
    with chromium.browser() as found:
        yield found


@pytest.fixture
def tab(opened, request):
    """Open a tab, of a phone if asked, and check that the page logs nothing and asks for no other file."""
    phone = {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True}
    found = opened.new_page(
        **(phone if getattr(request, "param", "") == "phone" else {"viewport": {"width": 1280, "height": 900}})
    )
    said, asked = [], []
    found.on("console", lambda message: said.append(message.text))
    found.on("pageerror", lambda error: said.append(str(error)))
    found.on("request", lambda request: asked.append(request.url))
    yield found
    found.close()
    assert said == [] and len(set(asked)) == 1


LOSS = "document.querySelector('#learning .plot')"


def ready(tab, address):
    """Open the page and scroll to the first plot, which is drawn when it comes into sight."""
    tab.goto(address)
    in_sight(tab)


def in_sight(tab):
    tab.evaluate(f"{LOSS}.scrollIntoView({{block: 'center'}})")
    tab.wait_for_selector("#learning .js-plotly-plot .scatterlayer .trace", state="attached")


def test_ten_runs_of_100_000_steps_open_within_two_seconds(tab, address):
    """Fault: points are not thinned, or all panels are drawn at once. The best of five: the machine may be busy."""
    seconds = [np.inf]
    while min(seconds) >= 2 and len(seconds) <= 5:
        begun = time.monotonic()
        ready(tab, address)
        seconds.append(time.monotonic() - begun)
    print(f"opened in {min(seconds):.2f} s")
    assert min(seconds) < 2


def test_controls_change_what_is_drawn(tab, address):
    """Fault: a control does nothing, or breaks another one."""
    ready(tab, address)

    def now(expression):
        return tab.evaluate(f"{LOSS}.{expression}")

    assert now("layout.xaxis.title.text") == "steps" and now("layout.yaxis.type") != "log"
    tab.select_option("select[name=axis]", "seconds")
    assert now("layout.xaxis.title.text") == "hours"
    tab.select_option("select[name=axis]", "tokens")
    assert now("layout.xaxis.title.text") == "tokens"
    tab.check("input[name=logx]")
    assert now("layout.xaxis.type") == "log"
    tab.select_option("select[name=y]", "log")
    assert now("layout.yaxis.type") == "log"
    before = now("data.length")
    tab.locator("input[name=smooth]").fill("0.9")
    assert now("data.length") == before + RUNS
    for chip in tab.locator("#chips button").all()[1:]:
        chip.click()
    assert {name for name in now("data.map((each) => each.name || '')") if name} == {
        "run0 (training)",
        "run0 (held-out)",
    }
    tab.reload()  # as --watch does: the reader's choice stays
    in_sight(tab)
    assert now("layout.xaxis.title.text") == "tokens" and tab.locator("#chips [aria-pressed=true]").count() == 1


def test_hover_zoom_themes_and_layers(tab, address):
    """Faults: no number under the pointer; no zoom; colours of the other theme; maps of another run."""
    ready(tab, address)
    for chip in tab.locator("#chips button").all()[2:]:  # of few lines, the pointer shows all values at a step
        chip.click()
    in_sight(tab)
    box = tab.locator("#learning .plot").first.locator(".nsewdrag").first.bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    tab.mouse.move(x, y)
    tab.mouse.move(x + 5, y)
    tab.wait_for_selector("#learning .hoverlayer .hovertext, #learning .hoverlayer .legend", state="attached")
    tab.mouse.move(x, y)
    tab.mouse.down()
    tab.mouse.move(x + 200, y + 5, steps=4)
    tab.mouse.up()
    tab.wait_for_selector("[data-zoomed]", state="attached")
    least, most = tab.evaluate(f"{LOSS}.layout.xaxis.range")
    assert most - least < STEPS / 2
    tab.mouse.dblclick(x, y)
    tab.wait_for_selector("[data-zoomed]", state="detached")
    light = tab.evaluate(f"{LOSS}.layout.font.color")
    tab.emulate_media(color_scheme="dark")
    tab.wait_for_function(f"{LOSS}.layout.font.color !== '{light}'")
    tab.locator("#maps .plot").first.scroll_into_view_if_needed()
    tab.wait_for_selector("#maps .heatmaplayer image", state="attached")
    assert tab.locator("#maps .panel").count() == 4 and "No fallbacks" in tab.inner_text("#maps")
    drawn = "document.querySelector('#maps .plot').data[0].customdata[0][0]"
    before = tab.evaluate(drawn)
    tab.select_option("#layers-of", "3")
    tab.wait_for_function(f"document.querySelector('#maps .plot').data && {drawn} !== {before}")


@pytest.mark.parametrize("tab", ["phone"], indirect=True)
def test_a_phone_needs_no_horizontal_scroll(tab, address):
    """Fault: a table, a long value or a plot is wider than the screen."""
    ready(tab, address)
    tab.evaluate("for (const each of document.querySelectorAll('details')) each.open = true")
    for _ in range(12):
        tab.mouse.wheel(0, 3000)
        tab.wait_for_timeout(30)
    assert tab.evaluate("document.documentElement.scrollWidth") == 390
    assert tab.evaluate(f"{LOSS}.layout.dragmode") is False  # a finger scrolls
    tab.check("input[name=zoom]")
    tab.locator("#learning .plot").first.scroll_into_view_if_needed()
    tab.wait_for_function(f"{LOSS}.layout.dragmode === 'zoom'")
    config = tab.locator("#about > details").first
    config.locator("input[type=search]").fill("rate")
    assert config.locator("tr:visible").filter(has_text="data.source").count() == 0
