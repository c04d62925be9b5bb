"""Four vowels by two resonances: the task on which the first mixture of experts was tried.

Each case is a pair of formants, F1 and F2: the two lowest resonances of a voice, in Hz. The vowel is to be named.
Peterson and Barney measured the formants of 76 speakers, each of whom said every vowel twice. The measurements
themselves are not used here: tokens are drawn from Gaussians that have their means, spreads and correlations. The
tokens of a drawn speaker have only the speaker's group in common; the tokens of a real speaker are more alike.

Peterson and Barney 1952, "Control methods used in a study of the vowels", JASA 24, 175-184.
Lesson: lessons/60_adaptive_mixtures.ipynb
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from minimoe.beyond import adaptive_mixture, hidden_layer
from minimoe.beyond.adaptive_mixture import CLASS_ERRORS, Answers
from minimoe.core.arrays import Array, to_host
from minimoe.core.errors import UserError

VOWELS = ("i", "ɪ", "ɑ", "ʌ")
"""heed, hid, hod, hud: the number of a vowel is its place in this tuple."""

MEASURED = {
    "children": {
        "i": (360, 70, 3178, 219, 0.08),
        "ɪ": (534, 74, 2744, 207, 0.27),
        "ɑ": (1030, 128, 1383, 163, 0.56),
        "ʌ": (855, 118, 1592, 103, 0.37),
    },
    "men": {
        "i": (267, 37, 2294, 136, 0.02),
        "ɪ": (392, 50, 1993, 126, -0.16),
        "ɑ": (718, 54, 1091, 97, 0.68),
        "ʌ": (631, 47, 1192, 109, 0.01),
    },
    "women": {
        "i": (310, 47, 2783, 132, -0.07),
        "ɪ": (441, 47, 2474, 151, 0.05),
        "ɑ": (864, 95, 1229, 99, 0.57),
        "ʌ": (758, 68, 1409, 119, 0.28),
    },
}
"""F1, the standard deviation of F1, F2, the standard deviation of F2, all in Hz; then the correlation of F1 and F2.

