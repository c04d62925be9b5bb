"""A ladder of equivalences: what the mixture must equal, from one dense expert up to a whole step on another device.

Each rung is a sentence. Values and gradients are compared on both of its sides, the other side written plainly here
where it is no part of the package.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import on_devices
import pytest
import strict_cupy
from hypothesis import example, given
from hypothesis import strategies as st
from small_models import (
    EVERY_LOSS,
    SEQUENCES,
    assert_close,
    assert_same,
    batch_of,
    drawn,
    drawn_mixture,
    gradient_in_a_group,
    identical,
    mixture,
    mixtures,
    split,
)

from minimoe.core import arrays, tree
from minimoe.core.config import ModelConfig
from minimoe.inference import generation, kv_cache
from minimoe.layers import attention, decoder, moe, rope
from minimoe.layers.attention import Attention, KeyValues
from minimoe.layers.decoder import Decoder
from minimoe.layers.experts.swiglu import Experts
from minimoe.layers.linear import Linear
from minimoe.layers.mode import Mode
from minimoe.layers.moe import MoE
from minimoe.layers.routers import noisy_top_k
from minimoe.layers.routers.noisy_top_k import Router
from minimoe.layers.routing import Choice
from minimoe.losses.objective import Objective, Shard, loss_and_gradient
from minimoe.parallel import processes

WayBack = Callable[[np.ndarray], Any]
"""From the gradient of an output to those of all inputs."""

# Experts and their mixture


def one_of(experts: Experts, e: int) -> Experts:
    return Experts(*(weight[e] for weight in experts))


def dense_swiglu(params: Experts, x: np.ndarray) -> tuple[np.ndarray, WayBack]:
    """x (N, D) through weights (D, F), (D, F) and (F, D) → y (N, D), and the way from dy to dx and the gradients."""
    a, b = x @ params.w_gate, x @ params.w_up
    s = 1 / (1 + np.exp(-a))

    def back(dy: np.ndarray) -> tuple[np.ndarray, Experts]:
        dh = dy @ params.w_down.T
        da, db = dh * b * (s + a * s * (1 - s)), dh * a * s
        return da @ params.w_gate.T + db @ params.w_up.T, Experts(x.T @ da, x.T @ db, (a * s * b).T @ dy)

    return (a * s * b) @ params.w_down, back


def test_one_expert_with_one_active_is_a_dense_swiglu(rng: np.random.Generator) -> None:
    config = mixture(experts=1, active=1)
    params, (x, dy) = drawn_mixture(rng, config), rng.standard_normal((2, 2, 3, 4))
    y, _, _, cache = moe.forward(params, x, config)
    dx, grads = moe.backward(params, cache, dy, None)
    dense, back = dense_swiglu(one_of(params.experts, 0), x.reshape(6, 4))
    dense_dx, dense_grads = back(dy.reshape(6, 4))
    assert_close((y.reshape(6, 4), dx.reshape(6, 4), one_of(grads.experts, 0)), (dense, dense_dx, dense_grads))
    assert not grads.router.w_gate.any()


@pytest.mark.parametrize("active", [2, 4])
def test_identical_experts_make_routing_irrelevant(rng: np.random.Generator, active: int) -> None:
    """A dense model copied into every expert computes what it computed before: sparse upcycling starts there."""
    config = mixture(experts=4, active=active)
    params = drawn_mixture(rng, config)
    params = MoE(params.router, Experts(*(weight[:1].repeat(4, axis=0) for weight in params.experts)))
    (x, dy), noise = rng.standard_normal((2, 2, 3, 4)), rng.standard_normal((2, 3, 4))
    y, _, _, cache = moe.forward(params, x, config, Mode(noise=noise))
    dx, grads = moe.backward(params, cache, dy, None)
    dense, back = dense_swiglu(one_of(params.experts, 0), x.reshape(6, 4))
    dense_dx, dense_grads = back(dy.reshape(6, 4))
    together = Experts(*(weight.sum(0) for weight in grads.experts))
    assert_close((y.reshape(6, 4), dx.reshape(6, 4), together), (dense, dense_dx, dense_grads))
    assert_close(grads.router, tree.zeros_like(grads.router))


@pytest.mark.parametrize("renormalize", [True, False])
def test_with_every_expert_active_it_is_the_full_soft_mixture(rng: np.random.Generator, renormalize: bool) -> None:
    config = mixture(experts=3, active=3, renormalize=renormalize)
    params, (x, dy) = drawn_mixture(rng, config), rng.standard_normal((2, 1, 5, 4))
    y, _, _, cache = moe.forward(params, x, config)
    dx, grads = moe.backward(params, cache, dy, None)

    p = np.exp(x[0] @ params.router.w_gate)
    p /= p.sum(1, keepdims=True)
    answers, backs = zip(*(dense_swiglu(one_of(params.experts, e), x[0]) for e in range(3)), strict=True)
    dp = np.stack([(dy[0] * answer).sum(1) for answer in answers], axis=1)
    dlogits = p * (dp - (p * dp).sum(1, keepdims=True))
    back = [backs[e](p[:, e : e + 1] * dy[0]) for e in range(3)]
    mixed = sum(p[:, e : e + 1] * answers[e] for e in range(3))
    mixed_dx = dlogits @ params.router.w_gate.T + sum(dx_of_one for dx_of_one, _ in back)
    assert_close((y[0], dx[0]), (mixed, mixed_dx))
    assert_close([one_of(grads.experts, e) for e in range(3)], [of_one for _, of_one in back])
    assert_close(grads.router.w_gate, x[0].T @ dlogits)


def test_infinite_capacity_is_dropless(rng: np.random.Generator) -> None:
    """So is E/K times the fair share, which is enough for all tokens of a sequence to choose the same expert."""
    config = mixture(experts=5, active=2)
    params, (x, dy) = drawn_mixture(rng, config), rng.standard_normal((2, 2, 6, 4))
    y, _, _, cache = moe.forward(params, x, config)
    for factor in (5 / 2, 1e6):
        same, _, dropped, same_cache = moe.forward(params, x, config, Mode(capacity_factor=factor))
        assert dropped == 0
        assert identical((same, moe.backward(params, same_cache, dy, None)), (y, moe.backward(params, cache, dy, None)))


def by_loop(experts: Experts, x: np.ndarray, choice: Choice, kept: np.ndarray, dy: np.ndarray) -> Any:
    """One token and one of its experts after the other → y, and the gradients of x, the weights and the experts."""
    y, dx, dweights = np.zeros_like(x), np.zeros_like(x), np.zeros_like(choice.weights)
    grads = tree.zeros_like(experts)
    for t, k in np.argwhere(kept):
        e, weight = choice.experts[t, k], choice.weights[t, k]
        answer, back = dense_swiglu(one_of(experts, e), x[t : t + 1])
        of_x, of_expert = back(weight * dy[t : t + 1])
        y[t] += weight * answer[0]
        dx[t] += of_x[0]
        dweights[t, k] = dy[t] @ answer[0]
        for total, part in zip(grads, of_expert, strict=True):
            total[e] += part
    return y, dx, dweights, grads


def by_einsum(experts: Experts, x: np.ndarray, choice: Choice, kept: np.ndarray, dy: np.ndarray) -> Any:
    """GShard's way: a one-hot tensor puts each token into a slot (s) of each of its experts, and all is one einsum."""
    chosen = (choice.experts[..., None] == np.arange(len(experts.w_gate))) & kept[..., None]  # (N, K, E)
    slot = chosen.reshape(-1, chosen.shape[-1]).cumsum(0).reshape(chosen.shape)
    dispatch = (chosen[..., None] & (slot[..., None] == np.arange(1, slot.max() + 1))).astype(float)  # (N, K, E, S)
    weighted = np.einsum("nkes,nk->nes", dispatch, choice.weights)
    tokens = np.einsum("nkes,nd->esd", dispatch, x)
    a = np.einsum("esd,edf->esf", tokens, experts.w_gate)
    b = np.einsum("esd,edf->esf", tokens, experts.w_up)
    s = 1 / (1 + np.exp(-a))
    answers = np.einsum("esf,efd->esd", a * s * b, experts.w_down)
    y = np.einsum("nes,esd->nd", weighted, answers)

    dweights = np.einsum("nd,esd,nkes->nk", dy, answers, dispatch)
    danswers = np.einsum("nes,nd->esd", weighted, dy)
    dh = np.einsum("esd,efd->esf", danswers, experts.w_down)
    da, db = dh * b * (s + a * s * (1 - s)), dh * a * s
    dtokens = np.einsum("esf,edf->esd", da, experts.w_gate) + np.einsum("esf,edf->esd", db, experts.w_up)
    grads = Experts(
        np.einsum("esd,esf->edf", tokens, da),
        np.einsum("esd,esf->edf", tokens, db),
        np.einsum("esf,esd->efd", a * s * b, danswers),
    )
    return y, np.einsum("nkes,esd->nd", dispatch, dtokens), dweights, grads


