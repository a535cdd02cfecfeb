"""Serve several users at once from one process: ``python serve.py BUNDLE PROMPT...``, one thread and session each.

The sessions share the weights and the runtime's threads; what a user has said lives in that user's session alone.
"""

import sys
from concurrent.futures import ThreadPoolExecutor

from crt_export.runtime import Bundle, GenerationOptions, load_bundle


def answer(bundle: Bundle, target: str, prompt: str) -> str:
    """What one user gets: a session of its own, opened and closed here."""
    ids = bundle.tokenizer.encode_prompt(prompt)
    options = GenerationOptions(max_new_tokens=60, stop_strings=("\n",))
    with bundle.session(target, capacity=len(ids) + options.max_new_tokens) as session:
        generation = session.generate([ids], options)
        for _ in generation:
            pass
        return generation.texts[0] + generation.rest[0]  # nothing follows


def main() -> None:
    """Answer every prompt of the command line at the same time."""
    path, *prompts = sys.argv[1:]
    with load_bundle(path) as bundle, ThreadPoolExecutor(max_workers=len(prompts)) as users:
        target = bundle.default_target()
        answers = users.map(lambda prompt: answer(bundle, target, prompt), prompts)
        for prompt, text in zip(prompts, answers, strict=True):
            print(f"{prompt}{text}")


if __name__ == "__main__":
    main()
