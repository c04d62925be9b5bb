"""The tokenizer of a Hugging Face folder: the same methods, the same text, and no word run into the one before."""

import base64
import dataclasses
import importlib.util
import json
import os
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizer_json import mixtral_like

import minimoe
from minimoe.analysis import microscope
from minimoe.cli import main
from minimoe.core.config import ModelConfig
from minimoe.core.errors import UserError
from minimoe.inference import generation
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
def test_the_bytes_of_a_token_that_holds_parts_of_characters(tmp_path: Path) -> None:
    letter = {byte: letter for letter, byte in huggingface_tokenizer.BYTE_OF.items()}
    spelt = {part: "".join(letter[byte] for byte in part) for part in (b"\xf0\x9f", b"\x8e\x89 ", b"par", b"ty")}
    vocabulary = {piece: i for i, piece in enumerate([*letter.values(), *spelt.values()])}
    described = {
        "version": "1.0",
        "added_tokens": [],
        "decoder": BYTE_LEVEL,
        "model": {"type": "BPE", "vocab": vocabulary, "merges": []},
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(described))
    read = huggingface_tokenizer.load(tmp_path)
    ids = [vocabulary[piece] for piece in spelt.values()]
    assert read.decode(ids) == "🎉 party"
    assert [read.bytes_of([token]) for token in ids] == [2, 3, 3, 2]
    assert [read.bytes_of(ids[:n]) for n in range(5)] == [0, 2, 5, 8, 10]
    assert read.bytes_of([vocabulary[letter[byte]] for byte in "\ufffd".encode()]) == 3
    rng = np.random.default_rng(0)
    for _ in range(200):
        some = rng.integers(0, len(vocabulary), rng.integers(1, 12))
        assert read.bytes_of(some) == sum(len(read.name_of(token) or "") for token in some)


@needs_library
def test_a_character_that_looks_like_damage_counts_as_what_it_is(mixtral: PretrainedTokenizer) -> None:
    ids = mixtral.encode("the 🎉 \ufffd")
    assert mixtral.bytes_of(ids) == 12
    assert [mixtral.bytes_of(ids[:n]) for n in range(2, len(ids) + 1)] == [3, 4, 5, 6, 7, 8, 9, 10, 11, 12]
    assert mixtral.bytes_of([*ids[:-1], 2, ids[-1]]) == 12, "a special token has no bytes"


@needs_library
@pytest.mark.parametrize("ids", [[-1], [0.5], [[1, 2]], [[1], [2, 3]], [2**40]])
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
    assert told["tokenizer_class"] == "PreTrainedTokenizerFast" and told["clean_up_tokenization_spaces"] is False
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


def added(token: int, content: str, special: bool = True) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": token, "content": content, "special": special, **flags}


@needs_library
@pytest.mark.parametrize(
    ("change", "size"),
    [
        ({}, 275),
        ({"added_tokens": [*mixtral_like()["added_tokens"], added(275, "<pad>")]}, 275),
        ({"added_tokens": [*mixtral_like()["added_tokens"], added(275, "bread", special=False)]}, 276),
        ({"added_tokens": [added(274, "▁bread")]}, 274),  # a special token, although it is in the vocabulary
        ({"model": {"type": "WordLevel", "vocab": {"a": 0, "<unk>": 7}, "unk_token": "<unk>"},
          "added_tokens": [added(1, "<s>"), added(7, "<unk>"), added(9, "<pad>")]}, 8),
    ],
)  # fmt: skip
def test_only_tokens_that_plain_text_can_give_need_a_place_in_the_model(
    tmp_path: Path, small: ModelConfig, change: dict[str, Any], size: int
) -> None:
    for vocab_size, fits in ((size, True), (size - 1, False)):
        config = dataclasses.replace(small, vocab_size=vocab_size)
        folder = tmp_path / str(vocab_size)
        huggingface.save(folder, decoder.init(np.random.default_rng(0), config), config)
        (folder / "tokenizer.json").write_text(json.dumps(mixtral_like() | change))
        if fits:
            assert huggingface.load(folder).tokenizer.text_size == size
        else:
            with pytest.raises(UserError, match=f"tokenizer of {size} tokens and a model of {size - 1}"):
                huggingface.load(folder)


