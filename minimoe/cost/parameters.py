"""What a model costs: parameters in all and at work for one token, and bytes to train it.

Lesson: lessons/00_start_here.ipynb
"""

from __future__ import annotations

from typing import NamedTuple

from minimoe import workers
from minimoe.config import ModelConfig, TrainConfig
from minimoe.errors import UserError
from minimoe.expert_parallel import rows_travel


class Parameters(NamedTuple):
    """Exact counts. The trainable noise is a tool of training and counted apart, so that Mixtral's numbers come out."""

    embedding: int
    attention: int
    experts: int
    router: int
    norms: int
    head: int
    noise: int
    total: int  # without the noise
    active: int  # of ``total``, at work for one token: K experts of E


def parameters(config: ModelConfig) -> Parameters:
    """Counts of parameters for the shapes of ``config``."""
    D, L = config.width, config.layers
    embedding = config.vocab_size * D
    head = 0 if config.tied_embeddings else config.vocab_size * D
    attention = L * 2 * D * config.head_width * (config.heads + config.kv_heads)
    expert = L * 3 * D * config.expert_width
    router = L * D * config.experts
    norms = (2 * L + 1) * D
    shared = embedding + head + attention + router + norms
    return Parameters(
        embedding=embedding,
        attention=attention,
        experts=config.experts * expert,
        router=router,
        norms=norms,
        head=head,
        noise=router if config.noisy_gating else 0,
        total=shared + config.experts * expert,
        active=shared + config.active_experts * expert,
    )


def training_bytes(model: ModelConfig, train: TrainConfig, threads: int = 1) -> int:
    """Bytes of weights, optimiser and gradients; the activations of a step come on top.

    Several workers have two gradients each, their own and one that others may read; but where rows of tokens travel to
    their experts, an expert's gradient is with its owner only.
    """
    counts = parameters(model)
    every = counts.total + counts.noise
    by_muon = counts.attention + counts.experts if train.optimizer == "muon" else 0
    moments = 2 * every - by_muon
    once = counts.experts if rows_travel(model, train, threads) else 0
    gradients = once + (every - once) * (1 if threads == 1 else 2 * threads)
    return _number_bytes(train) * (every + gradients + moments)


def activation_bytes(model: ModelConfig, train: TrainConfig) -> int:
    """Bytes that forward leaves for backward, at least: the large rows, of each token that is at work at once.

    These are the probabilities of the vocabulary; in each layer, four rows of width D; and for each of the K experts,
    its x and its answer, of width D, and the two factors of its SwiGLU, of width F.
    """
    tokens = train.batch * model.context // train.accumulate
    layer = 4 * model.width + model.active_experts * 2 * (model.width + model.expert_width)
    return _number_bytes(train) * tokens * (model.vocab_size + model.layers * layer)


def check_memory(model: ModelConfig, train: TrainConfig, threads: int = 1) -> None:
    """Raises ``UserError`` if training needs more memory than the machine has."""
    available = workers.memory_bytes()
    state, step = training_bytes(model, train, threads), activation_bytes(model, train)
    if available is not None and state + step > available:
        total = parameters(model).total
        raise UserError(
            f"training {total:,} parameters needs {state / 1e9:,.1f} GB for weights, gradients and optimiser and "
            f"{step / 1e9:,.1f} GB for a step of {train.batch * model.context:,} tokens, and this machine has "
            f"{available / 1e9:,.1f} GB: choose a smaller preset, width, layers, experts, batch or context."
        )


def _number_bytes(train: TrainConfig) -> int:
    return 8 if train.dtype == "float64" else 4
