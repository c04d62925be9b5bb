"""The plain file and the fast layers say the same: every value, every gradient, every step, every draw.

Both sides are float64 here, and ``same`` allows 1e-12 of the largest entry of an array. That the shared answer is right
is shown by finite differences of the plain file's own loss.
"""

import ast
import dataclasses
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from minimoe import reference
from minimoe.core import tree
from minimoe.core.config import ModelConfig, TrainConfig
from minimoe.inference import sampling
from minimoe.layers import attention, decoder, moe, rmsnorm, rope
from minimoe.layers.decoder import Decoder
from minimoe.layers.mode import Mode
from minimoe.layers.routers import noisy_top_k
from minimoe.losses import balance, objective
from minimoe.losses.balance import Coefficients
from minimoe.losses.objective import Objective, Shard
from minimoe.optim import clipping, optimizer
from minimoe.reference import Config

SOURCE = Path(reference.__file__).read_text(encoding="utf-8")
ALPHA = (0.5, 0.4, 0.2)
CASES = range(12)


def assert_same(ours: Any, theirs: Any, name: str = "") -> None:
    """Equal to 1e-12 of the largest entry."""
    theirs = np.asarray(theirs)
    assert np.shape(ours) == theirs.shape, name
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-12 * np.abs(theirs).max(initial=0), err_msg=name)


def plain(params: Decoder) -> list[dict[str, np.ndarray]]:
    """The package's tree of parameters, or of their gradients, in the form of the plain file; no copies."""
    assert params.head is not None
    ends = {"embedding": params.embedding.table, "norm": params.norm.gain, "head": params.head.weight}
    layers = [
        {
            "attention_norm": block.attention_norm.gain,
            "query": block.attention.query.weight,
            "key": block.attention.key.weight,
            "value": block.attention.value.weight,
            "output": block.attention.output.weight,
            "moe_norm": block.moe_norm.gain,
            "router": block.moe.router.w_gate,
            "noise_scale": block.moe.router.w_noise,
            "gate": block.moe.experts.w_gate,
            "up": block.moe.experts.w_up,
            "down": block.moe.experts.w_down,
        }
        for block in params.blocks
    ]
    return [ends, *layers]


def assert_same_parts(ours: list[dict[str, np.ndarray]], theirs: list[dict[str, np.ndarray]]) -> None:
    assert len(ours) == len(theirs)
    for number, (mine, other) in enumerate(zip(ours, theirs, strict=True)):
        assert mine.keys() == other.keys()
        for name in mine:
            assert_same(mine[name], other[name], f"{number}.{name}")


@dataclasses.dataclass(frozen=True)
class Case:
    """One model and one batch, as both sides take them."""

    config: Config
    settings: ModelConfig
    params: Decoder
    tokens: np.ndarray  # (B, T)
    targets: np.ndarray  # (B, T)
    noise: np.ndarray  # (L, B, T, E)

    @property
    def flat_noise(self) -> np.ndarray:
        return self.noise.reshape(self.config.L, -1, self.config.E)

    def loss(self, alpha: tuple[float, float, float] = ALPHA) -> tuple[Any, ...]:
        config = self.config._replace(alpha=alpha)
        return reference.loss(plain(self.params), self.tokens, self.targets, self.flat_noise, config)

    def fast(self, alpha: tuple[float, float, float] = ALPHA) -> tuple[objective.Totals, Decoder]:
        goal = Objective(Coefficients(balance=alpha[0], load=alpha[1], z=alpha[2]))
        shard = Shard(self.tokens, self.targets, self.noise)
        return objective.loss_and_gradient(self.params, [shard], self.settings, goal)

    def margin(self) -> float:
        """The smallest gap, over all tokens, to a logit of rank K or K + 1 from its neighbours."""
        least, active = np.inf, self.config.K
        _, _, cache = decoder.forward(self.params, self.tokens, self.settings, Mode(noise=self.noise))
        for block, w, noise in zip(cache.blocks, self.params.blocks, self.flat_noise, strict=True):
            x = block.moe.router.gate.x
            h = x @ w.moe.router.w_gate + noise * (np.logaddexp(0, x @ w.moe.router.w_noise) + 0.01)
            gaps = -np.diff(-np.sort(-h, axis=1), axis=1)
            least = min(least, gaps[:, active - 2 : active + 1].min())
        return float(least)


