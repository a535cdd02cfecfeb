"""Names of the levels of evidence, in the order they run; :mod:`crt_export.parity.level` says what each one asks."""

from __future__ import annotations

CONTRACT = "contract"
ONE_STEP = "one-step"
CHAIN = "chain"
CORPUS = "corpus"
FREE_RUNNING = "free-running"
CERTIFICATE = "certificate"
LONG_RUN = "long-run"

LEVELS = (CONTRACT, ONE_STEP, CHAIN, CORPUS, FREE_RUNNING, CERTIFICATE, LONG_RUN)
#: What ``crt-export validate`` runs unless told otherwise; the long run takes minutes and is asked for.
VALIDATE_LEVELS = LEVELS[:6]
