"""The hash router: its table, a loop over tokens, its gradient on every path, and what it refuses."""

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from minimoe.core import tree
from minimoe.core.config import ModelConfig
from minimoe.core.errors import UserError
from minimoe.inference import generation, kv_cache
from minimoe.layers import decoder, moe
from minimoe.layers.mode import Mode
from minimoe.layers.routers import token_hash
from minimoe.layers.routers.token_hash import TokenHash
from minimoe.layers.routing import RouterStats, by_token, experts_by_token
from minimoe.losses import balance, objective
from minimoe.losses.balance import Coefficients
from minimoe.losses.objective import Shard
from minimoe.proof.gradcheck import check, failed
from minimoe.training.step import objective_of

EVERY_LOSS = Coefficients(balance=0.5, importance=0.3, load=0.4, z=0.2, sequence=0.6)


def config_of(**changes: Any) -> ModelConfig:
    sizes = {"vocab_size": 11, "width": 4, "layers": 2, "heads": 2, "kv_heads": 1, "head_width": 4, "context": 7}
    return ModelConfig(
        **{**sizes, "experts": 5, "expert_width": 3, "router": "token_hash", "hash_gate": True, **changes}
    )


# The table


@given(vocabulary=st.integers(1, 60), experts=st.integers(1, 9), share=st.floats(0, 1))
@example(vocabulary=1, experts=9, share=1.0)
@example(vocabulary=56, experts=8, share=0.25)
@example(vocabulary=60, experts=8, share=0.4)
def test_every_id_has_different_experts_and_every_expert_equally_many_ids(
    vocabulary: int, experts: int, share: float
) -> None:
    active = max(1, round(share * experts))
    table = token_hash.table(vocabulary, experts, active)
    assert table.shape == (vocabulary, active)
    assert ((table >= 0) & (table < experts)).all()
    assert all(len(set(row)) == active for row in table.tolist())
    named = np.bincount(table.reshape(-1), minlength=experts)
    assert named.max() - named.min() <= 1


def test_the_table_is_the_same_for_ever() -> None:
    """A model that was saved keeps no table: other numbers here would send its tokens to other experts."""
    rows = [[0, 3], [3, 1], [4, 1], [0, 1], [0, 2], [3, 0], [1, 3], [4, 2], [2, 4], [1, 4], [2, 0]]
    assert token_hash.table(11, 5, 2).tolist() == rows
    assert int((token_hash.table(32_000, 8, 2) * [1, 8]).sum(1) @ np.arange(32_000) % 1_000_003) == 384134


def test_any_two_experts_meet_and_neighbouring_ids_are_not_dealt_in_order() -> None:
    table = token_hash.table(800, 8, 2)
    pairs = np.bincount((np.sort(table, axis=1) * [8, 1]).sum(1), minlength=64).reshape(8, 8)
    assert (pairs[np.triu_indices(8, 1)] > 10).all(), "28 pairs share 800 ids, 28.6 each on average"
    same = (table[1:, 0] == (table[:-1, 0] + 1) % 8).mean()
    assert 0.05 < same < 0.2, "1/8 by chance"


def test_the_table_is_shared_and_so_cannot_be_written_to() -> None:
    assert token_hash.table(11, 5, 2) is token_hash.table(11, 5, 2)
    with pytest.raises(ValueError, match="read-only"):
        token_hash.table(11, 5, 2)[0] = 0


@pytest.mark.parametrize("active", [1, 2, 3])
def test_new_ids_by_count_are_a_permutation_that_evens_out_the_load(active: int) -> None:
    """96 characters as frequent as in a text: the busiest expert, over its fair share, by id and by count."""
    counts = (1e5 / np.arange(3, 99)).astype(int)
    table = token_hash.table(96, 8, active)

    def busiest(rows: np.ndarray) -> float:
        load = np.bincount(rows.reshape(-1), np.repeat(counts, active), minlength=8)
        return float(load.max() / load.mean())

    ids = token_hash.ids_by_count(counts, 8, active)
    assert sorted(ids) == list(range(96))
    by_chance = [busiest(np.random.default_rng(draw).permutation(table)) for draw in range(50)]
    assert busiest(table[ids]) < min(1.1, *by_chance)
    assert np.median(by_chance) > 1.2


