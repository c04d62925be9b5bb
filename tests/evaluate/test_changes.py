"""What quantisation changed: nats by hand, and routings counted as sets, beside those of the microscope."""

import dataclasses

import numpy as np
import pytest
from small_models import drawn

from minimoe.analysis import routing_trace
from minimoe.core import tree
from minimoe.core.config import ModelConfig
from minimoe.evaluate import changes, text_loss
from minimoe.layers.decoder import Decoder


def sets(params: Decoder, config: ModelConfig, ids: np.ndarray) -> list[list[set[int]]]:
    return [[set(row) for row in layer.tolist()] for layer in routing_trace.trace(params, config, ids).experts]


@pytest.mark.parametrize(
    "settings", [{}, {"router": "remoe"}, {"router": "expert_threshold"}, {"dense_layers": 1}, {"layers": 3}]
)
def test_losses_and_sets_of_experts_are_those_of_both_models(
    rng: np.random.Generator, small: ModelConfig, settings: dict[str, object]
) -> None:
    config = dataclasses.replace(small, **settings)  # type: ignore[arg-type]
    one = drawn(rng, config)
    other = tree.map(lambda leaf: leaf + 0.1 * rng.standard_normal(leaf.shape), one)
    documents = [
        rng.integers(config.vocab_size, size=length).astype(np.int32) for length in (4 * config.context + 3, 9)
    ]
    found = changes.measure(("small", "large"), one, other, config, documents)
    losses = [text_loss.evaluate(params, config, documents).loss for params in (one, other)]
    assert found.nats.value == pytest.approx(losses[0] - losses[1], rel=1e-9)
    expected = np.zeros(len(found.others))
    for ids in documents:
        pairs = zip(sets(one, config, ids[:-1]), sets(other, config, ids[:-1]), strict=True)
        expected += [sum(a - {-1} != b - {-1} for a, b in zip(*layers, strict=True)) for layers in pairs]
    assert found.others.tolist() == expected.tolist() and len(found.others) == config.layers - config.dense_layers
    assert found.tokens == sum(len(ids) - 1 for ids in documents)
    assert 0 < found.share == expected.sum() / expected.size / found.tokens < 1
    same = changes.measure(("a", "b"), one, one, config, documents)
    assert same.share == same.nats.value == 0


def test_a_dense_model_has_no_routing_to_change(rng: np.random.Generator, small: ModelConfig) -> None:
    config = dataclasses.replace(small, experts=1, active_experts=1)
    params = drawn(rng, config)
    found = changes.measure(("a", "b"), params, params, config, [np.arange(5, dtype=np.int32) % config.vocab_size])
    assert (found.share, found.tokens, len(found.others)) == (0, 0, 0)


def test_a_missing_expert_is_not_another_one() -> None:
    two, wider = np.array([[0, 1], [-1, 2]]), np.array([[-1, 0, 1], [-1, 1, 2]])
    assert changes._differing(two, wider) == changes._differing(wider, two) == 1
