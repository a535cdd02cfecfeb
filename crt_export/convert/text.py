"""Text of a converted model: tokenizer, begin and end of a sequence, chat template."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from crt_export.config import is_integer
from crt_export.convert.folder import Source
from crt_export.errors import CheckpointError, UnsupportedError
from crt_export.tokenizer_file import TokenizerFile, library_errors

TOKENIZER, GENERATION, SETTINGS = "tokenizer.json", "generation_config.json", "tokenizer_config.json"
TEMPLATE = "chat_template.jinja"
#: Files of the folder that a checkpoint takes along.
CARRIED = (TOKENIZER, GENERATION, SETTINGS, TEMPLATE)
_OTHERS = ("tokenizer.model", "spiece.model", "tekken.json", "vocab.json", "vocab.txt", "merges.txt")
_MOST_SHOWN = 5


@dataclass(frozen=True, kw_only=True)
class Text:
    """What a checkpoint says about text.

    Attributes:
        keys: Of ``config.json``: tokenizer, bos_token_id, eos_token_id.
        files: Content of the files that lie beside it.
        notes: What was left out, a sentence each.
    """

    keys: Mapping[str, Any]
    files: Mapping[str, bytes]
    notes: tuple[str, ...]


def read_text(source: Source, vocab_size: int) -> Text:
    """What belongs to text in a source.

    A begin-of-sequence token is kept only where the tokenizer itself puts one before a text: many configurations name
    one that no text ever had in training.

    Raises:
        CheckpointError: A file is damaged, or text can produce ids that the model has no embedding for.
        UnsupportedError: The tokenizer has no ``tokenizer.json``, or puts several tokens before a text.
    """
    notes: list[str] = []
    files: dict[str, bytes] = {}
    bos: int | None = None
    content = source.content(TOKENIZER)
    if content is None:
        _refuse_other_tokenizers(source)
        notes.append("no tokenizer.json: the checkpoint takes token ids only")
    else:
        content = _fitting(source, content, vocab_size, notes)
        files[TOKENIZER] = content
        bos = _begin(source, content)
    generation = source.document(GENERATION) or {}
    ends = _ends(source, generation, vocab_size, notes)
    for name in (GENERATION, SETTINGS):
        found = source.content(name)
        if found is not None:
            files[name] = found
    template = _template(source)
    if template is not None:
        files[TEMPLATE] = template.encode()
    keys = {
        "tokenizer": TOKENIZER if content is not None else "none",
        "bos_token_id": bos,
        "eos_token_id": None if not ends else ends[0] if len(ends) == 1 else tuple(ends),
    }
    return Text(keys=keys, files=files, notes=tuple(notes))


def _refuse_other_tokenizers(source: Source) -> None:
    found = [name for name in _OTHERS if source.content(name) is not None]
    if found:
        raise UnsupportedError(
            f"{source.path}: holds {found[0]} and no {TOKENIZER}; make one with transformers: "
            "AutoTokenizer.from_pretrained(folder).save_pretrained(folder)"
        )


def _fitting(source: Source, content: bytes, vocab_size: int, notes: list[str]) -> bytes:
    """The file, without special tokens that the model has no embedding for."""
    path = source.path / TOKENIZER
    if TokenizerFile(path, content).vocab_size <= vocab_size:
        return content
    document = json.loads(content)
    added = document.get("added_tokens") or []
    beyond = [token for token in added if token["id"] >= vocab_size and token.get("special")]
    if beyond:
        document["added_tokens"] = [token for token in added if token not in beyond]
        content = json.dumps(document, ensure_ascii=False).encode()
        names = ", ".join(str(token["content"]) for token in beyond[:_MOST_SHOWN])
        more = f" and {len(beyond) - _MOST_SHOWN} more" if len(beyond) > _MOST_SHOWN else ""
        notes.append(f"special tokens left out of {TOKENIZER}, for which the model has no embedding: {names}{more}")
    library = TokenizerFile(path, content)
    left = sorted(
        (number, name) for name, number in library.get_vocab(with_added_tokens=True).items() if number >= vocab_size
    )
    if left:
        shown = ", ".join(f"{name!r:.40} = {number}" for number, name in left[:_MOST_SHOWN])
        raise CheckpointError(
            f"{path}: text can produce {len(left)} ids for which the model has no embedding, vocab_size being "
            f"{vocab_size}: {shown}; use the tokenizer that the model was trained with"
        )
    return content


def _begin(source: Source, content: bytes) -> int | None:
    """The token that the tokenizer puts before every text; None if it puts none."""
    from tokenizers import Tokenizer

    with library_errors(CheckpointError, f"{source.path / TOKENIZER}: not a readable tokenizer.json"):
        library = Tokenizer.from_buffer(content)
        library.no_padding()
        library.no_truncation()
        alone = library.encode("x", add_special_tokens=False).ids
        whole = library.encode("x", add_special_tokens=True).ids
    where = (n for n in range(len(whole)) if whole[n : n + len(alone)] == alone)
    before = next(where, 0) if alone else len(whole)
    if before > 1:
        raise UnsupportedError(
            f"{source.path / TOKENIZER}: it puts {before} tokens before every text, {whole[:before]}, "
            "and a checkpoint can name one"
        )
    return int(whole[0]) if before else None


def _ends(source: Source, generation: Mapping[str, Any], vocab_size: int, notes: list[str]) -> list[int]:
    """Every token that ends a sequence: those of generation_config.json, which may be several, or of config.json."""
    found = generation.get("eos_token_id")
    name = GENERATION if found is not None else "config.json"
    found = source.config.get("eos_token_id") if found is None else found
    listed = found if isinstance(found, list) else [] if found is None else [found]
    if not all(is_integer(one) for one in listed):
        raise CheckpointError(
            f"{source.path / name}: eos_token_id must be an integer or a list of them, found {found!r:.60}"
        )
    beyond = [one for one in listed if not 0 <= one < vocab_size]
    if beyond:
        notes.append(f"eos_token_id {beyond} of {name} left out: the vocabulary ends at {vocab_size - 1}")
    ends = list(dict.fromkeys(one for one in listed if one not in beyond))
    if not ends:
        notes.append("no end-of-sequence token: generation ends at its limit only")
    return ends


def _template(source: Source) -> str | None:
    """The chat template, wherever it stands; of several the one called default."""
    content = source.content(TEMPLATE)
    if content is not None:
        return content.decode("utf-8", "replace")
    for name in (SETTINGS, "chat_template.json"):
        found = (source.document(name) or {}).get("chat_template")
        if isinstance(found, list):
            named = {one.get("name"): one.get("template") for one in found if isinstance(one, dict)}
            found = named.get("default")
        if isinstance(found, str):
            return found
    return None
