"""A mode: the default is evaluation, and each layer gets its own noise and all else unchanged."""

import numpy as np

from minimoe.layers.exchange import LocalExchange
from minimoe.layers.mode import EVALUATION, Mode


def test_the_default_is_evaluation() -> None:
    """No noise, nothing dropped, no padding, every expert on this worker."""
    assert Mode() == EVALUATION
    assert not EVALUATION.training
    assert EVALUATION.noise is None
    assert EVALUATION.capacity_factor is None
    assert EVALUATION.mask is None
    assert EVALUATION.estimate_load
    assert EVALUATION.exchange is LocalExchange


def test_a_layer_gets_its_own_noise_and_the_rest_as_it_is(rng: np.random.Generator) -> None:
    noise, mask = rng.standard_normal((3, 2, 4, 5)), np.ones((2, 4))
    mode = Mode(True, noise, 1.25, False, mask, lambda counts: LocalExchange(counts))
    for layer in range(3):
        one = mode.at_layer(layer)
        assert one.noise is not None
        assert (one.noise == noise[layer]).all()
        assert one._replace(noise=None) == mode._replace(noise=None)
    assert mode.noise is noise


def test_without_noise_every_layer_has_the_same_mode() -> None:
    mode = Mode(training=True, capacity_factor=2.0)
    assert mode.at_layer(0) is mode.at_layer(7) is mode


def test_one_worker_owns_every_expert_and_its_rows_stay() -> None:
    exchange, rows, experts = LocalExchange([2, 0, 1]), np.ones((3, 4)), [np.ones((3, 4, 5))]
    assert exchange.counts == [2, 0, 1]
    assert exchange.own(experts) is experts
    assert exchange.dispatch(rows) is rows
    assert exchange.return_rows(rows) is rows


def test_a_layer_skips_second_experts_by_its_own_ratio() -> None:
    mode = Mode(noise=np.arange(3.0)[:, None], skip_below=[0.1, 0.2, 0.3])
    assert [list(mode.at_layer(i).skip_below or []) for i in range(3)] == [[0.1], [0.2], [0.3]]
    assert [float(mode.at_layer(i).noise[0]) for i in range(3)] == [0, 1, 2]  # type: ignore[index]
    assert Mode(skip_below=[0.1]).at_layer(0).noise is None
