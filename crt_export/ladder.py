"""Names of the levels of evidence, in the order they run; :mod:`crt_export.parity.level` says what each one asks."""

from __future__ import annotations

OWN_MODEL = "own-model"
CONTRACT = "contract"
ONE_STEP = "one-step"
CHAIN = "chain"
CORPUS = "corpus"
FREE_RUNNING = "free-running"
CERTIFICATE = "certificate"
LONG_RUN = "long-run"

LEVELS = (OWN_MODEL, CONTRACT, ONE_STEP, CHAIN, CORPUS, FREE_RUNNING, CERTIFICATE, LONG_RUN)
#: What ``crt-export validate`` runs unless told otherwise; the own model is another file, the long run takes minutes:
#: both are asked for.
VALIDATE_LEVELS = LEVELS[1:7]

#: What a verdict says where the level ``own-model`` had no outputs of the user's own model to compare with.
NOT_COMPARED = "not compared with your own model"
#: Begins the note of a report that repeats what an earlier one of the same checkpoint says of the user's own model.
WHEN_BUILT = "when the bundle was built"
