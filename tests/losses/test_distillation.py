"""Distillation: its gradient by finite differences and in its golden form, its identities, and its teacher."""

import dataclasses
import math
from typing import Any

import numpy as np
import on_devices
import pytest
import strict_cupy
from hypothesis import given
from hypothesis import strategies as st
from small_models import EVERY_LOSS, assert_close, batch_of, drawn, split

from minimoe.core import tree
from minimoe.core.config import ModelConfig
from minimoe.core.errors import UserError
from minimoe.layers import decoder
from minimoe.layers.mode import Mode
from minimoe.losses import cross_entropy, distillation
from minimoe.losses.distillation import Distillation, Settings
from minimoe.losses.objective import Objective, Shard, loss_and_gradient
from minimoe.proof.gradcheck import check, failed


def softmax(z: Any) -> Any:
    p = np.exp(z - z.max(-1, keepdims=True))
    return p / p.sum(-1, keepdims=True)


def loss_of(z: Any, targets: Any, teacher: Any, settings: Settings, mask: Any = None) -> tuple[float, Any]:
    """The summed loss and its gradient."""
    (total, _), cache = distillation.forward(z, targets, teacher, settings, mask)
    return float(total), distillation.backward(cache, np.float64(1))


class Case:
    """N = 4 tokens of V = 5, with logits that are no round numbers."""

    def __init__(self, seed: int = 0, scale: float = 1.0) -> None:
        rng = np.random.default_rng(seed)
        self.student, self.teacher = scale * rng.standard_normal((2, 4, 5))
        self.targets = rng.integers(5, size=4)
        self.mask = rng.uniform(0.5, 2, 4) * [1, 0, 1, 1]


@given(
    tokens=st.integers(1, 5),
    vocabulary=st.integers(1, 6),
    temperature=st.sampled_from([0.5, 1.0, 3.0]),
    hard_share=st.sampled_from([0.0, 0.3, 1.0]),
    reverse=st.booleans(),
    masked=st.booleans(),
    scale=st.sampled_from([0.1, 1.0, 10.0]),
    seed=st.integers(0, 99),
)
def test_gradient_is_right(
    tokens: int,
    vocabulary: int,
    temperature: float,
    hard_share: float,
    reverse: bool,
    masked: bool,
    scale: float,
    seed: int,
) -> None:
    rng = np.random.default_rng(seed)
    targets, teacher = rng.integers(vocabulary, size=tokens), scale * rng.standard_normal((tokens, vocabulary))
    mask = rng.uniform(0, 2, size=tokens) if masked else None
    settings = Settings(temperature, hard_share, reverse)

    def forward(params: None, x: Any) -> tuple[Any, Any]:
        (total, _), cache = distillation.forward(x, targets, teacher, settings, mask)
        return total, cache

    def backward(params: None, cache: Any, dy: Any) -> tuple[Any, None]:
        return distillation.backward(cache, dy), None

    x = scale * rng.standard_normal((tokens, vocabulary))
    assert failed(check("distillation", forward, backward, None, x)) == []


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_the_golden_gradient(temperature: float) -> None:
    """τ (p_s − p_t) for each token: KL(p_t‖p_s), summed over the vocabulary and not averaged over it."""
    case = Case()
    _, dz = loss_of(case.student, case.targets, case.teacher, Settings(temperature, 0.0))
    expected = temperature * (softmax(case.student / temperature) - softmax(case.teacher / temperature))
    np.testing.assert_allclose(dz, expected, rtol=0, atol=1e-15)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_the_golden_gradient_in_reverse(temperature: float) -> None:
    case = Case()
    _, dz = loss_of(case.student, case.targets, case.teacher, Settings(temperature, 0.0, True))
    p_s, p_t = softmax(case.student / temperature), softmax(case.teacher / temperature)
    kl = (p_s * np.log(p_s / p_t)).sum(-1, keepdims=True)
    np.testing.assert_allclose(dz, temperature * p_s * (np.log(p_s / p_t) - kl), rtol=0, atol=1e-15)