def first_come_first_served(experts: np.ndarray, capacity: float) -> np.ndarray:
    """experts (B, T, K) → which entries find their expert with fewer than ``capacity`` of this sequence before them."""
    kept = np.zeros(experts.shape, bool)
    for b, t, k in np.ndindex(experts.shape):
        before = experts[b].reshape(-1)[: t * experts.shape[2] + k]
        kept[b, t, k] = (before == experts[b, t, k]).sum() < capacity
    return kept


ONE_OF_ALL = {"batch": 1, "time": 1, "experts": 1, "active": 1, "noisy": True, "renormalize": True, "seed": 0}


@given(case=mixtures)
@example(case=ONE_OF_ALL | {"capacity_factor": 1.0})
def test_a_loop_over_tokens_is_one_hot_einsum_is_sorted_dispatch(case: dict[str, Any]) -> None:
    rng, factor = np.random.default_rng(case["seed"]), case["capacity_factor"]
    B, T, E, K = case["batch"], case["time"], case["experts"], min(case["active"], case["experts"])
    config = mixture(E, K, case["renormalize"], case["noisy"])
    params, (x, dy) = drawn_mixture(rng, config), rng.standard_normal((2, B, T, 4))
    noise = rng.standard_normal((B, T, E)) if case["noisy"] else None
    y, _, dropped, cache = moe.forward(params, x, config, Mode(noise=noise, capacity_factor=factor))
    dx, grads = moe.backward(params, cache, dy, None)

    rows, dy_rows = x.reshape(B * T, 4), dy.reshape(B * T, 4)
    xi = None if noise is None else noise.reshape(B * T, E)
    choice, _, router_cache = noisy_top_k.gate(params.router, rows, K, renormalize=config.renormalize, noise=xi)
    capacity = math.inf if factor is None else math.ceil(factor * K * T / E)
    kept = first_come_first_served(choice.experts.reshape(B, T, K), capacity).reshape(B * T, K)
    assert dropped == (~kept).sum()
    for way in (by_loop, by_einsum):
        its_y, its_dx, dweights, dexperts = way(params.experts, rows, choice, kept, dy_rows)
        dx_router, drouter = noisy_top_k.gate_backward(params.router, router_cache, dweights, None)
        assert_close((y.reshape(B * T, 4), dx.reshape(B * T, 4)), (its_y, its_dx + dx_router))
        assert_close(grads, MoE(drouter, dexperts))


