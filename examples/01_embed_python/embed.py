"""Stream text from a bundle: ``python embed.py BUNDLE PROMPT``. Needs numpy and one runtime, no PyTorch."""

import sys

from crt_export.runtime import GenerationOptions, SamplingOptions, generate_text, load_bundle

path, prompt = sys.argv[1:]
options = GenerationOptions(
    max_new_tokens=120,
    sampling=SamplingOptions(temperature=0.7, top_k=20, repetition_penalty=1.05, seed=1),
    stop_strings=("\n\n",),
)
with load_bundle(path) as bundle:
    generation = generate_text(bundle, prompt, options)
    for piece in generation:  # whole characters, as soon as they are complete
        print(piece, end="", flush=True)
    print(f"\n[{generation.result.new_tokens} tokens, ended by {generation.result.stop_reason}]")
