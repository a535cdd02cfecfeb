"""The same bundle in Python and through the C API: the same logits, tokens, texts and refusals."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from crt_export.errors import InputError
from crt_export.runtime import Bundle, GenerationOptions, SamplingOptions, Snapshot, load_bundle

TARGET = "ort-cpu-fp32"
CLOSE = {"rtol": 0, "atol": 1e-5}
PROMPTS = [[65, 66, 67, 68, 69], [70], [71, 72, 73]]
# Seeds that never draw the tiny model's overflowing token.
SAMPLINGS: list[dict[str, Any]] = [
    {},
    {"temperature": 1.0, "seed": 5},
    {"temperature": 0.7, "top_k": 9, "seed": 3},
    {"temperature": 1.3, "top_p": 0.8, "seed": 2**32 - 1},
    {"temperature": 1.5, "min_p": 0.2, "repetition_penalty": 1.3, "seed": 4},
    {"repetition_penalty": 1.7},
]


def greedy(session: Any, prompt: Sequence[int], steps: int) -> tuple[list[int], np.ndarray]:
    """Tokens by the engine's argmax, and the logits [steps, vocab] they come from; the same calls in both languages."""
    logits = [session.prefill([prompt])[0]]
    tokens = [int(session.next_tokens[0])]
    for _ in range(steps - 1):
        logits.append(session.step([tokens[-1]])[0])
        tokens.append(int(session.next_tokens[0]))
    return tokens, np.stack(logits)


# --- logits and tokens
def test_greedy_steps_give_the_same_logits_and_tokens(in_python: Bundle, in_c: Any) -> None:
    expected, wanted = greedy(in_python.session(TARGET, capacity=64), PROMPTS[0], 59)
    tokens, logits = greedy(in_c.session(TARGET, capacity=64), PROMPTS[0], 59)
    assert tokens == expected
    np.testing.assert_allclose(logits, wanted, **CLOSE)


@pytest.mark.parametrize("kind", ["context_ready_transformer", "transformer"])
def test_caches_of_their_own_windows_and_rotations_give_the_same_logits(
    library: Any, tiny_bundle: Callable[..., tuple[Path, Any]], tmp_path: Path, kind: str
) -> None:
    path, _ = tiny_bundle(
        f"patterned-{kind}",
        model_type=kind,
        num_hidden_layers=3,
        num_key_value_heads=2,
        rope_theta=None,
        rope_frequencies=[[1.0, 0.3, 0.1, 0.03], [0.5, 0.05, 0.005, 0.0]],
        layer_attention=[[4, 0], [7, 1], [5, None]],
    )
    in_c = library.bundle(path)
    with load_bundle(path, allow_unvalidated=True) as bundle:
        here, there = bundle.session(TARGET, capacity=10, on_full="evict"), in_c.session(TARGET, capacity=10, on_full=1)
        expected, wanted = greedy(here, PROMPTS[0], 40)
        tokens, logits = greedy(there, PROMPTS[0], 40)
        assert tokens == expected
        np.testing.assert_allclose(logits, wanted, **CLOSE)
        assert there.position == list(here.position)
        there.save(tmp_path / "state")
        here.restore(Snapshot.load(tmp_path / "state"))
        np.testing.assert_allclose(here.step([77]), there.step([77]), **CLOSE)


@pytest.mark.evidence  # the tiny model above says the same in seconds; this is the trained one, for 512 steps
@pytest.mark.parametrize("target", ["ort-cpu-fp32", "ort-cpu-int8"])
def test_512_greedy_steps_of_the_demo_agree(library: Any, demo: Path, target: str) -> None:
    prompt = list(b"The for statement")
    with load_bundle(demo, allow_unvalidated=True) as bundle:
        expected, wanted = greedy(bundle.session(target, capacity=1024), prompt, 512)
        generation = bundle.session(target, capacity=1024).generate([prompt], GenerationOptions(max_new_tokens=512))
        assert [tokens[0] for tokens in generation] == expected
    in_c = library.bundle(demo)
    tokens, logits = greedy(in_c.session(target, capacity=1024), prompt, 512)
    assert tokens == expected
    np.testing.assert_allclose(logits, wanted, **CLOSE)
    assert len(set(tokens)) > 10
    generation = in_c.session(target, capacity=1024).generate([prompt], max_new_tokens=512)
    assert generation.run() == [expected]
    assert generation.text(0).encode() == bytes(expected)


@pytest.mark.evidence  # needs the trained demo: rounding carries on in it, and in no tiny random model
@pytest.mark.parametrize("target", ["ort-cpu-fp32", "ort-cpu-int8"])
def test_batch_mates_change_nothing_in_the_demo(library: Any, demo: Path, heldout_text: Path, target: str) -> None:
    text = heldout_text.read_bytes()
    rows = [list(text[3000 * row : 3000 * row + 60]) for row in range(3)]
    with load_bundle(demo, allow_unvalidated=True) as bundle:
        sessions = (
            bundle.session(target, batch=3, capacity=64),
            library.bundle(demo).session(target, batch=3, capacity=64),
        )
        alone = [bundle.session(target, capacity=64) for _ in rows]
        expected = np.stack([alone[row].prefill([rows[row][: 5 + 6 * row]])[0] for row in range(3)])
        for session in sessions:
            found = session.prefill([rows[row][: 5 + 6 * row] for row in range(3)])
            np.testing.assert_allclose(found, expected, **CLOSE)
        for step in range(30):
            tokens = [None if (step + 2 * row) % 5 == 0 else rows[row][20 + step] for row in range(3)]
            running = [row for row, token in enumerate(tokens) if token is not None]
            expected[running] = [alone[row].step([tokens[row]])[0] for row in running]
            for session in sessions:
                np.testing.assert_allclose(session.step(tokens), expected, **CLOSE)


