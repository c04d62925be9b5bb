"""The PyTorch twins compute what minimoe computes: logits, loss and every gradient in float64, and greedy text."""

import dataclasses
from collections.abc import Iterator

import numpy as np
import pytest
import torch
import twins

from minimoe.core import tree
from minimoe.core.config import ModelConfig, TrainConfig
from minimoe.inference import generation
from minimoe.layers import decoder
from minimoe.layers.mode import Mode
from minimoe.losses import objective
from minimoe.losses.balance import Coefficients
from minimoe.losses.objective import Objective, Shard

pytestmark = pytest.mark.torch

CONFIG = ModelConfig(vocab_size=19, width=12, layers=2, heads=4, head_width=6, context=24, experts=5, expert_width=10)
RECIPE = TrainConfig(balance_loss=0.3, z_loss=0.2)
SHAPES = {
    "noisy": CONFIG,
    "three experts of five": dataclasses.replace(CONFIG, active_experts=3, kv_heads=4),
    "plain, multi-query": dataclasses.replace(CONFIG, noisy_gating=False, kv_heads=1),
    "Switch": dataclasses.replace(CONFIG, active_experts=1, renormalize=False),
}


@pytest.fixture(autouse=True)
def double() -> Iterator[None]:
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def weights(config: ModelConfig) -> decoder.Decoder:
    rng = np.random.default_rng(0)
    params = decoder.init(rng, config, "float64")
    return tree.map(lambda leaf: leaf + 0.2 * rng.standard_normal(leaf.shape), params)


def assert_equal(theirs: torch.Tensor, ours: np.ndarray, name: str) -> None:
    assert np.abs(ours).max() > 0, f"{name} is zero, which proves nothing"
    assert np.abs(theirs.detach().numpy() - ours).max() < 1e-11 * np.abs(ours).max(), name


@pytest.mark.parametrize("dispatch", ["loop", "sorted"])
@pytest.mark.parametrize("shape", SHAPES)
def test_logits_loss_and_every_gradient_agree(dispatch: twins.Dispatch, shape: str) -> None:
    config = SHAPES[shape]
    params, rng = weights(config), np.random.default_rng(1)
    tokens, targets = rng.integers(config.vocab_size, size=(2, 3, config.context))
    noise = rng.standard_normal((config.layers, 3, config.context, config.experts)) if config.noisy_gating else None
    goal = Objective(Coefficients(balance=RECIPE.balance_loss, z=RECIPE.z_loss))
    totals, gradient = objective.loss_and_gradient(params, [Shard(tokens, targets, noise)], config, goal)
    logits, _, _ = decoder.forward(params, tokens, config, Mode(noise=noise))

    twin = twins.copy_weights(twins.Twin(config, dispatch), params)
    drawn = None if noise is None else torch.tensor(noise)
    loss, twin_logits = twins.loss(twin, RECIPE, torch.tensor(tokens), torch.tensor(targets), drawn)
    loss.backward()
    assert_equal(twin_logits, logits, "logits")
    assert_equal(loss, np.array(totals.total), "loss")
    for name, parameter, ours in twins.beside(twin, gradient):
        assert parameter.grad is not None, name
        assert_equal(parameter.grad, ours, name)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["cached", "gathered"])
def test_greedy_text_agrees(shape: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)  # what it compiles is what is tested here
    config = SHAPES[shape]
    params, prompt = weights(config), [3, 1, 4, 1, 5]
    ours = list(generation.generate(params, config, prompt, tokens=19, temperature=0.0))
    twin = twins.copy_weights(twins.Twin(config), params)
    writer = twins.Cached(twin) if kind == "cached" else twins.Gathered(twin)
    assert writer.write(torch.tensor(prompt), 19) == ours
    assert len(set(ours)) > 1
