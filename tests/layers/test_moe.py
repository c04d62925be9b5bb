"""The mixture: its gradient, experts that nobody chose, and settings it refuses. What it equals: test_equivalences."""

import dataclasses
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import example, given
from small_models import EVERY_LOSS, assert_close, drawn_mixture, mixture, mixtures

from minimoe.core import tree
from minimoe.core.config import ModelConfig, TrainConfig
from minimoe.core.errors import UserError
from minimoe.layers import decoder, moe
from minimoe.layers.exchange import LocalExchange
from minimoe.layers.experts import swiglu
from minimoe.layers.mode import Mode
from minimoe.layers.moe import MoE
from minimoe.layers.routers import noisy_top_k
from minimoe.layers.routing import RouterStats
from minimoe.losses import balance
from minimoe.proof.gradcheck import Ranked, check, failed

ONE_TOKEN_ONE_EXPERT = {
    "batch": 1,
    "time": 1,
    "experts": 1,
    "active": 1,
    "noisy": True,
    "renormalize": True,
    "capacity_factor": 1.0,
    "seed": 0,
}


def set_up(case: dict[str, Any]) -> tuple[ModelConfig, MoE, np.ndarray, Any]:
    rng = np.random.default_rng(case["seed"])
    config = mixture(case["experts"], min(case["active"], case["experts"]), case["renormalize"], case["noisy"])
    x = rng.standard_normal((case["batch"], case["time"], 4))
    noise = rng.standard_normal((case["batch"], case["time"], case["experts"])) if case["noisy"] else None
    return config, drawn_mixture(rng, config), x, noise


def check_moe(params: MoE, x: np.ndarray, config: ModelConfig, mode: Mode) -> list[Any]:
    def forward(params: MoE, x: np.ndarray) -> tuple[Any, Any]:
        y, stats, _, cache = moe.forward(params, x, config, mode)
        losses, dstats = balance.loss(stats, EVERY_LOSS)
        return (y, balance.weighted(losses, EVERY_LOSS)), (cache, dstats)

    def backward(params: MoE, cache: Any, dy: Any) -> tuple[Any, Any]:
        return moe.backward(params, cache[0], dy[0], tree.map(lambda sum: sum * dy[1], cache[1]))

    def routing(params: MoE, cache: Any) -> list[Ranked]:
        return [Ranked(*one) for one in noisy_top_k.compared(params.router, cache[0].router)]

    return check("moe", forward, backward, params, x, routing=routing, entries=5, directions=2)


@given(case=mixtures)
@example(case=ONE_TOKEN_ONE_EXPERT)
def test_gradient_is_right_with_idle_experts_and_dropped_tokens(case: dict[str, Any]) -> None:
    config, params, x, noise = set_up(case)
    rows = check_moe(params, x, config, Mode(True, noise, case["capacity_factor"]))
    assert all(row.passed or 2 * row.refused > row.refused + row.checked for row in rows), failed(rows)


def test_noise_moves_the_choice_but_never_the_expert_s_input(rng: np.random.Generator) -> None:
    config = mixture()
    params, x, noise = drawn_mixture(rng, config), rng.standard_normal((2, 6, 4)), rng.standard_normal((2, 6, 5))
    y, _, _, cache = moe.forward(params, x, config, Mode(noise=noise))
    assert (y != moe.forward(params, x, config).y).any()
    assert (cache.experts.x == x.reshape(12, 4)[cache.routing.token]).all()


def test_an_expert_that_nobody_chose_gets_exactly_zero_gradient(rng: np.random.Generator) -> None:
    config = mixture(noisy=False)
    params = drawn_mixture(rng, config)
    params.router.w_gate[:] = np.array([0.3, 0.2, 0.1, 0.0, -9.0])
    x = abs(rng.standard_normal((2, 3, 4)))
    y, stats, _, cache = moe.forward(params, x, config)
    dx, grads = moe.backward(params, cache, np.ones_like(y), balance.loss(stats, EVERY_LOSS)[1])
    assert stats.assignments.tolist() == [6, 6, 0, 0, 0]
    assert all((gradient[2:] == 0).all() for gradient in grads.experts)
    assert all(np.isfinite(leaf).all() for leaf in tree.leaves((dx, grads)))
    assert grads.router.w_gate[:, 2].any(), "but the balancing loss pulls tokens towards it"


