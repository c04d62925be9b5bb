"""Adapters of a whole decoder: where they are, what they change, what is trained, how they add up and are merged."""

import dataclasses
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minimoe.core import tree
from minimoe.core.config import ModelConfig, TrainConfig
from minimoe.core.errors import UserError
from minimoe.inference import generation
from minimoe.layers import decoder, lora
from minimoe.layers.decoder import Decoder
from minimoe.losses import objective
from minimoe.losses.objective import Objective, Shard
from minimoe.optim import optimizer
from minimoe.parallel import exchange, launch
from minimoe.training import step
from minimoe.tuning import adapters

CONFIG = ModelConfig(
    vocab_size=11, width=8, layers=2, heads=4, kv_heads=2, head_width=4, context=6, experts=5, expert_width=6
)
SHARED = dataclasses.replace(CONFIG, shared_experts=2)
ZERO = dataclasses.replace(CONFIG, expert_kind="zero_computation")

TOKENS = np.random.default_rng(5).integers(0, 11, (3, 6))


def model(rng: np.random.Generator, config: ModelConfig = CONFIG, dtype: Any = np.float64) -> Decoder:
    fresh = decoder.init(rng, config, dtype)
    return tree.map(lambda leaf: leaf + (0.2 * rng.standard_normal(leaf.shape)).astype(dtype), fresh)


def trained(rng: np.random.Generator, params: Decoder) -> Decoder:
    """As if the adapters had learned: B is no longer zero."""
    moved: Decoder = lora.replace(params, lambda w: w._replace(b=rng.uniform(-0.5, 0.5, w.b.shape).astype(w.b.dtype)))
    return moved


def logits(params: Decoder, config: ModelConfig = CONFIG) -> Any:
    return decoder.forward(params, TOKENS, config).logits


def gradient(params: Decoder, config: ModelConfig = CONFIG) -> dict[str, Any]:
    shard = Shard(TOKENS, np.roll(TOKENS, -1, axis=1))
    return dict(tree.named_leaves(objective.loss_and_gradient(params, [shard], config, Objective())[1]))


# Where they are


def test_every_projection_and_every_matrix_of_an_expert_is_adapted_and_the_router_is_not(
    rng: np.random.Generator,
) -> None:
    adapted = adapters.add(model(rng), 2, rng=rng)
    places = [
        *(f"attention.{field}.weight" for field in ("query", "key", "value", "output")),
        *(f"moe.experts.{field}" for field in ("w_gate", "w_up", "w_down")),
    ]
    expected = [f"blocks[{i}].{place}" for i in range(2) for place in places]
    assert list(adapters.adapted_weights(adapted)) == expected
    assert adapters.adapted_leaves(adapted) == [f"{name}.{m}" for name in expected for m in "ab"]
    names = [name for name, _ in tree.named_leaves(adapted)]
    assert adapters.trainable(adapted) == {name for name in names if name.endswith((".a", ".b"))}
    assert adapters.frozen_leaves(adapted) == set(names) - adapters.trainable(adapted)
    assert not any("router" in name for name in adapters.trainable(adapted))


@pytest.mark.parametrize(("parts", "count"), [(("attention",), 8), (("experts",), 6), (["experts", "attention"], 14)])
def test_only_the_parts_that_are_named_are_adapted(rng: np.random.Generator, parts: Any, count: int) -> None:
    adapted = adapters.add(model(rng), 2, rng=rng, parts=parts)
    assert len(adapters.adapted_weights(adapted)) == count
    assert all(
        any(f".{'moe.experts' if p == 'experts' else p}." in name for p in parts)
        for name in adapters.adapted_weights(adapted)
    )


@pytest.mark.parametrize("config", [CONFIG, SHARED, ZERO])
def test_fresh_adapters_change_no_bit_and_hold_the_same_base(rng: np.random.Generator, config: ModelConfig) -> None:
    params = model(rng, config, np.float32)
    adapted = adapters.add(params, 3, rng=rng)
    np.testing.assert_array_equal(logits(adapted, config), logits(params, config))
    before = {id(leaf) for leaf in tree.leaves(params)}
    kept = {id(leaf) for name, leaf in tree.named_leaves(adapted) if name.endswith(".base")}
    assert kept <= before and len(kept) == len(adapters.adapted_weights(adapted))
    if config is SHARED:
        assert "blocks[1].moe.shared.w_up" in adapters.adapted_weights(adapted)
    if config is ZERO:
        assert "blocks[1].moe.experts.feed_forward.w_up" in adapters.adapted_weights(adapted)


