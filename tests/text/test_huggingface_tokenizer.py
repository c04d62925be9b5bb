"""The tokenizer of a Hugging Face folder: the same methods, the same text, and no word run into the one before."""

import dataclasses
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizer_json import mixtral_like

from minimoe.cli import main
from minimoe.core.config import ModelConfig
from minimoe.core.errors import UserError
from minimoe.layers import decoder
from minimoe.storage import huggingface
from minimoe.text import huggingface_tokenizer, tokenizer
from minimoe.text.huggingface_tokenizer import PretrainedTokenizer

TEXT = "The bread rises.\n\n  « Ça va ? » 日本 🎉 fin"

needs_library = pytest.mark.skipif(
    importlib.util.find_spec("tokenizers") is None, reason='needs the tokenizers library: pip install "minimoe[hf]"'
)


@pytest.fixture
def mixtral(tmp_path: Path) -> PretrainedTokenizer:
    (tmp_path / "tokenizer.json").write_text(json.dumps(mixtral_like()))
    return huggingface_tokenizer.load(tmp_path)


@needs_library
def test_text_comes_back_and_special_tokens_stay_inside(mixtral: PretrainedTokenizer) -> None:
    ids = mixtral.encode(TEXT)
    assert ids.dtype == np.int32
    assert ids[0] == 1, "a text begins with <s>"
    assert len(ids) > 4, "the truncation of the file is for training"
    assert mixtral.decode(ids) == mixtral.decode([*ids, 2]) == TEXT
    assert mixtral.bytes_of(ids) == mixtral.bytes_of(ids[None]) == len(TEXT.encode())
    assert mixtral.vocab_size == 275
    assert mixtral.encode("the bread").tolist() == [1, 269, 274]


@needs_library
def test_a_stream_is_whole_characters_that_add_up_to_the_text(mixtral: PretrainedTokenizer) -> None:
    ids = mixtral.encode(TEXT).tolist()
    pieces = list(mixtral.stream(iter(ids)))
    assert "".join(pieces) == TEXT
    assert len(pieces) > 20 and "�" not in "".join(pieces) and all(pieces)
    supply = iter(ids)
    assert next(mixtral.stream(supply)) == "T"
    assert list(supply) == ids[3:], "a piece comes before the next token is asked for: here after <s>, ▁ and T"


@needs_library
def test_a_word_that_continues_a_prompt_keeps_its_space(mixtral: PretrainedTokenizer) -> None:
    prompt, written = mixtral.encode("the").tolist(), [274]
    assert "".join(mixtral.stream(written)) == "bread", "alone it is the beginning of a text"
    assert "".join(mixtral.stream(prompt + written)) == "the bread"


@needs_library
def test_half_a_character_at_the_end_is_shown_as_damaged(mixtral: PretrainedTokenizer) -> None:
    ids = mixtral.encode("the 日").tolist()
    assert "".join(mixtral.stream(ids[:-1])) == mixtral.decode(ids[:-1]) == "the ��"


@needs_library
def test_bytes_of_a_text_and_of_its_parts(tmp_path: Path) -> None:
    huggingface_tokenizer.write(tmp_path, tokenizer.build("byte", ""))
    bytewise = huggingface_tokenizer.load(tmp_path)
    ids = bytewise.encode("étés à côté")
    assert bytewise.bytes_of(ids) == len(ids) == 16
    assert [bytewise.bytes_of(ids[:n]) for n in (1, 2, 3)] == [1, 2, 3]


@needs_library
@pytest.mark.parametrize("ids", [[-1], [0.5], [[1, 2]]])
def test_what_are_no_ids_is_refused(mixtral: PretrainedTokenizer, ids: Any) -> None:
    with pytest.raises(UserError, match="whole numbers from 0 up"):
        mixtral.decode(ids)


@needs_library
def test_no_ids_are_no_text(mixtral: PretrainedTokenizer) -> None:
    assert mixtral.decode([]) == "" and mixtral.bytes_of([]) == 0 and list(mixtral.stream([])) == []


OWN = [tokenizer.ByteTokenizer(), tokenizer.build("char", TEXT)]


