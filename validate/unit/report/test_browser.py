"""The HTML report in a real browser: Debian's Chromium, driven by Playwright."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from crt_export.cli import main
from crt_export.report.html import render_html

pytestmark = [pytest.mark.evidence, pytest.mark.slow]

Report = dict[str, Any]
WIDTHS = {400: 800, 1400: 900}
#: Names of the browser's program, as in validate/ux/prepare_browser.py.
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
    line: getComputedStyle(document.querySelector('.plot > svg path[style*="--plot-1"]') || document.body).stroke,
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
    for entry in (*report["levels"], *report["rows"]):
        entry["target"] = entry["target"].replace(
            "ort-cpu", "a-target-with-a-name-that-is-as-long-as-a-line-on-a-phone"
        )
    return report


@pytest.fixture(scope="module")
def pages(
    make_report: Callable[..., Report],
    make_checkpoint: Callable[..., Path],
    heldout_text: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, Path]:
    """Reports to look at: one that passed, one that failed in every way, and one that was measured, of every level."""
    folder = tmp_path_factory.mktemp("pages")
    files = {"passed": folder / "passed.html", "failed": folder / "failed.html", "measured": folder / "measured.html"}
    files["passed"].write_text(render_html(make_report()), encoding="utf-8")
    files["failed"].write_text(render_html(failed(make_report())), encoding="utf-8")
    text = ["--text", str(heldout_text)]
    checkpoint = make_checkpoint(max_position_embeddings=300, training_sequence_length=64, hidden_size=32)
    bundle = folder / "bundle"
    assert main(["build", str(checkpoint), "--output", str(bundle), "--target", "ort-cpu-int8", *text]) == 0
    more = ["--level", "all", "--long-run-tokens", "2000", "--report", str(folder / "measured.json")]
    code = main(["validate", str(bundle), *text, *more])
    assert code in (0, 1)  # a random model may miss a gate: the page has to be sound all the same
    assert main(["report", str(folder / "measured.json"), "--output", str(files["measured"])]) == 0
    levels = {result["level"] for result in json.loads((folder / "measured.json").read_bytes())["levels"]}
    assert len(levels) == 7
    return files


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", ["passed", "failed", "measured"])
def test_the_page_looks_right(
    browser: Any, pages: dict[str, Path], tmp_path: Path, name: str, width: int, scheme: str
) -> None:
    context = browser.new_context(viewport={"width": width, "height": WIDTHS[width]}, color_scheme=scheme)
    page = context.new_page()
    said: list[str] = []
    asked: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(pages[name].as_uri())
    for summary in page.query_selector_all("summary"):  # what is folded must fit as well
        summary.click()
    page.evaluate("scrollTo(0, 0)")
    seen = page.evaluate(MEASURE)
    page.screenshot(path=tmp_path / f"{name}-{width}-{scheme}.png", full_page=True)
    context.close()

    assert said == []
    assert [url for url in asked if not url.startswith("data:,")] == [pages[name].as_uri()]
    assert seen["page"] <= seen["window"] == width
    assert seen["wide"] == []
    for left, top, box_width, height in (seen["verdict"], seen["summary"]):
        assert min(box_width, height) > 0
        assert (left >= 0, left + box_width <= width, top >= 0, top + height <= seen["height"]) == (True,) * 4
    assert len(seen["plots"]) >= 10
    assert all(box_width > 250 and height > 150 for _, _, box_width, height in seen["plots"])
    assert all(height > 7 for height in seen["text"])  # pixels: text in a plot can be read on a phone
    bright = [sum(map(int, color.strip("rgb()").split(","))) > 3 * 128 for color in (seen["ink"], seen["ground"])]
    assert bright == ([False, True] if scheme == "light" else [True, False])
    assert seen["line"] == {"light": "rgb(31, 95, 174)", "dark": "rgb(125, 179, 245)"}[scheme]
    assert (tmp_path / f"{name}-{width}-{scheme}.png").stat().st_size > 20_000


def test_the_page_needs_no_script_and_says_its_verdict_to_assistive_technology(
    browser: Any, pages: dict[str, Path]
) -> None:
    context = browser.new_context(java_script_enabled=False, viewport={"width": 400, "height": 800})
    page = context.new_page()
    page.goto(pages["passed"].as_uri())
    assert page.get_by_role("heading", level=1).inner_text() == "Passed"
    # Tables that are shown as cards on a phone are tables all the same.
    assert page.get_by_role("rowheader", name="chain").count() >= 3
    assert page.get_by_role("columnheader", name="Limit").count() >= 3
    plots = page.get_by_role("img", name="Perplexity by number of passes")
    assert plots.count() == 3
    context.close()