def test_the_counts_of_mixtral_are_those_of_its_shapes() -> None:
    """q, k, v and o of 32 layers have 851,968 numbers for each rank, the experts 14,155,776."""
    big = ModelConfig(
        vocab_size=1, width=4096, layers=32, heads=32, kv_heads=8, head_width=128, experts=8, expert_width=14336
    )
    found = {"attention": 0, "experts": 0}

    def count(name: str, part: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        *stack, inputs, outputs = shape
        found[part] += int(np.prod(stack)) * (inputs + outputs)
        return shape

    adapters.at_each_weight(decoder.blank(big, tuple), count)  # type: ignore[arg-type]
    assert found == {"attention": 851_968, "experts": 14_155_776}


def test_scale_is_twice_the_rank_over_the_rank_unless_given(rng: np.random.Generator) -> None:
    def scale(**settings: Any) -> float:
        adapted = adapters.add(model(rng), 4, rng=rng, **settings)
        [value] = {float(s) for w in adapters.adapted_weights(adapted).values() for s in w.scale.ravel()}
        return value

    assert (scale(), scale(alpha=2), scale(alpha=6, stabilized=True)) == (2.0, 0.5, 3.0)


# What is trained


def test_a_fresh_adapter_has_gradients_for_b_alone_and_none_for_the_base(rng: np.random.Generator) -> None:
    adapted = adapters.add(model(rng), 2, rng=rng)
    found = gradient(adapted)
    assert not any(name.endswith((".base", ".scale")) for name in found)
    assert adapters.trainable(adapted) <= found.keys()
    for name in adapters.trainable(adapted):
        assert found[name].any() == name.endswith(".b"), name


def test_the_gradient_of_a_is_that_of_the_merged_weight_times_b(rng: np.random.Generator) -> None:
    adapted = trained(rng, adapters.add(model(rng), 2, rng=rng, alpha=3))
    found, whole = gradient(adapted), gradient(adapters.merge(adapted))
    for name, weight in adapters.adapted_weights(adapted).items():
        np.testing.assert_allclose(found[f"{name}.a"], 1.5 * whole[name] @ weight.b.swapaxes(-1, -2), atol=1e-12)
        np.testing.assert_allclose(found[f"{name}.b"], 1.5 * weight.a.swapaxes(-1, -2) @ whole[name], atol=1e-12)
    assert all(np.allclose(found[name], whole[name], atol=1e-12) for name in found.keys() & whole.keys())


@pytest.mark.parametrize("scheme", [None, "nf4", "int8"])
def test_training_lowers_the_loss_and_changes_only_the_adapters(rng: np.random.Generator, scheme: str | None) -> None:
    params = adapters.add(model(rng, dtype=np.float32), 4, rng=rng)
    params = params if scheme is None else adapters.quantize(params, scheme)
    params = tree.map(np.copy, params)
    before = tree.map(np.copy, params)
    recipe = TrainConfig(learning_rate=0.05, warmup=0, steps=30, weight_decay=0.1)
    chosen = adapters.trainable(params)
    shard = Shard(TOKENS, np.roll(TOKENS, -1, axis=1))
    state = optimizer.init(params, recipe, adapters.frozen_leaves(params))
    assert state.keys() == chosen
    losses = []
    for number in range(30):
        totals, grads = objective.loss_and_gradient(params, [shard], CONFIG, Objective())
        losses.append(float(totals.loss))
        optimizer.update(params, grads, state, recipe, number)
    assert losses[-1] < 0.7 * losses[0]
    for (name, now), then in zip(tree.named_leaves(params), tree.leaves(before), strict=True):
        assert (now != then).any() == (name in chosen), name


# Merging and adding up


@given(
    rank=st.integers(1, 6),
    parts=st.sampled_from([("attention",), ("experts",), adapters.PARTS]),
    seed=st.integers(0, 9),
)
def test_merged_logits_are_those_of_the_adapters(rank: int, parts: Any, seed: int) -> None:
    rng = np.random.default_rng(seed)
    params = model(rng)
    adapted = trained(rng, adapters.add(params, rank, rng=rng, parts=parts))
    merged = adapters.merge(adapted)
    np.testing.assert_allclose(logits(merged), logits(adapted), atol=1e-11)
    assert np.abs(logits(merged) - logits(params)).max() > 1e-3
    assert [name for name, _ in tree.named_leaves(merged)] == [name for name, _ in tree.named_leaves(params)]


def test_a_model_with_adapters_writes_what_the_merged_one_writes(rng: np.random.Generator) -> None:
    adapted = trained(rng, adapters.add(model(rng), 2, rng=rng))
    texts = [
        list(generation.generate(params, CONFIG, [1, 2, 3], tokens=20, seed=1))
        for params in (adapted, adapters.merge(adapted))
    ]
    assert texts[0] == texts[1]


@pytest.mark.parametrize("scheme", ["nf4", "int8"])
def test_a_quantised_base_is_merged_into_floats(rng: np.random.Generator, scheme: str) -> None:
    adapted = trained(rng, adapters.add(model(rng, dtype=np.float32), 2, rng=rng))
    quantised = adapters.quantize(adapted, scheme)
    merged = adapters.merge(quantised)
    np.testing.assert_allclose(logits(merged), logits(quantised), atol=1e-5)
    assert np.abs(logits(quantised) - logits(adapted)).max() > 1e-3, "the base has not changed"
    for name, weight in adapters.adapted_weights(quantised).items():
        original = adapters.adapted_weights(adapted)[name]
        np.testing.assert_array_equal(weight.a, original.a)
        leaf = dict(tree.named_leaves(merged))[name]
        assert leaf.dtype == np.float32 and leaf.shape == original.base.shape
    assert adapters.trainable(quantised) == adapters.trainable(adapted)


def test_merging_into_codes_is_refused(rng: np.random.Generator) -> None:
    adapted = adapters.add(model(rng), 2, rng=rng)
    with pytest.raises(UserError, match="cannot be merged into nf4 codes, because rounding loses much of"):
        adapters.merge(adapted, into="nf4")
    with pytest.raises(UserError, match="'fp8' is not a form"):
        adapters.merge(adapted, into="fp8")


def test_adapters_side_by_side_are_the_weighted_sum_of_their_corrections(rng: np.random.Generator) -> None:
    params = model(rng)
    one = trained(rng, adapters.add(params, 2, rng=rng, alpha=3))
    two = trained(rng, adapters.add(params, 3, rng=rng, alpha=5, stabilized=True))
    both = adapters.adapted_weights(adapters.concatenate([one, two], [0.75, -2.0]))
    first, second = adapters.adapted_weights(one), adapters.adapted_weights(two)
    for name, weight in both.items():
        expected = 0.75 * lora.delta(first[name]) - 2.0 * lora.delta(second[name])
        np.testing.assert_allclose(lora.delta(weight), expected, atol=1e-12)
        assert weight.a.shape[-1] == 5 and weight.base is first[name].base


def test_one_adapter_with_weight_one_is_itself(rng: np.random.Generator) -> None:
    one = trained(rng, adapters.add(model(rng), 2, rng=rng, alpha=3, stabilized=True))
    for weights in (None, [1.0]):
        for mine, same in zip(tree.leaves(one), tree.leaves(adapters.concatenate([one], weights)), strict=True):
            np.testing.assert_array_equal(mine, same)


def test_averaging_a_and_b_apart_would_be_another_adapter(rng: np.random.Generator) -> None:
    params = model(rng)
    one, two = (trained(rng, adapters.add(params, 2, rng=rng)) for _ in range(2))
    right = adapters.adapted_weights(adapters.concatenate([one, two], [0.5, 0.5]))
    apart = adapters.adapted_weights(tree.map(lambda a, b: (a + b) / 2, one, two))
    for name in right:
        correction = lora.delta(right[name])
        assert np.linalg.norm(lora.delta(apart[name]) - correction) > 0.3 * np.linalg.norm(correction)


# Dropout


def test_dropout_keeps_the_mean_of_the_adapter_s_input_and_drops_at_the_rate(rng: np.random.Generator) -> None:
    adapted = adapters.add(model(rng), 2, rng=rng)
    masks = [np.concatenate([m.ravel() for m in adapters.draw_dropout(adapted, 0.25, rng)]) for _ in range(200)]
    values = np.concatenate(masks)
    assert set(values) == {0.0, 1 / 0.75}
    assert abs((values == 0).mean() - 0.25) < 0.01
    assert set(np.concatenate([m.ravel() for m in adapters.draw_dropout(adapted, 0.0, rng)])) == {1.0}


def test_dropout_changes_only_the_correction_and_is_the_same_again_with_the_same_masks(
    rng: np.random.Generator,
) -> None:
    params = model(rng)
    fresh = adapters.add(params, 2, rng=rng)
    masks = adapters.draw_dropout(fresh, 0.5, rng)
    np.testing.assert_allclose(logits(lora.with_dropout(fresh, masks)), logits(params), atol=1e-13)
    learned = trained(rng, fresh)
    dropped = lora.with_dropout(learned, masks)
    assert np.abs(logits(dropped) - logits(learned)).max() > 1e-3
    np.testing.assert_array_equal(logits(dropped), logits(lora.with_dropout(learned, masks)))
    for weight, mask in zip(adapters.adapted_weights(dropped).values(), masks, strict=True):
        assert weight.keep is mask and mask.shape == weight.a.shape[:-1]


# Bad input


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"rank": 0}, "rank 0 is not possible"),
        ({"rank": 1.5}, "rank 1.5 is not possible"),
        ({"rank": 7}, r"blocks\[0\].moe.experts.w_gate: rank 7 does not suit a matrix of 8 × 6"),
        ({"rank": 2, "alpha": 0.0}, "alpha 0.0 is not possible: choose a positive number, such as 4"),
        ({"rank": 2, "alpha": float("nan")}, "alpha nan is not possible"),
        ({"rank": 2, "parts": ["router"]}, "'router' is no part that can have adapters: choose from attention and exp"),
        ({"rank": 2, "parts": []}, "no part is named"),
    ],
)
def test_settings_that_are_not_possible_are_refused(
    rng: np.random.Generator, settings: dict[str, Any], words: str
) -> None:
    with pytest.raises(UserError, match=words):
        adapters.add(model(rng), rng=rng, **settings)


