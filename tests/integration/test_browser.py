"""The dashboard and the report in a real browser: drawn, quiet, self-contained, accessible, readable on a phone, live."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from fffsweep.dashboards.queries import load_study
from fffsweep.dashboards.report import write_report
from fffsweep.sweeps.record import study_folder

axe = pytest.importorskip("axe_playwright_python.sync_playwright")

pytestmark = [pytest.mark.browser, pytest.mark.integration]

EVIL = "<script>alert(document.title)</script>"
WIDTHS = {"desk": 1280, "phone": 390}
PAGES = ("study", "pareto", "depth", "training", "compare", "trial")


def load_generator():
    path = Path(__file__).parents[1] / "dashboards" / "generated.py"
    spec = importlib.util.spec_from_file_location("generated_studies", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def generated():
    return load_generator()


@pytest.fixture(scope="module")
def results(tmp_path_factory, generated):
    folder = tmp_path_factory.mktemp("results")
    generated.generate(folder, "small")
    few = {"replicates": 2, "tasks": ("stsb",), "finetunings": 1, "steps": 10, "points": ((128, "cold"),)}
    generated.generate(folder, "thousand", layouts=generated.many_layouts(998), controls=("reference_dense(512)", "none"), **few)
    generated.generate(folder, EVIL, layouts=("512x0", "1x8"), controls=("reference_dense(512)",), replicates=2)
    return folder


@contextlib.contextmanager
def serving(results):
    """Address of a dashboard over `results`, served by another process."""
    code = "import sys; from pathlib import Path; from fffsweep.dashboards.app import serve; serve(Path(sys.argv[1]), None, port=0)"
    process = subprocess.Popen([sys.executable, "-c", code, str(results)], stdout=subprocess.PIPE, text=True)
    try:
        line = process.stdout.readline()
        assert line.startswith("dashboard: http://localhost:"), line
        yield line.split()[1].rstrip("/")
    finally:
        process.terminate()
        process.wait(20)


@pytest.fixture(scope="module")
def address(results):
    with serving(results) as found:
        yield found


def settled(page):
    if page.locator("[data-figure]").count():
        page.locator("html[data-figures=drawn]").wait_for(state="attached", timeout=60_000)


def violations(page):
    """What axe finds wrong, one line for each."""
    found = axe.Axe().run(page).response["violations"]
    return [f"{each['id']}: {each['help']}: {[node['target'] for node in each['nodes'][:3]]}" for each in found]


def query(page, study):
    trials = {"trial": "&trial=1x8", "compare": "&trial=512x0&trial=1x8&trial=none"}
    if study == "thousand":
        trials = {"trial": "&trial=3x8", "compare": "&trial=1x0&trial=3x8&trial=none"}
    return f"/{page}?study={study}{trials.get(page, '')}"


@pytest.mark.parametrize("screen", WIDTHS)
@pytest.mark.parametrize("study", ["small", "thousand"])
@pytest.mark.parametrize("name", ["", *PAGES])
def test_page(visit, address, screen, study, name):
    page = visit(screen)
    page.goto(address + (query(name, study) if name else "/"))
    settled(page)
    width = WIDTHS[screen]
    assert page.evaluate("document.documentElement.scrollWidth") <= width, "the page scrolls sideways"
    assert page.locator("h1").count() == 1
    for index in range(page.locator("[data-figure]").count()):
        assert page.locator("[data-figure]").nth(index).locator("svg.main-svg").count() > 0
    assert violations(page) == []


@pytest.mark.parametrize("screen", WIDTHS)
def test_report(visit, results, tmp_path, screen):
    path = write_report(load_study(results, "small"), tmp_path / "report.html")
    page = visit(screen)
    page.goto(path.as_uri())
    settled(page)
    assert page.locator("svg.main-svg").count() >= 8
    assert page.evaluate("document.documentElement.scrollWidth") <= WIDTHS[screen]
    assert violations(page) == []


def test_an_evil_name_runs_nothing(visit, address):
    page = visit("desk")
    page.goto(address)
    page.get_by_role("link", name=EVIL).click()
    assert page.locator("h1").inner_text() == EVIL
    for name in ("Pareto", "Depth and width", "Training", "Compare"):
        page.get_by_role("link", name=name, exact=True).click()
        settled(page)
        assert EVIL in page.locator("h1").inner_text()


def test_it_is_live(visit, generated, tmp_path):
    generator = generated.generate(tmp_path, "live", layouts=("512x0", "1x8"), controls=("reference_dense(512)",), finished=1)
    path = study_folder(tmp_path, "live") / "study.json"
    with serving(tmp_path) as address:
        page = visit("desk")
        with page.expect_response(lambda response: "/stamp" in response.url):
            page.goto(f"{address}/study?study=live")
        page.evaluate("window.loadedOnce = true")
        assert "120,000 of 400,000 tokens" in page.inner_text("main")
        path.write_text(path.read_text().replace('"done": 120000', '"done": 390000'))
        page.get_by_text("390,000 of 400,000 tokens").wait_for(timeout=15_000)
        assert page.evaluate("window.loadedOnce"), "the page must not have been loaded anew"
        generator.finished = 2
        with generated.without_fsync():
            generator.write()
        page.get_by_text("✓ complete").wait_for(timeout=15_000)
        page.locator("body[data-live=false]").wait_for(state="attached")
        assert json.loads(path.read_text())["state"] == "complete"


def test_pareto_controls_and_the_way_to_a_trial(visit, address):
    page = visit("desk")
    page.goto(f"{address}/pareto?study=small")
    settled(page)
    slider = page.get_by_label("Quality kept")
    slider.press("Home")
    page.get_by_text("Fastest that keeps 80 % of the dense quality").wait_for()
    assert "kept=80" in page.url
    assert page.evaluate("document.activeElement.name") == "kept", "the focus must stay on the slider"
    page.get_by_label("Colour").select_option("mlm/validation_loss")
    page.locator("[data-figure=pareto] .colorbar").wait_for()
    page.get_by_label("Depth from").fill("5")
    page.get_by_label("Depth from").press("Enter")
    page.wait_for_url("**depth_min=5**")
    page.get_by_role("region", name="Trials on the front").get_by_role("link", name="34x3").wait_for(state="detached")
    page.goto(f"{address}/pareto?study=small")
    settled(page)
    point = page.locator(".scatterlayer .trace .points path").first.bounding_box()
    page.mouse.move(point["x"] + point["width"] / 2, point["y"] + point["height"] / 2)
    page.locator(".hoverlayer .hovertext").first.wait_for()
    with page.expect_navigation():
        page.mouse.click(point["x"] + point["width"] / 2, point["y"] + point["height"] / 2)
    assert "/trial?" in page.url


def test_figures_can_be_taken_away(visit, address):
    page = visit("desk")
    page.goto(f"{address}/pareto?study=small")
    settled(page)
    for kind in ("CSV", "Parquet", "PNG", "SVG"):
        with page.expect_download() as caught:
            page.get_by_label(f"{kind} of Pareto front", exact=True).click()
        path = Path(caught.value.path())
        assert path.stat().st_size > 500
        head = path.read_bytes()[:8]
        assert {"CSV": b"trial", "Parquet": b"PAR1", "PNG": b"\x89PNG", "SVG": b"<svg"}[kind] in head


def test_keyboard_reaches_the_content(visit, address):
    page = visit("desk")
    page.goto(f"{address}/study?study=small")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    page.keyboard.press("Enter")
    assert page.url.endswith("#main")


FOCUS = """() => { const at = document.activeElement, style = getComputedStyle(at);
  return [at.getAttribute("aria-label") || at.name || at.textContent.trim(), style.outlineStyle, parseFloat(style.outlineWidth)]; }"""


def tab_to(page, wanted, most=80):
    """Press Tab until what has the focus is called `wanted`; all the way the focus must be seen."""
    for _ in range(most):
        page.keyboard.press("Tab")
        name, outline, width = page.evaluate(FOCUS)
        assert (outline, width) == ("solid", 3), f"the focus on {name!r} cannot be seen"
        if name == wanted:
            return
    raise AssertionError(f"no {wanted!r} after {most} tabs, the last one was {name!r}")


def test_everything_can_be_done_by_keyboard(visit, address):
    """The slider, a filter, the points of a figure, a trial, a comparison and the pick's form, with Tab, arrows and Enter alone."""
    page = visit("desk")
    page.goto(f"{address}/pareto?study=small")
    settled(page)
    tab_to(page, "q")
    page.keyboard.type("x7")
    page.keyboard.press("Enter")
    page.get_by_text("1 of 9 trials pass the filters").wait_for()
    tab_to(page, "kept")
    page.keyboard.press("ArrowLeft")
    page.get_by_text("Fastest that keeps 95.5 % of the dense quality").wait_for()
    page.goto(f"{address}/pareto?study=small")
    settled(page)
    tab_to(page, "Table of Pareto front")
    page.keyboard.press("Enter")
    page.wait_for_url("**/table?**")
    assert violations(page) == []
    tab_to(page, "1x8")
    page.keyboard.press("Enter")
    page.wait_for_url("**/trial?**")
    tab_to(page, "Compare with another")
    page.keyboard.press("Enter")
    page.wait_for_url("**/compare?**")
    tab_to(page, "trial")
    tab_to(page, "trial")
    page.keyboard.type("512x0")
    page.keyboard.press("Escape")  # the list of suggestions
    page.keyboard.press("Enter")
    page.get_by_role("region", name="Metrics and differences").wait_for()
    page.goto(f"{address}/study?study=small")
    tab_to(page, "8x5")
    page.keyboard.press("Enter")
    page.wait_for_url("**/trial?**")
    tab_to(page, "Pick this trial")
    page.keyboard.press("Enter")
    page.wait_for_url("**#pick")
    tab_to(page, "alias")
    page.keyboard.press("Control+A")
    page.keyboard.type("two words")
    page.keyboard.press("Enter")
    assert page.get_by_label("Alias in the registry").evaluate("each => !each.checkValidity()"), "the form itself must refuse it"
    assert page.url.endswith("#pick")


