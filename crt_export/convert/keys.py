"""Keys of a Hugging Face ``config.json``: each is read with the default of its family, or known to change nothing.

Whatever is left over is refused by name: new features come as new keys, and a conversion that ignored one would be
silently wrong.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from crt_export.config import is_finite_number, is_integer
from crt_export.errors import CheckpointError, UnsupportedError, problem_list

#: Keys of any family that change no logits: names, training, generation, output forms.
_NEUTRAL = frozenset(
    (
        "_attn_implementation",
        "_attn_implementation_autoset",
        "_commit_hash",
        "_name_or_path",
        "_num_labels",
        "activation_dropout",
        "architectures",
        "attention_dropout",
        "attention_probs_dropout_prob",
        "attn_implementation",
        "attn_pdrop",
        "begin_suppress_tokens",
        "bos_token_id",
        "cache_implementation",
        "chunk_size_feed_forward",
        "classifier_dropout",
        "decoder_start_token_id",
        "diversity_penalty",
        "do_sample",
        "dropout",
        "dtype",
        "early_stopping",
        "embd_pdrop",
        "embed_dropout",
        "embedding_dropout",
        "encoder_no_repeat_ngram_size",
        "eos_token_id",
        "exponential_decay_length_penalty",
        "finetuning_task",
        "forced_bos_token_id",
        "forced_eos_token_id",
        "gradient_checkpointing",
        "hidden_dropout",
        "hidden_dropout_prob",
        "id2label",
        "init_std",
        "initializer_range",
        "is_decoder",
        "is_llama_config",
        "label2id",
        "layerdrop",
        "length_penalty",
        "max_length",
        "min_length",
        "model_type",
        "name",
        "no_repeat_ngram_size",
        "num_beam_groups",
        "num_beams",
        "num_labels",
        "num_return_sequences",
        "output_attentions",
        "output_hidden_states",
        "output_scores",
        "pad_token_id",
        "prefix",
        "pretraining_tp",
        "problem_type",
        "remove_invalid_values",
        "repetition_penalty",
        "resid_dropout",
        "resid_pdrop",
        "residual_dropout",
        "return_dict",
        "return_dict_in_generate",
        "sep_token_id",
        "summary_activation",
        "summary_first_dropout",
        "summary_proj_to_labels",
        "summary_type",
        "summary_use_proj",
        "suppress_tokens",
        "task_specific_params",
        "temperature",
        "tf_legacy_loss",
        "tokenizer_class",
        "top_k",
        "top_p",
        "torch_dtype",
        "torchscript",
        "transformers.js_config",
        "transformers_version",
        "typical_p",
        "unsloth_fixed",
        "unsloth_version",
        "use_bfloat16",
        "use_cache",
    )
)
#: Keys of any family that change nothing at these values alone.
_NEUTRAL_VALUES: Mapping[str, tuple[Any, ...]] = {
    "add_cross_attention": (False,),
    "bad_words_ids": (None,),
    "cross_attention_hidden_size": (None,),
    "is_encoder_decoder": (False,),
    "pruned_heads": ({},),
    "tie_encoder_decoder": (False,),
}
#: Default of a size that every file names.
REQUIRED = object()
#: Beyond every model; what follows from a size must stay small until tensors were held against it.
_MOST = 1 << 24


class Keys:
    """The keys of one file; those asked for are known."""

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        self._values, self._where = values, where
        self._known: set[str] = set()
        self._refused: list[str] = []

    def value(self, name: str, default: Any = None) -> Any:
        """Any value; null is one."""
        self._known.add(name)
        return self._values.get(name, default)

    def count(self, name: str, default: Any = REQUIRED) -> int:
        """A whole number above 0; null asks for the default."""
        found = self._given(name, default)
        if is_integer(found) and 0 < found <= _MOST:
            return int(found)
        raise self._wrong(name, f"a whole number above 0, at most {_MOST}", found)

    def whole(self, name: str, default: int) -> int:
        """A whole number from 0 on; null asks for the default."""
        found = self._given(name, default)
        if is_integer(found) and 0 <= found <= _MOST:
            return int(found)
        raise self._wrong(name, f"a whole number from 0 to {_MOST}", found)

    def window(self, name: str, default: int | None) -> int | None:
        """A whole number above 0; null is none, absence the default."""
        found = self.value(name, default)
        if found is None or (is_integer(found) and found > 0):
            return found
        raise self._wrong(name, "a whole number above 0 or null", found)

    def number(self, name: str, default: Any = REQUIRED) -> float:
        """A finite number above 0; null asks for the default."""
        found = self._given(name, default)
        if is_finite_number(found) and found > 0:
            return float(found)
        raise self._wrong(name, "a finite number above 0", found)

    def flag(self, name: str, default: bool) -> bool:
        """True or false; null asks for the default."""
        found = self._given(name, default)
        if isinstance(found, bool):
            return found
        raise self._wrong(name, "true or false", found)

    def text(self, name: str, default: str) -> str:
        """Text; null asks for the default."""
        found = self._given(name, default)
        if isinstance(found, str):
            return found
        raise self._wrong(name, "text", found)

    def mapping(self, name: str) -> dict[str, Any] | None:
        """An object; None where there is none."""
        found = self.value(name)
        if found is None or isinstance(found, dict):
            return found
        raise self._wrong(name, "an object", found)

    def names(self, name: str, length: int, allowed: tuple[Any, ...]) -> list[Any] | None:
        """A list of one of some values for each layer; None where there is none."""
        found = self.value(name)
        if found is None:
            return None
        if isinstance(found, list) and len(found) == length and all(one in allowed for one in found):
            return found
        raise self._wrong(name, f"a list of {length} of {', '.join(map(str, allowed))}", found)

    def only(self, name: str, *values: Any, why: str) -> None:
        """Refuse a key whose value is not one of these; absence and null are as good as the first.

        Args:
            name: The key.
            values: What changes nothing.
            why: What another value would ask for.
        """
        found = self.value(name, values[0])
        if found is not None and not any(
            found == value and isinstance(found, bool) == isinstance(value, bool) for value in values
        ):
            self._refused.append(f"{name} = {found!r:.80}: {why}")

    def skip(self, *names: str) -> None:
        """Know keys that change no logits of this family."""
        self._known.update(names)

    def finish(self) -> None:
        """Refuse what was asked for and cannot be, and every key that nobody asked for.

        Raises:
            UnsupportedError: There is some of it.
        """
        for name, values in _NEUTRAL_VALUES.items():
            if name not in self._known:
                self.only(name, *values, why="not converted")
        unknown = [
            f"{name} = {value!r:.80}: this version does not know this key of model_type {self._values['model_type']}, "
            "and a conversion that ignored it might be silently wrong"
            for name, value in self._values.items()
            if name not in self._known | _NEUTRAL and value is not None
        ]
        if self._refused or unknown:
            raise UnsupportedError(problem_list(self._where, [*self._refused, *unknown]))

    def _given(self, name: str, default: Any) -> Any:
        found = self.value(name)
        if found is not None:
            return found
        if default is REQUIRED:
            raise CheckpointError(f"{self._where}: missing key {name!r}")
        return default

    def _wrong(self, name: str, expected: str, found: object) -> CheckpointError:
        return CheckpointError(f"{self._where}: {name} must be {expected}, found {found!r:.80}")
