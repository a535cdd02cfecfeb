"""Whether two reports are of the same model, on the same text, by the same amount of measurement."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from crt_export.ladder import CERTIFICATE, CHAIN, FREE_RUNNING, LONG_RUN, ONE_STEP
from crt_export.report.row_figures import row_name

#: PyTorch FP32 on another processor or of another version rounds otherwise; nothing else moves its perplexity.
_REFERENCE_NOISE = 1e-4
_TEXT = ("sha256", "tokens", "windows", "window")
#: What says how much a level measured.
_AMOUNTS = {
    ONE_STEP: ("positions",),
    CHAIN: ("windows", "steps"),
    FREE_RUNNING: ("prompts", "prompt_tokens", "new_tokens"),
    CERTIFICATE: ("unroll", "window", "windows"),
}


def comparison_problems(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """In what two reports differ that makes their figures no comparison; empty if in nothing."""
    problems = [
        f"{what} {before} is not {after}"
        for what, before, after in (
            ("the model's checkpoint", *(_short(report["model"].get("checkpoint")) for report in (old, new))),
            *((f"the text's {key}", *(_short(report["text"][key]) for report in (old, new))) for key in _TEXT),
        )
        if before != after
    ]
    return problems or [*_reference_problems(old, new), *_amount_problems(old, new)]


def _reference_problems(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[str]:
    """PyTorch FP32's own perplexity moved: something is wrong with one of the two measurements."""
    references = {_key(row): row["reference_perplexity"] for row in old["rows"] if row["regime"] != "regime-gap"}
    for row in new["rows"]:
        before, after = references.get(_key(row)), row["reference_perplexity"]
        if before is not None and after is not None and abs(after - before) > _REFERENCE_NOISE * before:
            place = f"{row['target']} {row_name(row)}"
            yield f"PyTorch FP32's own perplexity in {place} was {before:.6g} and is {after:.6g}"
            return


def _amount_problems(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[str]:
    """A level that now fails may have ended early: that is a regression, and not another measurement."""
    before = {(result["target"], result["level"]): result for result in old["levels"]}
    for result in new["levels"]:
        earlier = before.get((result["target"], result["level"]))
        if earlier is None or (result["passed"] is False and earlier["passed"] is not False):
            continue
        amounts = [_amount(entry["level"], entry["data"]) for entry in (earlier, result)]
        if all(amounts) and amounts[0] != amounts[1]:
            words = [", ".join(f"{key} {value}" for key, value in amount.items()) for amount in amounts]
            yield f"{result['target']} {result['level']} measured {words[0]} and now {words[1]}"
            return


def _amount(level: str, data: Mapping[str, Any]) -> dict[str, Any]:
    if level == LONG_RUN:
        return {str(run.get("kind")): run.get("tokens") for run in data.get("runs") or []}
    return {key: data[key] for key in _AMOUNTS.get(level, ()) if data.get(key) is not None}


def _key(row: Mapping[str, Any]) -> tuple[str, str]:
    return row["target"], row_name(row)


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 16 else f"{text[:16]}..."