def test_a_thousand_trials_are_usable_soon(visit, address):
    """1.5 s from the click to the drawn figure, in the quickest of three loads: others may be working on this machine."""
    page = visit("desk")
    page.goto(f"{address}/pareto?study=thousand")
    settled(page)
    loads_ms = []
    for _ in range(3):
        page.reload()
        settled(page)
        loads_ms.append(round(page.evaluate("performance.now()")))
    print(f"Pareto page of 1,000 trials drawn after {loads_ms} ms")
    assert min(loads_ms) < 1500


@pytest.fixture(scope="module")
def real(trained):
    with serving(trained) as found:
        yield found


@pytest.mark.parametrize("screen", WIDTHS)
def test_every_page_of_a_trained_study(visit, real, screen):
    page = visit(screen)
    for name in ("", *PAGES):
        page.goto(real + (f"/{name}?study=tiny&trial=4x3&trial=reference_dense" if name else "/"))
        settled(page)
        assert page.evaluate("document.documentElement.scrollWidth") <= WIDTHS[screen], name
        assert violations(page) == [], name
    assert "models:/tiny stsb@champion" in page.goto(f"{real}/study?study=tiny").text()


def test_a_trial_is_picked_by_its_button(visit, real, trained):
    """The page follows the pick, which runs in a process of its own, to its end without being loaded anew."""
    page = visit("desk")
    page.goto(f"{real}/trial?study=tiny&trial=4x3")
    page.get_by_role("link", name="Pick this trial").click()
    page.get_by_label("Alias in the registry").fill("by-button")
    page.get_by_label("Fresh seeds").fill("0")
    page.get_by_role("button", name="Pick", exact=True).click()
    card = page.get_by_role("region", name="Pick by-button")
    card.get_by_text("▶ running").wait_for()
    page.evaluate("window.loadedOnce = true")
    card.get_by_text("models:/tiny@by-button").wait_for(timeout=200_000)
    assert page.evaluate("window.loadedOnce")
    assert "not run again on fresh seeds" in card.inner_text()
    pick = json.loads((study_folder(trained, "tiny") / "picks" / "by-button.json").read_text())
    assert pick["state"] == "complete"
    page.get_by_label("Alias in the registry").fill("two words")
    page.get_by_role("button", name="Pick", exact=True).click()
    assert page.get_by_label("Alias in the registry").evaluate("each => !each.checkValidity()"), "the form itself must refuse it"