def test_a_model_gets_one_adapter_and_one_quantised_base(rng: np.random.Generator) -> None:
    params = model(rng, dtype=np.float32)
    adapted = adapters.add(params, 2, rng=rng)
    with pytest.raises(UserError, match="has adapters already"):
        adapters.add(adapted, 2, rng=rng)
    with pytest.raises(UserError, match="the model has no adapters"):
        adapters.quantize(params, "nf4")
    with pytest.raises(UserError, match="a base is quantised already"):
        adapters.quantize(adapters.quantize(adapted, "int8"), "nf4")
    with pytest.raises(UserError, match=r"dropout 1\.0 is not possible"):
        adapters.draw_dropout(adapted, 1.0, rng)


def test_adapters_that_do_not_belong_together_are_not_added_up(rng: np.random.Generator) -> None:
    params = model(rng)
    one, other = (adapters.add(params, 2, rng=rng, parts=parts) for parts in (("attention",), ("experts",)))
    for models, weights in (([], None), ([one], [1.0, 2.0]), ([one], [float("inf")])):
        with pytest.raises(UserError, match="give a finite number for each model"):
            adapters.concatenate(models, weights)
    for models in ([one, other], [params, params]):
        with pytest.raises(UserError, match="do not have adapters on the same weights"):
            adapters.concatenate(models)


