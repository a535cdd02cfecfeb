"""A bundle's manifest and parity report as tables and as JSON."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from crt_export.bundle import BundleFiles
from crt_export.cli.console import write_table, write_text
from crt_export.cli.level_table import write_level_table
from crt_export.report.own_model import own_model_text
from crt_export.report.reading import checked_report

PARITY_COLUMNS = (
    "target", "graph", "regime", "tokens>", "perplexity>", "reference>", "delta nll (95 %)>", "max error>",
    "mean KL>", "top-1>", "result",
)  # fmt: skip


_GAP_NOTE = (
    "regime-gap compares K passes with the steps of the same target (reference column); excess is how much wider that "
    "gap is than in PyTorch FP32, and is what its gate judges"
)


def bundle_document(bundle: BundleFiles) -> dict[str, Any]:
    """What ``build --json`` and ``inspect --json`` print: where the bundle is, its identity, and its manifest.

    Raises:
        InputError: The parity report that it holds is none.
    """
    return {
        **bundle.manifest,
        "kind": "bundle",
        "path": str(bundle.path),
        "identity": bundle.identity,
        "bytes": bundle_bytes(bundle),
        "own_model": own_model_text(_parity_report(bundle)),
    }


def bundle_bytes(bundle: BundleFiles) -> int:
    """Size of all files that the manifest lists, in bytes."""
    return sum(entry["size"] for entry in bundle.manifest["files"].values())


def _parity_report(bundle: BundleFiles) -> Mapping[str, Any] | None:
    found = bundle.manifest["parity"]
    return None if found is None else checked_report(found, f"the parity report of {bundle.path}")


def write_bundle_tables(bundle: BundleFiles) -> None:
    """Write what a bundle holds and how well it agrees with PyTorch.

    Raises:
        InputError: The parity report that it holds is none.
    """
    manifest, parity = bundle.manifest, _parity_report(bundle)
    validated = "validated" if manifest["validated"] else "NOT validated"
    write_text(
        f"{bundle.path}: {validated}, {own_model_text(parity)}, "
        f"{readable_size(bundle_bytes(bundle))} in {len(bundle.names)} files, "
        f"made by {manifest['tool']['name']} {manifest['tool']['version']}"
    )
    write_text(f"identity {bundle.identity} (SHA-256 of manifest.json)")
    rows = [
        (
            name,
            str(target["profile"].get("precision", "?")),
            "-" if target["capacity"] is None else str(target["capacity"]),
            "-" if target["unroll"] is None else str(target["unroll"]),
            ", ".join(target["engines"] or target["graphs"]),
            str(target["profile"].get("title", "")),
        )
        for name, target in manifest["targets"].items()
    ]
    write_table(("target", "precision", "capacity>", "unroll>", "parts", "title"), rows)
    if parity:
        write_text("")
        write_parity_table(parity)
        write_level_table(parity)


def write_parity_table(report: Mapping[str, Any]) -> None:
    """Write the rows of a parity report, and below them what the report says about them."""
    rows = report.get("rows", [])
    if rows:
        write_table(PARITY_COLUMNS, [_parity_cells(row) for row in rows], title="agreement with PyTorch FP32")
    notes = list(report.get("notes", ()))
    if any(row.get("excess_gap") is not None for row in rows):
        notes.append(_GAP_NOTE)
    for note in notes:
        write_text(f"note: {note}")


def _parity_cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    return (
        str(row["target"]),
        str(row["graph"]),
        _regime(row),
        _figure(row["tokens"], ",d"),
        _perplexity(row["perplexity"]),
        _reference(row),
        _difference(row),
        _figure(row["max_abs_logit_error"], ".2g"),
        _figure(row["mean_kl"], ".2g"),
        _figure(row["top1_agreement"], ".3%"),
        _result(row),
    )


def _regime(row: Mapping[str, Any]) -> str:
    """The regime, with the part of the window that a row covers where it is not all of it."""
    positions = row.get("positions")
    return str(row["regime"] or "-") + (f" {positions[0]}-{positions[1]}" if positions else "")


def _reference(row: Mapping[str, Any]) -> str:
    """The perplexity compared with; a regime gap has the target's own steps there, not PyTorch FP32."""
    text = _perplexity(row["reference_perplexity"])
    return f"step {text}" if row["regime"] == "regime-gap" else text


def _difference(row: Mapping[str, Any]) -> str:
    """What the likelihood gate judges: of a target's regime gap the excess over that of PyTorch FP32."""
    if row.get("excess_gap") is not None:
        return f"excess {_interval(row['excess_gap'], row['excess_gap_ci'])}"
    return _interval(row["delta_nll"], row["delta_nll_ci"])


def _perplexity(value: float | None) -> str:
    """Four decimals, as far as they say something: an untrained model's may have thirty digits."""
    return _figure(value, ".4f" if value is None or value < 1e6 else ".3e")


def _figure(value: float | None, form: str) -> str:
    """A figure of a report; whole numbers may stand there as 4096.0, which JSON calls an integer too."""
    return "-" if value is None else format(int(value) if form.endswith("d") else value, form)


def _interval(value: float | None, interval: Any) -> str:
    """A difference with its confidence interval, given as a half-width or as [low, high]."""
    if value is None:
        return "-"
    if isinstance(interval, list | tuple):
        return f"{value:+.1e} [{interval[0]:+.1e}, {interval[1]:+.1e}]"
    return f"{value:+.1e}" if interval is None else f"{value:+.1e} ± {interval:.1e}"


def _result(row: Mapping[str, Any]) -> str:
    words = [str(row["status"]) if row["passed"] is None else "passed" if row["passed"] else "FAILED"]
    if row.get("better_than_chance") is False:
        words.append("nll not gated")
    if "emulated" in (row["arithmetic"] or ""):
        words.append(row["arithmetic"])
    return ", ".join(words)


def readable_size(size: float) -> str:
    """A byte count for people: 1,536 gives ``1.5 KiB``."""
    for unit in ("bytes", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "bytes" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"
