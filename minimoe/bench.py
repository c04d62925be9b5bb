"""Benchmarks."""

from __future__ import annotations

from minimoe import accounting, blueprint
from minimoe.config import ModelConfig


def matrix_operations(config: ModelConfig, batch: int) -> int:
    """Operations (a product, a sum) of the matrix products of one step: forward, and twice as many backward.

    Exact: every active parameter that multiplies a token counts 2, every pair of a query and a key in its sight 4·H·C
    in each layer. What an implementation computes beyond that, such as masked scores or scores computed again, is not
    counted: it is no use to anyone.
    """
    plan = blueprint.of_config("", config)
    weights = sum(part.active for part in plan.parts if part.multiplied) + accounting.parameters(config).noise
    sight = config.context if config.window is None else config.window
    pairs = sum(min(i + 1, sight) for i in range(config.context))
    return 3 * batch * (2 * weights * config.context + 4 * plan.attention_width * pairs)