@needs_library
@pytest.mark.parametrize("own", OWN, ids=["byte", "char"])
def test_our_own_tokenizers_can_be_written(tmp_path: Path, own: tokenizer.Tokenizer) -> None:
    huggingface_tokenizer.write(tmp_path, own)
    read = huggingface_tokenizer.load(tmp_path)
    told = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert told == {"tokenizer_class": "PreTrainedTokenizerFast"}
    ids = own.encode(TEXT)
    assert read.encode(TEXT).tolist() == ids.tolist()
    assert read.decode(ids) == "".join(read.stream(ids.tolist())) == TEXT
    assert read.vocab_size == own.vocab_size and read.bytes_of(ids) == own.bytes_of(ids)


@needs_library
def test_a_character_that_nobody_knows_is_refused(tmp_path: Path) -> None:
    huggingface_tokenizer.write(tmp_path, tokenizer.build("char", "abc"))
    with pytest.raises(UserError, match="cannot encode 'abx'"):
        huggingface_tokenizer.load(tmp_path).encode("abx")


@needs_library
def test_a_whole_model_is_saved_and_loaded(tmp_path: Path, mixtral: PretrainedTokenizer, small: ModelConfig) -> None:
    config = dataclasses.replace(small, vocab_size=280)
    params = decoder.init(np.random.default_rng(0), config)
    huggingface.save(tmp_path / "saved", params, config, mixtral, end_tokens=(2,))
    loaded = huggingface.load(tmp_path / "saved").to("cpu")
    assert loaded.end_tokens == (2,) and not loaded.on_gpu
    assert loaded.tokenizer.encode(TEXT).tolist() == mixtral.encode(TEXT).tolist()
    np.testing.assert_array_equal(loaded.params.embedding.table, params.embedding.table)


@needs_library
def test_a_tokenizer_of_another_model_is_refused(
    tmp_path: Path, mixtral: PretrainedTokenizer, small: ModelConfig
) -> None:
    params = decoder.init(np.random.default_rng(0), small)
    huggingface.save(tmp_path / "saved", params, small, mixtral)
    with pytest.raises(UserError, match="tokenizer of 275 tokens and a model of 13"):
        huggingface.load(tmp_path / "saved")


@needs_library
def test_a_vocabulary_with_gaps_is_as_large_as_its_largest_id(mixtral: PretrainedTokenizer, tmp_path: Path) -> None:
    described = mixtral_like()
    described["model"]["vocab"]["▁far"] = 5000
    (tmp_path / "tokenizer.json").write_text(json.dumps(described))
    assert huggingface_tokenizer.load(tmp_path).vocab_size == 5001


@needs_library
def test_text_that_no_token_stands_for_is_counted_in_bits_per_byte(
    tmp_path: Path, small: ModelConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    words = {
        "version": "1.0",
        "added_tokens": [{"id": 2, "content": "<unk>", "special": True, "single_word": False, "lstrip": False,
                          "rstrip": False, "normalized": False}],
        "pre_tokenizer": {"type": "Whitespace"},
        "model": {"type": "WordLevel", "vocab": {"a": 0, "b": 1, "<unk>": 2}, "unk_token": "<unk>"},
    }  # fmt: skip
    params = decoder.init(np.random.default_rng(0), small)
    huggingface.save(tmp_path / "saved", params, small)
    (tmp_path / "saved" / "tokenizer.json").write_text(json.dumps(words))
    for text, size in (("a zz b yyyyyyyyyy", 16), ("zz zz", 5)):  # all bytes but those of the first token
        (tmp_path / "text.txt").write_text(text)
        assert main.main(["evaluate", str(tmp_path / "saved"), "--text", str(tmp_path / "text.txt")]) == 0
        found = json.loads(capsys.readouterr().out)
        assert found["bits_per_byte"] == pytest.approx(found["loss"] * found["tokens"] / np.log(2) / size)


@needs_library
@pytest.mark.parametrize("content", ["", "{}", "[]", '{"model": 3}'])
def test_a_damaged_file_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(UserError, match=r"tokenizer\.json is not a tokenizer"):
        huggingface_tokenizer.load(tmp_path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"tokenizer\.json does not exist"):
        huggingface_tokenizer.load(tmp_path)


def test_without_the_library_the_sentence_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=r'pip install "minimoe\[hf\]"'):
        huggingface_tokenizer.load(tmp_path)
