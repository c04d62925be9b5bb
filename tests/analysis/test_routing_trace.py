"""What the experts do, against brute force: every statistic is computed again by the slowest loops that can be read."""

import dataclasses
import itertools
import math
import time
import tracemalloc
from types import SimpleNamespace

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from minimoe.analysis import microscope, routing_trace
from minimoe.analysis.routing_trace import Trace
from minimoe.core import tree
from minimoe.core.config import ModelConfig
from minimoe.core.errors import UserError
from minimoe.inference import reading
from minimoe.layers import decoder
from minimoe.layers.routers import token_hash
from minimoe.layers.routing import by_token, experts_by_token


@pytest.fixture
def params(small, rng):
    """Far from the start of training, W_noise too, so that noise would be noticed."""
    return tree.map(lambda leaf: leaf + 0.3 * rng.standard_normal(leaf.shape), decoder.init(rng, small, np.float64))


def trace_of(logits, active=2, tokens=None, window=None):
    """The trace of a router with these logits (L, N, E)."""
    logits = np.asarray(logits, float)
    experts = np.argsort(-logits, axis=-1, kind="stable")[..., :active]
    weights = np.take_along_axis(np.exp(logits - logits.max(-1, keepdims=True)), experts, -1)
    weights /= weights.sum(-1, keepdims=True)
    count = logits.shape[1]
    tokens = np.zeros(count, int) if tokens is None else np.asarray(tokens)
    return Trace(tokens, np.zeros(count, int) if window is None else np.asarray(window), experts, weights, logits)


def chosen_in_order(first, experts):
    """A trace of one layer with K = 1 and these first choices."""
    return trace_of(np.eye(experts)[None, first], active=1)