def reordered(params: Decoder, order: np.ndarray) -> Decoder:
    """The same experts in another order, in every layer; or the same of a gradient."""
    blocks = []
    for layer in params.blocks:
        gate, noise = layer.moe.router
        experts = Experts(*(weight[order] for weight in layer.moe.experts))
        blocks.append(layer._replace(moe=MoE(Router(gate[:, order], noise[:, order]), experts)))
    return params._replace(blocks=blocks)


@pytest.mark.parametrize("renormalize", [True, False])
def test_permuting_the_experts_permutes_everything_and_changes_nothing(
    rng: np.random.Generator, small: ModelConfig, renormalize: bool
) -> None:
    config = dataclasses.replace(small, renormalize=renormalize)
    params, batch, order = drawn(rng, config), batch_of(rng, config), rng.permutation(5)
    assert batch.noise is not None
    goal = Objective(EVERY_LOSS, capacity_factor=0.7)
    totals, gradient = loss_and_gradient(params, [batch], config, goal)
    permuted = batch._replace(noise=batch.noise[..., order])
    same, reordered_gradient = loss_and_gradient(reordered(params, order), [permuted], config, goal)
    assert min(totals.dropped) > 0
    assert_same((same, reordered_gradient), (totals, reordered(gradient, order)))
    assert same.loss == pytest.approx(totals.loss, rel=1e-13)
    for theirs, ours in zip(same.stats, totals.stats, strict=True):
        assert_close(theirs, tree.map(lambda sum: sum[order] if np.ndim(sum) else sum, ours))


