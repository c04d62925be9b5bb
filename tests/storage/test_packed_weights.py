"""Objects that act like arrays where the layers use them, with the numbers of the arrays that they stand for."""

from pathlib import Path
from typing import Any

import mixtral_folders
import numpy as np
import pytest

from minimoe.core import summary
from minimoe.layers import embedding, linear
from minimoe.layers.embedding import Embedding
from minimoe.layers.linear import Linear
from minimoe.storage import bounded, huggingface
from minimoe.storage.packed_weights import Matrix, Stack, Table

Both = tuple[Any, Any]


@pytest.fixture(params=["F16", "BF16"])
def both(request: pytest.FixtureRequest, tmp_path: Path) -> Both:
    """A bounded model with two experts in memory, and the parameters that it stands for."""
    folder = mixtral_folders.write(tmp_path / "m", request.param)
    opened = bounded.open_folder(folder)
    budget = bounded.plan(opened.located, 10**9, 8, 64)
    return opened.load(budget.least + 2 * budget.expert, 8, 64), huggingface.load_params(folder)[0]


def test_each_kind_stands_where_it_is_expected(both: Both) -> None:
    block = both[0].params.blocks[0]
    assert {type(stack) for stack in block.moe.experts} == {Stack}
    assert {type(part.weight) for part in block.attention[:4]} == {Matrix}
    assert type(both[0].params.embedding.table) is Table
    for plain in (both[0].params.norm.gain, both[0].params.head.weight, block.moe.router.w_gate, block.moe_norm.gain):
        assert type(plain) is np.ndarray
    for ours, theirs in (
        (block.moe.experts.w_up, both[1].blocks[0].moe.experts.w_up),
        (block.attention.key.weight, both[1].blocks[0].attention.key.weight),
        (both[0].params.embedding.table, both[1].embedding.table),
    ):
        assert (ours.shape, ours.size, ours.ndim, ours.dtype) == (theirs.shape, theirs.size, theirs.ndim, theirs.dtype)
        assert summary.line(ours) == summary.line(theirs)


def test_a_stack_gives_the_matrices_of_its_experts_in_any_order(both: Both) -> None:
    for layer, e in ((0, 1), (2, 4), (0, 1), (1, 1), (2, 0), (0, 3)):
        ours, theirs = (params.blocks[layer].moe.experts for params in (both[0].params, both[1]))
        for field in ("w_down", "w_gate", "w_up"):
            np.testing.assert_array_equal(getattr(ours, field)[e], getattr(theirs, field)[e])
    assert len(ours.w_gate) == 5
    counted = both[0].cache.phases[""]
    assert (counted.uses, counted.bytes) == (6, 5 * both[0].budget.expert)
    # the uses of layer 0 and 1 found their expert because its w_down had brought it
    assert counted.hits == 6


def test_an_expert_is_used_once_for_its_three_matrices(both: Both) -> None:
    experts = both[0].params.blocks[0].moe.experts
    for e in (0, 1, 0, 2):
        for stack in experts:  # w_gate first, as in swiglu
            stack[e]
    counted = both[0].cache.phases[""]
    assert (counted.uses, counted.hits, counted.misses) == (4, 1, 3)
    assert counted.bytes == 3 * both[0].budget.expert
    assert counted.unpacking > 0


def test_a_matrix_that_was_given_stays_as_it_is_when_others_follow(both: Both) -> None:
    stack = both[0].params.blocks[0].moe.experts.w_up
    first = stack[0]
    kept = first.copy()
    for e in (1, 2, 3):
        stack[e]
    np.testing.assert_array_equal(first, kept)


def test_products_with_a_matrix_are_those_with_its_array(both: Both, rng: np.random.Generator) -> None:
    for name in ("query", "key", "value", "output"):
        ours, theirs = (getattr(params.blocks[1].attention, name) for params in (both[0].params, both[1]))
        one, many = rng.standard_normal(32).astype(np.float32), rng.standard_normal((2, 3, 32)).astype(np.float32)
        np.testing.assert_array_equal(one @ ours.weight, one @ theirs.weight)
        np.testing.assert_array_equal(linear.forward(ours, many)[0], linear.forward(Linear(theirs.weight), many)[0])


def test_rows_of_a_table_and_the_passes_that_begin_with_them(both: Both) -> None:
    table, expected = both[0].params.embedding.table, both[1].embedding.table
    tokens = np.array([[5, 0, 299], [5, 7, 8]])
    np.testing.assert_array_equal(embedding.forward(Embedding(table), tokens)[0], expected[tokens])
    np.testing.assert_array_equal(table[17], expected[17])
    phases = both[0].cache.phases
    assert (phases["reading"].tokens, phases["writing"].tokens) == (6, 1)


def test_a_tied_table_is_also_the_output_layer(tmp_path: Path) -> None:
    folder = mixtral_folders.write(tmp_path / "m", tie_word_embeddings=True)
    table: Any = bounded.open_folder(folder).load(10**8, 8, 64).params.embedding.table
    expected = huggingface.load_params(folder)[0].embedding.table
    np.testing.assert_array_equal(table.T, expected.T)
    assert table.T.flags.f_contiguous
    np.testing.assert_array_equal(table[[3, 4]], expected[[3, 4]])
    assert len(table) == 300