def drawn(seed: int) -> Case:
    """Sizes that seldom divide each other; weights away from the zeros and ones that training starts from.

    Three tokens at least: between equal tokens attention has nothing to choose, and its gradient is mere rounding.
    """
    rng = np.random.default_rng(seed)
    V, B, T, D, L, G, per_group, half, E, F = (
        int(rng.integers(least, most + 1))
        for least, most in [(3, 11), (1, 3), (3, 9), (3, 7), (1, 3), (1, 3), (1, 3), (1, 3), (3, 7), (1, 5)]
    )
    K = int(rng.integers(2, E))
    config = Config(V, B, T, D, L, G * per_group, G, 2 * half, E, K, F)
    settings = ModelConfig(
        vocab_size=V,
        width=D,
        layers=L,
        heads=config.H,
        kv_heads=G,
        head_width=config.C,
        context=T,
        experts=E,
        active_experts=K,
        expert_width=F,
    )
    params = tree.map(
        lambda leaf: leaf + 0.3 * rng.standard_normal(leaf.shape), decoder.init(rng, settings, np.float64)
    )
    tokens, targets = rng.integers(V, size=(2, B, T))
    case = Case(config, settings, params, tokens, targets, rng.standard_normal((L, B, T, E)))
    assert case.margin() > 1e-9, "no ranking hangs on a rounding"
    return case


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return drawn(request.param)


# The model


def test_the_defaults_are_those_of_the_package() -> None:
    """One model is meant on both sides: no option of ModelConfig is set otherwise than by default."""
    default = ModelConfig()
    assert default.renormalize and default.noisy_gating and not default.tied_embeddings and default.window is None
    assert (default.rope_theta, default.norm_eps, noisy_top_k.NOISE_FLOOR) == (10_000.0, 1e-5, 0.01)


def test_init_has_the_shapes_and_the_scales_of_the_package() -> None:
    settings = ModelConfig(vocab_size=90, width=48, layers=3, expert_width=80, head_width=16, heads=6, kv_heads=2)
    config = Config(90, 1, 128, 48, 3, 6, 2, 16, 8, 2, 80)
    ours = reference.init(config, np.random.default_rng(1))
    theirs = plain(decoder.init(np.random.default_rng(2), settings))
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.keys() == other.keys()
        for name, w in mine.items():
            assert (w.shape, w.dtype) == (other[name].shape, np.float32), name
            np.testing.assert_allclose(w.std(), other[name].std(), rtol=0.15, err_msg=name)
            np.testing.assert_allclose(w.mean(), other[name].mean(), atol=0.3 * other[name].std(), err_msg=name)


def test_logits_are_the_same_with_noise_and_without(case: Case) -> None:
    for noise in (case.noise, None):
        logits, _, _ = decoder.forward(case.params, case.tokens, case.settings, Mode(noise=noise))
        flat_noise = np.zeros_like(case.flat_noise) if noise is None else case.flat_noise
        ours, _, _ = reference.model(plain(case.params), case.tokens, flat_noise, case.config)
        assert_same(ours, logits.reshape(ours.shape))


def test_the_routers_sums_and_each_auxiliary_loss_are_the_same(case: Case) -> None:
    _, sums, _ = reference.model(plain(case.params), case.tokens, case.flat_noise, case.config)
    totals, _ = case.fast()
    for ours, theirs, losses in zip(sums, totals.stats, totals.auxiliary, strict=True):
        for mine, name in zip(ours, ("assignments", "probability", "load", "squared_lse"), strict=True):
            assert_same(mine, getattr(theirs, name), name)
        for one, name in enumerate(("balance", "load", "z")):
            alpha = tuple(float(other == one) for other in range(3))
            value, gradients = reference.auxiliary_loss(ours, case.tokens.size, *alpha)
            assert_same(value, getattr(losses, name), name)
            _, by_sums = balance.loss(theirs, Coefficients(**{name: 1.0}))
            for mine, sum_name in zip(gradients, ("probability", "load", "squared_lse"), strict=True):
                theirs_of_sum = getattr(by_sums, sum_name)
                assert_same(np.broadcast_to(mine, np.shape(theirs_of_sum)), theirs_of_sum, name)


@pytest.mark.parametrize("alpha", [ALPHA, (0.0, 0.0, 0.0), (1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0)])
def test_losses_and_every_gradient_are_the_same(case: Case, alpha: tuple[float, float, float]) -> None:
    cross_entropy, total, gradients = case.loss(alpha)
    totals, theirs = case.fast(alpha)
    assert_same(cross_entropy, totals.loss)
    assert_same(total, totals.total)
    assert_same_parts(gradients, plain(theirs))


def test_some_cases_leave_an_expert_without_tokens() -> None:
    """So the comparisons above include empty experts."""
    counts = [stats.assignments for seed in CASES for stats in drawn(seed).fast()[0].stats]
    assert any((count == 0).any() for count in counts)


