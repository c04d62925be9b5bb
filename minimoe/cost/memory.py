"""How many bytes of memory training needs, and whether this machine has them."""

from __future__ import annotations

from minimoe.core import resources
from minimoe.core.config import ModelConfig, TrainConfig
from minimoe.core.errors import UserError
from minimoe.cost import parameters
from minimoe.parallel.exchange import worth_exchanging


def training_bytes(config: ModelConfig, recipe: TrainConfig, threads: int = 1) -> int:
    """Bytes of weights, optimiser state and gradients; the activations of a step are not included.

    If there are several workers, each has two gradients: its own, and one that the others may read. If rows of tokens
    are sent to the owners of their experts, only the owner has the gradient of an expert.
    """
    counts = parameters.count(config)
    every = counts.total + counts.noise
    by_muon = parameters.by_muon(config) if recipe.optimizer == "muon" else 0
    moments = 2 * every - by_muon
    once = counts.experts if worth_exchanging(config, recipe, threads) else 0
    gradients = once + (every - once) * (1 if threads == 1 else 2 * threads)
    return _number_bytes(recipe) * (every + gradients + moments)


def activation_bytes(config: ModelConfig, recipe: TrainConfig) -> int:
    """A lower bound for the bytes that forward keeps for backward: the large rows of all tokens processed at a time.

    These are the probabilities of the vocabulary; in each layer, four rows of width D; and for each of the K experts,
    its input and its output, of width D, and the two factors of its SwiGLU, of width F.
    """
    tokens = recipe.batch * config.context // recipe.accumulate
    layer = 4 * config.width + config.active_experts * 2 * (config.width + config.expert_width)
    return _number_bytes(recipe) * tokens * (config.vocab_size + config.layers * layer)


def check_memory(config: ModelConfig, recipe: TrainConfig, threads: int = 1) -> None:
    """Raises ``UserError`` if training needs more memory than the machine has."""
    available = resources.memory_bytes()
    state, step = training_bytes(config, recipe, threads), activation_bytes(config, recipe)
    if available is not None and state + step > available:
        total = parameters.count(config).total
        raise UserError(
            f"training {total:,} parameters needs {state / 1e9:,.1f} GB for weights, gradients and optimiser and "
            f"{step / 1e9:,.1f} GB for a step of {recipe.batch * config.context:,} tokens, but this machine has "
            f"{available / 1e9:,.1f} GB: choose a smaller preset, width, layers, experts, batch or context."
        )


def _number_bytes(recipe: TrainConfig) -> int:
    return 8 if recipe.dtype == "float64" else 4
