"""The reference against a user's own model: agreement, every wrong word named, and files that say nothing."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from own_torch_model import Habits, OwnModel
from safetensors.torch import save_file
from torch.nn import functional as F

from crt_export.checkpoint import Checkpoint, load_checkpoint
from crt_export.errors import InputError, ParityError
from crt_export.parity.levels import OWN_MODEL
from crt_export.parity.own_model import check_own_model, require_own_model
from crt_export.parity.report import LevelResult

TANH = partial(F.gelu, approximate="tanh")
#: More than the tiny model's 32 hidden values, one and the spare rows, to tell a wrong head by itself.
TOKENS = 56

Compared = Callable[..., LevelResult]
Tensors = dict[str, torch.Tensor]


def small_embeddings(tensors: Tensors) -> None:
    """What makes eps matter: values of the size that training starts from."""
    tensors["embed.weight"] *= 0.04


@pytest.fixture(scope="module")
def checkpoints(make_checkpoint: Callable[..., Path]) -> dict[str, Checkpoint]:
    paths = {
        "crt": make_checkpoint(),
        "plain": make_checkpoint(model_type="transformer"),
        "small values": make_checkpoint(edit=small_embeddings),
        "half, two heads": make_checkpoint(rope_layout="half", num_attention_heads=2, rope_theta=500000.0),
        "tied": make_checkpoint(tie_word_embeddings=True),
        "window": make_checkpoint(sliding_window=20),
    }
    return {name: load_checkpoint(path) for name, path in paths.items()}


@pytest.fixture
def ids(heldout_text: Path) -> torch.Tensor:
    return torch.tensor([*heldout_text.read_bytes()[1000 : 1000 + TOKENS]])


def outputs(weights: Mapping[str, torch.Tensor], ids: torch.Tensor, habits: Habits) -> Tensors:
    """What the user saves: made by a model that has the weights of a checkpoint and its own habits."""
    model = OwnModel(weights, habits)
    with torch.no_grad():
        logits, hidden = model(ids[None])[0], model.hidden(ids[None])[0]
    return {"input_ids": ids, "logits": logits.contiguous(), "hidden": hidden.contiguous()}


@pytest.fixture
def compared(checkpoints: dict[str, Checkpoint], ids: torch.Tensor, tmp_path: Path) -> Compared:
    """``compared(name, habits, hidden=False, passes=None, weights=None, edit=None, **config)``: the level's result."""

    def compare(
        name: str,
        habits: Habits,
        *,
        hidden: bool = False,
        passes: str | None = None,
        weights: Tensors | None = None,
        edit: Callable[[Tensors], object] | None = None,
        **config: Any,
    ) -> LevelResult:
        checkpoint = checkpoints[name]
        tensors = outputs({**checkpoint.tensors, **(weights or {})}, ids, habits)
        if not hidden:
            del tensors["hidden"]
        if edit is not None:
            edit(tensors)
        file = tmp_path / "expect.safetensors"
        save_file(tensors, file, metadata=None if passes is None else {"passes": passes})
        changed = dataclasses.replace(checkpoint, config=dataclasses.replace(checkpoint.config, **config))
        return check_own_model(changed, file)

    return compare


@pytest.mark.parametrize(
    ("name", "habits", "regime"),
    [
        ("crt", Habits(), "exact"),
        ("crt", Habits(passes=4), 4),
        ("crt", Habits(first_position=3), "exact"),
        ("plain", Habits(), "exact"),
        ("plain", Habits(first_position=1), "exact"),
        ("half, two heads", Habits(layout="half", heads=2, theta=500000.0), "exact"),
        ("tied", Habits(tied=True), "exact"),
        ("window", Habits(window=20), "exact"),
    ],
    ids=str,
)
def test_a_model_of_the_same_equations_agrees(compared: Compared, name: str, habits: Habits, regime: object) -> None:
    result = compared(name, habits, hidden=True)
    assert result.passed, result.failures
    assert [check.name for check in result.checks] == ["logits", "hidden"]
    assert all(check.value is not None and check.value < 3e-5 for check in result.checks)
    assert result.data["passes"] == regime
    assert result.data["cause"] is None
    assert result.data["first_position"] is None


