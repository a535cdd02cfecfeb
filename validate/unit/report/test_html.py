"""The HTML report: what it says, that it is one sound file, and that nothing in a report can be markup."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from html.parser import HTMLParser
from typing import Any
from xml.etree import ElementTree

import pytest

from crt_export import environment
from crt_export.errors import MissingDependencyError
from crt_export.parity import ParityReport
from crt_export.parity.levels import LEVELS
from crt_export.parity.report import LevelResult
from crt_export.report import output
from crt_export.report.page import target_block
from crt_export.report.plots import draw_plots
from crt_export.visible import visible

Report = dict[str, Any]
VOID = {"meta", "link", "col", "br"}
HOSTILE = (
    '<script>alert(1)</script><img src="https://example.com/x" onerror="y">{{ 7 * 7 }} $\\frac{1}{0}$ \u202e\x00"\'&'
)


def render_html(report: Report, bundle: str = "") -> str:
    return output.render_html(ParityReport.from_dict(report), bundle=bundle)


class Page(HTMLParser):
    """Elements of a page with their attributes, its text, and whether every element is closed where it was opened."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] not in (["style"], ["title"]):
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture(scope="module")
def full_text(make_report: Callable[..., Report]) -> str:
    return render_html(make_report(targets=2))


@pytest.fixture(scope="module")
def full(full_text: str) -> Page:
    return Page(full_text)


def small(make_report: Callable[..., Report], **changes: Any) -> Report:
    return {**make_report(targets=1, levels=("contract", "free-running")), **changes}


def test_every_level_has_its_table_and_every_curve_its_plot(full: Page) -> None:
    text = full.text
    assert all(level in text for level in LEVELS)
    titles = [
        "Perplexity by number of passes", "Regime gap by number of passes", "Drift by position, K passes",
        "Residual against true error", "Handover from K passes to decoding", "Divergence of the tokens",
        "Drift by position, likelihood", "Drift by position, divergence", "Error by step of the chain",
        "Free running: agreement", "Error over the long run", "Norm of the state", "FP16 headroom by layer",
    ]  # fmt: skip
    assert all(text.count(title) == 2 for title in titles)
    assert len([svg for svg in full.all("svg") if svg.get("role") == "img"]) == 2 * len(titles)


def test_the_verdict_stands_first_with_what_was_judged(full: Page, make_report: Callable[..., Report]) -> None:
    levels = make_report(targets=2)["levels"]
    gates = sum(check["passed"] is not None for result in levels for check in result["checks"])
    assert f"Passed All {gates} gates held on 2 targets." in full.text[:600]
    assert "1 compiled engine (rtx-sm80-fp16) did not run" in full.text[:600]


def test_figures_stand_with_interval_limit_and_its_name(full: Page) -> None:
    assert "2.2×10⁻⁴ [−1.2×10⁻⁵, 4.5×10⁻⁴] within ±0.002 w8.delta_nll" in full.text
    assert "8-bit weights and row-wise 8-bit activations flip only close decisions" in full.text  # a limit's reason
    assert "crt-export validate build/demo --text heldout.txt --level all" in full.text
    assert "AMD EPYC" in full.text
    assert "onnxruntime 1.31.1" in full.text


def test_a_failure_is_said_first_in_words(sample_report: Report) -> None:
    result = next(r for r in sample_report["levels"] if (r["target"], r["level"]) == ("ort-cpu-int8", "one-step"))
    result["checks"][5].update(passed=False, value=0.31, failures=["error is 0.31 at step 12, expected at most 0.05"])
    sample_report["levels"] = [result]
    text = Page(render_html(sample_report)).text
    assert "Failed 1 of" in text[:300]
    place = "ort-cpu-int8 one-step, step: present_key_values.1.value:"
    assert f"What failed first: {place} error is 0.31 at step 12, expected at most 0.05" in text[:500]
    assert "13 of 14" in text


def test_a_report_that_says_passed_over_a_failed_check_is_not_shown_as_passed(
    make_report: Callable[..., Report],
) -> None:
    report = small(make_report)
    report["levels"][0]["checks"][0].update(passed=False, failures=["no"])
    assert report["passed"] is True
    assert "Failed 1 of" in Page(render_html(report)).text


