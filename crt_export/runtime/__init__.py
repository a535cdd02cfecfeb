"""The runtime that an application embeds: open a bundle, run it.

Needs numpy and one runtime, never torch or onnx. The runtime is imported when the first session is opened::

    with load_bundle("build/demo") as bundle:
        session = bundle.session("ort-cpu-fp32")
        logits = session.prefill([[1, 2, 3]])
        logits = session.step([4])
        for tokens in session.generate([[5, 6]]):
            print(tokens)
"""

from __future__ import annotations

from crt_export.runtime.bundle import Bundle, load_bundle
from crt_export.runtime.generate import Generation, TokenCallback
from crt_export.runtime.generation_options import GenerationOptions
from crt_export.runtime.sampling import SamplingOptions, sample_token
from crt_export.runtime.session import Session
from crt_export.runtime.snapshot import Snapshot
from crt_export.runtime.text import TextGeneration, TextResult, generate_text

__all__ = [
    "Bundle",
    "Generation",
    "GenerationOptions",
    "SamplingOptions",
    "Session",
    "Snapshot",
    "TextGeneration",
    "TextResult",
    "TokenCallback",
    "generate_text",
    "load_bundle",
    "sample_token",
]