def test_a_batch_of_padding_alone_gives_zeros(rng: np.random.Generator) -> None:
    """With a capacity every entry of padding is left out, so that the experts have not a single row."""
    config = mixture()
    params, (x, dy) = drawn_mixture(rng, config), rng.standard_normal((2, 2, 3, 4))
    y, stats, dropped, cache = moe.forward(params, x, config, Mode(capacity_factor=1.0, mask=np.zeros((2, 3))))
    dx, grads = moe.backward(params, cache, dy, balance.loss(stats, EVERY_LOSS)[1])
    assert cache.routing.counts == [0] * 5
    assert dropped == 0
    assert not any(leaf.any() for leaf in tree.leaves((y, dx, grads)))


def test_what_full_experts_refused_is_reported(rng: np.random.Generator) -> None:
    config = mixture(noisy=False)
    params, x = drawn_mixture(rng, config), rng.standard_normal((2, 6, 4))
    _, stats, dropped, cache = moe.forward(params, x, config, Mode(capacity_factor=0.5))
    assert dropped == stats.assignments.sum() - sum(cache.routing.counts) > 0


class Elsewhere(NamedTuple):
    """An exchange after which the experts, and with them all rows, stand in the reverse order."""

    sent: list[int]

    @property
    def counts(self) -> list[int]:
        return self.sent[::-1]

    def own(self, experts: Any) -> Any:
        return tree.map(lambda stack: stack[::-1], experts)

    def dispatch(self, rows: np.ndarray) -> np.ndarray:
        return np.concatenate(np.split(rows, np.cumsum(self.sent)[:-1])[::-1])

    def return_rows(self, rows: np.ndarray) -> np.ndarray:
        return np.concatenate(np.split(rows, np.cumsum(self.counts)[:-1])[::-1])


@pytest.mark.parametrize("capacity_factor", [None, 0.5])
def test_where_the_experts_are_changes_nothing(rng: np.random.Generator, capacity_factor: float | None) -> None:
    """All rows travel to the experts and back, in both passes; the experts' gradient is where the experts are."""
    config = mixture()
    params, (x, dy) = drawn_mixture(rng, config), rng.standard_normal((2, 2, 6, 4))
    noise = rng.standard_normal((2, 6, 5))
    results = []
    for exchange in (LocalExchange, Elsewhere):
        mode = Mode(noise=noise, capacity_factor=capacity_factor, exchange=exchange)
        y, stats, _, cache = moe.forward(params, x, config, mode)
        results.append((y, *moe.backward(params, cache, dy, balance.loss(stats, EVERY_LOSS)[1])))
    (y, dx, grads), (other_y, other_dx, other_grads) = results
    assert_close((other_y, other_dx, other_grads.router), (y, dx, grads.router))
    assert_close(other_grads.experts, tree.map(lambda stack: stack[::-1], grads.experts))


def test_backward_leaves_its_arguments_alone(rng: np.random.Generator) -> None:
    config = mixture()
    params, x, dy = drawn_mixture(rng, config), rng.standard_normal((2, 6, 4)), rng.standard_normal((2, 6, 4))
    _, stats, _, cache = moe.forward(params, x, config, Mode(noise=rng.standard_normal((2, 6, 5))))
    dstats = balance.loss(stats, EVERY_LOSS)[1]
    once = moe.backward(params, cache, dy, dstats)
    twice = moe.backward(params, cache, dy, dstats)
    assert all((a == b).all() for a, b in zip(tree.leaves(once), tree.leaves(twice), strict=True))