# Workers


@pytest.mark.parametrize("scheme", [None, "nf4"])
@pytest.mark.parametrize("owners", [False, True])
def test_several_workers_take_the_step_of_one(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch, owners: bool, scheme: str | None
) -> None:
    """With ``owners``, each worker has the adapters of its own experts, and rows are sent between them."""
    monkeypatch.setattr(exchange, "exchange_is_faster", lambda *_: owners)
    monkeypatch.setattr(launch, "can_fork", lambda: False)  # threads
    recipe = TrainConfig(batch=6, warmup=0, dtype="float64", clip=1e-3)
    start = trained(rng, adapters.add(model(rng), 2, rng=rng))
    start = start if scheme is None else adapters.quantize(start, scheme)
    fixed = adapters.frozen_leaves(start)
    masks = adapters.draw_dropout(start, 0.3, rng)
    tokens, targets = rng.integers(0, 11, (2, 6, 6))

    def stepped(count: int) -> tuple[Decoder, list[Any]]:
        params, drawn = tree.map(np.copy, start), np.random.default_rng(2)
        moments = optimizer.init(params, recipe, fixed)
        with step.open_workers(params, moments, CONFIG, recipe, count, frozen=fixed) as opened:
            for number in range(2):
                batch = Shard(tokens, targets, dropout=masks)
                opened.step(step.cut(drawn, opened.params, batch, CONFIG, recipe, count), number)
        return opened.params, [moment.mean for moment in opened.moments.values()]

    assert exchange.worth_exchanging(CONFIG, recipe, 2) == owners
    for one, other in zip(tree.leaves(stepped(1)), tree.leaves(stepped(2)), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-9)
    for (name, now), before in zip(tree.named_leaves(stepped(2)[0]), tree.leaves(start), strict=True):
        assert np.array_equal(now, before) == (name in fixed), name
