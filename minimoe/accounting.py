"""What a model costs: parameters in all and at work for one token, and bytes to train it.

Lesson: lessons/00_start_here.ipynb
"""

from __future__ import annotations

from typing import NamedTuple

from minimoe import workers
from minimoe.config import ModelConfig, TrainConfig
from minimoe.errors import UserError


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
    """Bytes of weights, optimiser and one gradient a thread; the activations of a step come on top."""
    counts = parameters(model)
    number = 8 if train.dtype == "float64" else 4
    every = counts.total + counts.noise
    by_muon = counts.attention + counts.experts if train.optimizer == "muon" else 0
    moments = 2 * every - by_muon
    return number * (every * (1 + threads) + moments)


def check_memory(model: ModelConfig, train: TrainConfig, threads: int = 1) -> None:
    """Raises ``UserError`` if training needs more memory than the machine has."""
    available = workers.memory_bytes()
    needed = training_bytes(model, train, threads)
    if available is not None and needed > available:
        total = parameters(model).total
        raise UserError(
            f"training {total:,} parameters needs {needed / 1e9:,.1f} GB for weights, gradients and optimiser, and "
            f"this machine has {available / 1e9:,.1f} GB: choose a smaller preset, width, layers or experts."
        )
