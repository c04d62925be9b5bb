"""The proofs of the models in ``minimoe.beyond``: rows for ``gradcheck.run``."""

from __future__ import annotations

import numpy as np

from minimoe.proof.results import Row


def rows(rng: np.random.Generator) -> list[Row]:
    """A row per tensor of each model."""
    return []