def test_a_report_that_gated_nothing_shows_nothing(make_report: Callable[..., Report]) -> None:
    report = small(make_report, levels=[], passed=False)
    assert "Failed Nothing was gated on 0 targets" in Page(render_html(report)).text


def test_the_header_names_model_bundle_and_date(make_report: Callable[..., Report]) -> None:
    text = Page(render_html(small(make_report), bundle="demo")).text
    assert "Bundle demo Model context ready transformer of 396,288 parameters, checkpoint 4f4f4f4f4f4f" in text[:600]
    assert "Date 2026-11-22 12:00:00 UTC" in text[:600]


def test_no_limit_stands_beside_a_figure_that_is_not_gated(make_report: Callable[..., Report]) -> None:
    report = make_report(targets=1)
    checks = next(result for result in report["levels"] if result["level"] == "corpus")["checks"]
    for gated in (True, False):
        for check in checks:
            if check["metric"] in ("delta_nll", "mean_kl") and not gated:
                check.update(passed=None, limit=None)
        line = target_block(ParityReport.from_dict(report), "ort-cpu-int8", "a", ()).rows[0]
        limits = {title: limit for title, _, _, limit in line.figures}
        assert (limits["Mean KL, nats"], bool(limits["Δ NLL, nats"])) == ("≤ 0.002" if gated else "", gated)
        assert limits["Relative logit error"], "errors are gated for every model"


def test_nothing_in_a_report_becomes_markup(make_report: Callable[..., Report]) -> None:
    """Every string of a report and every key of its tables, one at a time in one report."""

    def poisoned(value: Any, key: str = "") -> Any:
        if isinstance(value, dict):
            keep = {"level", "metric", "status", "passed", "config", "kind", "regime"}
            return {k: v if k in keep else poisoned(v, k) for k, v in value.items()}
        if isinstance(value, list):
            return [poisoned(item, key) for item in value]
        return f"{value}{HOSTILE}" if isinstance(value, str) else value

    report = make_report(targets=1)
    poison = poisoned({key: report[key] for key in report if key not in ("format", "format_version", "tolerances")})
    hostile_key = {HOSTILE: poison["levels"][3]["data"]["tensors"]["logits"]}
    poison["levels"][3]["data"]["tensors"] = hostile_key
    regime = poison["levels"][4]["data"]["regimes"]["step"]
    poison["levels"][4]["data"]["regimes"] = {HOSTILE: {**regime, "graph": HOSTILE, "runtime": HOSTILE}}
    poison["levels"][7]["data"]["runs"][0]["headroom_by_layer"] = {HOSTILE: 3.0}
    poison["versions"] = {HOSTILE: HOSTILE}
    text = render_html({**report, **poison})
    page = Page(text)
    assert visible(HOSTILE) in " ".join(page.words)
    assert not page.all("script")
    assert not page.all("img")
    assert "{{ 7 * 7 }}" in page.text
    assert not [name for _, attributes in page.elements for name in attributes if name.startswith("on")]
    assert page.open == []


def test_the_page_is_one_file_that_asks_for_nothing(full: Page, full_text: str) -> None:
    assert {tag for tag, _ in full.elements} & {"script", "img", "iframe", "object", "embed", "base", "form"} == set()
    policy = next(meta["content"] for meta in full.all("meta") if meta.get("http-equiv") == "Content-Security-Policy")
    assert policy == "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    links = [
        attributes[name]
        for _, attributes in full.elements
        for name in ("href", "src", "xlink:href")
        if name in attributes
    ]
    assert [link for link in links if not link.startswith(("#", "data:,"))] == []
    assert not re.search(r"https?:|@import|url\((?!#)", full_text)


def test_the_page_is_sound_html_that_can_be_walked_without_seeing_it(full: Page) -> None:
    assert full.open == []
    identities = [attributes["id"] for _, attributes in full.elements if "id" in attributes]
    assert len(identities) == len(set(identities))
    named = {
        name
        for _, a in full.elements
        for key in ("aria-labelledby", "aria-describedby")
        for name in a.get(key, "").split()
    }
    assert named <= set(identities)
    assert {a["href"][1:] for _, a in full.elements if a.get("href", "").startswith("#")} <= set(identities)
    assert [attributes["lang"] for attributes in full.all("html")] == ["en"]
    headings = [int(tag[1]) for tag, _ in full.elements if re.fullmatch("h[1-6]", tag)]
    assert headings[0] == 1
    assert headings.count(1) == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(headings))
    assert all("scope" in attributes for attributes in full.all("th"))
    assert all({"tabindex", "role"} <= set(a) for a in full.all("div") if a.get("class") == "scroll")


