"""Trees of arrays: names, order, and walks that refuse trees of different shapes."""

import dataclasses
from typing import Any, NamedTuple

import numpy as np
import pytest

from minimoe.core import tree
from minimoe.core.config import ModelConfig
from minimoe.layers import decoder
from minimoe.layers.attention import Attention
from minimoe.layers.experts.swiglu import Experts
from minimoe.layers.moe import MoE
from minimoe.layers.routers.noisy_top_k import Router


class Leaf(NamedTuple):
    weight: np.ndarray
    bias: np.ndarray | None


class Branch(NamedTuple):
    first: Leaf
    rest: list[Leaf]
    scale: np.ndarray


def branch(value: float = 1.0) -> Branch:
    return Branch(
        Leaf(np.full(2, value), None),
        [Leaf(np.full((1, 2), 2 * value), np.full(1, 3 * value)), Leaf(np.full(3, 4 * value), None)],
        np.full((), 5 * value),
    )


def test_a_leaf_is_named_by_the_way_to_it_and_none_is_skipped() -> None:
    names = ["first.weight", "rest[0].weight", "rest[0].bias", "rest[1].weight", "scale"]
    assert [name for name, _ in tree.named_leaves(branch())] == names
    assert [float(leaf.flat[0]) for leaf in tree.leaves(branch())] == [1, 2, 3, 4, 5]
    assert [name for name, _ in tree.named_leaves(branch(), "model")] == [f"model.{name}" for name in names]


def test_a_model_s_names_are_those_of_its_code(small: ModelConfig) -> None:
    names = [name for name, _ in tree.named_leaves(decoder.init(np.random.default_rng(0), small))]
    assert names[0] == "embedding.table"
    assert "blocks[1].moe.experts.w_up" in names
    assert "blocks[0].attention.query.weight" in names
    assert len(names) == len(set(names))


def test_map_keeps_the_shape_of_the_tree() -> None:
    doubled = tree.map(lambda leaf: 2 * leaf, branch())
    assert isinstance(doubled, Branch)
    assert isinstance(doubled.rest[1], Leaf)
    assert doubled.first.bias is None
    assert [float(leaf.flat[0]) for leaf in tree.leaves(doubled)] == [2, 4, 6, 8, 10]


def test_map_takes_several_trees_plain_tuples_and_a_single_array() -> None:
    both = tree.map(np.add, (np.ones(2), None, [np.ones(1)]), (np.ones(2), None, [np.zeros(1)]))
    assert isinstance(both, tuple)
    assert both[1] is None
    assert [leaf.tolist() for leaf in tree.leaves(both)] == [[2, 2], [1]]
    assert [name for name, _ in tree.named_leaves(both)] == ["0", "2[0]"]
    assert tree.map(np.negative, np.ones(2)).tolist() == [-1, -1]


def test_trees_of_different_shapes_are_refused() -> None:
    shorter = branch()._replace(rest=branch().rest[:1])
    with pytest.raises(ValueError, match="zip"):
        tree.map(np.add, branch(), shorter)
    with pytest.raises(ValueError, match="zip"):
        tree.accumulate(branch(), shorter)


def test_rebuild_is_the_inverse_of_leaves() -> None:
    rebuilt = tree.rebuild(branch(), tree.leaves(branch(7.0)))
    assert isinstance(rebuilt, Branch)
    assert [leaf.tolist() for leaf in tree.leaves(rebuilt)] == [leaf.tolist() for leaf in tree.leaves(branch(7.0))]


def test_add_makes_new_arrays_and_accumulate_fills_the_old_ones() -> None:
    one, two = branch(1.0), branch(10.0)
    total = tree.add(one, two, two)
    assert [float(leaf.flat[0]) for leaf in tree.leaves(total)] == [21, 42, 63, 84, 105]
    assert one.first.weight[0] == 1
    weight = one.first.weight
    tree.accumulate(one, two)
    assert weight is one.first.weight
    assert [float(leaf.flat[0]) for leaf in tree.leaves(one)] == [11, 22, 33, 44, 55]


def test_zeros_like_and_size() -> None:
    zeros = tree.zeros_like(branch())
    assert not any(leaf.any() for leaf in tree.leaves(zeros))
    assert [leaf.shape for leaf in tree.leaves(zeros)] == [leaf.shape for leaf in tree.leaves(branch())]
    assert tree.size(branch()) == 2 + 2 + 1 + 3 + 1
    assert tree.size(None) == 0


