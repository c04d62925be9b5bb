"""The proofs of the models in ``minimoe.beyond``: rows for ``gradcheck.run``."""

from __future__ import annotations

from typing import Any

import numpy as np

from minimoe.beyond import adaptive_mixture, hidden_layer, hierarchical_mixture
from minimoe.beyond.adaptive_mixture import Answers, Error
from minimoe.core import tree
from minimoe.core.arrays import Array
from minimoe.proof.finite_differences import check
from minimoe.proof.results import Row


def rows(rng: np.random.Generator) -> list[Row]:
    """A row per tensor of each model."""
    return [
        *_adaptive_mixture(rng),
        *_hidden_layer(rng),
        *_hierarchical_mixture(rng),
    ]


def _adaptive_mixture(rng: np.random.Generator) -> list[Row]:
    """The linear model with each of its errors, for targets that are numbers and for classes."""
    x, numbers, labels = rng.standard_normal((5, 3)), rng.standard_normal((5, 2)), np.array([1, 0, 0, 1, 1])
    found = []
    for errors, target, kind in (
        (adaptive_mixture.ERRORS, numbers, ""),
        (adaptive_mixture.CLASS_ERRORS, labels, ", classes"),
    ):
        for name, error in errors.items():
            params = adaptive_mixture.init(rng, 3, 2, 4, scale=0.7)
            found += _of_error(f"adaptive mixture, {name}{kind}", error, params, x, target)
    return found


def _of_error(name: str, error: Error, params: Any, x: Array, target: Array) -> list[Row]:
    def forward(params: Any, x: Array) -> tuple[Array, Any]:
        answers, cache = adaptive_mixture.forward(params, x)
        value, gradient = error(answers, target)
        return value, (cache, gradient)

    def backward(params: Any, cache: Any, dy: Array) -> tuple[Array, Any]:
        dgate, doutput = cache[1]
        return adaptive_mixture.backward(params, cache[0], Answers(dgate * dy[:, None], doutput * dy[:, None, None]))

    return check(name, forward, backward, params, x)


def _hidden_layer(rng: np.random.Generator) -> list[Row]:
    params = tree.map(lambda leaf: leaf + 0.3 * rng.standard_normal(leaf.shape), hidden_layer.init(rng, 3, 5, 2))
    return check("hidden layer", hidden_layer.forward, hidden_layer.backward, params, rng.standard_normal((4, 3)))


def _hierarchical_mixture(rng: np.random.Generator) -> list[Row]:
    x, y = hierarchical_mixture.with_one(rng.standard_normal((6, 3))), rng.standard_normal((6, 2))
    params = hierarchical_mixture.init(rng, x, y, branches=2, leaves=3, scale=0.7)
    params = params._replace(log_variance=rng.uniform(-1, 1, (2, 3)))

    def forward(params: Any, x: Array) -> tuple[Array, Any]:
        return hierarchical_mixture.forward(params, x, y)

    return check("hierarchical mixture", forward, hierarchical_mixture.backward, params, x)
