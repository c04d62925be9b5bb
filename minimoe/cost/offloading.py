"""The cost of a model whose experts stay on the disk: bytes read per token, seconds at a bandwidth, and memory.

A token uses K experts in each of L layers. The experts that a cache does not hold are read:

    bytes per token = L · K · (1 − hit rate) · bytes of an expert

Lesson: lessons/53_mixtral_on_a_laptop.ipynb
"""

from __future__ import annotations

from minimoe.core.config import ModelConfig
from minimoe.core.errors import UserError
from minimoe.layers import attention

LOGITS = 2**22
"""Logits that are computed at once, at most, unless 256 tokens have more; as in ``evaluate.text_loss``."""

UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


def parse_bytes(text: str) -> int:
    """A number of bytes, from a text such as 8GB, 1.5 GB (10⁹ bytes) or 800MiB (2²⁰ bytes).

    Raises:
        UserError: the text is not a positive number with one of these units.
    """
    size = 0
    if isinstance(text, str):
        whole = text.strip().upper()
        unit = next((unit for unit in UNITS if whole.endswith(unit)), "")
        number = whole.removesuffix(unit).rstrip()
        if unit and number.isascii() and number.replace(".", "", 1).isdecimal():
            size = int(float(number) * UNITS[unit])
    if size < 1:
        raise UserError(f"memory {text!r:.40} is not a size: give a number and its unit, such as 8GB or 800MB.")
    return size


def shown(size: float) -> str:
    """A number of bytes, such as 1.50 GB or 80.2 MB."""
    for unit, name in ((10**9, "GB"), (10**6, "MB")):
        if size >= unit:
            return f"{size / unit:,.{2 if name == 'GB' else 1}f} {name}"
    return f"{size / 1e3:,.1f} KB"


def expert_weights(config: ModelConfig) -> int:
    """The number of weights of one expert, a SwiGLU."""
    return 3 * config.width * config.expert_width


def bytes_per_token(config: ModelConfig, bits: float, hit_rate: float = 0.0) -> float:
    """Bytes that must be read for one token, with ``bits`` for each weight of an expert."""
    used = config.mixture_layers * config.active_experts * expert_weights(config)
    return used * (1 - hit_rate) * bits / 8


def cache_bytes(config: ModelConfig, length: int) -> int:
    """The keys and values of ``length`` tokens in float32, with the room that ``inference.kv_cache`` keeps to grow."""
    of_token = 2 * 4 * config.kv_heads * config.head_width
    window = config.context if config.window is None else min(config.window, config.context)
    rows = min(2 * length, 2 * window)
    return of_token * (config.layers * rows + rows)  # one layer at a time is copied to its new room


def pass_bytes(config: ModelConfig, tokens: int, length: int) -> int:
    """Bytes in float32 that a pass of ``tokens`` tokens, the last ones of a text of ``length`` tokens, needs at once.

    They are an upper bound of what a block holds while its experts work: rows of width D, queries, keys and values, the
    two factors of SwiGLU for all K experts, and three times more for experts that get all tokens; the scores
    of a tile of attention; and the logits. The tokens may be several texts, each shorter than ``length``.
    """
    D, F, K = config.width, config.expert_width, config.active_experts
    heads = config.heads * config.head_width + config.kv_heads * config.head_width
    hidden = max(F * (2 * K + 3), 4 * config.width_of_dense if config.dense_layers else 0)
    normed = 0 if config.qk_norm == "none" else 4 * heads
    row = D * (9 + 3 * K) + 5 * heads + normed + hidden + 4 * config.experts
    scores = 3 * config.heads * min(attention.ROWS, tokens) * max(length, tokens)
    logits = 4 * min(tokens * config.vocab_size, max(LOGITS, 256 * config.vocab_size)) + 16 * config.vocab_size
    return 4 * (tokens * row + scores + logits)
