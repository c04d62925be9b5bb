"""Texts: every sequence lies in one document, none reaches what is held out, and all of them are drawn."""

import os
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_runs import CORPUS

from minimoe.core.config import TrainConfig
from minimoe.core.errors import UserError
from minimoe.text import batches, corpus, tokenizer
from minimoe.text.batches import Texts
from minimoe.text.corpus import Corpus, Source, read_files

BYTES = TrainConfig(tokenizer="byte")


def numbered(*lengths: int) -> Texts:
    """Texts whose tokens are all different, so that each tells where it came from."""
    ends = np.cumsum(lengths)
    ids = [np.arange(end - length, end, dtype=np.int32) for end, length in zip(ends, lengths, strict=True)]
    names = [str(i) for i in range(len(ids))]
    codec = NumberTokenizer(int(ends[-1]))
    corpus = Corpus("numbers", {name: " ".join(map(str, values)) for name, values in zip(names, ids, strict=True)})
    return batches._encode(corpus, codec, context=5)[0]  # type: ignore[arg-type]


class NumberTokenizer:
    """Each number is a token of its own."""

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size

    def encode(self, text: str) -> np.ndarray:
        return np.array([int(word) for word in text.split()], dtype=np.int32)


def test_a_drawn_sequence_is_consecutive_text_of_one_training_part(rng: np.random.Generator) -> None:
    drawn = numbered(20, 11, 40)
    tokens, targets = drawn.draw(rng, 2000, 5)
    assert tokens.shape == targets.shape == (2000, 5)
    assert tokens.dtype == np.int32
    np.testing.assert_array_equal(targets, tokens + 1)
    np.testing.assert_array_equal(np.diff(tokens, axis=1), 1)
    # Document 0 is tokens 0-19, 1 is 20-30, 2 is 31-70, and the last tenth of each is held out.
    starts = {*range(18 - 5), *range(20, 29 - 5), *range(31, 67 - 5)}
    assert set(tokens[:, 0].tolist()) == starts, "every place that can begin a sequence is drawn, and no other"


@pytest.mark.parametrize("place", [0, 1, 2])
def test_one_document_alone_is_read_as_before(place: int) -> None:
    texts = numbered(20, 12, 40)
    alone, span = texts.only(str(place)), texts.spans[place]
    assert (alone.names, alone.longest) == ([str(place)], texts.longest)
    assert alone.spans == [slice(0, span.stop - span.start)]
    np.testing.assert_array_equal(alone.train[alone.starts], texts.train[texts.starts[span]])
    assert alone.train.tolist() == list(range(alone.train[0], texts.validation[place][0]))
    assert (alone.validation[0] == texts.validation[place]).all()
    tokens, targets = next(alone.batches(4, 5))
    assert (np.diff(tokens, axis=1) == 1).all()
    assert (targets == tokens + 1).all()


def test_a_document_that_is_not_there_is_refused() -> None:
    with pytest.raises(UserError, match="no document 'sums': choose one of 0, 1"):
        numbered(20, 12).only("sums")


def test_what_is_held_out_is_never_trained_on(rng: np.random.Generator) -> None:
    drawn = numbered(20, 11, 40)
    tokens, targets = drawn.draw(rng, 2000, 5)
    held_out = np.concatenate(drawn.validation)
    assert held_out.tolist() == [18, 19, 29, 30, 67, 68, 69, 70]
    assert not np.isin(tokens, held_out).any()
    assert not np.isin(targets, held_out).any()
    assert not np.isin(drawn.train, held_out).any()


def test_each_start_is_equally_likely(rng: np.random.Generator) -> None:
    drawn = numbered(20, 11, 40)
    tokens, _ = drawn.draw(rng, 50_000, 5)
    counts = np.bincount(tokens[:, 0])
    counts = counts[counts > 0]
    expected = 50_000 / len(counts)
    assert np.abs(counts - expected).max() < 5 * np.sqrt(expected)