def test_new_ids_by_count_worked_out_by_hand() -> None:
    """Four tokens, two experts, one choice: 9 alone with 1, and 6 with 5."""
    table = token_hash.table(4, 2, 1)[:, 0]
    experts = table[token_hash.ids_by_count(np.array([1, 9, 5, 6]), 2, 1)]
    assert experts[1] == experts[0] != experts[2] == experts[3]


# Forward


@pytest.mark.parametrize("gate", [False, True])
def test_it_agrees_with_a_loop_over_tokens(rng: np.random.Generator, gate: bool) -> None:
    config = config_of(hash_gate=gate, active_experts=3)
    w_gate = rng.standard_normal((4, 5))
    params, x = TokenHash(w_gate if gate else None), rng.standard_normal((2, 6, 4))
    labels = rng.integers(11, size=(2, 6))
    mask = np.ones((2, 6))
    mask[1, 4:] = 0
    mode = Mode(True, mask=mask, labels=labels, balance_by_sequence=True)
    routing, stats, _ = token_hash.forward(params, x, config, mode)
    experts, weights = experts_by_token(routing), by_token(routing.weight, routing.place)
    assignments, probability = np.zeros((2, 5))
    squared_lse = entropy = by_sequence = 0.0
    table = token_hash.table(11, 5, 3)
    for b in range(2):
        of_sequence, counts = np.zeros((2, 5))
        for t in range(6):
            token = x[b, t]
            logits = {e: float(token @ w_gate[:, e]) if gate else 0.0 for e in table[labels[b, t]].tolist()}
            total = sum(math.exp(z) for z in logits.values())
            p = {e: math.exp(z) / total for e, z in logits.items()}
            best_first = sorted(p, key=lambda e: -p[e])
            assert set(experts[6 * b + t]) == p.keys()
            if gate:
                assert experts[6 * b + t].tolist() == best_first
            for e, w in zip(experts[6 * b + t], weights[6 * b + t], strict=True):
                assert w == pytest.approx(p[e])
            if not mask[b, t]:
                continue
            for e, one in p.items():
                counts[e] += 1
                of_sequence[e] += one
            squared_lse += math.log(total) ** 2 if gate else 0.0
            entropy -= sum(one * math.log(one) for one in p.values())
        assignments += counts
        probability += of_sequence
        by_sequence += 5 * (counts / counts.sum() * of_sequence).sum()
    expected = RouterStats(10, assignments, probability, probability, assignments, squared_lse, by_sequence, entropy)
    for name, mine, theirs in zip(RouterStats._fields, stats, expected, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-12, err_msg=name)


def test_without_a_gate_it_is_a_gate_of_zeros(rng: np.random.Generator) -> None:
    x, labels = rng.standard_normal((2, 5, 4)), rng.integers(11, size=(2, 5))
    plain, zeros = (
        token_hash.forward(TokenHash(w), x, config_of(hash_gate=w is not None), Mode(labels=labels))
        for w in (None, np.zeros((4, 5)))
    )
    assert (plain[0].weight == 0.5).all()
    for mine, theirs in zip(plain[0], zeros[0], strict=True):
        np.testing.assert_array_equal(mine, theirs)
    for name in set(RouterStats._fields) - {"squared_lse"}:
        np.testing.assert_array_equal(getattr(plain[1], name), getattr(zeros[1], name))
    assert (plain[1].squared_lse, zeros[1].squared_lse) == (0, pytest.approx(10 * math.log(2) ** 2))


def test_the_experts_depend_on_the_ids_and_on_nothing_else(rng: np.random.Generator) -> None:
    labels = rng.integers(11, size=(2, 6))
    one, other = (
        token_hash.forward(
            TokenHash(rng.standard_normal((4, 5))), rng.standard_normal((2, 6, 4)), config_of(), Mode(labels=labels)
        )[0]
        for _ in range(2)
    )
    assert one.counts == other.counts
    assert (np.sort(experts_by_token(one)) == np.sort(experts_by_token(other))).all()
    assert (np.sort(experts_by_token(one)) == np.sort(token_hash.table(11, 5, 2)[labels.reshape(-1)])).all()


def test_tokens_in_another_order_are_the_same_tokens(rng: np.random.Generator) -> None:
    """The whole layer: who stands beside whom changes nothing."""
    config = config_of()
    params = tree.map(lambda leaf: leaf + rng.standard_normal(leaf.shape), moe.init(rng, config, dtype=np.float64))
    x, labels, order = rng.standard_normal((1, 9, 4)), rng.integers(11, size=(1, 9)), rng.permutation(9)
    y = moe.forward(params, x, config, Mode(labels=labels)).y
    again = moe.forward(params, x[:, order], config, Mode(labels=labels[:, order])).y
    np.testing.assert_allclose(again, y[:, order], atol=1e-14)


