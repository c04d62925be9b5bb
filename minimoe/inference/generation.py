"""Generation: read a prompt, then predict a token and append it, again and again.

The layers that training uses read the prompt in pieces of many tokens; ``fast_decode`` then computes one new token at a
time. Both store their keys and values in the cache, so no token is ever read twice. The router's noise is off and no
token is dropped: the model is deterministic, and only ``sampling`` is random.
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
from minimoe.core.ids import checked
from minimoe.inference import fast_decode, kv_cache, sampling
from minimoe.inference.kv_cache import KVCache
from minimoe.layers import decoder, linear, lora
from minimoe.layers.decoder import Decoder
from minimoe.layers.mode import Mode

PIECE = 256
"""Tokens of a prompt that are read at a time: enough for large matrix products, few enough to need little memory."""


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
    tokens. ``params`` may be on a GPU, and adapters in them are merged first; ``temperature``, ``top_k`` and ``top_p``
    are those of ``sampling``.

    Raises:
        UserError: at the call, if the prompt is empty, is not one row of ids or has an id outside the vocabulary, if
            ``tokens`` or ``seed`` is not a whole number of at least 0, or if a setting of the sampling is out of its
            range; during generation, if the model's logits are not finite.
    """
    prompt = checked(prompt_ids, config.vocab_size, axes=(1,), what="The ids of the prompt")
    if prompt.size == 0:
        raise UserError("The prompt is empty, but a model can only continue a text: give at least one token.")
    if not isinstance(tokens, int | np.integer) or tokens < 0:
        raise UserError(f"tokens {tokens} is not a number of tokens to write: choose a whole number of at least 0.")
    if not isinstance(seed, int | np.integer) or seed < 0:
        raise UserError(f"seed {seed} is not a seed: choose a whole number of at least 0.")
    sampling.check(temperature, top_k, top_p)

    def stream() -> Iterator[int]:
        rng = np.random.default_rng(seed)
        merged: Decoder = lora.replace(params, lora.merged)  # the decoding of one token has no path for adapters
        cache = kv_cache.init(merged, config)
        unread = prompt[None]  # (1, n)
        for _ in range(tokens):
            logits = to_host(extend(merged, cache, unread))[0]
            token = sampling.sample(logits, rng, temperature, top_k, top_p)
            yield token
            unread = np.array([[token]])

    return stream()


def extend(params: Decoder, cache: KVCache, tokens: NDArray[Any]) -> Array:
    """tokens (B, n), integers on the host → logits (B, V) of the next token of each sequence.

    The tokens are added to the cache of their B sequences.

    Raises:
        UserError: there is no token, B is not that of the cache, or an id is outside the vocabulary.
    """
    tokens = checked(tokens, cache.config.vocab_size)
    if tokens.ndim != 2 or len(tokens) != cache.batch or tokens.size == 0:
        raise UserError(
            f"tokens have shape {tokens.shape}, expected ({cache.batch}, n) with n at least 1: give one row of ids per "
            "sequence of the cache."
        )
    if tokens.size == 1:
        return fast_decode.forward(params, cache, int(tokens[0, 0]))[None]
    piece = min(PIECE, cache.window)  # the cache takes at most a window of positions at a time
    for start in range(0, tokens.shape[1], piece):
        part = like(params.norm.gain, tokens[:, start : start + piece])
        read = decoder.hidden(
            params, part, cache.config, Mode(estimate_load=False), past=cache.layers, position=cache.position, keep=None
        )
        logits, _ = linear.forward(decoder.output_layer(params), read.x)
        cache.position += part.shape[1]
    return logits[:, -1]


class Codec(Protocol):
    """A tokenizer: one of this package, or a pretrained one."""

    def encode(self, text: str) -> NDArray[np.int32]: ...
    def decode(self, ids: Any) -> str: ...
    def stream(self, ids: Iterable[int]) -> Iterator[str]: ...


class Writer(Protocol):
    """A model that can write text, such as ``checkpoint.Model`` and ``huggingface.Pretrained``."""

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
    """Yields the prompt and then its continuation, in pieces of text as soon as they exist; stops at an end token.

    Prompt and continuation are decoded as one text, because some tokenizers write a token differently at the beginning
    of a text. The settings are those of ``generate``.

    Raises:
        UserError: as ``generate``; or ``model`` is not a model, or the prompt cannot be encoded.
    """
    _check_model(model)
    if not isinstance(prompt, str):
        raise UserError(f"The prompt {prompt!r:.60} is not text: give a string, such as 'Once upon a time'.")
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


def _check_model(model: Any) -> None:
    if not (hasattr(model, "tokenizer") and hasattr(model, "params")):
        raise UserError(
            f"a {type(model).__name__} is not a model: give the result of minimoe.load, or the .model that "
            "minimoe.train returns."
        )


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
    """The text with which ``model`` continues ``prompt``, without the prompt: ``minimoe.generate``.

    At most ``tokens`` tokens are written, fewer if the model ends the text. A ``temperature`` of 0 always takes the
    likeliest token, and 1 draws from the model's own probabilities; ``top_k`` and ``top_p`` leave out unlikely tokens
    (see ``sampling``). The same ``seed`` gives the same text.

    Raises:
        UserError: as ``stream``.
    """
    _check_model(model)
    pieces = stream(model, prompt, tokens, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
    return "".join(pieces)[len(model.tokenizer.decode(model.tokenizer.encode(prompt))) :]
