"""The learning rate of each step: linear warm-up, then decay.

Bergsma et al. 2025, arXiv 2502.15938 (decay to zero).  Lesson: lessons/11_training.ipynb
"""

from __future__ import annotations

import math

from minimoe.core.config import TrainConfig


def learning_rate(step: int, recipe: TrainConfig) -> float:
    """The learning rate of step number ``step`` (from 0): linear warm-up, then decay along half a cosine or a line."""
    if step < recipe.warmup:
        return recipe.learning_rate * (step + 1) / recipe.warmup
    progress = (step - recipe.warmup) / max(1, recipe.steps - recipe.warmup)
    left = 1 - min(progress, 1.0)
    if recipe.schedule == "cosine":
        left = 0.5 * (1 - math.cos(math.pi * left))
    return recipe.learning_rate * (recipe.final_rate + (1 - recipe.final_rate) * left)