def test_dictionaries_are_branches_with_their_keys_for_names() -> None:
    params = {"w": np.ones(2), "layers": [{"b": np.zeros(1)}]}
    assert [name for name, _ in tree.named_leaves(params)] == ["['w']", "['layers'][0]['b']"]
    np.testing.assert_array_equal(tree.add(params, params)["w"], [2, 2])
    with pytest.raises(ValueError, match=r"keys \['w', 'layers'\], got"):
        tree.add(params, {"w": np.ones(2)})


@tree.marks(heavy=("weight",), rare=("bias", "weight"))
class Marked(NamedTuple):
    bias: np.ndarray | None
    weight: np.ndarray
    inner: Any = None


@tree.marks(rare=("deep",), frozen=("both",))
class Outer(NamedTuple):
    deep: Any
    parts: list[Marked]
    both: Any = None


def marked_leaf(bias: bool = True) -> Marked:
    return Marked(np.zeros(1) if bias else None, np.zeros(2))


def test_marked_names_the_leaves_of_the_fields_that_have_the_mark() -> None:
    params = Outer(None, [marked_leaf(), marked_leaf()])
    assert list(tree.marked(params, "heavy")) == ["parts[0].weight", "parts[1].weight"]
    assert list(tree.marked(params, "rare")) == [
        "parts[0].bias", "parts[0].weight", "parts[1].bias", "parts[1].weight",
    ]  # fmt: skip
    assert list(tree.marked(params, "unheard of")) == []
    assert list(tree.marked(params, "heavy", "model")) == ["model.parts[0].weight", "model.parts[1].weight"]


def test_a_mark_counts_for_everything_below_its_field() -> None:
    """Also for leaves whose own tuples say nothing, and for a single array or a dictionary."""
    leaf = Leaf(np.zeros(1), np.zeros(1))
    params = Outer([leaf, {"a": leaf}], [], np.zeros(1))
    below = [f"deep{i}.{field}" for i in ("[0]", "[1]['a']") for field in ("weight", "bias")]
    assert list(tree.marked(params, "rare")) == below
    assert list(tree.marked(params, "frozen")) == ["both"]


def test_a_leaf_marked_at_two_levels_is_named_once() -> None:
    params = Outer(marked_leaf(), [])
    assert list(tree.marked(params, "rare")) == ["deep.bias", "deep.weight"]


def test_an_absent_branch_is_not_named() -> None:
    params = Outer(None, [marked_leaf(bias=False)])
    assert list(tree.marked(params, "rare")) == ["parts[0].weight"]
    assert list(tree.marked(None, "rare")) == list(tree.marked(np.zeros(1), "rare")) == []


def test_marks_are_found_in_lists_dictionaries_and_plain_tuples_in_the_order_of_the_leaves() -> None:
    params = {"x": (marked_leaf(), [marked_leaf()]), "y": np.zeros(3)}
    assert list(tree.marked(params, "heavy")) == ["['x'].0.weight", "['x'].1[0].weight"]
    names = [name for name, _ in tree.named_leaves(params)]
    rare = list(tree.marked(params, "rare"))
    assert rare == [name for name in names if name in rare]


def test_marks_change_nothing_else_of_a_tuple() -> None:
    assert Marked._fields == ("bias", "weight", "inner")
    params = Outer(None, [marked_leaf()])
    assert [name for name, _ in tree.named_leaves(params)] == ["parts[0].bias", "parts[0].weight"]
    assert isinstance(tree.map(np.copy, params).parts[0], Marked)
    assert list(tree.marked(tree.map(np.copy, params), "heavy")) == ["parts[0].weight"]


def test_the_marks_of_a_model(small: ModelConfig) -> None:
    """Muon's matrices, what serves training only, and the stacks that workers may share among them."""
    params = decoder.init(np.random.default_rng(0), dataclasses.replace(small, layers=1))
    attention = [f"blocks[0].attention.{name}.weight" for name in ("query", "key", "value", "output")]
    experts = [f"blocks[0].moe.experts.{name}" for name in ("w_gate", "w_up", "w_down")]
    assert list(tree.marked(params, "matrices")) == attention + experts
    assert list(tree.marked(params, "training_only")) == ["blocks[0].moe.router.w_noise"]
    assert list(tree.marked(params, "by_expert")) == experts


def test_marks_name_fields_that_exist() -> None:
    """Every mark in the package names fields of its tuple."""
    for kind in (Attention, MoE, Experts, Router):
        for mark, fields in kind._marks.items():
            assert set(fields) <= set(kind._fields), (kind, mark)
