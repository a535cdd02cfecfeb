"""The key figures of the page: the growth is that of the run that is judged."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from crt_export.parity import ParityReport
from crt_export.report.numbers import number_text
from crt_export.report.page import page_from_report


def test_the_growth_is_that_of_the_chained_run(make_report: Callable[..., dict[str, Any]]) -> None:
    """The single run goes on above the training length, where nothing is promised: here it grows a hundredfold."""
    report = make_report(targets=1)
    level = next(result for result in report["levels"] if result["level"] == "long-run")
    runs = {run["kind"]: run["growth"] for run in level["data"]["runs"]}
    runs["chained"]["per_1000_tokens"], runs["single"]["per_1000_tokens"] = 3e-7, 3e-5
    columns, rows = (page := page_from_report(ParityReport.from_dict(report), {})).key_columns, page.key_rows
    assert rows[0][1][columns.index("Growth per 1,000, chained")] == number_text(3e-7, 2)
