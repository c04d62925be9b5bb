"""Generation: read a prompt, then predict a token, append it, and go on from there.

A prompt is read in pieces of many tokens, by the layers that training uses; what is written comes one token at a time,
by ``one_token``. Both leave their keys and values in the cache, so no token is ever read twice. The router's noise is
off and no token is dropped: the model is deterministic, and chance enters only in ``sampling``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, takewhile
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from minimoe.core.arrays import Array, like, to_host
from minimoe.core.config import ModelConfig
from minimoe.core.errors import UserError
from minimoe.inference import fast_decode, kv_cache, sampling
from minimoe.inference.kv_cache import KVCache
from minimoe.layers import decoder
from minimoe.layers.decoder import Decoder
from minimoe.layers.mode import Mode

PIECE = 256
"""Tokens of a prompt read at a time: enough for large matrix products, few enough for little memory."""


def generate(
    params: Decoder,
    config: ModelConfig,
    prompt_ids: NDArray[Any] | Sequence[int],
    *,
    tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
) -> Iterator[int]:
    """Yields ``tokens`` ids that continue the prompt, each as soon as it is drawn.

    The text may grow beyond the model's context: see ``kv_cache.generation_window``. The same seed gives the same
    tokens. ``params`` may live on a GPU; ``temperature``, ``top_k`` and ``top_p`` are those of ``sampling``.

    Raises:
        UserError: the prompt is empty, for a model can only continue something, or holds an id outside the vocabulary;
            ``tokens`` or ``seed`` is negative; a setting of the sampling is out of its range. All this at the call;
            while generating, if the model's logits are not finite.
    """
    prompt = np.asarray(prompt_ids)
    if prompt.size == 0:
        raise UserError("The prompt is empty, but a model can only continue something: give it at least one token.")
    if prompt.ndim != 1:
        raise UserError(f"The prompt has shape {prompt.shape}, expected one row of ids: give one prompt at a time.")
    _check_ids(prompt, config.vocab_size)
    if not isinstance(tokens, int | np.integer) or tokens < 0:
        raise UserError(f"tokens {tokens} cannot be written: choose a whole number of at least 0.")
    if not isinstance(seed, int | np.integer) or seed < 0:
        raise UserError(f"seed {seed} starts no random numbers: choose a whole number of at least 0.")
    sampling.check(temperature, top_k, top_p)

    def stream() -> Iterator[int]:
        rng = np.random.default_rng(seed)
        cache = kv_cache.init(params, config)
        unread = prompt[None]  # (1, n)
        for _ in range(tokens):
            logits = to_host(extend(params, cache, unread))[0]
            token = sampling.sample(logits, rng, temperature, top_k, top_p)
            yield token
            unread = np.array([[token]])

    return stream()


def extend(params: Decoder, cache: KVCache, tokens: NDArray[Any]) -> Array:
    """tokens (B, n), integers on the host, join the cache of their B sequences → logits (B, V) of what follows.

    Raises:
        UserError: there is no token, B is not that of the cache, or an id is outside the vocabulary.
    """
    tokens = np.asarray(tokens)
    if tokens.ndim != 2 or len(tokens) != cache.batch or tokens.size == 0:
        raise UserError(f"tokens have shape {tokens.shape}, expected ({cache.batch}, n) with n at least 1.")
    _check_ids(tokens, cache.config.vocab_size)
    if tokens.size == 1:
        return fast_decode.forward(params, cache, int(tokens[0, 0]))[None]
    piece = min(PIECE, cache.window)
    for start in range(0, tokens.shape[1], piece):
        part = like(params.norm.gain, tokens[:, start : start + piece])
        logits, _, _ = decoder.forward(
            params, part, cache.config, Mode(estimate_load=False), past=cache.layers, position=cache.position
        )
        cache.position += part.shape[1]
    return logits[:, -1]


def _check_ids(ids: NDArray[Any], vocab_size: int) -> None:
    """Raises ``UserError`` unless every id is an integer in [0, V): NumPy would read −1 as the last token."""
    if ids.dtype.kind not in "iu":
        raise UserError(f"Token ids must be integers, got {ids.dtype}: pass what the tokenizer's encode returned.")
    if ids.min() < 0 or ids.max() >= vocab_size:
        wrong = ids[(ids < 0) | (ids >= vocab_size)][0]
        raise UserError(f"Token id {wrong} is not in a vocabulary of {vocab_size}: use ids from 0 to {vocab_size - 1}.")


class Codec(Protocol):
    """A tokenizer, of this package or a pretrained one."""

    def encode(self, text: str) -> NDArray[np.int32]: ...
    def decode(self, ids: Any) -> str: ...
    def stream(self, ids: Iterable[int]) -> Iterator[str]: ...


class Writer(Protocol):
    """A model that can write: ``checkpoint.Model`` is one, ``huggingface.Pretrained`` another."""

    @property
    def params(self) -> Decoder: ...
    @property
    def config(self) -> ModelConfig: ...
    @property
    def tokenizer(self) -> Codec: ...
    @property
    def end_tokens(self) -> tuple[int, ...]: ...


def stream(
    model: Writer,
    prompt: str,
    tokens: int = 200,
    *,
    temperature: float = 0.8,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
) -> Iterator[str]:
    """Yields the prompt, then its continuation, in pieces of text as they come; stops early at an end token.

    Prompt and continuation go through one decoder, since some tokenizers write a token differently at the beginning of
    a text. Raises ``UserError`` as ``generate`` does, or if the prompt cannot be encoded.
    """
    if not hasattr(model, "tokenizer"):
        raise UserError(f"a {type(model).__name__} is no model: give minimoe.load's, or the .model of a training.")
    ids = model.tokenizer.encode(prompt).tolist()
    written = generate(
        model.params,
        model.config,
        ids,
        tokens=tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
    )
    return model.tokenizer.stream(chain(ids, takewhile(lambda token: token not in model.end_tokens, written)))


def write(
    model: Writer,
    prompt: str,
    tokens: int = 200,
    *,
    temperature: float = 0.8,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
) -> str:
    """The text with which ``model`` continues ``prompt``, without it; settings and errors are those of ``stream``."""
    pieces = stream(model, prompt, tokens, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
    return "".join(pieces)[len(model.tokenizer.decode(model.tokenizer.encode(prompt))) :]