def test_a_layer_follows_the_dtype_of_what_it_is_given(rng: np.random.Generator) -> None:
    config = mixture()
    params = moe.init(rng, config)
    x, noise = rng.standard_normal((1, 3, 4)).astype("f"), rng.standard_normal((1, 3, 5)).astype("f")
    y, stats, _, cache = moe.forward(params, x, config, Mode(noise=noise, capacity_factor=1.0))
    dx, grads = moe.backward(params, cache, y, balance.loss(stats, EVERY_LOSS)[1])
    assert {leaf.dtype for leaf in tree.leaves((y, dx, grads))} == {np.dtype(np.float32)}


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (
            {"router": "noisy_top_j"},
            "there is no router 'noisy_top_j' (did you mean 'noisy_top_k'?): choose",
        ),
        (
            {"expert_kind": "swiglue"},
            "there is no expert_kind 'swiglue' (did you mean 'swiglu'?): choose one of",
        ),
        ({"active_experts": 1}, "no gradient from the language-model loss: set renormalize to false"),
    ],
)
def test_settings_that_no_module_can_work_with_are_refused(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError) as caught:
        moe.check(ModelConfig(**settings))
    assert sentence in str(caught.value)
    assert str(caught.value).endswith(".")


def test_what_only_training_cannot_use_may_be_made_and_run(rng: np.random.Generator) -> None:
    untrainable = ModelConfig(active_experts=1)
    with pytest.raises(UserError, match="no gradient"):
        moe.check(untrainable)
    moe.check_forward(untrainable)
    assert decoder.init(rng, untrainable).norm.gain.size == untrainable.width
    for settings, sentence in (
        ({"router": "noisy_top_j"}, "no router"),
        ({"expert_kind": "swiglue"}, "no expert_kind"),
        ({"router": "switch", "active_experts": 2}, "not possible with the router 'switch'"),
    ):
        with pytest.raises(UserError, match=sentence):
            moe.check_forward(ModelConfig(**settings))


def test_the_modules_named_by_the_config_are_the_ones_used(rng: np.random.Generator) -> None:
    config = mixture()
    assert moe.check(config) is None
    assert moe.router_of(config) is moe.ROUTERS[config.router]
    assert moe.experts_of(config) is moe.EXPERTS[config.expert_kind]
    for name, leaf in tree.named_leaves(moe.blank(config, np.zeros)):
        assert leaf.shape == dict(tree.named_leaves(moe.init(rng, config)))[name].shape, name


# Shared experts


def with_shared(rng: np.random.Generator, count: int, **changes: Any) -> tuple[ModelConfig, MoE]:
    config = dataclasses.replace(mixture(noisy=False), shared_experts=count, **changes)
    return config, drawn_mixture(rng, config)


@pytest.mark.parametrize("router", ["noisy_top_k", "sigmoid_bias"])
def test_every_token_passes_through_the_shared_experts_one_by_one(rng: np.random.Generator, router: str) -> None:
    """One SwiGLU of width S·F is S experts of width F whose outputs are added up: values and gradients."""
    config, params = with_shared(rng, 3, router=router)
    x, dy = rng.standard_normal((2, 2, 6, 4))
    y, stats, _, cache = moe.forward(params, x, config)
    dx, grads = moe.backward(params, cache, dy, None)
    alone = params._replace(shared=None)
    y_routed, _, _, routed_cache = moe.forward(alone, x, dataclasses.replace(config, shared_experts=0))
    dx_routed, routed_grads = moe.backward(alone, routed_cache, dy, None)
    expected_y, expected_dx = y_routed.reshape(12, 4), dx_routed.reshape(12, 4)
    for s in range(3):
        hidden = slice(3 * s, 3 * s + 3)
        w_gate, w_up, w_down = params.shared
        one = swiglu.Experts(w_gate[:, :, hidden], w_up[:, :, hidden], w_down[:, hidden])
        y_one, cache_one = swiglu.forward(one, x.reshape(12, 4), [12])
        dx_one, grads_one = swiglu.backward(one, cache_one, dy.reshape(12, 4))
        expected_y, expected_dx = expected_y + y_one, expected_dx + dx_one
        mine = (grads.shared.w_gate[:, :, hidden], grads.shared.w_up[:, :, hidden], grads.shared.w_down[:, hidden])
        assert_close(mine, tuple(grads_one))
    assert_close((y.reshape(12, 4), dx.reshape(12, 4)), (expected_y, expected_dx))
    assert_close((grads.router, grads.experts), (routed_grads.router, routed_grads.experts))
    assert stats.assignments.sum() == 24, "no router counts them"