def test_every_plot_is_xml_with_a_title_and_a_description(full_text: str) -> None:
    plots = re.findall(r"<svg viewBox[^>]*role=\"img\".*?</svg>", full_text, flags=re.DOTALL)
    for plot in plots:
        root = ElementTree.fromstring(plot.replace("<svg ", '<svg xmlns:xlink="x" ', 1))
        assert [child.tag for child in root][:2] == ["title", "desc"]
        assert len(str(root.findtext("desc"))) > 30
        assert root.get("width") is None
        # Only the page's own colours: they change with the scheme.
        assert not re.search(r"#[0-9a-f]{6}|rgb\(", plot)
    assert len(plots) == 26


def contrast(first: str, second: str) -> float:
    """Of two colours #rrggbb, as WCAG 2 defines it."""

    def luminance(color: str) -> float:
        parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(first), luminance(second)))
    return (high + 0.05) / (low + 0.05)


def test_text_has_contrast_in_both_schemes(full_text: str) -> None:
    schemes = [
        dict(re.findall(r"--([a-z0-9-]+): (#[0-9a-f]{6})", block))
        for block in re.findall(r":root \{(.*?)\}", full_text, re.DOTALL)
    ]
    assert len(schemes) == 2
    for colors in schemes:
        for text in ("ink", "soft", "link", "good", "bad"):
            for ground in ("ground", "sheet", "flat"):
                assert contrast(colors[text], colors[ground]) >= 4.5, (text, ground)
        assert contrast(colors["good"], colors["good-ground"]) >= 4.5
        assert contrast(colors["bad"], colors["bad-ground"]) >= 4.5
        assert contrast(colors["ink"], colors["bad-ground"]) >= 4.5
        for text in ("plot-ink", "plot-muted", "plot-1", "plot-2", "plot-3", "plot-4", "plot-5"):
            assert contrast(colors[text], colors["sheet"]) >= 4.5, text


def test_the_same_report_gives_the_same_page(make_report: Callable[..., Report]) -> None:
    levels = ("chain", "free-running")
    assert render_html(make_report(1, levels)) == render_html(make_report(1, levels))


def test_the_users_own_plot_settings_change_nothing_and_stay(make_report: Callable[..., Report]) -> None:
    import matplotlib

    report = small(make_report)
    before = render_html(report)
    with matplotlib.rc_context({"font.size": 30, "axes.facecolor": "red", "text.usetex": True, "lines.linewidth": 9}):
        assert render_html(report) == before
        assert matplotlib.rcParams["font.size"] == 30


@pytest.mark.parametrize("level", LEVELS[3:])
def test_holes_in_the_data_leave_out_what_they_are_in(make_report: Callable[..., Report], level: str) -> None:
    """A level that broke down, a plain transformer, windows that do not reach far: nulls and empty lists anywhere."""
    report = make_report(1, (level,))
    data = report["levels"][0]["data"]

    def hollow(value: Any, hole: Any) -> Any:
        if isinstance(value, dict):
            return {key: hollow(item, hole) for key, item in value.items()}
        if isinstance(value, list):
            return [] if hole == [] else [hollow(item, hole) for item in value]
        return hole if isinstance(value, float) else value

    holes = (hollow(data, None), hollow(data, []), {}, hollow(data, 0.0))
    results = [LevelResult(level=level, target="t", checks=(), data=hole) for hole in holes]
    for result in results:
        assert len(draw_plots([result], report["tolerances"], "plot-1")) <= 5
    assert draw_plots(results[2:3], {}, "plot-1") == []


def test_the_report_of_a_build_says_how_to_measure_again(make_report: Callable[..., Report]) -> None:
    text = Page(render_html(small(make_report, command="", created=""))).text
    assert "Date not recorded" in text
    assert "crt-export validate BUNDLE" in text


def test_missing_packages_are_named_with_their_extra(
    make_report: Callable[..., Report], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(environment.Dependency, "usable", property(lambda self: self.distribution != "matplotlib"))
    with pytest.raises(MissingDependencyError, match=r"matplotlib 3\.9 or newer.*crt-export\[report\]"):
        render_html(small(make_report))
