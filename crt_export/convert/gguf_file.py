"""A GGUF file of the Llama or Gemma families as a source: it is read as the Hugging Face folder it was made from.

Weights are dequantised to float32; they are what the quantisation left of the original ones. llama.cpp reorders
the rows of queries and keys of ``llama``, and adds 1 to the gains of ``gemma``: both are undone. The ``gguf`` package
reads it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from crt_export.convert.folder import StoredTensor, json_object
from crt_export.convert.gguf_tokenizer import tokenizer_document
from crt_export.convert.rotary import rotary_set
from crt_export.convert.text import GENERATION, SETTINGS, TEMPLATE, TOKENIZER
from crt_export.errors import CheckpointError, MissingDependencyError, UnsupportedError, problem_list
from crt_export.user_files import is_input, open_input, read_input

_MODEL = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
#: Norms of a layer, which llama.cpp names by their place and transformers by their history.
_NORMS = {
    "llama": {"ffn_norm": "post_attention_layernorm"},
    "gemma": {"ffn_norm": "post_attention_layernorm"},
    "gemma3": {
        "post_attention_norm": "post_attention_layernorm",
        "ffn_norm": "pre_feedforward_layernorm",
        "post_ffw_norm": "post_feedforward_layernorm",
    },
}
_NAME = re.compile(r"blk\.([0-9]+)\.([a-z_]+)\.(weight|bias)")
_SIZES = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.key_length": "head_dim",
    "rope.freq_base": "rope_theta",
    "vocab_size": "vocab_size",
}
#: Of no consequence, or held against others.
_SKIPPED = {"attention.value_length", "rope.dimension_count", "rope.scaling.type", "rope.scaling.factor"}
_MOST_JSON_BYTES = 1 << 26
#: What the frequencies are divided by; it keeps the effect of the parameters, not the parameters.
_SCALED = "rope_freqs.weight"
_LLAMA3 = {
    "rope_type": "llama3",
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
_LLAMA3_FACTORS = (8.0, 32.0)
#: Layers of the one Gemma 3 whose scores are scaled by hidden_size / heads; llama.cpp tells it by them too.
_GEMMA3_27B_LAYERS = 62


class GgufFile:
    """The file, under the names and keys of the Hugging Face folder."""

    def __init__(self, path: Path) -> None:
        """Read its metadata.

        Raises:
            MissingDependencyError: The ``gguf`` package is not installed.
            CheckpointError: The file is damaged.
            UnsupportedError: It is of another family, or of several files.
        """
        self.path = path
        self._reader = _opened(path)
        with _damaged(path):
            self._read_metadata()

    def _read_metadata(self) -> None:
        path = self.path
        self._meta = {name: field.contents() for name, field in self._reader.fields.items()}
        self._kind = str(self._meta.get("general.architecture"))
        if self._kind not in _NORMS:
            raise UnsupportedError(
                f"{path}: a GGUF file of architecture {self._kind!r:.40}; converted are {', '.join(_NORMS)}: take the "
                "Hugging Face folder that it was made from"
            )
        self.tensors: dict[str, StoredTensor] = {}
        self._theirs: dict[str, Any] = {}
        problems = [problem for tensor in self._reader.tensors if (problem := self._add(tensor)) is not None]
        if problems:
            raise UnsupportedError(problem_list(str(path), problems[:20]))
        self.config = self._made_config()

    def read(self, name: str) -> Tensor:
        """One tensor, dequantised, as the folder has it."""
        with _damaged(self.path):
            return self._dequantised(name)

    def _dequantised(self, name: str) -> Tensor:
        import gguf

        tensor = self._theirs[name]
        kind = gguf.GGMLQuantizationType
        if tensor.tensor_type == kind.F16:
            values = torch.from_numpy(tensor.data.copy())
        else:
            values = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy())
        values = values.reshape(self.tensors[name].shape).to(self.tensors[name].dtype)
        if self._kind == "llama" and ".self_attn.q_proj." in name:
            return _rows_of_halves(values, int(self.config["num_attention_heads"]))
        if self._kind == "llama" and ".self_attn.k_proj." in name:
            return _rows_of_halves(values, int(self.config["num_key_value_heads"]))
        return values - 1 if self._kind != "llama" and "norm" in name else values

    def same(self, first: str, second: str) -> bool:
        """Whether two tensors are equal."""
        return torch.equal(self.read(first), self.read(second))

    def document(self, name: str) -> dict[str, Any] | None:
        """A JSON object that the folder would have."""
        content = self.content(name)
        return None if content is None else json_object(self.path.with_name(name), content)

    def content(self, name: str) -> bytes | None:
        """A file that the folder would have: what lies beside this one, else made of its metadata."""
        beside = self.path.with_name(name)
        if name in (TOKENIZER, TEMPLATE) and is_input(beside):
            return read_input(beside, most=_MOST_JSON_BYTES)
        if name == TOKENIZER:
            with _damaged(self.path):
                document = tokenizer_document(self.path, self._meta)
        elif name == GENERATION:
            ends = [self._meta.get(f"tokenizer.ggml.{key}_token_id") for key in ("eos", "eot", "eom")]
            document = {"eos_token_id": list(dict.fromkeys(one for one in ends if one is not None))}
        elif name == SETTINGS:
            document = {"chat_template": self._meta.get("tokenizer.chat_template")}
        else:
            return None
        return None if document is None else json.dumps(document, ensure_ascii=False, indent=1).encode()

    def _add(self, tensor: Any) -> str | None:
        """Take a tensor under the folder's name, or say why it cannot be."""
        name = self._folder_name(tensor.name)
        if tensor.name == _SCALED:
            return None
        if name is None:
            return f"tensor {tensor.name} is not converted"
        shape = tuple(int(dim) for dim in reversed(tensor.shape))
        dtype = {"F16": torch.float16, "BF16": torch.bfloat16}.get(tensor.tensor_type.name, torch.float32)
        self.tensors[name] = StoredTensor(shape=shape, dtype=dtype, file=self.path)
        self._theirs[name] = tensor
        return None if _is_readable(tensor) else f"tensor {tensor.name} of type {tensor.tensor_type.name} is not read"

    def _folder_name(self, name: str) -> str | None:
        match = _NAME.fullmatch(name)
        if match is None:
            stem, _, kind = name.rpartition(".")
            return f"{_MODEL[stem]}.{kind}" if stem in _MODEL else None
        module = {**_LAYER, **_NORMS[self._kind]}.get(match[2])
        return None if module is None else f"model.layers.{match[1]}.{module}.{match[3]}"

    def _made_config(self) -> dict[str, Any]:
        prefix = f"{self._kind}."
        own = {name.removeprefix(prefix): value for name, value in self._meta.items() if name.startswith(prefix)}
        config = {ours: own[name] for name, ours in _SIZES.items() if name in own}
        config["model_type"] = "gemma3_text" if self._kind == "gemma3" else self._kind
        config["tie_word_embeddings"] = "lm_head.weight" not in self.tensors
        config.setdefault("vocab_size", self.tensors["model.embed_tokens.weight"].shape[0])
        if any(name.endswith("q_proj.bias") for name in self.tensors):
            config["attention_bias"] = True
        unknown = set(own) - set(_SIZES) - _SKIPPED
        if self._kind == "gemma3":
            unknown -= {"attention.sliding_window", "rope.freq_base_swa", "final_logit_softcapping"}
            config |= self._gemma3(own, config)
        scaling = own.get("rope.scaling.type", "none")
        if scaling == "linear":
            config["rope_scaling"] = {"rope_type": "linear", "factor": float(own["rope.scaling.factor"])}
        elif scaling != "none":
            unknown.add("rope.scaling.type")
        head_dim = config.get("head_dim", config["hidden_size"] // config["num_attention_heads"])
        if own.get("rope.dimension_count", head_dim) != head_dim:
            unknown.add("rope.dimension_count")
        factors = next((tensor.data for tensor in self._reader.tensors if tensor.name == _SCALED), None)
        if factors is not None:
            config["rope_scaling"] = self._scaling_by(factors, head_dim, config.get("rope_theta", 10000.0))
        if unknown:
            shown = [f"{prefix}{name} = {own[name]!r:.60} is not known to this version" for name in sorted(unknown)]
            raise UnsupportedError(problem_list(str(self.path), shown))
        return config

    def _scaling_by(self, factors: Any, head_dim: int, theta: float) -> dict[str, Any]:
        """The parameters of Llama 3.1 and later that divide the frequencies by these factors."""
        usual = rotary_set(None, head_dim, 1, theta=theta).frequencies
        wanted = torch.tensor(usual) / torch.from_numpy(factors.copy()).flatten()
        for factor in _LLAMA3_FACTORS:
            parameters = {**_LLAMA3, "factor": factor}
            found = rotary_set(parameters, head_dim, 1, theta=theta).frequencies
            if wanted.shape == (len(found),) and torch.allclose(torch.tensor(found), wanted, rtol=1e-5, atol=0):
                return parameters
        raise UnsupportedError(
            f"{self.path}: {_SCALED} scales the frequencies as no Llama does; take the original folder"
        )

    def _gemma3(self, own: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
        head_dim = config.get("head_dim", 256)
        largest = config["num_hidden_layers"] == _GEMMA3_27B_LAYERS
        return {
            "sliding_window": own.get("attention.sliding_window"),
            "rope_theta": own.get("rope.freq_base", 1000000.0),
            "rope_local_base_freq": own.get("rope.freq_base_swa", 10000.0),
            "final_logit_softcapping": own.get("final_logit_softcapping"),
            "query_pre_attn_scalar": config["hidden_size"] // config["num_attention_heads"] if largest else head_dim,
        }


@contextmanager
def _damaged(path: Path) -> Iterator[None]:
    """Say that a file is damaged where its values are of other kinds than they must be."""
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        what = f"{type(error).__name__}: {error!s:.80}"
        raise CheckpointError(f"{path}: expected a complete GGUF file, found a damaged one ({what})") from None


def _opened(path: Path) -> Any:
    with open_input(path) as stream:
        start = stream.read(4)
    if start != b"GGUF":
        raise CheckpointError(f"{path}: expected a GGUF file, found something else")
    try:
        import gguf
    except ImportError:
        raise MissingDependencyError(f"{path}: reading a GGUF file needs the package gguf: pip install gguf") from None
    try:
        reader = gguf.GGUFReader(path)
    except Exception as error:  # whatever the package makes of a damaged file
        raise CheckpointError(f"{path}: expected a complete GGUF file, found a damaged one ({error!s:.80})") from None
    parts = reader.get_field("split.count")
    if parts is not None and parts.contents() > 1:
        raise UnsupportedError(f"{path}: one of {parts.contents()} files; merge them with llama-gguf-split --merge")
    return reader


def _is_readable(tensor: Any) -> bool:
    """Whether the package dequantises the type of a tensor; tried on its first row."""
    import gguf

    try:
        gguf.dequantize(tensor.data[:1], tensor.tensor_type)
    except NotImplementedError:
        return False
    return True


def _rows_of_halves(rows: Tensor, heads: int) -> Tensor:
    """Rows of pairs (2j, 2j+1), as llama.cpp has them, as rows of pairs (j, j + head_dim/2)."""
    pairs = rows.reshape(heads, -1, 2, *rows.shape[1:])
    return pairs.transpose(1, 2).reshape(rows.shape)