def test_an_epoch_reads_nothing_twice_and_is_cut_and_shuffled_anew() -> None:
    """Of each document up to two sequences' worth is left over where it is cut; what is read is read once."""
    read = numbered(200, 120)
    per_epoch = (180 - 5) // 5 + (108 - 5) // 5
    batches = list(islice(read.batches(5, 5), 2 * per_epoch // 5))  # 55 sequences an epoch, so it ends with a batch
    assert per_epoch % 5 == 0
    first, second = np.split(np.concatenate([tokens for tokens, _ in batches]), 2)
    for epoch in (first, second):
        assert len(np.unique(epoch)) == epoch.size == per_epoch * 5
    assert not np.array_equal(first, second), "an epoch is shuffled anew"
    assert set(first[:, 0].tolist()) != set(second[:, 0].tolist()), "and cut at other places"
    assert (np.diff(first[:, 0]) < 0).any(), "the order is not that of the text"


def test_every_place_that_can_begin_a_sequence_begins_one_in_some_epoch() -> None:
    read = numbered(20, 11, 40)
    begun = {int(tokens[0, 0]) for tokens, _ in islice(read.batches(1, 5), 2000)}
    assert begun == {*range(18 - 5), *range(20, 29 - 5), *range(31, 67 - 5)}
    tokens, targets = next(read.batches(7, 5))
    np.testing.assert_array_equal(targets, tokens + 1)
    np.testing.assert_array_equal(np.diff(tokens, axis=1), 1)


@given(count=st.integers(1, 30), first=st.integers(0, 12), seed=st.integers(0, 2**63))
def test_batches_go_on_where_a_run_was(count: int, first: int, seed: int) -> None:
    read = numbered(20, 11, 40)
    whole = list(islice(read.batches(count, 5, seed), first + 2))
    for mine, again in zip(whole[first:], read.batches(count, 5, seed, first), strict=False):
        np.testing.assert_array_equal(mine, again)


def test_another_seed_reads_in_another_order() -> None:
    read = numbered(200)
    assert not np.array_equal(next(read.batches(20, 5, seed=1))[0], next(read.batches(20, 5, seed=2))[0])


@given(lengths=st.lists(st.integers(11, 60), min_size=1, max_size=3), length=st.integers(-1, 9))
def test_no_sequence_reaches_into_the_next_document(lengths: list[int], length: int) -> None:
    """``numbered`` leaves out the places that have no room for 5 tokens and a target, so 5 is the longest."""
    read, rng = numbered(*lengths), np.random.default_rng(0)
    assert read.longest == 5
    if 1 <= length <= 5:
        ends = np.cumsum(lengths)
        for tokens, targets in (read.draw(rng, 200, length), next(read.batches(200, length))):
            begin, end = (np.searchsorted(ends, token, "right") for token in (tokens[:, 0], targets[:, -1]))
            assert (begin == end).all()
    else:
        for reading in (lambda: read.draw(rng, 1, length), lambda: read.batches(1, length)):
            with pytest.raises(UserError, match=f"length {length} is not between 1 and 5, the context"):
                reading()


@given(context=st.integers(1, 40), more=st.integers(0, 3), other=st.integers(0, 90))
def test_the_shortest_text_that_is_accepted_has_a_sequence_to_draw_and_a_token_to_predict(
    context: int, more: int, other: int
) -> None:
    with pytest.raises(UserError) as error:
        batches.prepare(Corpus("c", {"short": "ab"}), BYTES, context)
    least = int(str(error.value).rpartition("at least ")[2].partition(",")[0])
    corpus = Corpus("c", {"long": "x" * (least + other), "short": "y" * (least + more)})
    prepared, _, codec = batches.prepare(corpus, BYTES, context)
    drawn, read = prepared.draw(np.random.default_rng(0), 20, context), next(prepared.batches(20, context))
    for row in np.concatenate([*drawn, *read]):
        assert codec.decode(row) in ("x" * context, "y" * context)
    assert min(len(ids) for ids in prepared.validation) >= 2
    with pytest.raises(UserError, match="'short' has .* too few for a context of"):
        batches.prepare(Corpus("c", {"long": "x" * least, "short": "y" * (least - 1)}), BYTES, context)


def test_the_split_of_a_real_corpus_puts_every_token_in_one_part() -> None:
    prepared, source, codec = batches.prepare(CORPUS, TrainConfig(), context=8)
    assert prepared.names == ["pyramid", "seasons"]
    ends = np.cumsum(
        [len(text) - len(ids) for text, ids in zip(CORPUS.documents.values(), prepared.validation, strict=True)]
    )
    parts = np.split(prepared.train, ends[:-1])
    for text, begin, end in zip(CORPUS.documents.values(), parts, prepared.validation, strict=True):
        assert codec.decode(begin) + codec.decode(end) == text
        assert len(end) == pytest.approx(len(text) / 10, abs=1)
    assert source.corpus == "small"
    assert source.paths == []


def test_the_texts_of_a_run_are_found_again(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("The tide comes in, the tide goes out. " * 5)
    prepared, source, codec = batches.prepare(read_files(path), BYTES, 4)
    again = batches.reload(source, codec, 4)
    np.testing.assert_array_equal(again.train, prepared.train)
    np.testing.assert_array_equal(again.starts, prepared.starts)
    np.testing.assert_array_equal(again.validation[0], prepared.validation[0])
    built_in, source, codec = batches.prepare("fables", BYTES, 4)
    np.testing.assert_array_equal(batches.reload(source, codec, 4).train, built_in.train)


@pytest.mark.parametrize("change", [str.upper, lambda text: text + ".", lambda text: text[::-1], lambda text: "ab"])
def test_a_text_that_has_changed_is_noticed(tmp_path: Path, change: object) -> None:
    assert callable(change)
    path = tmp_path / "text.txt"
    path.write_text("The tide comes in, the tide goes out. " * 5)
    _, source, codec = batches.prepare(read_files(path), TrainConfig(), 4)
    path.write_text(change(path.read_text()))
    with pytest.raises(UserError, match="text.txt has changed since this run began: restore the text, or start a new"):
        batches.reload(source, codec, 4)


def test_where_one_document_ends_and_the_next_begins_is_part_of_the_text() -> None:
    one, two = "The tide comes in, the tide ", "goes out, and nobody asks it why."
    _, source, codec = batches.prepare(Corpus("c", {"a": one, "b": two}), BYTES, 4)
    with pytest.raises(UserError, match="has changed"):
        batches.reload(source, codec, 4, Corpus("c", {"a": one + two[:4], "b": two[4:]}))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no pipes among its files")
def test_a_pipe_that_a_run_names_as_its_text_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="which the run names as its text, is not a file"):
        batches.read_source(Source("x", [str(tmp_path / "pipe")], "0"))


def test_a_corpus_made_in_python_has_to_be_passed_again() -> None:
    with pytest.raises(UserError, match="'mine' was made in Python: resume there, and pass it again as corpus="):
        batches.read_source(Source("mine", [], "0"))
    codec = tokenizer.build("char", corpus.load("fables").text)
    with pytest.raises(UserError, match="another one of that name, made in Python: pass that one again as corpus="):
        batches.reload(Source("fables", [], "0"), codec, 8)


@pytest.mark.parametrize("wrong", [Path("a.txt"), ["a.txt"], {"a": "text"}, 3])
def test_what_is_no_corpus_is_refused(wrong: object) -> None:
    with pytest.raises(UserError, match="is not a corpus: give the name of one, or a minimoe.text.corpus.Corpus"):
        batches.prepare(wrong, TrainConfig(), 8)  # type: ignore[arg-type]
