"""The vowels: drawn as they were measured, split by speaker, and learned by every system."""

import math

import numpy as np
import pytest

from minimoe.beyond import hidden_layer, vowels
from minimoe.core.errors import UserError


def test_tokens_have_the_published_means_spreads_and_correlations(rng: np.random.Generator) -> None:
    for group in vowels.MEASURED.values():
        drawn = vowels._spoken(rng, [group] * 4000)
        for number, vowel in enumerate(vowels.VOWELS):
            tokens = drawn.formants[drawn.label == number]
            assert len(tokens) == 8000
            mean1, spread1, mean2, spread2, correlation = group[vowel]
            np.testing.assert_allclose(tokens.mean(0), [mean1, mean2], atol=10)
            np.testing.assert_allclose(tokens.std(0), [spread1, spread2], rtol=0.04)
            assert np.corrcoef(tokens.T)[0, 1] == pytest.approx(correlation, abs=0.04)


def test_a_table_of_vowels_has_the_order_that_ears_know() -> None:
    """[i] is the closest vowel and [ɑ] the most open one; children have the highest formants and men the lowest."""
    for group in vowels.MEASURED.values():
        first = [group[vowel][0] for vowel in vowels.VOWELS]
        assert first[0] < first[1] < first[3] < first[2]
    for vowel in vowels.VOWELS:
        for formant in (0, 2):
            men, women, children = (vowels.MEASURED[who][vowel][formant] for who in ("men", "women", "children"))
            assert men < women < children


def test_fifty_speakers_are_learned_from_and_twenty_five_held_out(rng: np.random.Generator) -> None:
    task = vowels.task(rng)
    assert [len(part.label) for part in task[:2]] == [400, 200]
    for part, speakers in ((task.learned, 50), (task.heldout, 25)):
        np.testing.assert_array_equal(np.bincount(part.label), 2 * speakers)
    inputs = task.inputs(task.learned.formants)
    np.testing.assert_allclose(inputs.mean(0), 0, atol=1e-9)
    np.testing.assert_allclose(inputs.std(0), 1)
    assert abs(task.inputs(task.heldout.formants).mean(0)).max() > 1e-6, "scaled by what was learned from"


def test_all_groups_speak_in_both_parts(rng: np.random.Generator) -> None:
    """A split that is not random would hold out only women, who come last."""
    task = vowels.task(rng)
    men = [part.formants[part.label == 0, 1] < 2550 for part in task[:2]]  # F2 of [i]
    assert 0.2 < men[0].mean() < 0.7
    assert 0.2 < men[1].mean() < 0.7


@pytest.mark.parametrize(
    ("system", "rate"),
    [
        (vowels.mixture_of(4), 7),
        (vowels.mixture_of(4, "cooperative"), 7),
        (vowels.mixture_of(4, "competitive"), 7),
        (vowels.network_of(6), 1),
        (vowels.network_of(6, "squares"), 1),
    ],
)
def test_every_system_learns_far_above_chance(system: vowels.System, rate: float) -> None:
    outcome, task = vowels.learn(system, rate, seed=0)
    assert outcome.reached
    assert 5 < outcome.epochs < 60
    assert min(outcome.learned, outcome.heldout) > 0.75
    shares = system.shares(outcome.params, task.inputs(task.learned.formants))
    np.testing.assert_allclose(shares.sum(1), 1)
    wrong = np.mean([(np.eye(4)[label] - share) ** 2 for label, share in zip(task.learned.label, shares, strict=True)])
    assert 0.06 < wrong <= 0.08
    assert outcome.heldout == np.mean(
        [share.argmax() == label for share, label in zip(
            system.shares(outcome.params, task.inputs(task.heldout.formants)), task.heldout.label, strict=True)]
    )


def test_training_stops_at_the_criterion_and_not_before() -> None:
    system = vowels.mixture_of(4)
    whole, _ = vowels.learn(system, 7, seed=1)
    short, _ = vowels.learn(system, 7, seed=1, most_epochs=whole.epochs - 1)
    assert (short.epochs, short.reached) == (whole.epochs - 1, False)
    easy, _ = vowels.learn(system, 7, seed=1, criterion=0.2)
    assert (easy.epochs, easy.reached) == (0, True)


@pytest.mark.parametrize("error", ["cross-entropy", "squares"])
def test_the_network_goes_against_the_gradient_of_its_error(rng: np.random.Generator, error: str) -> None:
    system = vowels.network_of(5, error)
    params, x, labels = system.init(rng), rng.standard_normal((7, 2)), rng.integers(4, size=7)

    def loss(params: hidden_layer.HiddenLayer) -> float:
        shares = system.shares(params, x)
        if error == "squares":
            return ((np.eye(4)[labels] - shares) ** 2).sum() / 7
        return -sum(math.log(share[label]) for share, label in zip(shares, labels, strict=True)) / 7

    new = system.step(params, x, labels, 1e-5)
    square = sum(((a - b) ** 2).sum() for a, b in zip(new, params, strict=True)) / 1e-10
    assert loss(params) - loss(new) == pytest.approx(1e-5 * square, rel=1e-3)


def test_an_expert_is_at_work_where_the_gate_trusts_it_most() -> None:
    prior = np.array([[0.6, 0.3, 0.1], [0.2, 0.5, 0.3], [0.4, 0.35, 0.25], [0.9, 0.1, 0.0]])
    np.testing.assert_allclose(vowels.experts_at_work(prior), [0.75, 0.25, 0])


def test_unknown_errors_and_useless_settings_are_refused() -> None:
    with pytest.raises(UserError, match="error 'selfish' is unknown: choose one of cooperative, competitive, mixture"):
        vowels.mixture_of(4, "selfish")
    with pytest.raises(UserError, match="error 'hinge' is unknown: choose one of cross-entropy, squares"):
        vowels.network_of(4, "hinge")
    for settings in ((0, 5), (1, 0)):
        with pytest.raises(UserError, match=f"rate {settings[0]} and most_epochs {settings[1]} lead nowhere"):
            vowels.learn(vowels.mixture_of(2), settings[0], 0, most_epochs=settings[1])
