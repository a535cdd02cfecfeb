"""The HTML report in a real browser: Debian's Chromium, driven by Playwright."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import shutil
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from crt_export.cli import main
from crt_export.parity import ParityReport
from crt_export.parity.levels import LEVELS
from crt_export.report.output import render_html

pytestmark = [pytest.mark.evidence, pytest.mark.slow, pytest.mark.timeout(900)]

Report = dict[str, Any]
WIDTHS = {400: 800, 1400: 900}
#: Names of the browser's program, as in validate/prepare.py.
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
ROOT = Path(__file__).resolve().parents[3]

#: What a reader can see of the page, measured by the browser itself.
MEASURE = """() => {
  const box = (element) => { const r = element.getBoundingClientRect(); return [r.left, r.top, r.width, r.height]; };
  const wide = [...document.querySelectorAll('body *')].filter((element) => {
    const r = element.getBoundingClientRect();
    return r.width > 0 && r.right > innerWidth + 0.5 && !element.closest('.scroll, pre, .plot svg');
  });
  return {
    page: document.scrollingElement.scrollWidth, window: innerWidth, height: innerHeight,
    verdict: box(document.querySelector('h1')), summary: box(document.querySelector('.summary')),
    plots: [...document.querySelectorAll('.plot > svg')].map(box),
    text: [...document.querySelectorAll('.plot > svg text')].map((text) => text.getBoundingClientRect().height),
    wide: wide.map((element) => element.outerHTML.slice(0, 120)),
    ink: getComputedStyle(document.body).color, ground: getComputedStyle(document.body).backgroundColor,
    line: getComputedStyle(document.querySelector('.plot > svg path[style*="stroke: var(--plot-1)"]')).stroke,
  };
}"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """The browser; where there is none, its tests say so and are skipped, or fail with CRT_EXPORT_REQUIRE_BROWSER=1."""
    program = os.environ.get("CRT_EXPORT_BROWSER") or next(filter(None, map(shutil.which, BROWSERS)), None)
    reason = ""
    if program is None:
        note = ROOT / "build" / "browser" / "missing.txt"
        reason = note.read_text(encoding="utf-8").strip() if note.is_file() else "no Chromium: apt-get install chromium"
    elif importlib.util.find_spec("playwright") is None:
        reason = "playwright is not installed: pip install 'crt-export[browser]'"
    if reason:
        if os.environ.get("CRT_EXPORT_REQUIRE_BROWSER") == "1":
            pytest.fail(f"CRT_EXPORT_REQUIRE_BROWSER=1, but {reason}")
        pytest.skip(reason)
    sync_api = importlib.import_module("playwright.sync_api")
    with sync_api.sync_playwright() as playwright:
        # Root has no sandbox of its own to give Chromium; the page is this package's own.
        flags = ["--no-sandbox"] if os.geteuid() == 0 else []
        started = playwright.chromium.launch(executable_path=program, args=flags)
        yield started
        started.close()


def failed(report: Report) -> Report:
    """Of everything that can go wrong with a page: long names, long sentences, many failures."""
    report["passed"] = False
    for result in report["levels"]:
        if result["level"] == "one-step":
            result["passed"] = False
            for check in result["checks"]:
                check["name"] = f"prefill_pass: {'present_key_values.' * 6}key <script>document.title='x'</script>"
                check.update(passed=False, value=float("1e300"), failures=["is off by " + "0123456789" * 30] * 2)
    for entry in report["levels"]:
        entry["target"] = entry["target"].replace(
            "ort-cpu", "a-target-with-a-name-that-is-as-long-as-a-line-on-a-phone"
        )
    return report


@pytest.fixture(scope="module")
def made_up(make_report: Callable[..., Report], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A report that passed, and one that failed in every way."""
    folder = tmp_path_factory.mktemp("pages")
    pages = {"passed": make_report(), "failed": failed(make_report())}
    for name, report in pages.items():
        (folder / f"{name}.html").write_text(render_html(ParityReport.from_dict(report)), encoding="utf-8")
    return {name: folder / f"{name}.html" for name in pages}