def test_a_loss_worked_out_by_hand() -> None:
    """Student (1/2, 1/4, 1/4), teacher (1/4, 1/4, 1/2): here KL happens to be ¼ ln 2 in both directions.

    KL(t‖s) = ¼ ln ½ + ¼ ln 1 + ½ ln 2 = ¼ ln 2,  KL(s‖t) = ½ ln 2 + 0 + ¼ ln ½ = ¼ ln 2; CE of token 0 is ln 2.
    """
    student, teacher = np.log([[0.5, 0.25, 0.25]]) + 3.0, np.log([[0.25, 0.25, 0.5]]) - 1.0
    for reverse in (False, True):
        total, dz = loss_of(student, np.array([0]), teacher, Settings(1.0, 0.25, reverse))
        assert math.isclose(total, 0.25 * math.log(2) + 0.75 * 0.25 * math.log(2), rel_tol=1e-14)
    _, dz = loss_of(student, np.array([0]), teacher, Settings(1.0, 0.25))
    np.testing.assert_allclose(dz, [[0.25 * -0.5 + 0.75 * 0.25, 0.25 * 0.25, 0.25 * 0.25 - 0.75 * 0.25]], atol=1e-15)
    skewed = np.log([[0.9, 0.05, 0.05]])
    forward, _ = loss_of(student, np.array([0]), skewed, Settings(1.0, 0.0))
    reverse_, _ = loss_of(student, np.array([0]), skewed, Settings(1.0, 0.0, True))
    assert math.isclose(forward, 0.9 * math.log(1.8) + 0.1 * math.log(0.2), rel_tol=1e-13)
    assert math.isclose(reverse_, 0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(5), rel_tol=1e-13)


@given(seed=st.integers(0, 99), hard_share=st.floats(0, 1))
def test_at_temperature_1_it_is_cross_entropy_with_the_mixed_label(seed: int, hard_share: float) -> None:
    case = Case(seed)
    _, dz = loss_of(case.student, case.targets, case.teacher, Settings(1.0, hard_share))
    mixed = hard_share * np.eye(5)[case.targets] + (1 - hard_share) * softmax(case.teacher)
    np.testing.assert_allclose(dz, softmax(case.student) - mixed, rtol=0, atol=1e-14)


@pytest.mark.parametrize("reverse", [False, True])
def test_a_teacher_of_almost_no_temperature_is_the_label(reverse: bool) -> None:
    """With a teacher that is sure, KL(p_t‖p_s) is the cross-entropy of its answer."""
    case = Case()
    sure = 1e3 * np.eye(5)[case.targets]
    total, dz = loss_of(case.student, case.targets, sure, Settings(1.0, 0.0, reverse))
    (nats, _), cache = cross_entropy.forward(case.student, case.targets)
    if reverse:
        assert total > 100  # it pays for every possibility that the teacher excludes
    else:
        assert math.isclose(total, float(nats), rel_tol=1e-12)
        np.testing.assert_allclose(dz, cross_entropy.backward(cache, np.float64(1)), atol=1e-12)


def test_hard_share_1_is_cross_entropy_to_the_bit() -> None:
    case = Case()
    for reverse in (False, True):
        total, dz = loss_of(case.student, case.targets, case.teacher, Settings(3.0, 1.0, reverse), case.mask)
        (nats, _), cache = cross_entropy.forward(case.student, case.targets, case.mask)
        assert total == float(nats)
        np.testing.assert_array_equal(dz, cross_entropy.backward(cache, np.float64(1)))


def test_a_student_that_is_its_teacher_has_nothing_to_learn_from_it() -> None:
    """Whatever is added to all logits of a token."""
    case = Case()
    for reverse in (False, True):
        total, dz = loss_of(case.student, case.targets, case.student + 7, Settings(2.0, 0.0, reverse))
        assert abs(total) < 1e-14
        np.testing.assert_allclose(dz, 0, atol=1e-14)


