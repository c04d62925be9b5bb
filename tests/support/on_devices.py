"""Every layer, a training step and short runs, on inputs drawn on the host and moved to a device of choice.

The strict stand-in for CuPy and a real GPU are held to the same cases.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import small_runs

from minimoe.compression import prune
from minimoe.core import tree
from minimoe.core.arrays import Device, to_device, to_host
from minimoe.core.config import ModelConfig, TrainConfig
from minimoe.evaluate import text_loss
from minimoe.inference import generation
from minimoe.layers import attention, block, decoder, embedding, linear, lora, moe, rmsnorm, rope, routing, soft_moe
from minimoe.layers.attention import KeyValues
from minimoe.layers.experts import swiglu
from minimoe.layers.mode import Mode
from minimoe.layers.routers import noisy_top_k
from minimoe.losses import balance, cross_entropy, distillation, objective
from minimoe.losses.balance import Coefficients
from minimoe.losses.distillation import Settings
from minimoe.losses.objective import Objective, Shard
from minimoe.optim import clipping, optimizer
from minimoe.training import trainer
from minimoe.training.trainer import Trained

EVERY_LOSS = Coefficients(balance=0.5, importance=0.3, load=0.4, z=0.2, sequence=0.6)
CONFIG = ModelConfig(
    vocab_size=13, width=6, layers=2, heads=4, kv_heads=2, head_width=8, context=70, experts=5, expert_width=3
)
B, T, V, D, E = 2, CONFIG.context, CONFIG.vocab_size, CONFIG.width, CONFIG.experts  # T reaches into a second tile


class Case(NamedTuple):
    """One component with its inputs in place."""

    forward: Callable[[], tuple[Any, Any]]  # → results, cache
    backward: Callable[[Any], Any]  # cache → gradients


Move = Callable[[Any], Any]
"""Takes a tree of host arrays to where the case is to run, floats in the dtype to be tested."""


def mover(device: Device, dtype: Any) -> Move:
    def move(leaf: Any) -> Any:
        return to_device(leaf.astype(dtype) if leaf.dtype.kind == "f" else leaf, device)

    return lambda host: tree.map(move, host)


def on_host(results: Any) -> list[Any]:
    """Every array of a tree, on the host; plain numbers are left out."""
    kept = [leaf for leaf in tree.leaves(results) if not isinstance(leaf, int)]
    return [np.asarray(leaf) if isinstance(leaf, np.generic | float) else to_host(leaf) for leaf in kept]


def assert_equal(one: Any, other: Any, rtol: float, what: str = "") -> None:
    """Two results, entry by entry, to ``rtol`` of the largest of their array."""
    ones, others = on_host(one), on_host(other)
    assert len(ones) == len(others)
    for i, (a, b) in enumerate(zip(ones, others, strict=True)):
        assert a.shape == b.shape and a.dtype == b.dtype, f"{what}: array {i} is {b.dtype} {b.shape}"
        scale = float(np.abs(a).max(initial=0)) or 1.0
        np.testing.assert_allclose(b, a, rtol=0, atol=rtol * scale, err_msg=f"{what}: array {i}")


def moved(rng: np.random.Generator, params: Any) -> Any:
    """Parameters away from the zeros and ones that they start at."""
    return tree.map(lambda leaf: leaf + 0.3 * rng.standard_normal(leaf.shape), params)


# Components


def cases(on: Move, dtype: Any) -> Iterator[tuple[str, Case]]:
    """Every layer in every mode, by name."""
    rng = np.random.default_rng(0)
    yield "linear", _plain(on, rng, linear, linear.init(rng, D, 4))
    yield "rmsnorm", _plain(on, rng, rmsnorm, moved(rng, rmsnorm.init(D)))
    yield "embedding", _embedding(on, rng)
    yield "rope", _rope(on, rng, dtype)
    yield "attention", _attention(on, rng, dtype)
    yield "attention, window", _attention(on, rng, dtype, window=9)
    yield "attention after a past", _attention(on, rng, dtype, past=5)
    yield "swiglu, an expert idle, rows of none", _swiglu(on, rng)
    for name, options in ROUTERS.items():
        yield f"router, {name}", _router(on, rng, **options)
    yield "balance, pooled", _pooled(on, rng)
    yield "moe", _moe(on, rng, CONFIG)
    yield "moe, tokens dropped", _moe(on, rng, CONFIG, capacity_factor=0.5)
    yield "moe, tokens dropped, padding", _moe(on, rng, CONFIG, capacity_factor=0.5, masked=True)
    yield "soft_moe", _soft_moe(on, rng)
    yield "block", _block(on, rng, dtype)
    yield "cross-entropy", _cross_entropy(on, rng)
    yield "cross-entropy, padding", _cross_entropy(on, rng, mask=rng.integers(2, size=(B, T)))
    yield "linear, adapted", _plain(on, rng, linear, linear.Linear(_adapted(rng, rng.standard_normal((D, 4)))))
    yield "swiglu, adapted", _swiglu(on, rng, adapted=True)
    yield "moe, second experts skipped", _skipping(on, rng)
    for reverse in (False, True):
        yield f"distillation, reverse {reverse}", _distillation(on, rng, reverse)
    yield "pruning", _pruning(on, rng)


NOT_IN_A_STEP = ("moe, second experts skipped", "pruning")
"""Cases that no training step computes, so they may wait for the device more often."""

ROUTERS: dict[str, dict[str, Any]] = {
    "noisy": {},
    "noisy, padding": {"masked": True},
    "all probabilities": {"renormalize": False},
    "plain": {"noisy": False},
    "top-1": {"top_k": 1, "renormalize": False, "noisy": False},
    "every expert": {"top_k": E},
}


def _plain(on: Move, rng: np.random.Generator, layer: Any, params: Any) -> Case:
    params, x = on(params), on(rng.standard_normal((B, T, D)))
    y, _ = layer.forward(params, x)
    dy = on(rng.standard_normal(y.shape))
    return Case(lambda: layer.forward(params, x), lambda cache: layer.backward(params, cache, dy))


def _embedding(on: Move, rng: np.random.Generator) -> Case:
    params, tokens = on(embedding.init(rng, V, D)), on(rng.integers(V - 2, size=(B, T)))
    dy = on(1 + rng.standard_normal((B, T, D)))  # a common mean makes running sums grow
    return Case(lambda: embedding.forward(params, tokens), lambda cache: embedding.backward(params, cache, dy))


def _rope(on: Move, rng: np.random.Generator, dtype: Any) -> Case:
    positions, x, dy = on(np.arange(7, 7 + T)), *on(list(rng.standard_normal((2, B, T, 3, 8))))

    def forward() -> tuple[Any, Any]:
        rotation = rope.init(positions, 8, dtype=dtype)
        return rope.forward(rotation, x), rotation

    return Case(forward, lambda rotation: rope.backward(rotation, dy))


def _attention(on: Move, rng: np.random.Generator, dtype: Any, window: int | None = None, past: int = 0) -> Case:
    params = on(attention.init(rng, D, CONFIG.heads, CONFIG.kv_heads, CONFIG.head_width))
    earlier = on(KeyValues(*rng.standard_normal((2, B, past, CONFIG.kv_heads, CONFIG.head_width))))
    rotation = rope.init(on(np.arange(past, past + T)), CONFIG.head_width, dtype=dtype)
    x, dy = on(list(rng.standard_normal((2, B, T, D))))

    def forward() -> tuple[Any, Any]:
        return attention.forward(params, x, rotation, CONFIG.head_width, window, earlier if past else None)

    return Case(forward, lambda cache: attention.backward(params, cache, dy))


def _adapted(rng: np.random.Generator, weight: Any) -> Any:
    """The weight with an adapter that has learned, and with dropout."""
    keep = (rng.random(weight.shape[:-1]) < 0.7) / 0.7
    return moved(rng, lora.init(rng, weight, 2, 0.5))._replace(keep=keep)


def _swiglu(on: Move, rng: np.random.Generator, adapted: bool = False) -> Case:
    experts = swiglu.init(rng, ModelConfig(width=D, experts=4, expert_width=3))
    params = on(swiglu.Experts(*(_adapted(rng, stack) for stack in experts)) if adapted else experts)
    x, dy = on(list(rng.standard_normal((2, 9, D))))
    return Case(lambda: swiglu.forward(params, x, [3, 0, 4, 0]), lambda cache: swiglu.backward(params, cache, dy))


def _router(
    on: Move,
    rng: np.random.Generator,
    top_k: int = 2,
    renormalize: bool = True,
    noisy: bool = True,
    masked: bool = False,
) -> Case:
    config = ModelConfig(width=D, experts=E, noisy_gating=noisy)
    params, x = on(moved(rng, noisy_top_k.init(rng, config))), on(rng.standard_normal((T, D)))
    noise = on(rng.standard_normal((T, E))) if noisy else None
    mask = on(rng.integers(2, size=T)) if masked else None
    dweights = on(rng.standard_normal((T, top_k)))

    def forward() -> tuple[Any, Any]:
        choice, stats, cache = noisy_top_k.gate(params, x, top_k, renormalize=renormalize, noise=noise, mask=mask)
        losses, dstats = balance.loss(stats, EVERY_LOSS)
        return (choice, stats, losses, dstats), (cache, dstats)

    return Case(forward, lambda kept: noisy_top_k.gate_backward(params, kept[0], dweights, kept[1]))


def _pooled(on: Move, rng: np.random.Generator) -> Case:
    params, x = on(noisy_top_k.init(rng, CONFIG)), on(rng.standard_normal((T, D)))

    def forward() -> tuple[Any, Any]:
        _, stats, _ = noisy_top_k.gate(params, x, 2)
        return balance.pooled([stats, stats], 0.1), None

    return Case(forward, lambda cache: ())


def _moe(
    on: Move,
    rng: np.random.Generator,
    config: ModelConfig,
    capacity_factor: float | None = None,
    masked: bool = False,
) -> Case:
    params = on(moved(rng, moe.init(rng, config)))
    x, dy, noise = on(list(rng.standard_normal((2, B, T, D)))) + [on(rng.standard_normal((B, T, E)))]
    mask = on(rng.integers(2, size=(B, T))) if masked else None
    mode = Mode(training=True, noise=noise, capacity_factor=capacity_factor, mask=mask)

    def forward() -> tuple[Any, Any]:
        y, stats, dropped, cache = moe.forward(params, x, config, mode)
        _, dstats = balance.loss(stats, EVERY_LOSS)
        made = cache.routing
        chosen = routing.experts_by_token(made), routing.by_token(made.weight, made.place)
        return (y, stats, dropped, chosen), (cache, dstats)

    return Case(forward, lambda kept: moe.backward(params, kept[0], dy, kept[1]))


def _soft_moe(on: Move, rng: np.random.Generator) -> Case:
    params = on(moved(rng, soft_moe.init(rng, CONFIG, slots_per_expert=2)))
    x, dy = on(list(rng.standard_normal((2, B, T, D))))
    return Case(lambda: soft_moe.forward(params, x, CONFIG), lambda cache: soft_moe.backward(params, cache, dy))


def _block(on: Move, rng: np.random.Generator, dtype: Any) -> Case:
    params = on(moved(rng, block.init(rng, CONFIG)))
    rotation = rope.init(on(np.arange(T)), CONFIG.head_width, dtype=dtype)
    x, dy, noise = on(list(rng.standard_normal((2, B, T, D)))) + [on(rng.standard_normal((B, T, E)))]
    mode = Mode(training=True, noise=noise, capacity_factor=1.0)

    def forward() -> tuple[Any, Any]:
        y, stats, _, cache = block.forward(params, x, rotation, CONFIG, mode)
        _, dstats = balance.loss(stats, EVERY_LOSS)
        return (y, stats), (cache, dstats)

    return Case(forward, lambda kept: block.backward(params, kept[0], dy, kept[1]))


def _skipping(on: Move, rng: np.random.Generator) -> Case:
    params, x = on(moved(rng, moe.init(rng, CONFIG))), on(rng.standard_normal((B, T, D)))
    return Case(lambda: (moe.forward(params, x, CONFIG, Mode(skip_below=[0.4])).y, None), lambda cache: ())


def _distillation(on: Move, rng: np.random.Generator, reverse: bool) -> Case:
    z, told = on(list(rng.standard_normal((2, B, T, V))))
    targets, mask = on(rng.integers(V, size=(B, T))), on(rng.integers(2, size=(B, T)))
    dloss = on([rng.standard_normal(())])[0]
    settings = Settings(2.0, 0.3, reverse)

    def forward() -> tuple[Any, Any]:
        loss, cache = distillation.forward(z, targets, told, settings, mask)
        return loss.total, cache

    return Case(forward, lambda cache: distillation.backward(cache, dloss))


def _pruning(on: Move, rng: np.random.Generator) -> Case:
    """The parameters that are left, and the ratios by which second experts are skipped."""
    params, tokens = on(moved(rng, decoder.init(rng, CONFIG))), on(rng.integers(V, size=(B, T)))

    def forward() -> tuple[Any, Any]:
        done = prune.prune(params, CONFIG, tokens, 3)
        return (done.params, done.errors, prune.median_ratios(params, CONFIG, tokens)), None

    return Case(forward, lambda cache: ())


def _cross_entropy(on: Move, rng: np.random.Generator, mask: Any = None) -> Case:
    logits, targets = on(rng.standard_normal((B, T, V))), on(rng.integers(V, size=(B, T)))
    mask = None if mask is None else on(mask)
    return Case(
        lambda: cross_entropy.forward(logits, targets, mask), lambda cache: cross_entropy.backward(cache, 1 / (B * T))
    )


# Training, evaluation and generation

WHOLE = {
    "Mixtral": {},
    "tied, windowed": {"tied_embeddings": True, "window": 9},
    "Switch": {"active_experts": 1, "renormalize": False, "noisy_gating": False},
}


def whole(on: Move, dtype: Any, padding: bool = False, **changes: Any) -> tuple[Any, list[Shard], ModelConfig]:
    """A decoder and a batch in two shards."""
    rng = np.random.default_rng(1)
    config = dataclasses.replace(CONFIG, **changes)
    params = on(moved(rng, decoder.init(rng, config)))
    tokens, targets = rng.integers(V, size=(2, B, T))
    noise = rng.standard_normal((config.layers, B, T, E))
    mask = (np.arange(T) < T - 5 * np.arange(B)[:, None]).astype(dtype) if padding else None
    shards = [
        on(Shard(tokens[rows], targets[rows], noise[:, rows], None if mask is None else mask[rows]))
        for rows in (slice(0, 1), slice(1, 2))
    ]
    return params, shards, config


def training_step(on: Move, dtype: Any, optimizer_name: str = "muon", padding: bool = False, **changes: Any) -> Any:
    """A whole step: every loss, capacity, gradients, clipping, update → losses, gradient, parameters, moments."""
    params, shards, config = whole(on, dtype, padding, **changes)
    recipe = TrainConfig(optimizer=optimizer_name, clip=0.5, warmup=1)
    totals, gradient = objective.loss_and_gradient(params, shards, config, Objective(EVERY_LOSS, 0.8))
    norm = clipping.clip(gradient, recipe.clip)
    state = optimizer.init(params, recipe)
    optimizer.update(params, gradient, state, recipe, 0)
    return totals.total, totals.loss, totals.auxiliary, gradient, norm, params, list(state.values())


def run(out: Path, device: str, steps: int = 4, **settings: Any) -> Trained:
    """A few steps of training on ``device``."""
    preset = small_runs.override(small_runs.SMALL, {"steps": steps, "save_every": 2, "evaluate_every": 2} | settings)
    return trainer.train(preset, corpus=small_runs.CORPUS, out=out, device=device, threads=1, progress=False)


def resume(folder: Path, device: str, steps: int) -> Trained:
    return trainer.resume(
        folder, corpus=small_runs.CORPUS, changes={"steps": steps}, device=device, threads=1, progress=False
    )


def losses(done: Trained) -> list[float]:
    """What a run reports of every step: training loss and all that is added to it, norm, entropy, validation loss."""
    return [
        value
        for row in done.metrics
        for value in (row["loss"], row["total"], row["gradient_norm"], *row["router_entropy"], row.get("val_loss", 0.0))
    ]


def evaluated(trained: Trained, device: Device) -> text_loss.Evaluation:
    model = trained.model.to(device)
    ids = model.tokenizer.encode(small_runs.SEASONS)
    return text_loss.evaluate(model.params, model.config, [ids, ids[:3]])


def written(trained: Trained, device: Device, temperature: float) -> str:
    """A text longer than the model's context, from a prompt longer than it too."""
    return generation.write(trained.model.to(device), "4 steps up, 16 stones", 40, temperature=temperature, seed=3)