# Attention


def one_head(x: np.ndarray, query: Any, key: Any, value: Any, output: Any) -> tuple[np.ndarray, WayBack]:
    """x (T, D) and the projections of one causal head → y (T, D), and the way from dy to the five gradients.

    RoPE is multiplication by a complex number of size 1, and its way back the multiplication by its conjugate.
    """
    T, C = len(x), query.shape[1]
    turn = np.exp(1j * np.arange(T)[:, None] * 10_000.0 ** (-2 * np.arange(C // 2) / C))

    def turned(z: np.ndarray, by: np.ndarray) -> np.ndarray:
        pairs = (z[:, : C // 2] + 1j * z[:, C // 2 :]) * by
        return np.concatenate([pairs.real, pairs.imag], axis=1)

    q, k, v = turned(x @ query, turn), turned(x @ key, turn), x @ value
    weights = np.where(np.tri(T) > 0, np.exp(q @ k.T / math.sqrt(C)), 0)
    weights /= weights.sum(1, keepdims=True)
    o = weights @ v

    def back(dy: np.ndarray) -> tuple[np.ndarray, ...]:
        do = dy @ output.T
        dweights = do @ v.T
        dscores = weights * (dweights - (weights * dweights).sum(1, keepdims=True)) / math.sqrt(C)
        dq, dk, dv = turned(dscores @ k, turn.conj()), turned(dscores.T @ q, turn.conj()), weights.T @ do
        return dq @ query.T + dk @ key.T + dv @ value.T, x.T @ dq, x.T @ dk, x.T @ dv, o.T @ dy

    return o @ output, back


@pytest.mark.parametrize(
    ("kv_heads", "group_of_head"),
    [(4, [0, 1, 2, 3]), (1, [0, 0, 0, 0]), (2, [0, 0, 1, 1])],
    ids=["one per query head is multi-head", "a single one is multi-query", "between, neighbours share one"],
)
def test_grouped_queries_are_heads_on_their_own(
    rng: np.random.Generator, kv_heads: int, group_of_head: list[int]
) -> None:
    """D 6, H 4, C 8."""
    params = attention.init(rng, 6, 4, kv_heads, 8, dtype=np.float64)
    x, dy = rng.standard_normal((2, 2, 5, 6))
    y, cache = attention.forward(params, x, rope.init(np.arange(5), 8, dtype=np.float64), 8)
    dx, grads = attention.backward(params, cache, dy)
    query, key, value, output = (projection.weight for projection in params[:4])
    plain_y, plain_dx = np.zeros_like(x), np.zeros_like(x)
    plain = Attention(*(Linear(np.zeros_like(projection.weight)) for projection in params[:4]))
    for b, (h, g) in ((b, head) for b in range(2) for head in enumerate(group_of_head)):
        own, shared = slice(8 * h, 8 * h + 8), slice(8 * g, 8 * g + 8)
        of_head, back = one_head(x[b], query[:, own], key[:, shared], value[:, shared], output[own])
        of_x, of_query, of_key, of_value, of_output = back(dy[b])
        plain_y[b] += of_head
        plain_dx[b] += of_x
        plain.query.weight[:, own] += of_query
        plain.key.weight[:, shared] += of_key
        plain.value.weight[:, shared] += of_value
        plain.output.weight[own] += of_output
    assert_close((y, dx, grads), (plain_y, plain_dx, plain))


def test_a_window_as_long_as_the_sequence_is_no_window(rng: np.random.Generator, small: ModelConfig) -> None:
    params, batch = drawn(rng, small), batch_of(rng, small)

    def within(window: int | None) -> Any:
        config = dataclasses.replace(small, window=window)
        totals, gradient = loss_and_gradient(params, [batch], config, Objective(EVERY_LOSS))
        return totals.total, gradient

    assert identical(within(small.context), within(None))
    assert identical(within(99), within(None))
    assert not identical(within(small.context - 1), within(None))


# The whole model


@given(length=st.integers(1, 6), window=st.none() | st.integers(1, 8), seed=st.integers(0, 99))
def test_a_longer_context_never_changes_earlier_logits(
    small: ModelConfig, length: int, window: int | None, seed: int
) -> None:
    rng, config = np.random.default_rng(seed), dataclasses.replace(small, window=window)
    params, tokens = drawn(rng, config), rng.integers(13, size=(2, 7))
    longer, _, _ = decoder.forward(params, tokens, config)
    shorter, _, _ = decoder.forward(params, tokens[:, :length], config)
    np.testing.assert_allclose(longer[:, :length], shorter, rtol=0, atol=1e-12)


@pytest.mark.parametrize("noisy", [True, False])
def test_a_longer_context_never_changes_the_gradient_of_earlier_losses(
    rng: np.random.Generator, small: ModelConfig, noisy: bool
) -> None:
    """What is behind a sequence is padding to it."""
    params, batch = drawn(rng, small), batch_of(rng, small, masked=False, noisy=noisy)
    behind = [rng.integers(13, size=(SEQUENCES, 3)) for _ in range(2)]
    noise = None
    if batch.noise is not None:
        noise = np.concatenate([batch.noise, rng.standard_normal((2, SEQUENCES, 3, 5))], axis=2)
    longer = Shard(
        np.concatenate([batch.tokens, behind[0]], axis=1),
        np.concatenate([batch.targets, behind[1]], axis=1),
        noise,
        np.concatenate([np.ones((SEQUENCES, 7)), np.zeros((SEQUENCES, 3))], axis=1),
    )
    goal = Objective(EVERY_LOSS)
    assert_same(loss_and_gradient(params, [longer], small, goal), loss_and_gradient(params, [batch], small, goal))


@given(cuts=st.sets(st.integers(1, 6)), window=st.none() | st.integers(1, 8), seed=st.integers(0, 99))
def test_cached_decoding_is_full_decoding(small: ModelConfig, cuts: set[int], window: int | None, seed: int) -> None:
    """In pieces cut anywhere, and as text is written: a prompt, then token by token.

    Where two experts are nearly tied, rounding may choose between them: such a point is no test, and is left out.
    """
    rng = np.random.default_rng(seed)
    config = dataclasses.replace(small, window=window)
    params, tokens = drawn(rng, config), rng.integers(13, size=(2, 7))
    whole, _, cache = decoder.forward(params, tokens, config)
    for layer, done in zip(params.blocks, cache.blocks, strict=True):
        [(logits, _)] = noisy_top_k.compared(layer.moe.router, done.moe.router)
        ascending = np.sort(logits)
        if (ascending[:, -2] - ascending[:, -3]).min() < 1e-9:
            return
    past, pieces = None, []
    for start, stop in zip([0, *sorted(cuts)], [*sorted(cuts), 7], strict=True):
        logits, _, cache = decoder.forward(params, tokens[:, start:stop], config, past=past, position=start)
        past = [KeyValues(layer.attention.attended.k, layer.attention.attended.v) for layer in cache.blocks]
        pieces.append(logits)
    np.testing.assert_allclose(np.concatenate(pieces, axis=1), whole, atol=1e-11)
    for b in range(2):
        remembered = kv_cache.init(params, config)
        prompt = min(cuts, default=1)
        for start, stop in [(0, prompt), *((t, t + 1) for t in range(prompt, 7))]:
            logits = generation.extend(params, remembered, tokens[b : b + 1, start:stop])
            np.testing.assert_allclose(logits[0], whole[b, stop - 1], atol=1e-11)


@pytest.mark.parametrize("renormalize", [True, False])
def test_noise_of_scale_zero_is_no_noise(rng: np.random.Generator, small: ModelConfig, renormalize: bool) -> None:
    """But for the load loss, which is made of how far the noise might have reached."""
    config = dataclasses.replace(small, renormalize=renormalize)
    params, batch = drawn(rng, config), batch_of(rng, config)
    goal = Objective(EVERY_LOSS._replace(load=0.0), capacity_factor=0.7)
    silent = batch._replace(noise=0.0 * batch.noise)
    (silent_totals, silent_gradient), (totals, gradient) = (
        loss_and_gradient(params, [shard], config, goal) for shard in (silent, batch._replace(noise=None))
    )
    assert silent_totals.total == totals.total
    assert identical(silent_gradient, gradient)
    assert loss_and_gradient(params, [batch], config, goal)[0].total != totals.total


# A batch, and the machine

KINDS = [False, True] if processes.can_fork() else [False]
"""Workers that are threads, and processes where there can be any."""


@given(
    sizes=st.sampled_from([[6], [3, 3], [2, 2, 2], [1] * 6, [5, 1], [1, 2, 3]]),
    workers=st.integers(1, 3),
    masked=st.booleans(),
    noisy=st.booleans(),
    capacity_factor=st.none() | st.just(0.6),
    recompute=st.booleans(),
    pooled=st.booleans(),
    seed=st.integers(0, 99),
)
def test_one_batch_is_many_micro_batches_is_any_number_of_workers(
    small: ModelConfig,
    sizes: list[int],
    workers: int,
    masked: bool,
    noisy: bool,
    capacity_factor: float | None,
    recompute: bool,
    pooled: bool,
    seed: int,
) -> None:
    """Auxiliary losses included; and whether workers are processes or threads changes not a bit."""
    rng = np.random.default_rng(seed)
    params, batch = drawn(rng, small), batch_of(rng, small, masked, noisy)
    goal = Objective(EVERY_LOSS, capacity_factor, pooled)
    whole = loss_and_gradient(params, [batch], small, goal)
    shards = split(batch, sizes)
    one_by_one = loss_and_gradient(params, shards, small, goal, recompute=recompute)
    assert_same(one_by_one, whole)
    first, *others = (
        gradient_in_a_group(min(workers, len(shards)), params, shards, small, goal, recompute, processes)
        for processes in KINDS
    )
    assert_same(first, whole)
    for other in others:
        assert other[0].total == first[0].total
        assert identical(other[1], first[1])


def test_averaging_the_losses_of_parts_would_be_another_loss(rng: np.random.Generator, small: ModelConfig) -> None:
    """The fault that sums over tokens rule out: it would show here, so the test above can fail."""
    params, batch = drawn(rng, small), batch_of(rng, small)
    goal = Objective(EVERY_LOSS)
    whole, _ = loss_and_gradient(params, [batch], small, goal)
    parts = [loss_and_gradient(params, [shard], small, goal)[0].total for shard in split(batch, [2, 2, 2])]
    assert abs(np.mean(parts) - whole.total) > 0.01


@pytest.mark.parametrize(
    ("device", "dtype", "rounding"),
    [
        ("stand-in", np.float64, 1e-9),
        ("stand-in", np.float32, 1e-3),
        pytest.param("GPU", np.float64, 1e-6, marks=pytest.mark.gpu),
    ],
)
@pytest.mark.parametrize("padding", [False, True])
@pytest.mark.parametrize("name", on_devices.WHOLE)
def test_a_training_step_on_cupy_is_the_one_on_numpy(
    monkeypatch: pytest.MonkeyPatch, name: str, padding: bool, device: str, dtype: Any, rounding: float
) -> None:
    """Where a gradient is almost 0, AdamW divides rounding by rounding."""
    if device == "stand-in":
        strict_cupy.install(monkeypatch)
    elif problem := arrays.gpu_problem():
        pytest.skip(problem)
    on_numpy, on_cupy = (
        on_devices.training_step(
            on_devices.mover(where, dtype), dtype, "adamw" if padding else "muon", padding, **on_devices.WHOLE[name]
        )
        for where in ("cpu", "gpu")
    )
    on_devices.assert_equal(on_numpy, on_cupy, rounding)