@pytest.fixture(scope="module")
def measured(
    make_checkpoint: Callable[..., Path], heldout_text: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """``measured(model_type)``: the page of a report of every level of a bundle that was built; once per type."""

    @cache
    def page_of(model_type: str) -> Path:
        folder = tmp_path_factory.mktemp("measured")
        text = ["--text", str(heldout_text)]
        bundle, report, page = (str(folder / name) for name in ("bundle", "report.json", "report.html"))
        checkpoint = str(make_checkpoint(num_hidden_layers=1, model_type=model_type))
        assert main(["build", checkpoint, "--output", bundle, "--target", "ort-cpu-int8", *text]) == 0
        code = main(["validate", bundle, *text, "--level", "all", "--long-run-tokens", "2000", "--report", report])
        assert code in (0, 1)  # a random model may miss a gate: the page has to be sound all the same
        assert main(["report", report, "--output", page]) == 0
        assert {result["level"] for result in json.loads(Path(report).read_bytes())["levels"]} == set(LEVELS)
        return Path(page)

    return page_of


def _page(request: pytest.FixtureRequest, name: str) -> Path:
    """Nothing is measured for the pages that are made up."""
    made_up = name in ("passed", "failed")
    return request.getfixturevalue("made_up")[name] if made_up else request.getfixturevalue("measured")(name)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", ["passed", "failed", "context_ready_transformer", "transformer"])
def test_the_page_looks_right(
    browser: Any, request: pytest.FixtureRequest, tmp_path: Path, name: str, width: int, scheme: str
) -> None:
    address = _page(request, name).as_uri()
    context = browser.new_context(viewport={"width": width, "height": WIDTHS[width]}, color_scheme=scheme)
    page = context.new_page()
    said: list[str] = []
    asked: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda made: asked.append(made.url))
    page.goto(address)
    for summary in page.query_selector_all("summary"):  # what is folded must fit as well
        summary.click()
    page.evaluate("scrollTo(0, 0)")
    seen = page.evaluate(MEASURE)
    page.screenshot(path=tmp_path / f"{name}-{width}-{scheme}.png", full_page=True)
    context.close()

    assert said == []
    assert [url for url in asked if not url.startswith("data:,")] == [address]
    assert seen["page"] <= seen["window"] == width
    assert seen["wide"] == []
    for left, top, box_width, height in (seen["verdict"], seen["summary"]):
        assert min(box_width, height) > 0
        assert (left >= 0, left + box_width <= width, top >= 0, top + height <= seen["height"]) == (True,) * 4
    assert len(seen["plots"]) >= (5 if name == "transformer" else 11)  # without passes there are no curves over them
    assert all(box_width > 250 and height > 150 for _, _, box_width, height in seen["plots"])
    assert all(height > 7 for height in seen["text"])  # pixels: text in a plot can be read on a phone
    bright = [sum(map(int, color.strip("rgb()").split(","))) > 3 * 128 for color in (seen["ink"], seen["ground"])]
    assert bright == ([False, True] if scheme == "light" else [True, False])
    assert seen["line"] == {"light": "rgb(31, 95, 174)", "dark": "rgb(125, 179, 245)"}[scheme]
    assert (tmp_path / f"{name}-{width}-{scheme}.png").stat().st_size > 20_000


#: What a reader cannot see of a verdict: cut off by the window or by the box that its table scrolls in.
CUT = """() => [...document.querySelectorAll('h1, .badge, .cell')].filter((element) => {
  const r = element.getBoundingClientRect();
  const scroll = element.closest('.scroll');
  const box = scroll ? scroll.getBoundingClientRect() : {left: 0, right: innerWidth};
  return r.width > 0 && (r.left < box.left - 0.5 || r.right > Math.min(box.right, innerWidth) + 0.5);
}).map((element) => element.outerHTML.slice(0, 120))"""


@pytest.mark.parametrize("width", [320, 600, 768, 900, 1050, 1600])
@pytest.mark.parametrize("name", ["passed", "failed"])
def test_no_verdict_is_cut(browser: Any, made_up: dict[str, Path], name: str, width: int) -> None:
    context = browser.new_context(viewport={"width": width, "height": 900})
    page = context.new_page()
    page.goto(made_up[name].as_uri())
    for summary in page.query_selector_all("summary"):
        summary.click()
    assert page.evaluate(CUT) == []
    context.close()


def test_the_page_needs_no_script_and_says_its_verdict_to_assistive_technology(
    browser: Any, made_up: dict[str, Path]
) -> None:
    context = browser.new_context(java_script_enabled=False, viewport={"width": 400, "height": 800})
    page = context.new_page()
    page.goto(made_up["passed"].as_uri())
    assert page.get_by_role("heading", level=1).inner_text() == "Passed"
    # Tables that are shown as cards on a phone are tables all the same.
    assert page.get_by_role("rowheader", name="chain").count() >= 3
    assert page.get_by_role("columnheader", name="Limit").count() >= 3
    plots = page.get_by_role("img", name="Perplexity by number of passes")
    assert plots.count() == 3
    context.close()