@pytest.mark.parametrize(
    ("name", "habits", "words"),
    [
        ("crt", Habits(layout="half"), "rope_layout = 'half'"),
        ("plain", Habits(layout="half"), "rope_layout = 'half'"),
        ("half, two heads", Habits(heads=2, theta=500000.0), "rope_layout = 'interleaved'"),
        ("crt", Habits(theta=500000.0), "rope_theta = 500000.0"),
        ("small values", Habits(eps=1e-6), "norm_eps = 1e-06"),
        ("crt", Habits(tied=True), "tie_word_embeddings = true"),
        ("plain", Habits(heads=8), "num_attention_heads = 8"),
        ("crt", Habits(window=20), "sliding_window = 20"),
        ("window", Habits(), "sliding_window = null"),
        ("crt", Habits(layout="half", theta=500000.0), "rope_layout = 'half' and rope_theta = 500000.0"),
    ],
    ids=str,
)
def test_a_wrong_word_of_the_configuration_is_named(compared: Compared, name: str, habits: Habits, words: str) -> None:
    result = compared(name, habits)
    assert result.passed is False
    (failure,) = [failure for failure in result.failures if "falls from" in failure]
    assert f"with {words} the difference falls from" in failure
    assert "in config.json and build again" in failure
    assert result.data["cause"]["words"] == words
    assert result.data["cause"]["after"] < 3e-5 < result.data["cause"]["before"]


@pytest.mark.evidence  # each cause is a search over all variations; wrong words above go the same way
@pytest.mark.parametrize(
    ("name", "habits", "words"),
    [
        ("crt", Habits(gelu=TANH), "the tanh form of GELU"),
        ("plain", Habits(rotary=False), "no rotary embedding"),
        ("crt", Habits(rms=True), "RMSNorm in place of LayerNorm"),
        ("crt", Habits(correction="ffn(norm(h))"), "a correction of h alone, not of h + x"),
        ("crt", Habits(correction="ffn(norm(h) + norm(x))"), "a correction of LN(h) + LN(x)"),
        ("crt", Habits(correction="added to h + x"), "a correction that is added to h + x, not to x"),
    ],
    ids=str,
)
def test_what_no_configuration_can_express_is_named(compared: Compared, name: str, habits: Habits, words: str) -> None:
    result = compared(name, habits)
    told = " ".join((*result.failures, *result.notes))
    assert f"your model uses {words}, which this version cannot express" in told
    # The tanh form differs by less than the limit on some weights: then it is a note and no failure.
    assert result.passed is (result.checks[0].value is not None and result.checks[0].value <= 1e-3)


@pytest.mark.evidence  # each cause is a search over all variations; wrong words above go the same way
@pytest.mark.parametrize(
    ("habits", "words", "advice"),
    [
        (Habits(transposed=True), "q, k, v, o transposed", "as [out, in]"),
        (Habits(correction="none"), "no correction", "model_type = 'transformer'"),
        (Habits(bos=1), "token 1 in front of input_ids", "bos_token_id"),
        (Habits(passes=3), "3 parallel passes", "metadata={'passes': '3'}"),
    ],
    ids=str,
)
def test_a_cause_in_the_weights_or_the_file_is_named(
    compared: Compared, habits: Habits, words: str, advice: str
) -> None:
    result = compared("crt", habits)
    assert result.passed is False
    assert f"with {words} the difference falls from" in result.failures[1]
    assert advice in result.failures[1]


def test_a_wrong_word_fails_below_the_limit_too(compared: Compared) -> None:
    """An eps that moves normal activations by less than the limit is still another model."""
    result = compared("crt", Habits(eps=1e-3), norm_eps=1.04e-3)
    assert result.checks[0].passed
    assert 3e-5 < (result.checks[0].value or 0) < 1e-3
    (failure,) = result.failures
    assert failure.startswith("config.json: with norm_eps = 0.001 the difference falls")


def test_the_file_says_which_regime_its_logits_are_of(compared: Compared) -> None:
    stated = compared("crt", Habits(passes=3), passes="3")
    assert stated.passed
    assert any("those of 3 parallel passes; the deployment runs the recurrence" in note for note in stated.notes)
    wrong = compared("crt", Habits(passes=4), passes="exact")
    assert wrong.passed is False
    assert "with 4 parallel passes the difference falls" in wrong.failures[1]


