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
    moments = 2 * (every - parameters.state(config)) - by_muon
    once = counts.experts if worth_exchanging(config, recipe, threads) else 0
    gradients = once + (every - once) * (1 if threads == 1 else 2 * threads)
    return _number_bytes(recipe) * (every + gradients + moments)


def activation_bytes(config: ModelConfig, recipe: TrainConfig) -> int:
    """A lower bound for the bytes that forward keeps for backward: the large rows of all tokens processed at a time.

    These are the probabilities of the vocabulary; in each layer, four rows of width D; and for each of the K experts,
    its input and its output, of width D, and the two factors of its SwiGLU, of width F. The input of the shared experts
    and of a dense layer is one of the four rows, and their output is not kept. (A zero-computation expert keeps no
    factors; the count assumes that no token is sent to such an expert.)
    """
    tokens = recipe.batch * config.context // recipe.accumulate
    layer = config.active_experts * 2 * (config.width + config.expert_width)
    layer += 2 * config.shared_experts * config.expert_width
    first = config.dense_layers
    layers = 4 * config.layers * config.width + (config.layers - first) * layer + first * 2 * config.width_of_dense
    return _number_bytes(recipe) * tokens * (config.vocab_size + layers)


LIBRARIES = 60_000_000
"""Bytes that a run still needs for libraries, above all for drawing its figures at the end: about 50 MB on Linux."""

ADDRESS_SPACE, ADDRESS_SPACE_OF_A_THREAD = 150_000_000, 16_000_000
"""Bytes of address space that a run needs besides its arrays, and for each thread. Beyond a limit on address space,
libraries abort the process instead of raising an error, so the need must be known before."""


def check_memory(config: ModelConfig, recipe: TrainConfig, threads: int = 1) -> None:
    """Raises ``UserError`` if training needs more memory than the machine, the container or the address space has."""
    state, step = training_bytes(config, recipe, threads), activation_bytes(config, recipe)
    needs = (
        f"training {parameters.count(config).total:,} parameters needs {_shown(state)} for weights, gradients and "
        f"optimiser and {_shown(step)} for a step of {recipe.batch * config.context:,} tokens"
    )
    advice = "choose a smaller preset, width, layers, experts, batch or context"
    available, limit = resources.memory_bytes(), resources.memory_limit()
    if available is not None and available == limit:
        others = resources.memory_in_use() + LIBRARIES
        if state + step + others > limit:
            raise UserError(
                f"{needs}, and {_shown(others)} for Python and its libraries, but the container may use "
                f"{_shown(limit)}: raise its memory limit, or {advice}."
            )
    if available is not None and state + step > available:
        raise UserError(f"{needs}, but this machine has {_shown(available)}: {advice}.")
    left, more = resources.address_space_left(), ADDRESS_SPACE + threads * ADDRESS_SPACE_OF_A_THREAD
    if left is not None and state + step + more > left:
        raise UserError(
            f"{needs}, and {_shown(more)} of address space for threads and libraries, but the limit on address space "
            f"leaves {_shown(left)}: raise the limit, which `ulimit -v` shows, or {advice}, or give --threads 1."
        )


def _shown(size: int) -> str:
    """A number of bytes, such as 1.5 GB or 80 MB."""
    return f"{size / 1e9:,.1f} GB" if size >= 10**9 else f"{size / 1e6:,.0f} MB"


def _number_bytes(recipe: TrainConfig) -> int:
    return 8 if recipe.dtype == "float64" else 4