def test_each_layer_is_the_same_alone(case: Case) -> None:
    """Where the whole differs, this says which layer does."""
    rng, config = np.random.default_rng(5), case.config
    N = case.tokens.size
    block, w = case.params.blocks[0], plain(case.params)[1]
    x, dy = rng.standard_normal((2, N, config.D))

    y, back = reference.rmsnorm(w["moe_norm"], x)
    theirs, cache = rmsnorm.forward(block.moe_norm, x)
    dx, dnorm = rmsnorm.backward(block.moe_norm, cache, dy)
    assert_same(y, theirs)
    assert_same(back(dy)[0], dx)
    assert_same(back(dy)[1], dnorm.gain)

    heads = rng.standard_normal((config.B, config.T, config.H, config.C))
    rotation = rope.init(np.arange(config.T), config.C, dtype=np.float64)
    assert_same(reference.rope(heads.swapaxes(1, 2)).swapaxes(1, 2), rope.forward(rotation, heads))
    assert_same(reference.rope(heads.swapaxes(1, 2), -1).swapaxes(1, 2), rope.backward(rotation, heads))

    y, back = reference.attention(w, x, config.T, config)
    normed, norm_cache = rmsnorm.forward(block.attention_norm, x.reshape(config.B, config.T, -1))
    gathered, attended = attention.forward(block.attention, normed, rotation, config.C)
    dnormed, dattention = attention.backward(block.attention, attended, dy.reshape(normed.shape))
    dx, _ = rmsnorm.backward(block.attention_norm, norm_cache, dnormed)
    assert_same(y, x + gathered.reshape(x.shape))
    dx_ours, dw = back(dy)
    assert_same(dx_ours, dy + dx.reshape(x.shape))
    for name in ("query", "key", "value", "output"):
        assert_same(dw[name], getattr(dattention, name).weight, name)

    y, _, back = reference.moe(w, x, case.flat_noise[0], config)
    normed, norm_cache = rmsnorm.forward(block.moe_norm, x)
    mixed, stats, _, moe_cache = moe.forward(
        block.moe, normed.reshape(config.B, config.T, -1), case.settings, Mode(noise=case.noise[0])
    )
    assert_same(y, x + mixed.reshape(x.shape))
    by_probability, by_load, by_lse = rng.standard_normal(config.E), rng.standard_normal(config.E), 0.3
    dstats = tree.zeros_like(stats._replace(tokens=np.zeros(())))._replace(
        probability=by_probability, load=by_load, squared_lse=np.asarray(by_lse)
    )
    dnormed, dmoe = moe.backward(block.moe, moe_cache, dy.reshape(mixed.shape), dstats)
    dx, _ = rmsnorm.backward(block.moe_norm, norm_cache, dnormed.reshape(x.shape))
    dx_ours, dw = back(dy, (by_probability, by_load, by_lse))
    assert_same(dx_ours, dy + dx)
    assert_same(dw["router"], dmoe.router.w_gate)
    assert_same(dw["noise_scale"], dmoe.router.w_noise)
    for name in ("gate", "up", "down"):
        assert_same(dw[name], getattr(dmoe.experts, f"w_{name}"), name)


def test_equal_logits_go_to_the_lower_index() -> None:
    """A router of zeros, without noise: both sides choose experts 0 and 1 for every token."""
    w = {"router": np.zeros((4, 5)), "noise_scale": np.zeros((4, 5))}
    x = np.random.default_rng(0).standard_normal((3, 4))
    share, chosen, _, _ = reference.router(w, x, np.zeros((3, 5)), 2)
    choice, _, _ = noisy_top_k.gate(noisy_top_k.Router(w["router"], w["noise_scale"]), x, 2)
    assert (choice.experts == [0, 1]).all()
    assert (chosen == [True, True, False, False, False]).all() and (share[:, :2] == 0.5).all()


def test_finite_differences_confirm_every_kind_of_weight() -> None:
    """Central differences of the total loss, at entries whose step changes no ranking."""
    checked = 0
    for seed in CASES[:4]:
        case, rng = drawn(seed), np.random.default_rng(seed)
        params = plain(case.params)
        _, _, gradients = case.loss()
        for part, dpart in zip(params, gradients, strict=True):
            for name, w in part.items():
                place = tuple(int(rng.integers(size)) for size in w.shape)
                entry, step, values, ranks = w[place], 1e-5, [], []
                for moved in (entry + step, entry - step):
                    w[place] = moved
                    values.append(case.loss()[1])
                    ranks.append(rankings(case))
                w[place] = entry
                if all((a == b).all() for a, b in zip(*ranks, strict=True)):
                    slope = (values[0] - values[1]) / (2 * step)
                    np.testing.assert_allclose(dpart[name][place], slope, rtol=2e-6, atol=1e-8, err_msg=name)
                    checked += 1
    assert checked > 60