def test_rows_of_unequal_length_agree_in_every_call(in_python: Bundle, in_c: Any) -> None:
    sessions = in_python.session(TARGET, batch=3), in_c.session(TARGET, batch=3)
    calls: list[Callable[[Any], np.ndarray]] = [
        lambda session: session.prefill(PROMPTS),
        lambda session: session.step([80, None, 81]),
        lambda session: session.prefill([[], [82, 83], [84] * 7], passes=2),
        lambda session: session.prefill([[85] * 9, [], [86]], chunk=4),
        lambda session: session.step([None, 87, None]),
    ]
    for call in calls:
        expected, found = (call(session) for session in sessions)
        np.testing.assert_allclose(found, expected, **CLOSE)
        np.testing.assert_array_equal(sessions[1].position, sessions[0].position)
        np.testing.assert_array_equal(sessions[1].next_tokens, sessions[0].next_tokens)


# --- sampling
@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
def test_generation_draws_the_same_tokens(in_python: Bundle, in_c: Any, sampling: dict[str, Any]) -> None:
    options = GenerationOptions(max_new_tokens=20, sampling=SamplingOptions(**sampling))
    generation = in_python.session(TARGET, batch=3).generate(PROMPTS, options)
    expected = [[-1 if token is None else token for token in tokens] for tokens in generation]
    in_other = in_c.session(TARGET, batch=3).generate(PROMPTS, max_new_tokens=20, sampling=sampling)
    assert list(in_other) == expected
    assert [in_other.text(row) for row in range(3)] == generation.texts
    assert [in_other.stop_reason(row) for row in range(3)] == list(generation.stop_reasons)


# --- stops
def test_generation_stops_at_the_same_token_for_the_same_reason(in_python: Bundle, in_c: Any) -> None:
    free = in_python.session(TARGET).generate([PROMPTS[0]], GenerationOptions(max_new_tokens=12))
    tokens = [token for (token,) in free]
    stops: list[tuple[dict[str, Any], str]] = [
        ({"stop_strings": (free.texts[0][3:5],)}, "stop_string"),
        ({"stop_tokens": (tokens[-1],)}, "stop_token"),
    ]
    for stop, reason in stops:
        options = GenerationOptions(max_new_tokens=20, **stop)
        expected = in_python.session(TARGET).generate([PROMPTS[0]], options)
        wanted = [token for (token,) in expected if token is not None]
        found = in_c.session(TARGET).generate([PROMPTS[0]], max_new_tokens=20, **stop)
        assert found.run() == [wanted]
        assert (found.text(0), found.stop_reason(0)) == (expected.texts[0], reason)
        assert expected.stop_reasons[0] == reason


def test_every_end_token_ends_a_row_in_both_languages(
    library: Any, tiny: Path, tmp_path: Path, sign_again: Callable[[Path], None]
) -> None:
    with load_bundle(tiny, allow_unvalidated=True) as bundle:
        free = bundle.session(TARGET).generate([PROMPTS[0]], GenerationOptions(max_new_tokens=12))
        tokens = [token for (token,) in free]
    ends = [next(token for token in range(256) if token not in tokens), tokens[4]]
    folder = Path(shutil.copytree(tiny, tmp_path / "several"))
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["model"]["eos_token_ids"] = ends
    (folder / "manifest.json").write_text(json.dumps(manifest))
    sign_again(folder)
    expected = tokens[: tokens.index(ends[1])]
    in_c = library.bundle(folder)
    with load_bundle(folder, allow_unvalidated=True) as bundle:
        assert bundle.model.eos_token_ids == tuple(ends)
        for ignore, wanted in ((False, (expected, "stop_token")), (True, (tokens, "max_new_tokens"))):
            options = GenerationOptions(max_new_tokens=12, ignore_eos=ignore)
            found = bundle.session(TARGET).generate([PROMPTS[0]], options)
            assert ([token for (token,) in found if token is not None], found.stop_reasons[0]) == wanted
            other = in_c.session(TARGET).generate([PROMPTS[0]], max_new_tokens=12, ignore_eos=ignore)
            assert (other.run()[0], other.stop_reason(0)) == wanted


# --- refusals
@pytest.mark.parametrize(
    ("call", "found"),
    [
        (lambda session: session.step([1, 2, 3]), "3"),
        (lambda session: session.prefill([[1], [2], [3]]), "3"),
        (lambda session: session.step([256, 0]), "256"),
        (lambda session: session.prefill([[5], [-2]]), "-2"),
        (lambda session: [session.prefill([[1] * 20, [2]]) for _ in range(2)], "20"),
    ],
    ids=["step: batch", "prefill: batch", "id too large", "id negative", "over the capacity"],
)
def test_both_refuse_and_say_what_was_found(
    in_python: Bundle, in_c: Any, c_library: Any, call: Callable[[Any], Any], found: str
) -> None:
    twin, session = (bundle.session(TARGET, batch=2, capacity=32) for bundle in (in_python, in_c))
    with pytest.raises(InputError) as in_one:
        call(twin)
    with pytest.raises(c_library.CrtError) as in_other:
        call(session)
    assert in_other.value.kind == "input"
    for text in (str(in_one.value), in_other.value.message):
        assert found in text
    assert session.position == list(twin.position)


def test_an_unvalidated_bundle_is_refused_unless_allowed(library: Any, c_library: Any, tiny: Path) -> None:
    with pytest.raises(c_library.CrtError, match="is not validated") as refusal:
        library.bundle(tiny, allow_unvalidated=False)
    assert refusal.value.kind == "bundle"