@pytest.fixture
def example(rng):
    """3 layers, 60 tokens in windows of 25, 25 and 10, 2 of 6 experts, an uneven load."""
    logits = rng.standard_normal((3, 60, 6)) + np.linspace(0, 2, 6)
    return trace_of(logits, tokens=rng.integers(0, 9, 60), window=np.arange(60) // 25)


def test_a_trace_is_what_the_routers_of_a_forward_pass_decide(params, small, rng):
    tokens = rng.integers(0, small.vocab_size, small.context)
    seen = routing_trace.trace(params, small, tokens)
    _, _, cache = decoder.forward(params, tokens[None], small)
    assert_array_equal(seen.tokens, tokens)
    for layer, block in enumerate(cache.blocks):
        routing = block.moe.routing
        assert_array_equal(seen.experts[layer], experts_by_token(routing))
        assert_array_equal(seen.weights[layer], by_token(routing.weight, routing.place))
        p = np.exp(seen.logits[layer] - np.log(np.exp(seen.logits[layer]).sum(1, keepdims=True)))
        assert_allclose(p, block.moe.router.gate.probability)
    assert_array_equal(seen.experts, np.argsort(-seen.logits, axis=-1)[..., : small.active_experts])


def test_a_router_that_compares_no_scores_is_traced_by_its_weights(small, rng):
    """Its uncertainty is that of the weights, and its choice is further from any other than scores could be."""
    for gate in (False, True):
        config = dataclasses.replace(small, router="token_hash", hash_gate=gate)
        params = decoder.init(rng, config, np.float64)
        tokens = rng.integers(0, small.vocab_size, small.context)
        seen = routing_trace.trace(params, config, tokens)
        w = seen.weights
        table = token_hash.table(small.vocab_size, small.experts, small.active_experts)
        assert_array_equal(np.sort(seen.experts), np.sort(table[tokens])[None].repeat(small.layers, 0))
        assert_allclose(np.take_along_axis(seen.logits, seen.experts, -1), np.log(w))
        assert_allclose(routing_trace.entropy(seen), -(w * np.log(w)).sum(-1))
        assert (routing_trace.margin(seen) > 80).all()


def test_a_text_longer_than_the_context_is_read_window_by_window(params, small, rng):
    tokens = rng.integers(0, small.vocab_size, 2 * small.context + 3)
    seen = routing_trace.trace(params, small, tokens)
    for number in range(3):
        part = slice(number * small.context, (number + 1) * small.context)
        alone = routing_trace.trace(params, small, tokens[part])
        assert_allclose(seen.logits[:, part], alone.logits)
        assert_array_equal(seen.experts[:, part], alone.experts)
        assert set(seen.window[part]) == {number}


def test_rows_of_a_batch_do_not_see_each_other(params, small, rng):
    rows = rng.integers(0, small.vocab_size, (3, small.context + 2))
    seen = routing_trace.trace(params, small, rows)
    alone = [routing_trace.trace(params, small, row) for row in rows]
    assert_array_equal(seen.tokens, rows.reshape(-1))
    assert_allclose(seen.logits, np.concatenate([one.logits for one in alone], axis=1))
    assert seen.window.tolist() == [
        2 * row + (t >= small.context) for row in range(3) for t in range(small.context + 2)
    ]


def test_few_or_many_tokens_at_once_give_the_same_trace(params, small, rng, monkeypatch):
    tokens = rng.integers(0, small.vocab_size, 40)
    whole = routing_trace.trace(params, small, tokens)
    monkeypatch.setattr(reading, "TOKENS", 2 * small.context)
    for field, other in zip(routing_trace.trace(params, small, tokens), whole, strict=True):
        assert_allclose(field, other)


def test_a_context_longer_than_the_tokens_read_at_once_is_read_too(params, small, rng, monkeypatch):
    tokens = rng.integers(0, small.vocab_size, 2 * small.context + 3)
    whole = routing_trace.trace(params, small, tokens)
    monkeypatch.setattr(reading, "TOKENS", small.context - 1)
    for field, other in zip(routing_trace.trace(params, small, tokens), whole, strict=True):
        assert_allclose(field, other)


def test_the_routing_needs_no_logits_of_the_output_layer(params, small, rng):
    """They are larger than everything else if the vocabulary is large."""
    tokens = rng.integers(0, small.vocab_size, 20)
    whole = routing_trace.trace(params, small, tokens)
    without = params._replace(head=None)
    for field, other in zip(routing_trace.trace(without, small, tokens), whole, strict=True):
        assert_array_equal(field, other)
    assert routing_trace.trace(params._replace(head="none"), small, tokens).experts.shape == whole.experts.shape


def test_a_list_of_tokens_will_do(params, small):
    assert routing_trace.trace(params, small, np.array([1, 2, 3], np.uint8)).tokens.tolist() == [1, 2, 3]
    with pytest.raises(UserError, match="rows of different lengths"):
        routing_trace.trace(params, small, [[1], [1, 2]])
    assert routing_trace.trace(params, small, [1, 2, 3]).experts.shape == (2, 3, 2)


@pytest.mark.parametrize(
    ("tokens", "complaint"),
    [
        (np.array([], int), r"shape \(0,\)"),
        (np.zeros((2, 2, 2), int), r"shape \(2, 2, 2\)"),
        (np.array([0.5]), "got float64"),
        (np.array([3, -1]), "Token id -1"),
        (np.array([3, 13]), "Token id 13 is not in a vocabulary of 13"),
    ],
)
def test_tokens_that_make_no_sense_are_refused(params, small, tokens, complaint):
    with pytest.raises(UserError, match=complaint):
        routing_trace.trace(params, small, tokens)


def test_a_router_that_decides_by_what_is_no_number_is_refused(params, small):
    params.blocks[1].moe.router.w_gate[0, 0] = np.nan
    with pytest.raises(UserError, match="not finite: the model has diverged"):
        routing_trace.trace(params, small, [1, 2, 3])


def test_load_counts_the_first_the_second_or_all_choices():
    seen = trace_of([[[3, 2, 1], [3, 1, 2], [1, 3, 2], [3, 2, 1]]])  # chosen: 0 1, 0 2, 1 2, 0 1
    assert_allclose(routing_trace.load(seen, "first"), [[3 / 4, 1 / 4, 0]])
    assert_allclose(routing_trace.load(seen, "second"), [[0, 2 / 4, 2 / 4]])
    assert_allclose(routing_trace.load(seen), [[3 / 8, 3 / 8, 2 / 8]])


@pytest.mark.parametrize("setting", [{"shuffles": 0}, {"seed": -1}])
def test_no_shuffles_are_refused(example, setting):
    with pytest.raises(UserError, match="give at least 1, from a seed of at least 0"):
        routing_trace.repetition(example, **setting)


def test_a_choice_that_does_not_exist_is_refused(example):
    with pytest.raises(UserError, match="'third' is unknown"):
        routing_trace.load(example, "third")
    with pytest.raises(UserError, match="no second choice"):
        routing_trace.load(chosen_in_order([0, 1], 2), "second")


def test_load_by_domain_is_the_load_of_each_text_on_its_own(params, small, rng):
    texts = {name: rng.integers(0, small.vocab_size, length) for name, length in (("short", 5), ("long", 30))}
    loads = routing_trace.load_by_domain(params, small, texts, "first")
    assert list(loads) == ["short", "long"]
    for name, text in texts.items():
        assert_allclose(loads[name], routing_trace.load(routing_trace.trace(params, small, text), "first"))


def test_jensen_shannon_is_zero_for_equals_one_for_strangers_and_symmetric():
    p, q = np.array([0.5, 0.5, 0, 0]), np.array([0, 0, 0.25, 0.75])
    assert routing_trace.jensen_shannon(p, p) == 0
    assert_allclose(routing_trace.jensen_shannon(p, q), 1)
    # by hand: m = (3/4, 1/4), JS = H(m) − (H(1, 0) + H(1/2, 1/2))/2 = 0.811278 − 1/2
    assert_allclose(routing_trace.jensen_shannon(np.array([1, 0]), np.array([0.5, 0.5])), 0.311278, atol=1e-6)
    assert_allclose(routing_trace.jensen_shannon(np.array([0.5, 0.5]), np.array([1, 0])), 0.311278, atol=1e-6)


def test_jensen_shannon_of_several_is_the_mean_divergence_from_their_mean(rng):
    p = rng.dirichlet(np.ones(5), 4)
    divergences = [(row * np.log2(row / p.mean(0))).sum() for row in p]
    assert_allclose(routing_trace.jensen_shannon(*p), np.mean(divergences))
    assert_allclose(routing_trace.jensen_shannon(*np.eye(4)), 2)


def test_jensen_shannon_takes_layers_one_by_one(rng):
    p, q = rng.dirichlet(np.ones(5), 3), rng.dirichlet(np.ones(5), 3)
    one_by_one = [routing_trace.jensen_shannon(*pair) for pair in zip(p, q, strict=True)]
    assert_allclose(routing_trace.jensen_shannon(p, q), one_by_one)


def test_jensen_shannon_refuses_what_is_no_distribution():
    p = np.array([0.5, 0.5])
    with pytest.raises(UserError, match="sums to 4"):
        routing_trace.jensen_shannon(p, np.array([3, 1]))
    with pytest.raises(UserError, match="negative"):
        routing_trace.jensen_shannon(p, np.array([1.5, -0.5]))
    with pytest.raises(UserError, match="shapes"):
        routing_trace.jensen_shannon(p, np.array([0.5, 0.25, 0.25]))
    with pytest.raises(UserError, match="at least two"):
        routing_trace.jensen_shannon(p)


def test_the_violation_is_what_the_fullest_expert_has_too_much():
    assert_allclose(routing_trace.max_violation(np.array([[5.0, 3, 4, 4], [1, 1, 1, 1], [12, 0, 0, 0]])), [0.25, 0, 3])
    shares = np.random.default_rng(0).random((2000, 256, 8)).argsort(2)[:, :, :2]
    load = np.stack([np.bincount(batch.reshape(-1), minlength=8) for batch in shares])
    assert_allclose(routing_trace.max_violation(load).mean(), 0.17, atol=0.005)  # the level of chance that it states


def test_chance_deals_whole_windows_to_groups_of_the_size_of_the_texts():
    """Two windows to one text, one to the other; each window has a single expert, so there are three groupings."""

    def of(*windows):
        experts = np.repeat(windows, 2)
        return trace_of(np.eye(3)[None, experts], active=1, window=np.repeat(np.arange(len(windows)), 2))

    texts = [of(0, 0), of(1)]  # 0 0 | 1 is 1 bit apart, 0 1 | 0 only 0.311278, and comes twice as often
    found = routing_trace.divergence_by_chance(texts, groupings=6000)
    assert_allclose(found, [(1 + 2 * 0.311278) / 3], atol=0.01)
    three = routing_trace.divergence_by_chance([of(0, 1), of(2)], groupings=3)
    assert_allclose(three, [1], err_msg="whatever the grouping, the two have no expert in common")
    again = [routing_trace.divergence_by_chance(texts, groupings=3, seed=seed) for seed in (0, 0, 1)]
    assert again[0] == again[1] != again[2]


def test_chance_needs_two_texts_of_one_model(example):
    for traces in ([example], [example, trace_of(np.zeros((3, 4, 5)))], [example, trace_of(np.zeros((2, 4, 6)))]):
        with pytest.raises(UserError, match="cannot be compared"):
            routing_trace.divergence_by_chance(traces)


def meets(seen, layer, one, other, k):
    return bool(set(seen.experts[layer, one, :k]) & set(seen.experts[layer, other, :k]))


@pytest.mark.parametrize(("choice", "k"), [("first", 1), ("either", 2)])
def test_repetition_counts_neighbours_that_share_an_expert(example, choice, k):
    found = routing_trace.repetition(example, choice)
    pairs = [t for t in range(59) if example.window[t] == example.window[t + 1]]
    assert len(pairs) == 57
    for layer in range(3):
        assert_allclose(found.observed[layer], np.mean([meets(example, layer, t, t + 1, k) for t in pairs]))


@pytest.mark.parametrize(("choice", "k"), [("first", 1), ("either", 2)])
def test_the_null_of_the_load_draws_two_tokens_at_random(example, choice, k):
    found = routing_trace.repetition(example, choice)
    for layer in range(3):
        pairs = itertools.product(range(60), repeat=2)
        assert_allclose(found.load[layer], np.mean([meets(example, layer, a, b, k) for a, b in pairs]))


def test_the_null_of_the_load_of_first_choices_is_the_sum_of_squared_shares(example):
    expected = (routing_trace.load(example, "first") ** 2).sum(1)
    assert_allclose(routing_trace.repetition(example).load, expected)


def test_uniform_chance_is_that_of_mixtrals_table(rng):
    mixtral = trace_of(rng.standard_normal((1, 10, 8)))
    assert routing_trace.repetition(mixtral).uniform == 0.125
    assert_allclose(routing_trace.repetition(mixtral, "either").uniform, 1 - 6 / 8 * 5 / 7)
    assert routing_trace.repetition(trace_of(np.zeros((1, 4, 2))), "either").uniform == 1  # all experts active


def test_shuffling_leaves_repetition_by_load_and_takes_that_by_order(rng):
    first = np.sort(rng.choice(4, 4000, p=[0.4, 0.3, 0.2, 0.1]))  # long runs
    found = routing_trace.repetition(chosen_in_order(first, 4))
    assert found.observed[0] > 0.999
    # One shuffle of 4000 tokens has a standard error near √(0.3 · 0.7 / 4000) = 0.007; the mean of 20, 0.0016.
    assert_allclose(found.shuffled, found.load, atol=0.008)
    mixed = routing_trace.repetition(chosen_in_order(rng.permutation(first), 4))
    assert_allclose(mixed.observed, mixed.load, atol=0.03)


def test_shuffling_keeps_tokens_in_their_window():
    """Each window has one expert of its own: order within it means nothing, and the load explains a quarter."""
    first = np.repeat([0, 1, 2, 3], 25)
    seen = chosen_in_order(first, 4)._replace(window=first)
    found = routing_trace.repetition(seen)
    assert_array_equal([found.observed[0], found.shuffled[0], found.load[0]], [1, 1, 0.25])


def test_shuffles_repeat_with_their_seed(example):
    one, same, other = (routing_trace.repetition(example, seed=seed).shuffled for seed in (1, 1, 2))
    assert_array_equal(one, same)
    assert (one != other).any()


def test_repetition_needs_two_tokens_in_a_row():
    with pytest.raises(UserError, match="two tokens in a row"):
        routing_trace.repetition(chosen_in_order([0, 1], 2)._replace(window=np.array([0, 1])))


def test_entropy_is_that_of_the_softmax_over_all_experts(example):
    p = np.exp(example.logits) / np.exp(example.logits).sum(-1, keepdims=True)
    assert_allclose(routing_trace.entropy(example), -(p * np.log(p)).sum(-1))
    assert_allclose(routing_trace.entropy(trace_of(np.full((1, 1, 8), 7.0))), math.log(8))
    assert_array_equal(routing_trace.entropy(trace_of([[[1e4, -1e4, 0]]])), [[0]])


def test_margin_is_the_gap_between_the_last_chosen_and_the_first_left_out():
    assert_allclose(routing_trace.margin(trace_of([[[5, 1, 4, 2]]])), [[2]])
    assert routing_trace.margin(trace_of([[[5, 1]]])) == np.inf


def test_co_activation_counts_tokens_that_go_to_both(example):
    together = routing_trace.co_activation(example)
    for layer, i, j in itertools.product(range(3), range(6), range(6)):
        both = [{i, j} <= set(chosen) for chosen in example.experts[layer]]
        assert_allclose(together[layer, i, j], np.mean(both), atol=1e-12)
    assert_allclose(np.trace(together, axis1=1, axis2=2), 2)  # every token goes to K = 2 experts


def test_statistics_of_pairs_stay_small_or_are_refused_before_the_model_is_read():
    most = routing_trace.MOST_EXPERTS
    few = Trace(*(np.zeros(50, int),) * 2, np.zeros((1, 50, 2), int), np.ones((1, 50, 2)), np.zeros((1, 50, most)))
    few.experts[..., 1] = np.arange(50) + 1
    tracemalloc.start()
    routing_trace.favourite_tokens(few, 0)
    assert tracemalloc.get_traced_memory()[1] < 2**20, "no (N, E) and no (V, E) numbers"
    assert routing_trace.co_activation(few)[0, 0, :3].tolist() == [1, 1 / 50, 1 / 50]
    assert tracemalloc.get_traced_memory()[1] < 4 * 8 * most**2
    tracemalloc.stop()

    many = few._replace(logits=np.broadcast_to(0.0, (1, 50, 16_384)))
    words = "16,384 experts per layer, which is 268,435,456 pairs .* up to 1,024, so look at a smaller model.$"
    for statistic in (routing_trace.co_activation, lambda trace: routing_trace.favourite_tokens(trace, 0)):
        with pytest.raises(UserError, match=words):
            statistic(many)
    model = SimpleNamespace(config=ModelConfig(experts=16_384), params=None, tokenizer=None)
    with pytest.raises(UserError, match=words):
        microscope.look(model, {"a": np.array([1, 2])})


def test_favourite_tokens_follow_their_formula(example):
    layer, prior = 1, 3.0
    listed = routing_trace.favourite_tokens(example, layer, top=9, prior=prior)
    for expert, favourites in enumerate(listed):
        goes = (example.experts[layer] == expert).any(-1)
        for token in range(9):
            here = example.tokens == token
            lift = (goes[here].sum() + prior * goes.mean()) / (here.sum() + prior) / goes.mean()
            found = [favourite for favourite in favourites if favourite.token == token]
            assert len(found) == (lift > 1)
            for favourite in found:
                assert_allclose(favourite[1:], (here.sum(), goes[here].mean(), lift))
        assert [f.lift for f in favourites] == sorted((f.lift for f in favourites), reverse=True)


def test_a_rare_token_does_not_beat_a_frequent_one_by_luck():
    # Expert 1 takes all 60 of token 7 and the only token 8; expert 0 takes the rest.
    tokens = np.array([7] * 60 + [8] + [0] * 139)
    favourites = routing_trace.favourite_tokens(
        chosen_in_order((tokens >= 7).astype(int), 2)._replace(tokens=tokens), 0
    )
    assert [favourite.token for favourite in favourites[1]] == [7, 8]
    assert [favourite.token for favourite in favourites[0]] == [0]


def test_an_expert_without_tokens_has_no_favourites():
    assert routing_trace.favourite_tokens(chosen_in_order([0, 0, 1], 3), 0)[2] == []


def test_a_layer_that_does_not_exist_is_refused(example):
    for layer in (-1, 3):
        with pytest.raises(UserError, match=f"no layer {layer}; choose one from 0 to 2"):
            routing_trace.favourite_tokens(example, layer)


# Tokens with fewer experts than others, or with none


@pytest.fixture
def uneven():
    """Five tokens with 2, 0, 1, 3 and 0 of 4 experts, the heaviest first."""
    experts = np.array([[[2, 0, -1], [-1, -1, -1], [2, -1, -1], [0, 1, 2], [-1, -1, -1]]])
    weights = np.array([[[0.9, 0.2, 0], [0, 0, 0], [0.7, 0, 0], [0.6, 0.5, 0.1], [0, 0, 0]]])
    logits = [[0.2, -1, 0.9, -2], [-1, -2, -3, -4], [-1, -1, 0.7, -1], [0.6, 0.5, 0.1, -1], [-1, -1, -1, -9]]
    return Trace(np.array([5, 6, 5, 6, 6]), np.zeros(5, int), experts, weights, np.array([logits]))


def test_tokens_without_an_expert_are_no_assignments(uneven):
    assert_allclose(routing_trace.load(uneven), [[2 / 6, 1 / 6, 3 / 6, 0]])
    assert_allclose(routing_trace.load(uneven, "first"), [[1 / 3, 0, 2 / 3, 0]])
    together = 5 * routing_trace.co_activation(uneven)[0]
    assert_allclose(together, [[2, 1, 2, 0], [1, 1, 1, 0], [2, 1, 3, 0], [0, 0, 0, 0]])
    favourites = routing_trace.favourite_tokens(uneven, 0, prior=0.1)
    assert favourites[2][0].token == 5
    assert favourites[3] == []


def test_two_tokens_without_an_expert_do_not_share_one(uneven):
    found = routing_trace.repetition(uneven, "either", shuffles=1)
    assert found.observed == [1 / 4]  # of the four pairs only the third and the fourth token meet, in expert 2
    sizes = [2, 0, 1, 3, 0]
    chance = [1 - math.comb(4 - a, b) / math.comb(4, b) for a, b in itertools.product(sizes, repeat=2)]
    assert found.uniform == pytest.approx(np.mean(chance))


def test_the_margin_is_between_the_worst_expert_of_a_token_and_the_best_of_the_others(uneven):
    assert_allclose(routing_trace.margin(uneven), [[0.2 + 1, np.inf, 0.7 + 1, 0.1 + 1, np.inf]])


def test_texts_with_unequal_numbers_of_experts_are_joined():
    """Two windows whose routings have one and three places for each token."""
    short, long = np.full((2, 3, 1), 4), np.arange(18).reshape(2, 3, 3)
    joined = routing_trace._joined([short, long], 1, -1)
    assert joined.shape == (2, 6, 3)
    assert_array_equal(joined[:, :3], [[[4, -1, -1]] * 3] * 2)
    assert_array_equal(joined[:, 3:], long)


def test_traces_are_made_alike_with_columns_of_missing_experts() -> None:
    """The load, the neighbours and the pairs of a text stay what they were."""
    rng = np.random.default_rng(0)
    experts = np.argsort(rng.random((2, 9, 4)), axis=2)
    full = Trace(np.arange(9), np.zeros(9, int), experts, rng.random((2, 9, 4)), rng.random((2, 9, 4)))
    narrow = full._replace(experts=experts[..., :1], weights=full.weights[..., :1])
    found = routing_trace.alike([narrow, full])
    assert [trace.experts.shape for trace in found] == [trace.weights.shape for trace in found] == [(2, 9, 4)] * 2
    assert (found[0].experts[..., 1:] == -1).all()
    assert not found[0].weights[..., 1:].any()
    np.testing.assert_array_equal(found[0].experts[..., :1], narrow.experts)
    np.testing.assert_array_equal(found[1].experts, experts)
    np.testing.assert_array_equal(routing_trace.load(found[0]), routing_trace.load(narrow))
    np.testing.assert_array_equal(routing_trace.co_activation(found[0]), routing_trace.co_activation(narrow))
    assert (routing_trace.repetition(found[0]).observed == routing_trace.repetition(narrow).observed).all()


@pytest.mark.parametrize("most", [2, 3, 9])
def test_large_sets_meet_as_small_ones_do(rng, most):
    """Sets of up to 2, 3 or 9 of 9 experts, some empty: in pairs, expert by expert, and against Python's sets."""
    experts = np.argsort(rng.random((1, 60, 9)), axis=2)[..., :most]
    experts[np.arange(most) >= rng.integers(0, most + 1, (1, 60, 1))] = -1
    trace = Trace(np.zeros(60, int), np.zeros(60, int), experts, np.ones((1, 60, most)), np.zeros((1, 60, 9)))
    found = routing_trace.repetition(trace, "either")
    sets = [{int(e) for e in row if e >= 0} for row in experts[0]]
    assert_allclose(found.observed, np.mean([bool(a & b) for a, b in itertools.pairwise(sets)]))
    assert_allclose(found.load, np.mean([bool(a & b) for a in sets for b in sets]))


def test_thousands_of_large_sets_are_compared_in_seconds(rng):
    """A router that lets the number of experts vary gives nearly every token a set of its own."""
    experts = np.argsort(rng.random((1, 4000, 64)), axis=2)[..., :20]
    trace = Trace(np.zeros(4000, int), np.zeros(4000, int), experts, experts * 1.0, np.zeros((1, 4000, 64)))
    started = time.process_time()
    routing_trace.repetition(trace, "either", shuffles=1)
    assert time.process_time() - started < 4  # 0.2 s; pair by pair it took a minute


def test_a_dense_layer_has_no_place_in_a_trace(small, rng):
    config = dataclasses.replace(small, layers=3, dense_layers=1, dense_width=4)
    params = tree.map(lambda leaf: leaf + 0.3 * rng.standard_normal(leaf.shape), decoder.init(rng, config, np.float64))
    tokens = rng.integers(0, config.vocab_size, 2 * config.context)
    seen = routing_trace.trace(params, config, tokens)
    _, _, cache = decoder.forward(params, tokens.reshape(2, -1), config)
    assert (seen.first_layer, len(seen.experts), len(seen.logits)) == (1, 2, 2)
    for layer in range(2):
        logits = cache.blocks[1 + layer].moe.router.gate.x @ params.blocks[1 + layer].moe.router.w_gate
        assert_allclose(seen.logits[layer], logits, atol=1e-12)