@given(case=mixtures)
def test_gradient_is_right_with_shared_experts(case: dict[str, Any]) -> None:
    config, _, x, noise = set_up(case)
    config = dataclasses.replace(config, shared_experts=2)
    params = drawn_mixture(np.random.default_rng(case["seed"]), config)
    rows = check_moe(params, x, config, Mode(True, noise, case["capacity_factor"]))
    assert all(row.passed or 2 * row.refused > row.refused + row.checked for row in rows), failed(rows)
    assert "shared.w_up" in [row.tensor for row in rows]


def test_a_token_that_every_expert_refuses_still_has_the_shared_ones(rng: np.random.Generator) -> None:
    config, params = with_shared(rng, 1)
    x = rng.standard_normal((1, 8, 4))
    y, _, dropped, _ = moe.forward(params, x, config, Mode(capacity_factor=0.01))
    refused = (y != moe.forward(params._replace(shared=None), x, config, Mode(capacity_factor=0.01)).y).any(2)
    assert dropped > 0
    assert refused.all()


def test_shared_experts_start_as_experts_do(rng: np.random.Generator) -> None:
    """The width that they have together is not the number of inputs to an expert's output."""
    config = ModelConfig(expert_width=256, shared_experts=4)
    for given_std, expected in ((None, 256**-0.5), (0.5, 0.5)):
        params = moe.init(rng, config, given_std)
        assert params.shared.w_down.shape == (1, 4 * 256, 128)
        assert params.shared.w_down.std() == pytest.approx(expected, rel=0.02)
        assert params.shared.w_up.std() == pytest.approx(128**-0.5, rel=0.02)
    without = moe.init(np.random.default_rng(1), ModelConfig(expert_width=256))
    first = moe.init(np.random.default_rng(1), config)
    assert without.shared is None
    assert all(
        (a == b).all() for a, b in zip(tree.leaves(without), tree.leaves(first._replace(shared=None)), strict=True)
    )


def test_shared_experts_are_matrices_for_muon_that_no_worker_owns_alone(rng: np.random.Generator) -> None:
    config, params = with_shared(rng, 2)
    names = [name for name, _ in tree.named_leaves(params) if name.startswith("shared")]
    assert set(names) <= set(tree.marked(params, "matrices"))
    assert not set(names) & set(tree.marked(params, "by_expert"))
    with pytest.raises(UserError, match=r"shared_experts 3 of expert_width 1048576 are 3,145,728 wide"):
        dataclasses.replace(config, shared_experts=3, expert_width=2**20)


def test_each_layer_s_router_learns_from_the_sums_of_its_own_layer(rng: np.random.Generator) -> None:
    """In place, whatever is learned without a gradient."""
    config = dataclasses.replace(mixture(5, 2, True, False), router="sigmoid_bias")
    layers = [moe.init(rng, config, dtype=np.float64) for _ in range(2)]
    loads = np.array([[1.0, 2, 3, 4, 5], [5.0, 1, 1, 9, 4]])
    sums = [RouterStats(10, load, *[np.zeros(())] * 6) for load in loads]
    moe.update_state(layers, sums, config, TrainConfig(bias_rate=0.5))
    for layer, load in zip(layers, loads, strict=True):
        np.testing.assert_array_equal(layer.router.bias, 0.5 * np.sign(load.mean() - load))


def test_a_router_that_names_no_coefficient_of_the_balance_loss_has_a_hundredth() -> None:
    expected = {"noisy_top_k": 0.01, "switch": 0.01, "gshard": 0.01, "cosine": 0.01}
    for router in moe.ROUTERS:
        config = dataclasses.replace(mixture(5, 2, True, False), router=router)
        assert moe.balance_coefficient(config) == expected.get(router, 0.0), router


def test_the_number_of_experts_per_token_is_bounded_by_k_unless_it_varies() -> None:
    varies = {"expert_choice", "expert_threshold", "remoe"}
    for router in moe.ROUTERS:
        config = dataclasses.replace(mixture(5, 2, True, False), router=router)
        assert moe.most_experts(config) == (5 if router in varies else 2), router