@pytest.mark.parametrize("reverse", [False, True])
def test_the_gradient_keeps_its_size_when_the_temperature_rises(reverse: bool) -> None:
    """For τ → ∞, τ² KL tends to ½ Σ (Δ − mean Δ)²/V, Δ the difference of the logits: its gradient is Δ/V, centred.

    Without τ² it would shrink like 1/τ².
    """
    case = Case()
    _, dz = loss_of(case.student, case.targets, case.teacher, Settings(1e3, 0.0, reverse))
    delta = case.student - case.teacher
    np.testing.assert_allclose(dz, (delta - delta.mean(-1, keepdims=True)) / 5, atol=2e-3)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_extreme_logits_stay_finite(reverse: bool, dtype: Any) -> None:
    student = np.array([[1e4, -1e4, 0], [-1e4, 1e4, 0], [0, 0, 0], [1e4, 1e4, -1e4]], dtype)
    teacher = np.array([[-1e4, 1e4, 0], [-1e4, 1e4, 0], [1e4, 0, -1e4], [-1e4, -1e4, 1e4]], dtype)
    for temperature in (0.5, 1.0, 4.0):
        settings = Settings(temperature, 0.25, reverse)
        (total, tokens), cache = distillation.forward(student, np.array([0, 1, 2, 0]), teacher, settings)
        dz = distillation.backward(cache, dtype(1))
        assert np.isfinite(total)
        assert np.isfinite(dz).all()
        assert dz.dtype == dtype
        assert tokens == 4
    one, _ = loss_of(student[:1].astype(float), np.array([0]), teacher[:1].astype(float), Settings(1.0, 0.0, reverse))
    assert one == pytest.approx(2e4)


def test_tokens_that_do_not_count_have_no_loss_and_no_gradient() -> None:
    case = Case()
    for reverse in (False, True):
        settings = Settings(2.0, 0.3, reverse)
        total, dz = loss_of(case.student, case.targets, case.teacher, settings, case.mask)
        alone = [
            loss_of(case.student[t : t + 1], case.targets[t : t + 1], case.teacher[t : t + 1], settings)
            for t in range(4)
        ]
        assert total == pytest.approx(sum(m * one for m, (one, _) in zip(case.mask, alone, strict=True)), rel=1e-12)
        for t, (_, expected) in enumerate(alone):
            np.testing.assert_allclose(dz[t], case.mask[t] * expected[0], atol=1e-14)
        (_, count), _ = distillation.forward(case.student, case.targets, case.teacher, settings, case.mask)
        assert count == pytest.approx(case.mask.sum())


def test_the_gradient_scales_with_that_of_the_sum() -> None:
    case = Case()
    for reverse in (False, True):
        _, cache = distillation.forward(case.student, case.targets, case.teacher, Settings(2.0, 0.3, reverse))
        one, quarter = (distillation.backward(cache, np.float64(scale)) for scale in (1, 0.25))
        np.testing.assert_allclose(quarter, one / 4, atol=1e-15)


# The teacher


def teacher_of(rng: np.random.Generator, small: ModelConfig) -> tuple[Any, ModelConfig]:
    """Other experts, another router and another width; only the vocabulary is the student's."""
    config = dataclasses.replace(small, router="switch", active_experts=1, experts=3, width=10)
    return drawn(rng, config), config


def soft(rng: np.random.Generator, small: ModelConfig, **settings: Any) -> Objective:
    chosen = Settings(**{"temperature": 2.0, "hard_share": 0.25, **settings})
    return Objective(EVERY_LOSS, 0.8, token_loss=Distillation(*teacher_of(rng, small), chosen))


def test_the_teacher_reads_the_shard_in_evaluation(rng: np.random.Generator, small: ModelConfig) -> None:
    """No noise and no capacity, whatever the student is trained with: a Switch in training would drop tokens."""
    params, batch, goal = drawn(rng, small), batch_of(rng, small), soft(rng, small, hard_share=0.0)
    loss: Any = goal.token_loss
    totals, _ = loss_and_gradient(params, [batch], small, goal._replace(coefficients=EVERY_LOSS))
    told = decoder.forward(loss.teacher, batch.tokens, loss.config).logits
    mode = Mode(training=True, noise=batch.noise, capacity_factor=0.8, mask=batch.mask)
    said = decoder.forward(params, batch.tokens, small, mode).logits
    (total, tokens), _ = distillation.forward(said, batch.targets, told, loss.settings, batch.mask)
    assert totals.loss == pytest.approx(float(total / tokens), rel=1e-10)


@pytest.mark.parametrize("sizes", [[4, 2], [1, 2, 3]])
def test_shards_give_the_loss_and_the_gradient_of_their_batch(
    rng: np.random.Generator, small: ModelConfig, sizes: list[int]
) -> None:
    params, batch, goal = drawn(rng, small), batch_of(rng, small), soft(rng, small)
    whole, expected = loss_and_gradient(params, [batch], small, goal)
    shards = split(batch, sizes)
    for recompute in (False, True):
        totals, gradient = loss_and_gradient(params, shards, small, goal, recompute=recompute)
        assert totals.loss == pytest.approx(float(whole.loss), rel=1e-12)
        assert_close(gradient, expected)


