"""The mixture of 1991: its errors against loops, their gradients, and what each of them makes the experts do."""

import math
from typing import Any

import numpy as np
import pytest
import strict_cupy
from hypothesis import given
from hypothesis import strategies as st

from minimoe.beyond import adaptive_mixture as mixtures
from minimoe.beyond.adaptive_mixture import CLASS_ERRORS, ERRORS, Answers
from minimoe.core import tree
from minimoe.core.arrays import to_device, to_host
from minimoe.core.errors import UserError
from minimoe.proof.finite_differences import check
from minimoe.proof.results import failed


def softmax(logits: Any) -> list[float]:
    powers = [math.exp(logit) for logit in logits]
    return [power / sum(powers) for power in powers]


@given(
    cases=st.integers(1, 4),
    inputs=st.integers(1, 3),
    outputs=st.integers(2, 3),
    experts=st.integers(1, 4),
    name=st.sampled_from(list(ERRORS)),
    classes=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_every_gradient_is_right(
    cases: int, inputs: int, outputs: int, experts: int, name: str, classes: bool, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    x, target = rng.standard_normal((cases, inputs)), rng.standard_normal((cases, outputs))
    error = CLASS_ERRORS[name] if classes else ERRORS[name]
    target = rng.integers(outputs, size=cases) if classes else target

    def forward(params: Any, x: np.ndarray) -> tuple[Any, Any]:
        answers, cache = mixtures.forward(params, x)
        value, gradient = error(answers, target)
        return value, (cache, gradient)

    def backward(params: Any, cache: Any, dy: np.ndarray) -> tuple[Any, Any]:
        gate, output = cache[1]
        return mixtures.backward(params, cache[0], Answers(gate * dy[:, None], output * dy[:, None, None]))

    params = mixtures.init(rng, inputs, outputs, experts, scale=0.7)
    rows = check(name, forward, backward, params, x, entries=6, directions=2)
    assert not failed(rows), failed(rows)


def test_the_answers_agree_with_a_loop(rng: np.random.Generator) -> None:
    params, x = mixtures.init(rng, 3, 2, 4), rng.standard_normal((5, 3))
    answers, _ = mixtures.forward(params, x)
    for n, e in np.ndindex(5, 4):
        logit = sum(x[n, d] * params.w_gate[d, e] for d in range(3)) + params.b_gate[e]
        assert answers.gate[n, e] == pytest.approx(logit)
        for m in range(2):
            output = sum(x[n, d] * params.w_expert[e, d, m] for d in range(3)) + params.b_expert[e, m]
            assert answers.output[n, e, m] == pytest.approx(output)


def test_the_three_errors_agree_with_a_loop(rng: np.random.Generator) -> None:
    answers = Answers(rng.standard_normal((6, 3)), rng.standard_normal((6, 3, 2)))
    target = rng.standard_normal((6, 2))
    values = {name: error(answers, target)[0] for name, error in ERRORS.items()}
    for n in range(6):
        p = softmax(answers.gate[n])
        squares = [sum((target[n, m] - answers.output[n, e, m]) ** 2 for m in range(2)) for e in range(3)]
        blend = [sum(p[e] * answers.output[n, e, m] for e in range(3)) for m in range(2)]
        joint = [p[e] * math.exp(-squares[e] / 2) for e in range(3)]
        assert values["cooperative"][n] == pytest.approx(sum((target[n, m] - blend[m]) ** 2 for m in range(2)))
        assert values["competitive"][n] == pytest.approx(sum(p[e] * squares[e] for e in range(3)))
        assert values["mixture"][n] == pytest.approx(-math.log(sum(joint)))
        np.testing.assert_allclose(mixtures.prior(answers)[n], p)
        np.testing.assert_allclose(mixtures.posterior(answers, target)[n], np.array(joint) / sum(joint))
        np.testing.assert_allclose(mixtures.blend(answers)[n], blend)


def test_the_errors_of_classes_agree_with_a_loop(rng: np.random.Generator) -> None:
    answers = Answers(rng.standard_normal((6, 3)), rng.standard_normal((6, 3, 4)))
    labels = np.array([3, 0, 1, 1, 2, 3])
    values = {name: error(answers, labels)[0] for name, error in CLASS_ERRORS.items()}
    for n, label in enumerate(labels):
        p, shares = softmax(answers.gate[n]), [softmax(answers.output[n, e]) for e in range(3)]
        blend = [sum(p[e] * shares[e][c] for e in range(3)) for c in range(4)]
        squares = [sum(((c == label) - shares[e][c]) ** 2 for c in range(4)) for e in range(3)]
        joint = [p[e] * shares[e][label] for e in range(3)]
        assert values["cooperative"][n] == pytest.approx(sum(((c == label) - blend[c]) ** 2 for c in range(4)))
        assert values["competitive"][n] == pytest.approx(sum(p[e] * squares[e] for e in range(3)))
        assert values["mixture"][n] == pytest.approx(-math.log(blend[label]))
        np.testing.assert_allclose(mixtures.class_blend(answers)[n], blend)
        np.testing.assert_allclose(mixtures.class_posterior(answers, labels)[n], np.array(joint) / sum(joint))


def test_the_push_on_an_output_is_weighted_by_the_prior_or_by_the_posterior(rng: np.random.Generator) -> None:
    answers, target = Answers(rng.standard_normal((7, 3)), rng.standard_normal((7, 3, 2))), rng.standard_normal((7, 2))
    away = target[:, None] - answers.output
    p, h = mixtures.prior(answers), mixtures.posterior(answers, target)
    np.testing.assert_allclose(mixtures.competitive(answers, target)[1].output, -2 * p[..., None] * away)
    np.testing.assert_allclose(mixtures.mixture(answers, target)[1].output, -h[..., None] * away)
    np.testing.assert_allclose(mixtures.mixture(answers, target)[1].gate, p - h)


def test_the_competitive_error_is_the_cooperative_one_and_the_spread_of_the_outputs(rng: np.random.Generator) -> None:
    answers, target = Answers(rng.standard_normal((7, 3)), rng.standard_normal((7, 3, 2))), rng.standard_normal((7, 2))
    p = mixtures.prior(answers)[..., None]
    spread = (p * (answers.output - mixtures.blend(answers)[:, None]) ** 2).sum((1, 2))
    apart = mixtures.competitive(answers, target)[0] - mixtures.cooperative(answers, target)[0]
    np.testing.assert_allclose(apart, spread)


def test_one_expert_alone_makes_all_errors_a_square_or_a_cross_entropy(rng: np.random.Generator) -> None:
    output, target = rng.standard_normal((4, 1, 3)), rng.standard_normal((4, 3))
    answers = Answers(rng.standard_normal((4, 1)), output)
    square = ((target - output[:, 0]) ** 2).sum(1)
    for name, factor in (("cooperative", 1), ("competitive", 1), ("mixture", 0.5)):
        value, gradient = ERRORS[name](answers, target)
        np.testing.assert_allclose(value, factor * square)
        assert not gradient.gate.any()
    log_share = np.log(np.exp(output[:, 0]) / np.exp(output[:, 0]).sum(1, keepdims=True))
    labels = np.array([0, 2, 1, 2])
    np.testing.assert_allclose(mixtures.class_mixture(answers, labels)[0], -log_share[range(4), labels])


def test_experts_that_say_the_same_are_told_apart_by_nothing_but_the_gate(rng: np.random.Generator) -> None:
    answers = Answers(rng.standard_normal((5, 3)), np.ones((5, 3, 2)))
    target = rng.standard_normal((5, 2))
    np.testing.assert_allclose(mixtures.posterior(answers, target), mixtures.prior(answers))
    for error in ERRORS.values():
        assert abs(error(answers, target)[1].gate).max() < 1e-12


@pytest.mark.parametrize("name", list(ERRORS))
def test_a_constant_in_all_logits_of_the_gate_changes_nothing(rng: np.random.Generator, name: str) -> None:
    answers, target = Answers(rng.standard_normal((5, 3)), rng.standard_normal((5, 3, 2))), rng.standard_normal((5, 2))
    value, gradient = ERRORS[name](answers, target)
    moved, same = ERRORS[name](Answers(answers.gate + 50, answers.output), target)
    np.testing.assert_allclose(moved, value)
    np.testing.assert_allclose(same.output, gradient.output)
    np.testing.assert_allclose(gradient.gate.sum(1), 0, atol=1e-12)


@pytest.mark.parametrize("size", [1e4, -1e4])
@pytest.mark.parametrize("name", list(ERRORS))
def test_a_certain_gate_and_a_hopeless_target_give_finite_numbers(name: str, size: float) -> None:
    """Without the largest taken out of the sum of exponentials, every term is 0 and its logarithm −∞."""
    answers = Answers(np.array([[size, 0.0, 0.0]]), np.array([[[size, 0.0], [0.0, 1.0], [1.0, 0.0]]]))
    for error, target in ((ERRORS[name], np.array([[-size, size]])), (CLASS_ERRORS[name], np.array([1]))):
        value, gradient = error(answers, target)
        assert np.isfinite(value).all()
        assert np.isfinite(gradient.gate).all()
        assert np.isfinite(gradient.output).all()
    h = mixtures.posterior(answers, np.array([[-size, size]]))
    np.testing.assert_allclose(h.sum(1), 1)


@pytest.mark.parametrize("labels", [[0, -1], [3, 0]])
@pytest.mark.parametrize("name", list(CLASS_ERRORS))
def test_a_label_that_is_no_class_is_refused(name: str, labels: list[int]) -> None:
    with pytest.raises(UserError, match="are not classes: use whole numbers from 0 that are below 3"):
        CLASS_ERRORS[name](Answers(np.zeros((2, 2)), np.zeros((2, 2, 3))), np.array(labels))


@pytest.mark.parametrize("sizes", [(0, 1, 1), (1, 0, 1), (1, 1, -2)])
def test_a_size_below_one_is_refused(sizes: tuple[int, int, int]) -> None:
    with pytest.raises(UserError, match="is not a size: choose a whole number of at least 1"):
        mixtures.init(np.random.default_rng(0), *sizes)


def test_a_step_goes_against_the_gradient_of_the_mean_error(rng: np.random.Generator) -> None:
    params = mixtures.init(rng, 2, 3, 2, scale=0.5)
    x, target = rng.standard_normal((9, 2)), rng.standard_normal((9, 3))
    moved, errors, answers = mixtures.step(params, x, target, mixtures.mixture, 1e-6)
    again, _ = mixtures.forward(params, x)
    np.testing.assert_array_equal(answers.gate, again.gate)
    np.testing.assert_array_equal(errors, mixtures.mixture(again, target)[0])
    lower = mixtures.mixture(mixtures.forward(moved, x)[0], target)[0].mean()
    slope = sum(((new - old) ** 2).sum() for new, old in zip(moved, params, strict=True)) / 1e-6  # rate · |gradient|²
    assert errors.mean() - lower == pytest.approx(slope, rel=1e-3)


def test_dtype_follows_the_parameters(rng: np.random.Generator) -> None:
    params = mixtures.init(rng, 2, 3, 4, dtype=np.float32)
    answers, cache = mixtures.forward(params, np.ones((5, 2), np.float32))
    numbers, labels = np.ones((5, 3), np.float32), np.arange(5) % 3
    for value, gradient in (mixtures.mixture(answers, numbers), mixtures.class_cooperative(answers, labels)):
        dx, dparams = mixtures.backward(params, cache, gradient)
        assert {value.dtype, dx.dtype, *(leaf.dtype for leaf in dparams)} == {np.dtype(np.float32)}


def test_the_v_is_made_of_two_lines(rng: np.random.Generator) -> None:
    x, d = mixtures.two_lines(rng, 4000)
    assert x.shape == d.shape == (4000, 1)
    for side, slope in ((x[:, 0] > 0, 2), (x[:, 0] < 0, -2)):
        fitted = np.polyfit(x[side, 0], d[side, 0], 1)
        np.testing.assert_allclose(fitted, [slope, 0], atol=0.05)
        assert np.std(d[side, 0] - np.polyval(fitted, x[side, 0])) == pytest.approx(0.3, rel=0.05)


def test_the_mixture_finds_both_lines_of_the_v(rng: np.random.Generator) -> None:
    x, d = mixtures.two_lines(rng)
    params = mixtures.init(rng, 1, 1, 2)
    for _ in range(300):
        params, errors, _ = mixtures.step(params, x, d, mixtures.mixture, 0.1)
    np.testing.assert_allclose(np.sort(params.w_expert[:, 0, 0]), [-2, 2], atol=0.3)
    assert errors.mean() < 0.2


def test_alone_is_the_output_of_the_expert_that_the_gate_trusts_most(rng: np.random.Generator) -> None:
    answers = Answers(rng.standard_normal((6, 3)), rng.standard_normal((6, 3, 2)))
    for n, output in enumerate(mixtures.alone(answers)):
        np.testing.assert_array_equal(output, answers.output[n, max(range(3), key=lambda e: answers.gate[n, e])])


@pytest.mark.parametrize("name", list(ERRORS))
def test_cupy_gives_the_same_errors_and_gradients(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    strict_cupy.install(monkeypatch)
    params, x = mixtures.init(rng, 3, 2, 4), rng.standard_normal((5, 3))
    for error, target in ((ERRORS[name], rng.standard_normal((5, 2))), (CLASS_ERRORS[name], np.array([0, 1, 1, 0, 1]))):

        def results(params: Any, x: Any, target: Any, error: Any = error) -> Any:
            answers, cache = mixtures.forward(params, x)
            value, gradient = error(answers, target)
            return value, mixtures.backward(params, cache, gradient), mixtures.alone(answers)

        on_gpu = results(*tree.map(lambda leaf: to_device(leaf, "gpu"), (params, x, target)))
        for mine, theirs in zip(tree.leaves(results(params, x, target)), tree.leaves(on_gpu), strict=True):
            np.testing.assert_allclose(to_host(theirs), mine, rtol=1e-12, atol=1e-14)
