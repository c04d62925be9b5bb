"""Packing: every pair of a token and its target once, both masks at the right place, no pair across a border."""

from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file

from minimoe.core import tree
from minimoe.core.errors import UserError
from minimoe.layers import decoder
from minimoe.layers.mode import Mode
from minimoe.losses import objective
from minimoe.losses.objective import Objective, Shard
from minimoe.storage import huggingface
from minimoe.text.chat import Encoded
from minimoe.tuning import packing
from minimoe.tuning.packing import Batches

GOLDEN = Path(__file__).parent.parent / "golden"


def document(ids: list[int], answer: list[int]) -> Encoded:
    return Encoded(np.array(ids, np.int32), np.array(answer, np.bool_))


A = document([7, 1, 2, 8, 3, 9], [0, 0, 0, 0, 1, 1])  # 7 begins, 8 opens the answer, 9 ends it
B = document([7, 4, 8, 5, 5, 9], [0, 0, 0, 1, 1, 1])
C = document([7, 8, 9], [0, 0, 1])

lengths = st.lists(st.integers(1, 9), min_size=1, max_size=30)


@given(lengths=lengths, pack=st.booleans())
def test_every_document_has_one_row_and_no_row_is_overfull(lengths: list[int], pack: bool) -> None:
    rows = packing.rows_of(lengths, 10, pack)
    assert sorted(number for row in rows for number in row) == list(range(len(lengths)))
    assert all(sum(lengths[number] for number in row) <= 10 for row in rows)
    if pack:
        assert sum(sum(lengths[number] for number in row) <= 5 for row in rows) <= 1, "two half-empty rows would be one"
    else:
        assert rows == [[number] for number in range(len(lengths))]


def test_a_packed_row_by_hand() -> None:
    shard = packing.shard_of([[A, C], [B]], packed=True)
    assert shard.tokens.tolist() == [[7, 1, 2, 8, 3, 7, 8], [7, 4, 8, 5, 5, 0, 0]]
    assert shard.targets.tolist() == [[1, 2, 8, 3, 9, 8, 9], [4, 8, 5, 5, 9, 0, 0]]
    assert shard.mask is not None and shard.loss_mask is not None and shard.starts is not None
    assert shard.mask.tolist() == [[1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0, 0]]
    # the last token of the question predicts the first of the answer, and the end is predicted but predicts nothing
    assert shard.loss_mask.tolist() == [[0, 0, 0, 1, 1, 0, 1], [0, 0, 1, 1, 1, 0, 0]]
    assert shard.starts.tolist() == [[0, 0, 0, 0, 0, 5, 5], [0, 0, 0, 0, 0, 5, 6]]


def test_padded_rows_need_no_starts() -> None:
    shard = packing.shard_of([[C], [B]], packed=False)
    assert shard.starts is None
    assert shard.tokens.tolist() == [[7, 8, 0, 0, 0], [7, 4, 8, 5, 5]]
    assert shard.mask is not None and shard.mask.tolist() == [[1, 1, 0, 0, 0], [1, 1, 1, 1, 1]]


def pairs_of(shards: list[Shard]) -> list[tuple[int, int, float]]:
    """Every real pair of token and target, with its weight in the loss."""
    found = []
    for shard in shards:
        assert shard.mask is not None and shard.loss_mask is not None
        real = shard.mask == 1
        assert (shard.loss_mask[~real] == 0).all()
        found += list(zip(shard.tokens[real], shard.targets[real], shard.loss_mask[real], strict=True))
    return sorted((int(x), int(y), float(m)) for x, y, m in found)


@pytest.mark.parametrize("pack", [True, False])
def test_an_epoch_reads_every_pair_once(pack: bool) -> None:
    documents = [A, B, C, A, C, C, B, C]
    batches = Batches(documents, space=9, rows=1, pack=pack, seed=3)
    rows = round(batches.per_epoch())
    expected = sorted(
        (int(x), int(y), float(m))
        for ids, answer in documents
        for x, y, m in zip(ids[:-1], ids[1:], answer[1:], strict=True)
    )
    read = list(islice(batches.read(), 2 * rows))
    assert pairs_of(read[:rows]) == expected
    if not pack:  # a packed epoch may have more or fewer rows
        assert pairs_of(read[rows:]) == expected
        assert [shard.tokens.tolist() for shard in read[:rows]] != [shard.tokens.tolist() for shard in read[rows:]]


@pytest.mark.parametrize("pack", [True, False])
def test_batches_go_on_where_they_stopped_and_another_seed_reads_in_another_order(pack: bool) -> None:
    batches = Batches([A, B, C] * 5, space=12, rows=2, pack=pack, seed=1)
    whole = list(islice(batches.read(), 12))
    for first in (0, 1, 7, 11):
        resumed = next(batches.read(first))
        for mine, other in zip(resumed, whole[first], strict=True):
            np.testing.assert_array_equal(mine, other)
    assert all(len(shard.tokens) == 2 for shard in whole)
    others = list(islice(batches._replace(seed=2).read(), 12))
    assert [shard.tokens.tolist() for shard in whole] != [shard.tokens.tolist() for shard in others]


def test_what_does_not_fit_or_predicts_nothing_is_refused() -> None:
    with pytest.raises(UserError, match="11 tokens does not fit into a row of 10"):
        packing.rows_of([3, 11], 10, True)
    with pytest.raises(UserError, match="1 token has nothing to predict"):
        packing.shard_of([[document([7], [0])]], packed=True)


def test_packed_rows_give_what_transformers_computes() -> None:
    """Logits, loss and the embedding's gradient of the golden Mixtral; the positions there begin again, ours do not."""
    golden = load_file(GOLDEN / "packed.safetensors")
    params, config = huggingface.load_params(GOLDEN / "mixtral")
    params = tree.map(lambda leaf: leaf.astype(np.float64), params)
    shard = Shard(golden["tokens"], golden["targets"], loss_mask=golden["loss_mask"], starts=golden["starts"])
    logits = decoder.forward(params, shard.tokens, config, Mode(starts=shard.starts)).logits
    np.testing.assert_allclose(logits, golden["logits"], rtol=0, atol=1e-6)  # RoPE's angles are float32 there
    totals, gradient = objective.loss_and_gradient(params, [shard], config, Objective())
    assert float(totals.loss) == pytest.approx(float(golden["loss"]), abs=1e-6)
    np.testing.assert_allclose(gradient.embedding.table, golden["gradient"], rtol=0, atol=1e-6)
    leaking, _ = objective.loss_and_gradient(params, [shard._replace(starts=None)], config, Objective())
    assert abs(float(leaking.loss) - float(golden["loss"])) > 1e-4