def test_a_full_expert_refuses_entries_and_padding_takes_no_seat(rng: np.random.Generator) -> None:
    config = config_of(active_experts=1, hash_gate=False, experts=4)
    labels = np.full((2, 8), 3)
    mask = np.ones((2, 8))
    mask[1, :6] = 0
    mode = Mode(True, capacity_factor=1.0, mask=mask, labels=labels)
    routing, stats, _ = token_hash.forward(TokenHash(None), np.ones((2, 8, 4)), config, mode)
    assert routing.token.tolist() == [0, 1, 14]  # ⌈8/4⌉ = 2 of the first sequence, ⌈2/4⌉ = 1 of the second
    assert routing.dropped == 7
    assert stats.assignments.sum() == 10


@pytest.mark.parametrize("gate", [False, True])
def test_a_text_is_written_as_the_whole_model_would(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch, gate: bool
) -> None:
    """One token at a time with the cache, by ``decode_label`` alone, gives the logits of the full pass."""
    config = config_of(hash_gate=gate, active_experts=3)
    params = tree.map(lambda leaf: leaf + 0.5 * rng.standard_normal(leaf.shape), decoder.init(rng, config, np.float64))
    tokens = rng.integers(11, size=(1, 7))
    whole = decoder.forward(params, tokens, config).logits[0]
    cache = kv_cache.init(params, config)
    monkeypatch.setattr(moe, "forward", None)
    for position in range(7):
        logits = generation.extend(params, cache, tokens[:, position : position + 1])[0]
        np.testing.assert_allclose(logits, whole[position], atol=1e-12)


def test_one_token_with_extreme_logits_has_finite_weights() -> None:
    x = np.array([1e4, 0, 0, 0])
    experts, weights = token_hash.decode_label(TokenHash(np.ones((4, 1)) * [1, -1, 1, -1, 1]), x, config_of(), 0)
    assert (experts, weights) == ([0, 3], [1, 0])


# Backward


@given(
    batch=st.integers(1, 2),
    context=st.integers(1, 5),
    experts=st.integers(1, 5),
    share=st.floats(0, 1),
    masked=st.booleans(),
    factor=st.sampled_from([None, 0.5, 100.0]),
    seed=st.integers(0, 2**16),
)
def test_every_gradient_is_right_at_every_point(
    batch: int, context: int, experts: int, share: float, masked: bool, factor: float | None, seed: int
) -> None:
    """No ``routing`` is passed to the check and nothing is refused: there is no jump to stay away from."""
    rng = np.random.default_rng(seed)
    active = max(1, round(share * experts))
    config = config_of(experts=experts, active_experts=active)
    params, x = TokenHash(rng.standard_normal((4, experts))), rng.standard_normal((batch, context, 4))
    mask = (rng.random((batch, context)) < 0.7).astype(float) if masked else None
    labels = rng.integers(11, size=(batch, context))
    mode = Mode(True, None, factor, balance_by_sequence=True, mask=mask, labels=labels)

    def forward(params: TokenHash, x: np.ndarray) -> tuple[Any, Any]:
        routing, stats, cache = token_hash.forward(params, x, config, mode)
        losses, dstats = balance.loss(stats, EVERY_LOSS)
        return (routing.weight, balance.weighted(losses, EVERY_LOSS)), (cache, dstats)

    def backward(params: TokenHash, cache: Any, dy: Any) -> tuple[Any, Any]:
        return token_hash.backward(params, cache[0], dy[0], tree.map(lambda leaf: leaf * dy[1], cache[1]))

    rows = check("token_hash", forward, backward, params, x, entries=10, directions=2)
    assert failed(rows) == []
    assert sum(row.refused for row in rows) == 0


