"""Fuzz every file that crt-export reads, in Python and in C++.

python validate/fuzz/run.py --language both --seconds 60 --seed 1

prints what became of the inputs by kind, and exits with 1 if one broke a rule: only deliberate errors, finite results,
no crash, no hang, bounded memory, no file written, and the same verdict in both languages. What broke one is made small
and stored under build/fuzz/; --replay FILE tries it again.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from pathlib import Path

from campaign import Campaign, CampaignError, Result, Setup, count_lines
from cases import KINDS, Inputs
from planted_faults import FAULTS

ROOT = Path(__file__).resolve().parents[2]
EXIT_FINDING, EXIT_ENVIRONMENT = 1, 3


def main(arguments: list[str]) -> int:
    """Run; the exit code."""
    options = _parser().parse_args(arguments)
    replayed = None if options.replay is None else json.loads(options.replay.read_bytes())
    languages = ("python", "cpp") if options.language == "both" else (options.language,)
    setup = Setup(
        languages=languages,
        kinds=(replayed["case"]["kind"],) if replayed else tuple(options.kind or KINDS),
        seed=options.seed,
        library=options.library,
        fault=options.plant_fault,
        kept=options.folder,
    )
    if "cpp" in languages and not options.library.is_file():
        _say(f"there is no {options.library}: make cpp builds it, or use --language python", error=True)
        return EXIT_ENVIRONMENT
    try:
        with Campaign(setup) as campaign:
            if replayed:
                return _replay(campaign, replayed)
            return _report(campaign.run(seconds=options.seconds, cases=options.cases), setup, options.output)
    except CampaignError as error:
        _say(str(error), error=True)
        return EXIT_ENVIRONMENT


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    library = Path(os.environ.get("CRT_RUNTIME_LIBRARY", ROOT / "build" / "cpp" / "libcrt_runtime.so"))
    parser.add_argument("--language", choices=("python", "cpp", "both"), default="both")
    parser.add_argument("--seconds", type=float, default=60.0, help="how long, all kinds together (default: 60)")
    parser.add_argument("--cases", type=int, help="that many inputs of each kind instead of a time")
    parser.add_argument("--seed", type=int, default=0, help="of the random changes (default: 0)")
    parser.add_argument("--kind", action="append", choices=tuple(KINDS), help="only these; may be repeated")
    parser.add_argument("--library", type=Path, default=library, help="libcrt_runtime.so (default: that of make cpp)")
    parser.add_argument("--output", type=Path, metavar="FILE.json", help="store the counts")
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "fuzz", help="for inputs that broke a rule")
    parser.add_argument("--replay", type=Path, metavar="FILE", help="try one stored input again")
    parser.add_argument("--plant-fault", choices=tuple(FAULTS), default="", help="break the package first, as a test")
    return parser


def _replay(campaign: Campaign, replayed: dict) -> int:
    broken = campaign.replay(replayed["case"]["kind"], Inputs.from_dict(replayed))
    for language, text in broken.items():
        _say(f"{language}: {text}")
    if not broken:
        _say("nothing is broken by this input any more")
    return EXIT_FINDING if broken else 0


def _report(result: Result, setup: Setup, output: Path | None) -> int:
    for line in (*count_lines(result, setup.languages), *result.findings):
        _say(line)
    _say(f"{result.total} findings (seed {setup.seed})")
    if output is not None:
        counts = {
            language: {kind: dataclasses.asdict(of_kind) for kind, of_kind in kinds.items()}
            for language, kinds in result.counts.items()
        }
        values = {"seed": setup.seed, "counts": counts, "findings": result.findings}
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(values, indent=1) + "\n", "utf-8", errors="replace")
    return EXIT_FINDING if result.total else 0


def _say(text: str, *, error: bool = False) -> None:
    print(text.encode(errors="replace").decode(), file=sys.stderr if error else sys.stdout, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