def rankings(case: Case) -> list[np.ndarray]:
    """For each layer, the experts of every token, best first."""
    _, _, cache = decoder.forward(case.params, case.tokens, case.settings, Mode(noise=case.noise))
    return [block.moe.router.gate.ranking for block in cache.blocks]


def test_gradients_have_the_type_of_the_weights() -> None:
    config = Config(V=7, B=2, T=5, D=6, L=2, H=4, G=2, C=4, E=4, K=2, F=3)
    rng = np.random.default_rng(0)
    tokens = rng.integers(7, size=(2, 5))
    for dtype in (np.float32, np.float64):
        params = reference.init(config, rng, dtype)
        noise = rng.standard_normal((2, 10, 4), np.float32)
        _, total, gradients = reference.loss(params, tokens, tokens, noise, config)
        assert total.dtype == dtype
        for part, dpart in zip(params, gradients, strict=True):
            assert {name: d.dtype for name, d in dpart.items()} == dict.fromkeys(part, np.dtype(dtype))


# The optimiser


def test_adamw_takes_the_same_steps() -> None:
    """40 steps through warm-up and decay, on gradients of which some are clipped and some are not."""
    case, rng, steps = drawn(3), np.random.default_rng(0), 40
    recipe = TrainConfig(optimizer="adamw", steps=steps, warmup=steps // 20, learning_rate=0.01)
    theirs = case.params
    ours = [{name: w.copy() for name, w in part.items()} for part in plain(theirs)]
    moments = [{name: (np.zeros_like(w), np.zeros_like(w)) for name, w in part.items()} for part in ours]
    state = optimizer.init(theirs, recipe)
    norms = []
    for step in range(steps):
        size = 10.0 ** -(step % 4)
        gradient = tree.map(lambda w, size=size: size * rng.standard_normal(w.shape), theirs)
        before = [{name: d.copy() for name, d in part.items()} for part in plain(gradient)]
        reference.adamw(ours, before, moments, step, steps)
        norms.append(float(clipping.clip(gradient, recipe.clip)))
        optimizer.update(theirs, gradient, state, recipe, step)
        assert_same_parts(ours, plain(theirs))
    assert min(norms) < 1 < max(norms)


# Sampling and training


@pytest.mark.parametrize("temperature", [0.3, 0.7, 1.0, 2.5])
def test_the_distribution_of_the_next_character_is_the_same(temperature: float) -> None:
    logits = 5 * np.random.default_rng(0).standard_normal(40)
    p, _, _ = reference.softmax(logits / temperature)
    assert_same(p, sampling.probabilities(logits, temperature))


@pytest.mark.parametrize("temperature", [0.5, 1.5])
def test_generate_draws_the_same_characters(temperature: float) -> None:
    """Also beyond the context, of which both then see the last T tokens."""
    case = drawn(3)
    start, count = case.tokens[0, :1], 3 * case.config.T + 5
    ours = reference.generate(plain(case.params), start, count, temperature, case.config, np.random.default_rng(1))
    theirs, rng = start.tolist(), np.random.default_rng(1)
    for _ in range(count):
        logits, _, _ = decoder.forward(case.params, np.array([theirs[-case.config.T :]]), case.settings)
        theirs.append(sampling.sample(logits[0, -1], rng, temperature))
    assert ours.tolist() == theirs
    assert len(set(theirs)) > 2


def test_training_lowers_the_loss(capsys: pytest.CaptureFixture[str]) -> None:
    config = Config(V=5, B=8, T=12, D=16, L=1, H=2, G=1, C=8, E=4, K=2, F=16)
    rng = np.random.default_rng(0)
    params = reference.init(config, rng)
    reference.train(params, np.arange(200) % 5, config, 40, rng)
    first, last = (float(line.split()[-1]) for line in capsys.readouterr().out.splitlines())
    assert first == pytest.approx(np.log(5), abs=0.1)
    assert last < 0.2
    text = reference.generate(params, np.array([0, 1]), 10, 0.5, config, rng)
    assert (text == np.arange(12) % 5).all()


# The file


def test_the_file_reads_alone() -> None:
    """At most 300 lines; nothing from the package, nothing beside NumPy and the standard library."""
    assert len(SOURCE.splitlines()) <= 300
    for node in ast.walk(ast.parse(SOURCE)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module]
            for name in names:
                root = str(name).partition(".")[0]
                assert root == "numpy" or root in sys.stdlib_module_names, name
