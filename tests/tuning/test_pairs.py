"""Pairs of answers as ids: what counts, what is held out, and in which order they are read."""

import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from minimoe.core.config import ModelConfig
from minimoe.core.errors import UserError
from minimoe.losses.objective import Shard
from minimoe.text import chat, instructions, tokenizer
from minimoe.text.chat import Turn
from minimoe.tuning import pairs

CODEC = tokenizer.with_chat_tokens(tokenizer.build("char", "abcdefghij0123456789 "))
CONFIG = ModelConfig(context=20, vocab_size=CODEC.vocab_size)


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def row(n: int, chosen: str = "abc", rejected: str = "de", prompt: Any = None) -> dict[str, Any]:
    asked = [["user", f"{n}"]] if prompt is None else prompt
    return {"kind": "kind", "document": f"d{n}", "prompt": asked, "chosen": chosen, "rejected": rejected}


@pytest.fixture
def lines(tmp_path: Path) -> Path:
    return write(tmp_path / "pairs.jsonl", [row(n, "abc" + "d" * (n % 5)) for n in range(50)])


def test_only_the_answer_and_its_end_count(tmp_path: Path) -> None:
    prompt = [["user", "ab"], ["assistant", "c"], ["user", "d"]]
    path = write(tmp_path / "pairs.jsonl", [row(n, "abc", "de", prompt) for n in range(30)])
    example = pairs.read(CODEC, CONFIG, path).train[0]
    turns = [Turn(role, text) for role, text in prompt]
    (end,) = chat.end_ids(CODEC)
    for encoded, text in ((example.chosen, "abc"), (example.rejected, "de")):
        count = len(text) + 1
        assert encoded.answer.tolist() == [False] * (len(encoded.ids) - count) + [True] * count
        assert encoded.ids[encoded.answer].tolist() == [*CODEC.encode(text), end]
        np.testing.assert_array_equal(encoded.ids[~encoded.answer], chat.prompt(CODEC, turns))


def test_documents_are_held_out_as_in_every_file_and_the_checksum_is_that_of_the_ids(lines: Path) -> None:
    found = pairs.read(CODEC, CONFIG, lines)
    train, validation = instructions.split(instructions.read_pairs(lines))
    assert (len(found.train), len(found.validation), found.lost) == (len(train), len(validation), 0)
    assert found.items == validation
    again = pairs.read(CODEC, CONFIG, lines)
    assert again.sha256 == found.sha256
    write(lines, [row(n, "abc" + "d" * (n % 5), "df" if n == 7 else "de") for n in range(50)])
    assert pairs.read(CODEC, CONFIG, lines).sha256 != found.sha256


def test_a_pair_whose_answers_do_not_both_fit_is_left_out(lines: Path) -> None:
    room = CONFIG.context + 1 - 4 - len("49")  # begin, user, assistant and end
    write(lines, [row(n, "abc", "d" * (room + (n % 2))) for n in range(10, 50)])
    found = pairs.read(CODEC, CONFIG, lines)
    assert found.lost == 20
    assert len(found.train) + len(found.validation) == 20
    assert len(found.items) == len(found.validation)
    assert max(len(example.rejected.ids) for example in found.train) == CONFIG.context + 1
    with pytest.raises(UserError, match="no pair of answers fits into the 3 tokens"):
        pairs.read(CODEC, ModelConfig(context=3, vocab_size=CODEC.vocab_size), lines)


def test_a_model_without_tokens_for_a_chat_is_refused(lines: Path) -> None:
    with pytest.raises(UserError, match="minimoe sft"):
        pairs.read(tokenizer.build("byte", ""), CONFIG, lines)


def test_a_shard_holds_the_chosen_answer_of_each_pair_and_then_the_rejected_one(lines: Path) -> None:
    examples = pairs.read(CODEC, CONFIG, lines).train[:3]
    reference = -np.arange(6.0).reshape(3, 2)
    shard = pairs.shard_of(examples, reference)
    assert shard.mask is not None and shard.loss_mask is not None
    for number, example in enumerate(examples):
        for side, (ids, answer) in enumerate((example.chosen, example.rejected)):
            where, count = 2 * number + side, len(ids) - 1
            np.testing.assert_array_equal(shard.tokens[where, :count], ids[:-1])
            np.testing.assert_array_equal(shard.targets[where, :count], ids[1:])
            np.testing.assert_array_equal(shard.loss_mask[where, :count], answer[1:])
            assert (shard.mask[where].sum(), shard.loss_mask[where].sum()) == (count, answer.sum())
            assert shard.extra.place[where].argmax() == where
            assert shard.extra.reference[where] == reference[number, side]
    assert shard.extra.place.sum() == 6
    assert pairs.shard_of(examples).extra.reference is None


def seen(read: Iterator[Shard], count: int) -> list[list[float]]:
    """The references of the chosen answers of so many batches, which say which pairs these are."""
    return [shard.extra.reference[::2].tolist() for shard in islice(read, count)]


def test_an_epoch_reads_every_pair_once_and_goes_on_in_the_middle(lines: Path) -> None:
    examples = pairs.read(CODEC, CONFIG, lines).train[:10]
    reference = np.stack([np.arange(10.0), -np.arange(10.0)], axis=1)
    batches = pairs.Batches(examples, reference, 4, seed=3)
    all_of_them = seen(batches.read(), 10)
    flat = [number for batch in all_of_them for number in batch]
    assert [sorted(flat[start : start + 10]) for start in (0, 10, 20, 30)] == [list(range(10))] * 4
    assert flat[:10] != flat[10:20], "every epoch has an order of its own"
    for first in range(10):
        assert seen(batches.read(first), 10 - first) == all_of_them[first:]
    assert seen(pairs.Batches(examples, reference, 4, seed=4).read(), 10) != all_of_them
    assert next(pairs.Batches(examples, None, 4).read()).extra.reference is None


def test_pieces_hold_every_pair_once_and_never_more_sequences_than_allowed(lines: Path) -> None:
    examples = pairs.read(CODEC, CONFIG, lines).train
    reference = np.arange(2.0 * len(examples)).reshape(-1, 2)
    pieces = pairs.in_pieces(examples, 7, reference)
    assert sorted(number for numbers, _ in pieces for number in numbers) == list(range(len(examples)))
    for numbers, shard in pieces:
        assert len(shard.tokens) == 2 * len(numbers) <= 7
        np.testing.assert_array_equal(shard.extra.reference.reshape(-1, 2), reference[numbers])
    widths = [shard.tokens.shape[1] for _, shard in pieces]
    assert widths == sorted(widths)
    assert [len(shard.tokens) for _, shard in pairs.in_pieces(examples[:2], 1)] == [2, 2]