@pytest.mark.parametrize("hidden", [False, True], ids=["logits alone", "with hidden"])
def test_a_head_that_the_checkpoint_lacks_is_named(
    checkpoints: dict[str, Checkpoint], compared: Compared, hidden: bool
) -> None:
    """config.json says tied, the model has a head of its own whose weights were left out: nothing to try."""
    head = {name: tensor for name, tensor in checkpoints["crt"].tensors.items() if name.startswith("lm_head.")}
    result = compared("tied", Habits(), hidden=hidden, weights=head)
    assert result.passed is False
    assert "tie_word_embeddings = true says that it is the embedding: set it to false" in result.failures[1]
    found = "the hidden states agree" if hidden else "your logits are a linear function"
    assert found in result.failures[1]


@pytest.mark.parametrize(("shift", "way"), [(1, "up"), (-1, "down")])
def test_logits_cut_to_fit_the_next_tokens_are_named(compared: Compared, shift: int, way: str) -> None:
    result = compared("crt", Habits(), edit=lambda tensors: tensors.update(logits=tensors["logits"].roll(shift, 0)))
    assert result.passed is False
    assert f"with your logits moved {way} by one row the difference falls" in result.failures[1]


def test_hidden_states_after_the_final_norm_are_named(compared: Compared, checkpoints: dict[str, Checkpoint]) -> None:
    def normed(tensors: Tensors) -> None:
        weight, bias = (checkpoints["crt"].tensors[f"final_norm.{name}"] for name in ("weight", "bias"))
        tensors["hidden"] = F.layer_norm(tensors["hidden"], (32,), weight, bias, 1e-5)

    result = compared("crt", Habits(), hidden=True, edit=normed)
    assert result.checks[0].passed
    (failure,) = result.failures
    assert "yours is that after the final norm" in failure


def test_without_a_cause_the_message_narrows_it_down(compared: Compared) -> None:
    def noise(tensors: Tensors) -> None:
        tensors["logits"][7:] += torch.randn(tensors["logits"][7:].shape, generator=torch.Generator().manual_seed(0))

    result = compared("crt", Habits(), edit=noise)
    text = "\n".join(result.failures)
    assert "first at position 7 of 56" in text
    assert "no cause was found" in text
    assert "positions 0 to 6 agree" in text
    assert result.data["cause"] is None
    assert result.data["first_position"] == 7


def test_16_bits_in_the_users_model_are_suspected(compared: Compared) -> None:
    result = compared("crt", Habits(), edit=lambda t: t.update(logits=t["logits"].bfloat16().float()))
    assert any("bfloat16 or float16 in your model: run it in float32" in failure for failure in result.failures)


# --- files that say nothing
def without(name: str) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.pop(name)


