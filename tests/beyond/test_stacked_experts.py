"""Two mixtures in a stack: their gradient, the bar on experts that have had too much, and what the gates know."""

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minimoe.beyond import digits, stacked_experts
from minimoe.beyond.stacked_experts import Mixture, PerLayer, Stack
from minimoe.core import tree
from minimoe.core.errors import UserError
from minimoe.proof.gradcheck import check, failed


def drawn(rng: np.random.Generator, experts: tuple[int, int] = (3, 4)) -> Stack:
    """A stack in which no two sizes are equal, with biases away from 0."""
    params = stacked_experts.init(rng, 7, 5, experts, (6, 8), 9, np.float64)
    return tree.map(lambda leaf: leaf + 0.3 * rng.standard_normal(leaf.shape), params)


def check_stack(params: Stack, x: np.ndarray, opened: PerLayer | None) -> list[Any]:
    def forward(params: Stack, x: np.ndarray) -> tuple[Any, Any]:
        return stacked_experts.forward(params, x, opened)

    return check("stack", forward, stacked_experts.backward, params, x, entries=8, directions=2)


@given(
    rows=st.integers(1, 6),
    experts=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    bars=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_every_gradient_is_right(rows: int, experts: tuple[int, int], bars: bool, seed: int) -> None:
    rng = np.random.default_rng(seed)
    params, x = drawn(rng, experts), rng.standard_normal((rows, 7))
    opened = None
    if bars:
        opened = PerLayer(*(rng.random(count) < 0.6 for count in experts))
        for layer in opened:
            layer[rng.integers(len(layer))] = True
    found = check_stack(params, x, opened)
    assert all(row.passed or 2 * row.refused > row.refused + row.checked for row in found), failed(found)


def test_it_agrees_with_a_loop_over_images_and_experts(rng: np.random.Generator) -> None:
    params, x = drawn(rng), rng.standard_normal((4, 7))
    opened = PerLayer(np.array([True, False, True]), np.ones(4, bool))

    def layer(params: Mixture, row: np.ndarray, opened: np.ndarray) -> np.ndarray:
        hidden = [max(0.0, row @ params.gate.w_hidden[:, k] + params.gate.b_hidden[k]) for k in range(9)]
        scores = [hidden @ params.gate.w_out[:, e] + params.gate.b_out[e] for e in range(len(opened))]
        total = sum(math.exp(score) for e, score in enumerate(scores) if opened[e])
        return sum(
            math.exp(scores[e]) / total * np.maximum(0, row @ params.w[e] + params.b[e])
            for e in range(len(opened))
            if opened[e]
        )

    logits, cache = stacked_experts.forward(params, x, opened)
    for n, row in enumerate(x):
        z = layer(params.second, layer(params.first, row, opened.first), opened.second)
        np.testing.assert_allclose(logits[n], z @ params.w_class + params.b_class, rtol=1e-12)
    np.testing.assert_allclose(cache.first.gate.sum(1), 1)
    assert not cache.first.gate[:, 1].any()


def test_a_barred_expert_gets_no_gradient_and_the_others_still_learn_their_gate(rng: np.random.Generator) -> None:
    params, x = drawn(rng), rng.standard_normal((5, 7))
    opened = PerLayer(np.array([True, False, True]), np.array([False, True, True, True]))
    logits, cache = stacked_experts.forward(params, x, opened)
    _, grads = stacked_experts.backward(params, cache, rng.standard_normal(logits.shape))
    for layer, barred in ((grads.first, 1), (grads.second, 0)):
        for leaf in (layer.w[barred], layer.b[barred], layer.gate.w_out[:, barred], layer.gate.b_out[barred]):
            assert not leaf.any()
        others = np.arange(len(layer.b)) != barred
        assert (abs(layer.gate.w_out[:, others]).sum(0) > 1e-6).all()
        assert (abs(layer.w[others]).sum((1, 2)) > 1e-6).all()


def test_to_bar_an_expert_is_to_take_it_out(rng: np.random.Generator) -> None:
    params, x = drawn(rng), rng.standard_normal((5, 7))
    opened = PerLayer(np.array([True, False, True]), np.ones(4, bool))
    keep = np.array([0, 2])
    gate = params.first.gate
    smaller = Mixture(
        gate._replace(w_out=gate.w_out[:, keep], b_out=gate.b_out[keep]), params.first.w[keep], params.first.b[keep]
    )
    logits, _ = stacked_experts.forward(params, x, opened)
    without, _ = stacked_experts.forward(params._replace(first=smaller), x)
    np.testing.assert_allclose(logits, without, rtol=1e-12)


@pytest.mark.parametrize("size", [1e4, -1e4])
def test_extreme_logits_do_not_overflow_even_if_the_largest_is_barred(size: float, rng: np.random.Generator) -> None:
    params = stacked_experts.init(rng, 7, 5, (3, 4), (6, 8), 9)
    params.first.gate.b_out[:] = [0, size, 0.5]
    opened = PerLayer(np.array([True, False, True]), np.ones(4, bool))
    with np.errstate(all="raise"):
        logits, cache = stacked_experts.forward(params, rng.standard_normal((4, 7)).astype(np.float32), opened)
        _, grads = stacked_experts.backward(params, cache, np.ones_like(logits))
        free, _ = stacked_experts.forward(params, np.zeros((4, 7), np.float32))
    assert all(np.isfinite(leaf).all() for leaf in [logits, free, *tree.leaves(grads)])
    np.testing.assert_allclose(cache.first.gate.sum(1), 1, rtol=1e-6)
    assert {leaf.dtype for leaf in [logits, *tree.leaves(grads)]} == {np.dtype(np.float32)}


def test_one_expert_has_the_whole_weight(rng: np.random.Generator) -> None:
    params = drawn(rng, (1, 1))
    _, cache = stacked_experts.forward(params, rng.standard_normal((5, 7)))
    assert (cache.first.gate == 1).all()
    assert (cache.second.gate == 1).all()


def test_a_layer_without_an_open_expert_is_refused(rng: np.random.Generator) -> None:
    opened = PerLayer(np.ones(3, bool), np.zeros(4, bool))
    with pytest.raises(UserError, match="all 4 experts of a layer are barred"):
        stacked_experts.forward(drawn(rng), np.ones((2, 7)), opened)


# The constraint


def test_an_expert_is_barred_while_it_is_ahead_of_the_mean_by_more_than_the_margin() -> None:
    totals = PerLayer(np.array([10.0, 4, 4, 2]), np.array([7.0, 3]))  # means 5 and 5
    assert stacked_experts.open_experts(totals, 4).first.tolist() == [False, True, True, True]
    assert stacked_experts.open_experts(totals, 5).first.tolist() == [True, True, True, True]  # exceeds, not reaches
    assert stacked_experts.open_experts(totals, 1.9).second.tolist() == [False, True]
    assert stacked_experts.open_experts(totals, 0).first.tolist() == [False, True, True, True]
    assert stacked_experts.open_experts(totals, math.inf).second.all()


@given(
    totals=st.lists(st.floats(0, 1e9), min_size=1, max_size=8),
    margin=st.one_of(st.just(0.0), st.floats(0, 1e9)),
)
def test_an_expert_is_always_open(totals: list[float], margin: float) -> None:
    pair = PerLayer(np.array(totals), np.full(3, 0.7))  # whose mean is rounded to below 0.7
    opened = stacked_experts.open_experts(pair, margin)
    assert opened.first.any()
    assert opened.second.all()


@pytest.mark.parametrize("margin", [-1.0, math.nan])
def test_a_margin_below_zero_is_refused(margin: float, rng: np.random.Generator) -> None:
    with pytest.raises(UserError, match=f"margin {margin} is not a number of images"):
        stacked_experts.open_experts(stacked_experts.no_totals(drawn(rng)), margin)


def test_totals_are_returned_and_not_changed(rng: np.random.Generator) -> None:
    params, x = drawn(rng), rng.standard_normal((5, 7))
    before = stacked_experts.no_totals(params)
    _, cache = stacked_experts.forward(params, x)
    after = stacked_experts.count(before, cache)
    assert not before.first.any() and not before.second.any()
    twice = stacked_experts.count(after, cache)
    for total, again, gate in zip(after, twice, (cache.first.gate, cache.second.gate), strict=True):
        np.testing.assert_allclose(total, [gate[:, e].sum() for e in range(gate.shape[1])])
        assert total.sum() == pytest.approx(5)  # images
        np.testing.assert_allclose(again, 2 * total)


# The experiment


@given(
    rows=st.lists(st.integers(0, 8), min_size=3, max_size=3),
    columns=st.lists(st.integers(0, 8), min_size=3, max_size=3),
)
def test_an_image_is_placed_whole_and_the_rest_is_empty(rows: list[int], columns: list[int]) -> None:
    images = np.random.default_rng(0).random((3, 8, 8))
    placed = stacked_experts.place(images, np.array(rows), np.array(columns)).reshape(3, 16, 16)
    for n, (r, c) in enumerate(zip(rows, columns, strict=True)):
        np.testing.assert_array_equal(placed[n, r : r + 8, c : c + 8], images[n])
        assert placed[n].sum() == pytest.approx(images[n].sum())


@pytest.mark.parametrize(("row", "column", "named"), [(9, 0, 9), (0, -1, -1), (0, 12, 12)])
def test_an_image_beyond_the_canvas_is_refused(row: int, column: int, named: int) -> None:
    with pytest.raises(UserError, match=f"a corner at {named} puts an image of 8 pixels beyond a canvas of 16"):
        stacked_experts.place(np.ones((1, 8, 8)), np.array([row]), np.array([column]))


def test_information_in_cases_that_can_be_counted() -> None:
    labels = np.array([0, 1, 2, 3] * 5)
    assert stacked_experts.information(np.eye(4)[labels], labels) == pytest.approx(2)  # the expert is the label
    assert stacked_experts.information(np.eye(2)[labels % 2], labels) == pytest.approx(1)
    assert stacked_experts.information(np.full((20, 4), 0.25), labels) == pytest.approx(0)
    assert stacked_experts.information(np.eye(4)[labels], 10 - labels) == pytest.approx(2)  # names do not matter
    half = 0.5 * np.eye(2)[labels % 2] + 0.25  # 3 : 1
    assert stacked_experts.information(half, labels) == pytest.approx(1 + 0.75 * np.log2(0.75) + 0.25 * np.log2(0.25))


def test_information_counts_rare_labels_rarely() -> None:
    labels = np.array([0] * 15 + [1])
    entropy = -(15 / 16 * np.log2(15 / 16) + 1 / 16 * np.log2(1 / 16))
    assert stacked_experts.information(np.eye(2)[labels], labels) == pytest.approx(entropy)


def test_chance_is_what_a_gate_shows_of_labels_that_it_cannot_know(rng: np.random.Generator) -> None:
    labels = rng.integers(10, size=400)
    gate = np.eye(4)[labels % 4]
    level = stacked_experts.chance(rng, gate, labels)
    assert 0 < level < 0.1 < stacked_experts.information(gate, labels)
    assert level == pytest.approx(9 * 3 / (2 * 400 * math.log(2)), rel=0.35)  # (labels − 1)(experts − 1) / 2N nats


def test_ten_copies_of_an_image_count_as_one_where_chance_is_measured(rng: np.random.Generator) -> None:
    labels = rng.integers(10, size=400)
    gate = np.eye(4)[labels % 4]
    many = np.repeat(gate, 10, axis=0), np.repeat(labels, 10)
    same = stacked_experts.chance(np.random.default_rng(1), gate, labels)
    assert stacked_experts.chance(np.random.default_rng(1), *many, copies=10) == pytest.approx(same)
    assert stacked_experts.chance(np.random.default_rng(1), *many) < 0.2 * same


def test_a_region_is_a_third_of_each_side() -> None:
    rows, columns = (grid.ravel() for grid in np.mgrid[:9, :9])
    gates = PerLayer(np.ones((81, 1)), np.ones((81, 1)))
    places = stacked_experts.Seen(rows, columns, rows, gates, 0.0).places
    assert np.bincount(places).tolist() == [9] * 9
    assert [places[r * 9 + c] for r, c in ((0, 0), (2, 2), (0, 3), (3, 0), (8, 8), (5, 6))] == [0, 0, 1, 3, 8, 5]


def test_means_by_place_and_by_label_are_those_of_a_loop(rng: np.random.Generator) -> None:
    gate, labels = rng.random((300, 3)), rng.integers(9, size=300)
    rows, columns = rng.integers(9, size=(2, 300))
    places, kinds = stacked_experts.by_place(gate, rows, columns), stacked_experts.by_label(gate, labels)
    assert (places.shape, kinds.shape) == ((3, 9, 9), (3, 10))
    for e in range(3):
        for k in range(9):
            assert kinds[e, k] == pytest.approx(gate[labels == k, e].mean())
        for r, c in ((0, 0), (2, 7), (8, 1)):
            there = gate[(rows == r) & (columns == c), e]
            assert places[e, r, c] == pytest.approx(there.mean()) if there.size else np.isnan(places[e, r, c])
    assert np.isnan(kinds[:, 9]).all(), "no image has the label 9"


@pytest.fixture(scope="module")
def data() -> tuple[digits.Digits, digits.Digits]:
    return digits.split(digits.load())


def test_a_short_run_keeps_the_totals_together_and_learns(data: Any) -> None:
    run = stacked_experts.train(*data, margin=20.0, steps=300, lifted=0.2)
    assert run.shares.first.shape == run.opened.second.shape == run.excess.first.shape == (300, 4)
    for layer in (0, 1):
        np.testing.assert_allclose(run.shares[layer].sum(1), 1, rtol=1e-5)
        # a batch of 64 can push an expert over the margin once: it is then barred
        assert run.excess[layer][:240].max() <= 20 + 64
        assert not run.opened[layer][:240].all()
        assert run.opened[layer][240:].all()
        assert (run.shares[layer][~run.opened[layer]] == 0).all()
        # the bar of a step is decided by the totals before it
        np.testing.assert_array_equal(run.opened[layer][1:240], run.excess[layer][:239] <= 20)
        steps = 64 * (run.shares[layer] - 0.25)
        np.testing.assert_allclose(run.excess[layer], steps.cumsum(0), atol=0.02)
    assert run.seen.correct > 0.2
    assert run.seen.gates.first.shape == (4970, 4)
    again = stacked_experts.train(*data, margin=20.0, steps=300, lifted=0.2)
    assert again.seen.correct == run.seen.correct


def test_without_a_margin_nobody_is_barred(data: Any) -> None:
    run = stacked_experts.train(*data, margin=None, steps=20)
    assert run.opened.first.all() and run.opened.second.all()
