"""``tokenizer.json`` of what a GGUF file says about its tokenizer: byte-level BPE, by the name of its pre-tokenizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from crt_export.errors import UnsupportedError

_BYTES: dict[str, Any] = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
_ENGLISH = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def _split(numbers: str) -> dict[str, Any]:
    pattern = {"Regex": _ENGLISH + numbers + _REST}
    parts = [
        {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False},
        {**_BYTES, "use_regex": False},
    ]
    return {"type": "Sequence", "pretokenizers": parts}


_DIGITS = {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, _BYTES]}
#: By llama.cpp's name: pre-tokenizer, normalizer, whether a token that is whole skips merges, whether bos is the rule.
_KINDS: Mapping[str, tuple[dict[str, Any], dict[str, Any] | None, bool, bool]] = {
    "gpt-2": (_BYTES, None, False, False),
    "smollm": (_DIGITS, None, False, False),
    "llama-bpe": (_split(r"\p{N}{1,3}"), None, True, True),
    "qwen2": (_split(r"\p{N}"), {"type": "NFC"}, False, False),
}
_CONTROL, _OWN = 3, 4


def tokenizer_document(path: Path, meta: Mapping[str, Any]) -> dict[str, Any] | None:
    """The content of ``tokenizer.json``; None where the file has no tokenizer.

    Args:
        path: The file.
        meta: Its metadata.

    Raises:
        UnsupportedError: A kind of tokenizer that cannot be made of what GGUF keeps.
    """
    tokens = meta.get("tokenizer.ggml.tokens")
    if tokens is None:
        return None
    kind, name = meta.get("tokenizer.ggml.model"), meta.get("tokenizer.ggml.pre")
    if kind != "gpt2" or name not in _KINDS:
        raise UnsupportedError(
            f"{path}: its tokenizer ({kind}, {name}) cannot be made from a GGUF file; put the tokenizer.json of the "
            "original model beside it"
        )
    before, normalizer, whole, begins = _KINDS[str(name)]
    bos = meta.get("tokenizer.ggml.bos_token_id")
    adds = bool(meta.get("tokenizer.ggml.add_bos_token", begins))
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": _added(tokens, meta.get("tokenizer.ggml.token_type") or []),
        "normalizer": normalizer,
        "pre_tokenizer": before,
        "post_processor": None if bos is None or not adds else _begin(tokens[bos], bos),
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": whole,
            "vocab": {token: number for number, token in enumerate(tokens)},
            "merges": meta.get("tokenizer.ggml.merges", []),
        },
    }


def _added(tokens: Sequence[str], kinds: Sequence[int]) -> list[dict[str, Any]]:
    """Tokens that are found in a text before it is cut into words."""
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return [
        {"id": number, "content": tokens[number], **plain, "special": kind == _CONTROL}
        for number, kind in enumerate(kinds)
        if kind in (_CONTROL, _OWN)
    ]


def _begin(token: str, number: int) -> dict[str, Any]:
    """A template that puts one token before a text."""
    first = {"SpecialToken": {"id": token, "type_id": 0}}
    return {
        "type": "TemplateProcessing",
        "single": [first, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [first, {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {token: {"id": token, "ids": [number], "tokens": [token]}},
    }