def changed(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.update({name: change(tensors[name]).contiguous()})


def with_value(name: str, index: tuple[int, ...], value: float) -> Callable[[Tensors], object]:
    def edit(tensors: Tensors) -> None:
        tensors[name] = tensors[name].clone()
        tensors[name][index] = value

    return edit


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (without("logits"), "missing tensor 'logits'"),
        (without("input_ids"), "missing tensor 'input_ids'"),
        (lambda t: t.update(labels=t["input_ids"].clone()), "unexpected tensor 'labels'"),
        (changed("logits", torch.Tensor.half), "logits has dtype F16, expected F32: run your model in float32"),
        (changed("logits", torch.Tensor.bfloat16), "logits has dtype BF16, expected F32"),
        (changed("logits", torch.Tensor.double), "logits has dtype F64, expected F32"),
        (changed("input_ids", torch.Tensor.int), r"input_ids has dtype I32, expected I64: .*to\(torch.int64\)"),
        (changed("input_ids", lambda t: t[None]), r"input_ids has shape \[1, 56\], expected \[n\]: take the batch off"),
        (changed("logits", lambda t: t[None]), r"logits has shape \[1, 56, 256\], .*take the batch off, logits\[0\]"),
        (changed("logits", lambda t: t[:, :-1]), r"\[56, 255\], expected \[56, 256\]: .*config.json's vocab_size"),
        (changed("logits", lambda t: torch.cat([t, t[:1]])), r"\[57, 256\], expected .*one row per token of input_ids"),
        (changed("hidden", lambda t: t[:, :-1]), r"hidden has shape \[56, 31\], expected \[56, 32\]"),
        (with_value("logits", (9, 3), float("nan")), "logits is NaN or infinite in 1 rows, the first at position 9"),
        (with_value("hidden", (4, 3), float("inf")), "hidden is NaN or infinite in 1 rows, the first at position 4"),
        (with_value("input_ids", (5,), 256), r"1 ids outside the vocabulary .*, the first is 256 at position 5"),
        (with_value("input_ids", (6,), -1), "the first is -1 at position 6"),
        (changed("logits", torch.zeros_like), "logits has rows of one value only"),
        (lambda t: t.update({name: tensor[:0].clone() for name, tensor in t.items()}), "input_ids has 0 tokens"),
        (lambda t: t.update({name: tensor[:1].clone() for name, tensor in t.items()}), "input_ids has 1 tokens"),
        (
            lambda t: t.update({name: torch.cat([tensor, tensor]) for name, tensor in t.items()}),
            "input_ids has 112 tokens, above max_position_embeddings 64",
        ),
    ],
)  # fmt: skip
def test_a_file_that_says_nothing_is_refused(
    compared: Compared, edit: Callable[[Tensors], object], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        compared("crt", Habits(), hidden=True, edit=edit)


@pytest.mark.parametrize("passes", ["0", "-1", "ten", "", "1.0", "00001234567", "99999999999999999999", "４"])
def test_a_number_of_passes_that_is_none_is_refused(compared: Compared, passes: str) -> None:
    with pytest.raises(InputError, match="metadata passes is"):
        compared("crt", Habits(), passes=passes)


def test_all_problems_of_a_file_are_told_at_once(compared: Compared) -> None:
    def spoil(tensors: Tensors) -> None:
        tensors["logits"] = tensors["logits"][:-1, :7].half()
        tensors["ids"] = tensors.pop("input_ids")

    with pytest.raises(InputError, match=r"(?s)4 problems.*'ids'.*missing tensor 'input_ids'.*F16.*\[55, 7\]"):
        compared("crt", Habits(), edit=spoil)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 a pickle", b"\xff" * 64, (1 << 62).to_bytes(8, "little")])
def test_what_is_no_safetensors_file_is_refused(
    checkpoints: dict[str, Checkpoint], tmp_path: Path, content: bytes
) -> None:
    file = tmp_path / "expect.safetensors"
    file.write_bytes(content)
    with pytest.raises(InputError, match="expected a safetensors file with input_ids"):
        check_own_model(checkpoints["crt"], file)
    with pytest.raises(InputError, match="found a folder"):
        check_own_model(checkpoints["crt"], tmp_path)
    with pytest.raises(InputError, match="found nothing"):
        check_own_model(checkpoints["crt"], tmp_path / "absent")


# --- what builds on it
def test_the_demo_agrees_with_an_independent_model(demo_checkpoint: Path, heldout_text: Path, tmp_path: Path) -> None:
    checkpoint, ids = load_checkpoint(demo_checkpoint), torch.tensor([*heldout_text.read_bytes()[:128]])
    save_file(outputs(checkpoint.tensors, ids, Habits()), tmp_path / "expect.safetensors")
    result = check_own_model(checkpoint, tmp_path / "expect.safetensors")
    assert result.passed
    assert max(check.value or 0 for check in result.checks) < 2e-5


def test_a_difference_ends_a_build_with_a_report_of_this_level(
    checkpoints: dict[str, Checkpoint], ids: torch.Tensor, tmp_path: Path
) -> None:
    file = tmp_path / "expect.safetensors"
    save_file(outputs(checkpoints["crt"].tensors, ids, Habits(layout="half")), file)
    with pytest.raises(ParityError, match=r"(?s)your own model and this package's do not agree.*rope_layout") as caught:
        require_own_model(checkpoints["crt"], file)
    report = caught.value.report
    assert report["passed"] is False
    assert [(level["level"], level["target"]) for level in report["levels"]] == [(OWN_MODEL, "pytorch-fp32")]
    assert report["text"]["tokens"] == TOKENS