@needs_library
def test_a_text_that_names_a_token_beyond_the_model_is_refused(tmp_path: Path, small: ModelConfig) -> None:
    config = dataclasses.replace(small, vocab_size=275)
    huggingface.save(tmp_path / "saved", decoder.init(np.random.default_rng(0), config), config)
    described = mixtral_like()
    described["added_tokens"].append(added(275, "<pad>"))
    (tmp_path / "saved/tokenizer.json").write_text(json.dumps(described))
    loaded = huggingface.load(tmp_path / "saved")
    assert minimoe.generate(loaded, "the bread", tokens=2) is not None
    with pytest.raises(UserError, match="275 is not in a vocabulary of 275"):
        minimoe.generate(loaded, "the <pad>", tokens=2)


SPECIAL = {
    "tokenizer_config.json": {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "unk_token": "<unk>",
                              "chat_template": "{{ bos_token }}[INST] é", "tokenizer_class": "LlamaTokenizer"},
    "special_tokens_map.json": {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"},
    "added_tokens.json": {"<pad>": 275},
    "generation_config.json": {"temperature": 0.6, "eos_token_id": [2, 3]},
}  # fmt: skip


@pytest.mark.parametrize("with_tokenizer", [pytest.param(True, marks=needs_library), False])
def test_what_was_read_is_written(tmp_path: Path, small: ModelConfig, with_tokenizer: bool) -> None:
    config = dataclasses.replace(small, vocab_size=280)
    huggingface.save(tmp_path / "a", decoder.init(np.random.default_rng(0), config), config, end_tokens=(2,))
    values = json.loads((tmp_path / "a/config.json").read_text())
    (tmp_path / "a/config.json").write_text(json.dumps(values | {"bos_token_id": 1, "pad_token_id": 0}))
    described = mixtral_like()
    if with_tokenizer:
        (tmp_path / "a/tokenizer.json").write_text(json.dumps(described))
    for name, content in SPECIAL.items():
        (tmp_path / "a" / name).write_text(json.dumps(content))
    (tmp_path / "a/chat_template.jinja").write_text("{% for message in messages %}")

    read = huggingface.load(tmp_path / "a")
    huggingface.save(tmp_path / "b", read.params, read.config, read.tokenizer, read.end_tokens)
    written = {path.name: path.read_text() for path in (tmp_path / "b").iterdir() if path.suffix != ".safetensors"}
    assert written.pop("chat_template.jinja") == "{% for message in messages %}"
    found = {name: json.loads(content) for name, content in written.items()}
    assert found.pop("config.json").items() >= {"bos_token_id": 1, "pad_token_id": 0, "eos_token_id": [2, 3]}.items()
    assert found.pop("generation_config.json") == {
        "temperature": 0.6, "eos_token_id": [2, 3], "bos_token_id": 1, "pad_token_id": 0
    }  # fmt: skip
    if with_tokenizer:
        assert found.pop("tokenizer.json") == described, "with its truncation, which is only switched off here"
        settings = found.pop("tokenizer_config.json")
        assert settings["clean_up_tokenization_spaces"] is False
        assert settings.items() >= SPECIAL["tokenizer_config.json"].items()
    else:
        assert found.pop("tokenizer_config.json") == SPECIAL["tokenizer_config.json"]
    assert found == {name: SPECIAL[name] for name in ("special_tokens_map.json", "added_tokens.json")}
    assert huggingface.load(tmp_path / "b").end_tokens == (2, 3)


@needs_library
@pytest.mark.parametrize("name", huggingface_tokenizer.FILES)
def test_damage_beside_the_tokenizer_is_named(tmp_path: Path, mixtral: PretrainedTokenizer, name: str) -> None:
    (tmp_path / name).write_bytes(b"\xff")
    with pytest.raises(UserError, match=f"{name} cannot be read"):
        huggingface_tokenizer.load(tmp_path)


@pytest.mark.parametrize("why", ["no file", "no library", "a broken library"])
def test_without_a_tokenizer_the_model_opens_and_only_text_is_refused(
    tmp_path: Path,
    small: ModelConfig,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    why: str,
) -> None:
    params = decoder.init(np.random.default_rng(0), small)
    huggingface.save(tmp_path / "saved", params, small)
    words = "does not exist"
    if why != "no file":
        (tmp_path / "saved/tokenizer.json").write_text("{}")
        words = "needs the tokenizers library"
        broken = types.ModuleType("tokenizers")  # it has no Tokenizer
        monkeypatch.setitem(sys.modules, "tokenizers", None if why == "no library" else broken)
    loaded = minimoe.load(tmp_path / "saved")
    np.testing.assert_array_equal(loaded.params.embedding.table, params.embedding.table)
    assert len(list(generation.generate(loaded.params, loaded.config, [1, 2], tokens=3))) == 3
    seen = microscope.look(loaded, {"ids": np.arange(13)})
    assert set(seen.token_texts.values()) == {f"⟨{token}⟩" for token in range(13)}
    huggingface.save(tmp_path / "again", loaded.params, loaded.config, loaded.tokenizer)

    refused: list[Any] = [
        lambda: minimoe.generate(loaded, "a"), lambda: loaded.tokenizer.encode("a"),
        lambda: loaded.tokenizer.decode([1]), lambda: loaded.tokenizer.stream([1]),
        lambda: loaded.tokenizer.bytes_of([1]), lambda: loaded.tokenizer.vocab_size,
    ]  # fmt: skip
    for needs_text in refused:
        with pytest.raises(UserError, match=words):
            needs_text()
    assert main.main(["generate", str(tmp_path / "saved"), "--prompt", "a"]) == 2
    assert words in capsys.readouterr().err
    assert main.main(["params", str(tmp_path / "saved")]) == 0


# What a stranger's tokenizer can do

PANIC = {"decoder": {"type": "Strip", "content": "a", "start": 0, "stop": 5}}
REGEX = {"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}}


@needs_library
def test_a_panic_of_the_library_is_a_sentence(
    tmp_path: Path, small: ModelConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    config = dataclasses.replace(small, vocab_size=275)
    huggingface.save(tmp_path / "saved", decoder.init(np.random.default_rng(0), config), config)
    (tmp_path / "saved/tokenizer.json").write_text(json.dumps(mixtral_like() | PANIC))
    (tmp_path / "text.txt").write_text("aaa aaa")
    loaded = huggingface.load(tmp_path / "saved")
    # 265 is "a", which is shorter than what the decoder strips
    for call in (lambda: loaded.tokenizer.decode([265]), lambda: list(loaded.tokenizer.stream([265])),
                 lambda: loaded.tokenizer.bytes_of([265]),
                 lambda: microscope.look(loaded, {"ids": np.array([265, 265])})):  # fmt: skip
        with pytest.raises(UserError, match="cannot decode"):
            call()
    for words in (["generate", "--prompt", "aaa"], ["routing", "--text", str(tmp_path / "text.txt")]):
        assert main.main([words[0], str(tmp_path / "saved"), *words[1:]]) == 2
        assert "minimoe: The tokenizer cannot decode" in capsys.readouterr().err

    (tmp_path / "tokenizer.json").write_text(json.dumps(mixtral_like() | REGEX))
    with pytest.raises(UserError, match="cannot encode 'aaaa"):
        huggingface_tokenizer.load(tmp_path).encode("a" * 40 + "b")


def test_only_the_librarys_own_failures_are_caught() -> None:
    def stopped(text: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        PretrainedTokenizer(types.SimpleNamespace(encode=stopped)).encode("a")


def sequence(name: str, inside: str, *steps: dict[str, Any]) -> dict[str, Any]:
    return {name: {"type": "Sequence", inside: list(steps)}}


def replace(pattern: dict[str, str], content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": pattern, "content": content}


A = {"Sequence": {"id": "A", "type_id": 0}}
TWICE = {
    "type": "TemplateProcessing", "single": [A, A], "pair": [A, {"Sequence": {"id": "B", "type_id": 0}}],
    "special_tokens": {},
}  # fmt: skip
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
CHARSMAP = base64.b64encode((4).to_bytes(4, "little") + b"\0\0\0\0" + b"x\0" + b"b" * 100 + b"\0").decode()
EXPLODE: dict[str, dict[str, Any]] = {
    "a letter becomes a million": {"normalizer": replace({"String": "a"}, "b" * 10**6)},
    "a letter doubles, seven times": sequence("normalizer", "normalizers", *[replace({"String": "a"}, "aa")] * 7),
    "sequences in sequences": sequence(
        "normalizer", "normalizers", *[sequence("x", "normalizers", *[replace({"String": "a"}, "aaaa")] * 2)["x"]] * 2
    ),
    "between any two letters": sequence("normalizer", "normalizers", *[replace({"Regex": ""}, "b")] * 7),
    "a long beginning": {"normalizer": {"type": "Prepend", "prepend": "b" * 100}},
    "bytes of bytes": sequence("normalizer", "normalizers", *[{"type": "ByteLevel"}] * 4),
    "words of bytes of bytes": sequence("pre_tokenizer", "pretokenizers", *[BYTE_LEVEL] * 4),
    "a table of characters": {"normalizer": {"type": "Precompiled", "precompiled_charsmap": CHARSMAP}},
    "the text twice, seven times": sequence("post_processor", "processors", *[TWICE] * 7),
    "a decoder": sequence("decoder", "decoders", *[replace({"String": "a"}, "aa")] * 7),
    "a token of many letters": {"added_tokens": [added(300, "b" * 10**5)]},
    "long words": {"model": {"type": "WordPiece", "vocab": {"[UNK]": 0}, "unk_token": "[UNK]",
                             "continuing_subword_prefix": "##", "max_input_chars_per_word": 10**9}},
}  # fmt: skip


@needs_library
@pytest.mark.parametrize("case", EXPLODE)
def test_a_tokenizer_that_makes_a_long_text_of_a_short_one_is_refused(tmp_path: Path, case: str) -> None:
    (tmp_path / "tokenizer.json").write_text(json.dumps(mixtral_like() | EXPLODE[case]))
    with pytest.raises(UserError, match=r"expected at most [\d,]+: do not use this tokenizer\.$"):
        huggingface_tokenizer.load(tmp_path)


@needs_library
def test_ordinary_rules_are_not_taken_for_an_explosion(tmp_path: Path) -> None:
    rules = sequence("normalizer", "normalizers", {"type": "NFKC"}, {"type": "Prepend", "prepend": "▁"},
                     replace({"String": " "}, "▁"), replace({"Regex": " {2,}"}, " "),
                     replace({"String": "..."}, "…"))  # fmt: skip
    (tmp_path / "tokenizer.json").write_text(json.dumps(mixtral_like() | rules | {"pre_tokenizer": BYTE_LEVEL}))
    assert len(huggingface_tokenizer.load(tmp_path).encode("the bread")) > 1


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no pipes among its files")
@needs_library
@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"])
def test_a_pipe_is_not_waited_for(tmp_path: Path, mixtral: PretrainedTokenizer, name: str) -> None:
    (tmp_path / name).unlink(missing_ok=True)
    os.mkfifo(tmp_path / name)
    with pytest.raises(UserError, match="not a regular file"):
        huggingface_tokenizer.load(tmp_path)


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
        assert found["bits_per_byte"] == pytest.approx(found["loss"] * found["tokens"] / np.log(2) / size, abs=2e-5)


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