def test_the_teacher_reads_packed_documents_apart(rng: np.random.Generator, small: ModelConfig) -> None:
    """The loss of two documents in a row, each with its own start, is that of the two alone."""
    params, goal = drawn(rng, small), soft(rng, small)._replace(coefficients=Objective().coefficients)
    goal = goal._replace(capacity_factor=None)
    row = batch_of(rng, small, masked=False, noisy=False)
    tokens, targets = row.tokens[:1], row.targets[:1]
    packed = Shard(tokens, targets, starts=np.array([[0, 0, 0, 3, 3, 3, 3]]))
    alone = [Shard(tokens[:, part], targets[:, part]) for part in (slice(0, 3), slice(3, 7))]
    totals = [loss_and_gradient(params, shards, small, goal)[0].loss for shards in ([packed], alone)]
    assert totals[0] == pytest.approx(float(totals[1]), rel=1e-12)


def test_the_logits_of_a_teacher_in_float64_do_not_change_the_dtype_of_the_gradient(
    rng: np.random.Generator, small: ModelConfig
) -> None:
    loss: Any = soft(rng, small).token_loss
    batch = batch_of(rng, small)
    logits = rng.standard_normal((*batch.tokens.shape, small.vocab_size)).astype(np.float32)
    _, cache = loss.forward(logits, batch)
    assert loss.backward(cache, np.float32(1)).dtype == np.float32


def test_a_teacher_on_the_host_teaches_a_student_on_the_gpu(
    rng: np.random.Generator, small: ModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A resumed run opens its teacher on the host."""
    loss: Any = soft(rng, small).token_loss
    batch = batch_of(rng, small, noisy=False)
    logits = rng.standard_normal((*batch.tokens.shape, small.vocab_size))
    expected, cache = loss.forward(logits, batch)
    strict_cupy.install(monkeypatch)
    on = on_devices.mover("gpu", np.float64)
    found, on_gpu = loss.forward(on([logits])[0], on(batch))
    on_devices.assert_equal(expected, found, 1e-12)
    on_devices.assert_equal(loss.backward(cache, 0.5), loss.backward(on_gpu, 0.5), 1e-12)


def test_the_teacher_does_not_change(rng: np.random.Generator, small: ModelConfig) -> None:
    params, batch, goal = drawn(rng, small), batch_of(rng, small), soft(rng, small)
    loss: Any = goal.token_loss
    before = tree.map(np.copy, loss.teacher)
    loss_and_gradient(params, [batch], small, goal)
    for ours, theirs in zip(tree.leaves(before), tree.leaves(loss.teacher), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_a_batch_without_targets_has_loss_0_and_no_gradient(rng: np.random.Generator, small: ModelConfig) -> None:
    params, goal = drawn(rng, small), soft(rng, small)._replace(coefficients=Objective().coefficients)
    batch: Shard = batch_of(rng, small)
    empty = batch._replace(loss_mask=np.zeros(batch.tokens.shape))
    totals, gradient = loss_and_gradient(params, [empty], small, goal._replace(coefficients=Objective().coefficients))
    assert totals.loss == 0
    assert all((leaf == 0).all() for name, leaf in tree.named_leaves(gradient) if name.startswith("head"))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (Settings(0.0), "temperature 0.0 is not possible"),
        (Settings(-1.0), "temperature -1.0 is not possible"),
        (Settings(math.inf), "temperature inf is not possible"),
        (Settings(1e300), "give a number from 0.001 to 1000"),
        (Settings(1e-300), "give a number from 0.001 to 1000"),
        (Settings(math.nan), "temperature nan is not possible"),
        (Settings(1.0, 1.5), "hard_share 1.5 is not a share"),
        (Settings(1.0, math.nan), "hard_share nan is not a share"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings: Settings, words: str) -> None:
    case = Case()
    with pytest.raises(UserError, match=words):
        distillation.forward(case.student, case.targets, case.teacher, settings)


def test_another_vocabulary_is_refused() -> None:
    case = Case()
    with pytest.raises(UserError, match=r"\(4, 5\) and the teacher's \(4, 4\)"):
        distillation.forward(case.student, case.targets, case.teacher[:, :4], Settings())