def test_a_logit_outside_the_set_gets_no_gradient_and_every_logit_inside_gets_one(rng: np.random.Generator) -> None:
    x, label = rng.standard_normal((1, 1, 4)), 7
    params = TokenHash(rng.standard_normal((4, 5)))
    _, stats, cache = token_hash.forward(params, x, config_of(active_experts=3), Mode(labels=np.array([[label]])))
    dstats = tree.map(lambda leaf: rng.standard_normal(np.shape(leaf)), stats._replace(tokens=np.zeros(())))
    _, grads = token_hash.backward(params, cache, rng.standard_normal(3), dstats)
    inside = token_hash.table(11, 5, 3)[label]
    assert grads.w_gate is not None
    touched = abs(grads.w_gate).sum(0)
    assert (touched[inside] > 1e-6).all()
    assert (np.delete(touched, inside) == 0).all()


def test_two_weights_with_the_same_gradient_teach_the_gate_nothing(rng: np.random.Generator) -> None:
    params, x = TokenHash(rng.standard_normal((4, 5))), rng.standard_normal((1, 3, 4))
    _, _, cache = token_hash.forward(params, x, config_of(), Mode(labels=np.array([[0, 4, 9]])))
    dx, grads = token_hash.backward(params, cache, np.full(6, 2.5), None)
    np.testing.assert_allclose(dx, 0, atol=1e-14)
    np.testing.assert_allclose(grads.w_gate, 0, atol=1e-14)


def test_a_fixed_weight_passes_nothing_back(rng: np.random.Generator) -> None:
    x = rng.standard_normal((1, 3, 4)).astype(np.float32)
    _, stats, cache = token_hash.forward(
        TokenHash(None), x, config_of(hash_gate=False), Mode(labels=np.array([[0, 4, 9]]))
    )
    dstats = balance.loss(stats, EVERY_LOSS)[1]
    dx, grads = token_hash.backward(TokenHash(None), cache, np.ones(6, np.float32), dstats)
    assert (dx.shape, dx.dtype, dx.any()) == (x.shape, np.float32, False)
    assert tree.leaves(grads) == []


# What it needs and what it refuses


@pytest.mark.parametrize("labels", [np.array([[0, -1]]), np.array([[11, 0]])])
def test_labels_that_are_no_ids_are_refused(labels: np.ndarray) -> None:
    """−1 is a usual placeholder, and as an index it would mean the last row of the table."""
    with pytest.raises(UserError, match=r"labels from -?\d+ to \d+ are not token ids of a vocabulary of 11"):
        token_hash.forward(TokenHash(None), np.ones((1, 2, 4)), config_of(hash_gate=False), Mode(labels=labels))


def test_missing_labels_are_refused_in_a_sentence(rng: np.random.Generator) -> None:
    config = config_of()
    with pytest.raises(UserError, match="labels is None, but the router 'token_hash'.*Mode\\(labels=...\\)"):
        moe.forward(moe.init(rng, config), np.ones((1, 2, 4), np.float32), config)


def test_a_gate_that_weighs_one_expert_can_be_run_but_not_trained(rng: np.random.Generator) -> None:
    config = config_of(active_experts=1)
    with pytest.raises(UserError, match="hash_gate with active_experts 1 .*--no-hash-gate"):
        moe.check(config)
    moe.check_forward(config)
    for allowed in ({"hash_gate": False}, {"experts": 1}, {"active_experts": 2}):
        moe.check(dataclasses.replace(config, **allowed))


def test_the_gate_is_the_only_parameter_and_noise_is_never_drawn(rng: np.random.Generator) -> None:
    for gate in (False, True):
        config = config_of(hash_gate=gate)
        params, blank = token_hash.init(rng, config), token_hash.blank(config, np.zeros)
        shapes = [leaf.shape for leaf in tree.leaves(params)]
        assert shapes == [leaf.shape for leaf in tree.leaves(blank)] == ([(4, 5)] if gate else [])
        assert token_hash.draw_noise(rng, config, (2, 3, 4), np.float32) is None
    assert token_hash.init(rng, config_of(width=400)).w_gate.std() == pytest.approx(0.02, rel=0.1)


def test_a_recipe_that_names_no_coefficient_balances_nothing(rng: np.random.Generator) -> None:
    from minimoe.core.config import TrainConfig

    assert objective_of(config_of(), TrainConfig()).coefficients.balance == 0
    config = config_of(hash_gate=False)
    params = decoder.init(rng, config, np.float64)
    tokens = rng.integers(11, size=(2, 2, 7))
    totals, _ = objective.loss_and_gradient(params, [Shard(*tokens)], config, objective_of(config, TrainConfig()))
    assert float(totals.total) == float(totals.loss), "no loss is added where nothing can be learned"