Computed from the measurements of Peterson and Barney 1952, in the form in which the program Praat distributes them.
"""

SPEAKERS = {"children": 15, "men": 32, "women": 28}
"""75 speakers, as in the experiment of 1991; 50 of them are for training."""
LEARNED = 50
REPETITIONS = 2

CRITERION = 0.08
"""A system has learned the task when the mean of (onehot − share)² over cases and classes is at most this."""

MOST_EPOCHS = 400


class Vowels(NamedTuple):
    """Tokens of some speakers."""

    formants: Array  # (N, 2)  F1 and F2 in Hz
    label: Array  # (N,)  the place of the vowel in VOWELS


class Task(NamedTuple):
    """The training and the held-out part, and the scaling of Hz to mean 0 and standard deviation 1 over the training
    tokens."""

    learned: Vowels  # 400 tokens
    heldout: Vowels  # 200 tokens, of other speakers
    mean: Array  # (2,)
    spread: Array  # (2,)

    def inputs(self, formants: Array) -> Array:
        """Formants (…, 2) in Hz → inputs of the same shape."""
        return (formants - self.mean) / self.spread


class Outcome(NamedTuple):
    """How the training of one system went."""

    epochs: int  # until the criterion; MOST_EPOCHS if it was not reached
    reached: bool
    learned: float  # share of the learned tokens named rightly, at that point
    heldout: float
    params: Any


class System(NamedTuple):
    """Something that learns to name vowels, one step of gradient descent on all tokens at a time."""

    init: Callable[[np.random.Generator], Any]
    step: Callable[[Any, Array, Array, float], Any]  # (params, x, labels, rate) → new params
    shares: Callable[[Any, Array], Array]  # (params, x (N, 2)) → the probability of each vowel (N, 4)


def task(rng: np.random.Generator) -> Task:
    """Draws 75 speakers with two tokens of each of the four vowels, and splits the speakers 50 to 25."""
    group = [MEASURED[name] for name, count in SPEAKERS.items() for _ in range(count)]
    order = rng.permutation(len(group))
    learned, heldout = (_spoken(rng, [group[i] for i in part]) for part in (order[:LEARNED], order[LEARNED:]))
    return Task(learned, heldout, learned.formants.mean(0), learned.formants.std(0))


def _spoken(rng: np.random.Generator, speakers: Sequence[dict[str, tuple[float, ...]]]) -> Vowels:
    formants, label = [], []
    for speaker in speakers:
        for number, vowel in enumerate(VOWELS):
            mean1, spread1, mean2, spread2, correlation = speaker[vowel]
            for _ in range(REPETITIONS):
                one, other = rng.standard_normal(2)
                along = correlation * one + math.sqrt(1 - correlation**2) * other  # has this correlation with `one`
                formants.append((mean1 + spread1 * one, mean2 + spread2 * along))
                label.append(number)
    return Vowels(np.array(formants), np.array(label))


def mixture_of(experts: int, error: str = "mixture") -> System:
    """A mixture of linear experts that learns with one of the three errors: mixture, cooperative or competitive.

    Raises:
        UserError: ``error`` is none of the three.
    """
    if error not in CLASS_ERRORS:
        raise UserError(f"error {error!r} is unknown: choose one of {', '.join(CLASS_ERRORS)}.")

    def init(rng: np.random.Generator) -> Any:
        return adaptive_mixture.init(rng, 2, len(VOWELS), experts)

    def step(params: Any, x: Array, labels: Array, rate: float) -> Any:
        return adaptive_mixture.step(params, x, labels, CLASS_ERRORS[error], rate)[0]

    return System(init, step, lambda params, x: adaptive_mixture.class_blend(adaptive_mixture.forward(params, x)[0]))


def network_of(hidden: int, error: str = "cross-entropy") -> System:
    """A network with one hidden layer that learns with the cross-entropy (the mixture's log loss) or with ``squares``.

    Raises:
        UserError: ``error`` is neither of the two.
    """
    # A mixture of one expert, whose prior is 1: its mixture error is the cross-entropy, its cooperative one the square.
    errors = {"cross-entropy": CLASS_ERRORS["mixture"], "squares": CLASS_ERRORS["cooperative"]}
    if error not in errors:
        raise UserError(f"error {error!r} is unknown: choose one of {', '.join(errors)}.")

    def init(rng: np.random.Generator) -> Any:
        return hidden_layer.init(rng, 2, hidden, len(VOWELS))

    def step(params: Any, x: Array, labels: Array, rate: float) -> Any:
        y, cache = hidden_layer.forward(params, x)
        _, gradient = errors[error](_alone(y), labels)
        _, dparams = hidden_layer.backward(params, cache, gradient.output[:, 0])
        moved = (old - rate / len(x) * change for old, change in zip(params, dparams, strict=True))
        return hidden_layer.HiddenLayer(*moved)

    def shares(params: Any, x: Array) -> Array:
        return adaptive_mixture.class_blend(_alone(hidden_layer.forward(params, x)[0]))

    return System(init, step, shares)


def _alone(y: Array) -> Answers:
    """y (N, M) as the answer of a mixture of one."""
    return Answers(np.zeros((len(y), 1)), y[:, None])


def learn(
    system: System, rate: float, seed: int, criterion: float = CRITERION, most_epochs: int = MOST_EPOCHS
) -> tuple[Outcome, Task]:
    """Trains on all training tokens at once; ``seed`` draws the speakers and the first parameters.

    Training ends when the mean of (onehot − share)² is at most ``criterion``, or after ``most_epochs``.

    Raises:
        UserError: ``rate`` or ``most_epochs`` is not above 0.
    """
    if rate <= 0 or most_epochs < 1:
        raise UserError(f"rate {rate} and most_epochs {most_epochs} lead nowhere: choose numbers above 0.")
    rng = np.random.default_rng(seed)
    drawn = task(rng)
    params = system.init(rng)
    x, labels = drawn.inputs(drawn.learned.formants), drawn.learned.label
    target = np.eye(len(VOWELS))[labels]
    epochs = 0
    while not (reached := bool(((target - system.shares(params, x)) ** 2).mean() <= criterion)):
        if epochs == most_epochs:
            break
        params = system.step(params, x, labels, rate)
        epochs += 1
    right = [named(system, params, drawn, part) for part in (drawn.learned, drawn.heldout)]
    return Outcome(epochs, reached, right[0], right[1], params), drawn


def named(system: System, params: Any, drawn: Task, tokens: Vowels) -> float:
    """The share of the tokens whose likeliest vowel is the right one. Chance is one quarter."""
    shares = system.shares(params, drawn.inputs(tokens.formants))
    return float((to_host(shares).argmax(1) == tokens.label).mean())


def experts_at_work(prior: Array) -> Array:
    """p (N, E) → the share of the cases in which the gate trusts each expert most (E,)."""
    return np.bincount(prior.argmax(1), minlength=prior.shape[1]) / len(prior)
