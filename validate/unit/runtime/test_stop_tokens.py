"""Tokens that end a row: by id, by the text of a special token, as a stop string, as one of several end tokens."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

from crt_export.cli import main
from crt_export.errors import InputError
from crt_export.runtime import Bundle, GenerationOptions, generate_text, load_bundle

TARGET = "ort-cpu-fp32"
PROMPT = "w72 w101 w108"
COUNT = 12
Folder = Callable[..., Path]


@pytest.fixture(scope="module")
def drawn(crt_path: Path) -> list[int]:
    """What the model goes on with; every test lets one of these tokens end it."""
    with load_bundle(crt_path, allow_unvalidated=True) as bundle, bundle.session(TARGET) as session:
        generation = session.generate([[72, 101, 108]], GenerationOptions(max_new_tokens=COUNT))
        return [token for (token,) in generation if token is not None]


@pytest.fixture(scope="module")
def end(drawn: list[int]) -> int:
    """The last token that comes for the first time after another one."""
    return next(token for token in reversed(drawn[1:]) if drawn.index(token) > 0)


@pytest.fixture
def folder(crt_path: Path, tmp_path: Path, end: int, sign_again: Callable[[Path], None]) -> Folder:
    """``folder(**model)``: a bundle whose tokenizer writes ids as words, w0 w1 ..., and one as <|eot|>."""

    def write(**model: Any) -> Path:
        path = Path(shutil.copytree(crt_path, tmp_path / f"bundle{len(list(tmp_path.iterdir()))}"))
        words = {"<|eot|>" if number == end else f"w{number}": number for number in range(256)}
        library: Any = Tokenizer(models.WordLevel(words, unk_token="w0"))
        library.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        library.add_special_tokens([AddedToken("<|eot|>", special=True)])
        library.save(str(path / "tokenizer.json"))
        manifest = json.loads((path / "manifest.json").read_text())
        manifest["model"] |= {"tokenizer": "tokenizer.json", **model}
        manifest |= {"validated": True, "parity": {"passed": True}}
        (path / "manifest.json").write_text(json.dumps(manifest))
        sign_again(path)
        return path

    return write


@pytest.fixture
def bundle(folder: Folder) -> Any:
    with load_bundle(folder()) as opened:
        yield opened


def ended(bundle: Bundle, **options: Any) -> tuple[list[int], str, Any]:
    generation = generate_text(bundle, PROMPT, GenerationOptions(max_new_tokens=COUNT, **options))
    for _ in generation:
        pass
    result = generation.result
    return list(result.token_ids), result.stop_reason, result.stopped_by


@pytest.mark.parametrize("how", ["id", "alias", "text", "stop string"])
def test_a_stop_token_ends_the_row_however_it_is_named(how: str, bundle: Bundle, drawn: list[int], end: int) -> None:
    options: dict[str, dict[str, Any]] = {
        "id": {"stop_tokens": (end,)},
        "alias": {"stop_token_ids": (end,)},
        "text": {"stop_tokens": ("<|eot|>",)},
        "stop string": {"stop_strings": ("<|eot|>", "never there")},
    }
    assert ended(bundle, **options[how]) == (drawn[: drawn.index(end)], "stop_token", end)


def test_without_a_stop_token_the_row_goes_on(bundle: Bundle, drawn: list[int]) -> None:
    assert ended(bundle) == (drawn, "max_new_tokens", None)


def test_each_of_several_end_tokens_ends_the_row(folder: Folder, drawn: list[int], end: int) -> None:
    other = next(token for token in range(256) if token not in drawn)
    for ends in ([end], [other, end], [end, other, end]):
        with load_bundle(folder(eos_token_ids=ends)) as bundle:
            assert ended(bundle) == (drawn[: drawn.index(end)], "stop_token", end)
            assert ended(bundle, ignore_eos=True) == (drawn, "max_new_tokens", None)


def test_what_would_never_stop_anything_is_refused(bundle: Bundle, crt_path: Path) -> None:
    with pytest.raises(InputError, match=r"(?s)2 problems.*256 is outside the vocabulary.*'w3' is no special token"):
        ended(bundle, stop_tokens=(256, "w3", "<|eot|>"))
    with (
        load_bundle(crt_path, allow_unvalidated=True) as of_bytes,
        of_bytes.session(TARGET) as session,
        pytest.raises(InputError, match="'<s>' is no special token"),
    ):
        session.generate([[1]], GenerationOptions(max_new_tokens=4, stop_tokens=("<s>",)))


def test_ids_and_their_alias_are_one_list() -> None:
    options = GenerationOptions(stop_tokens=(7, "<s>", 7), stop_token_ids=(9, 7))
    assert (options.stop_tokens, options.stop_token_ids) == ((7, "<s>", 9), (7, 9))
    assert GenerationOptions(stop_tokens=[3]) == GenerationOptions(stop_token_ids=(3,))
    for wrong in (
        {"stop_tokens": "<s>"},
        {"stop_tokens": ("",)},
        {"stop_tokens": (1.5,)},
        {"stop_token_ids": ("<s>",)},
    ):
        with pytest.raises(InputError, match="generation options"):
            GenerationOptions(**wrong)  # type: ignore[arg-type]


def test_prompt_text_that_spells_a_special_token(bundle: Bundle) -> None:
    counts = []
    for parse_special in (True, False):
        seen: list[Any] = []
        encode = bundle.tokenizer.encode_prompt
        generation = generate_text(
            bundle, "w1 <|eot|>", GenerationOptions(max_new_tokens=1), parse_special=parse_special
        )
        seen += list(generation)
        counts.append(generation.result.token_ids)
        assert encode("w1 <|eot|>", parse_special=parse_special)[0] == 1
    assert counts[0] != counts[1], "the token was fed both times, or never"


def test_the_command_line_takes_ids_and_texts(folder: Folder, drawn: list[int], end: int, capsys: Any) -> None:
    path = str(folder())

    def generate(*arguments: str) -> tuple[int, str]:
        code = main(["generate", path, "--prompt", PROMPT, "--max-new-tokens", str(COUNT), *arguments])
        return code, capsys.readouterr().err

    another = str(next(token for token in range(256) if token not in drawn))
    for given in (("--stop-token", str(end)), ("--stop-token", "<|eot|>"), ("--stop", "<|eot|>")):
        code, written = generate("--stop-token", another, *given)
        assert code == 0
        assert f"{drawn.index(end)} tokens, ended by stop_token {end}]" in written
    assert "ended by max_new_tokens" in generate("--no-parse-special")[1]
    code, written = generate("--stop-token", "<s>")
    assert (code, "'<s>' is no special token" in written) == (2, True)
