"""Resume a conversation from a file: ``python resume.py BUNDLE SNAPSHOT TEXT``, as often as you like.

Each call adds TEXT to what the model has read and written so far, lets it go on, and saves everything: caches,
recurrent state, random numbers, penalty history. The next call, in another process, goes on from there.
"""

import sys
from pathlib import Path

from crt_export.runtime import GenerationOptions, SamplingOptions, Snapshot, load_bundle

path, file, text = sys.argv[1], Path(sys.argv[2]), sys.argv[3]
options = GenerationOptions(
    max_new_tokens=40, sampling=SamplingOptions(temperature=0.7, repetition_penalty=1.1, seed=7)
)
with load_bundle(path) as bundle:
    session = bundle.session(bundle.default_target())
    if file.exists():
        session.restore(Snapshot.load(file))
        ids = bundle.tokenizer.encode(text)
    else:
        ids = bundle.tokenizer.encode_prompt(text)
    generation = session.generate([ids], options)
    for _ in generation:
        print(generation.pieces[0], end="", flush=True)
    print()
    session.snapshot().save(file)
