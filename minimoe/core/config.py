"""Settings: what a model is (``ModelConfig``), and how it is trained (``TrainConfig``).

Every field is documented once, here: the options of the command line and the contents of config.json follow from these
classes. An invalid value raises ``UserError`` when the config is created, so that no later code has to check it again.
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from minimoe.core.errors import UserError, suggestion

MAX_SIZE = 2**20
"""The largest value of any single size of a model; a larger one is most likely a typing error."""


def _setting(
    default: Any, doc: str, *, least: float | None = None, most: float | None = None, choices: Any = None
) -> Any:
    return dataclasses.field(default=default, metadata={"doc": doc, "least": least, "most": most, "choices": choices})


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The architecture: Mixtral's, in any size."""

    vocab_size: int = _setting(
        256, "V: tokens in the vocabulary; training takes it from the tokenizer", least=1, most=MAX_SIZE
    )
    width: int = _setting(128, "D: numbers that represent one token", least=1, most=MAX_SIZE)
    layers: int = _setting(4, "L: number of blocks", least=1, most=4096)
    heads: int = _setting(4, "H: number of query heads", least=1, most=4096)
    kv_heads: int = _setting(2, "G: key/value heads; heads/kv_heads query heads share each", least=1, most=4096)
    head_width: int = _setting(32, "C: numbers per head; even, because RoPE rotates pairs", least=2, most=MAX_SIZE)
    context: int = _setting(128, "T: tokens in a training sequence", least=1, most=MAX_SIZE)
    window: int | None = _setting(
        None, "sliding window: query i sees the keys j with i - j < window; none: all keys", least=1, most=MAX_SIZE
    )
    qk_norm: str = _setting(
        "none",
        "RMSNorm on queries and keys before RoPE: over all heads together (whole, OLMoE) or in each head (per_head, "
        "Qwen3)",
        choices=("none", "whole", "per_head"),
    )
    experts: int = _setting(8, "E: experts per layer", least=1, most=65536)
    active_experts: int = _setting(2, "K: experts that each token is sent to", least=1, most=65536)
    expert_width: int = _setting(256, "F: hidden width of an expert", least=1, most=MAX_SIZE)
    router: str = _setting("noisy_top_k", "how experts are chosen: the name of a module in minimoe/layers/routers")
    expert_kind: str = _setting("swiglu", "what an expert is: the name of a module in minimoe/layers/experts")
    shared_experts: int = _setting(
        0, "S: SwiGLU experts that every token passes through, besides the K that it is sent to", least=0, most=65536
    )
    dense_layers: int = _setting(
        0, "first layers with one SwiGLU in place of router and experts, as in DeepSeekMoE", least=0, most=4096
    )
    dense_width: int | None = _setting(
        None,
        "hidden width of that SwiGLU; none: the width of all experts that a token uses, (K + S)·F",
        least=1,
        most=MAX_SIZE,
    )
    expert_groups: int = _setting(
        1, "sigmoid_bias: groups that the experts are divided into; 1 for no groups", least=1, most=65536
    )
    active_groups: int = _setting(
        1, "sigmoid_bias: number of groups that a token may use, those with the best scores", least=1, most=65536
    )
    routed_scale: float = _setting(
        1.0, "sigmoid_bias: what the weights of a token's experts add up to; 2.5 in DeepSeek-V3", least=1e-6, most=1e6
    )
    renormalize: bool = _setting(True, "noisy_top_k: softmax over the chosen experts (Mixtral) rather than over all")
    noisy_gating: bool = _setting(True, "add trainable noise to the router (Shazeer 2017), in training only")
    second_expert: str = _setting(
        "random",
        "gshard, second expert in training: kept by chance (random), drawn by Gumbel noise (sampling), "
        "or always kept (all)",
        choices=("random", "sampling", "all"),
    )
    hash_gate: bool = _setting(False, "token_hash: weigh the fixed set of experts with a gate rather than with 1/K")
    zero_experts: int = _setting(1, "zero_computation: how many of the experts answer 0", least=0, most=65536)
    copy_experts: int = _setting(1, "zero_computation: how many of the experts answer x", least=0, most=65536)
    cheap_balance: float = _setting(
        1.0,
        "zero_computation: weight of zero and copy experts in the balance loss; below 1, they get more tokens",
        least=0.0,
        most=10.0,
    )
    cosine_form: str = _setting(
        "tutel", "cosine: width and initial values of the projection, Tutel's or X-MoE's", choices=("tutel", "x-moe")
    )
    tied_embeddings: bool = _setting(False, "use the embedding table as the output layer too")
    rope_theta: float = _setting(10_000.0, "base of RoPE's wavelengths", least=1.0)
    norm_eps: float = _setting(1e-5, "RMSNorm's epsilon", least=0.0, most=1.0)

    def __post_init__(self) -> None:
        _check_fields(self)
        if self.heads % self.kv_heads:
            raise UserError(
                f"heads {self.heads} cannot share kv_heads {self.kv_heads} evenly: "
                "choose kv_heads so that it divides heads (1 for multi-query, the same number for multi-head)."
            )
        if self.head_width % 2:
            raise UserError(
                f"head_width {self.head_width} is odd, but RoPE rotates pairs of channels: choose an even number."
            )
        if self.active_experts > self.experts:
            raise UserError(
                f"active_experts {self.active_experts} is more than experts {self.experts}: "
                "a token cannot go to more experts than there are; choose a smaller number."
            )
        if self.shared_experts * self.expert_width > MAX_SIZE:
            raise UserError(
                f"shared_experts {self.shared_experts} of expert_width {self.expert_width} are "
                f"{self.shared_experts * self.expert_width:,} wide together, and at most {MAX_SIZE:,} is possible: "
                "choose fewer or narrower ones."
            )
        if self.dense_layers >= self.layers and self.dense_layers > 0:
            raise UserError(
                f"dense_layers {self.dense_layers} leave none of the layers {self.layers} for a mixture: choose fewer, "
                "or experts 1 for a model that is dense throughout."
            )
        if self.dense_layers and self.dense_width is None and self.width_of_dense > MAX_SIZE:
            raise UserError(
                f"the experts that a token uses are {self.width_of_dense:,} wide together, and a dense layer is at "
                f"most {MAX_SIZE:,} wide: give a dense_width."
            )

    @property
    def mixture_layers(self) -> int:
        """The number of layers with a router and experts: all but the dense ones."""
        return self.layers - self.dense_layers

    @property
    def width_of_dense(self) -> int:
        """The hidden width of a dense layer: ``dense_width``, or that of all experts that a token uses, (K + S)·F."""
        wide = (self.active_experts + self.shared_experts) * self.expert_width
        return wide if self.dense_width is None else self.dense_width


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The recipe: data, objective, optimiser, schedule, bookkeeping."""

    tokenizer: str = _setting("char", "units of text", choices=("char", "byte"))
    steps: int = _setting(1000, "number of optimiser steps", least=0, most=10**9)
    batch: int = _setting(16, "B: sequences per step", least=1, most=MAX_SIZE)
    accumulate: int = _setting(
        1, "parts that a batch is divided into, to save memory; the gradient stays the same", least=1, most=MAX_SIZE
    )
    seed: int = _setting(0, "seed of all random draws", least=0, most=2**63)
    optimizer: str = _setting(
        "muon", "optimiser of the attention and expert matrices (AdamW for the rest)", choices=("muon", "adamw")
    )
    learning_rate: float = _setting(3e-3, "peak learning rate", least=0.0, most=10.0)
    warmup: int = _setting(100, "steps of linear warm-up", least=0, most=10**9)
    schedule: str = _setting("cosine", "shape of the decay after the warm-up", choices=("cosine", "linear"))
    final_rate: float = _setting(0.0, "fraction of the peak learning rate left at the end", least=0.0, most=1.0)
    weight_decay: float = _setting(0.1, "decoupled weight decay, on matrices only", least=0.0, most=10.0)
    beta1: float = _setting(0.9, "AdamW: decay rate of the mean gradient", least=0.0, most=0.999999)
    beta2: float = _setting(0.99, "AdamW: decay rate of the mean squared gradient", least=0.0, most=0.999999)
    momentum: float = _setting(0.9, "Muon: decay rate of the mean gradient, Nesterov's form", least=0.0, most=0.999999)
    newton_schulz_steps: int = _setting(3, "Muon: steps of the orthogonalisation", least=1, most=20)
    clip: float = _setting(1.0, "largest global norm of a gradient; 0 for no clipping", least=0.0)
    balance_loss: float | None = _setting(
        None,
        "coefficient of the Switch load-balancing loss, per layer; none: the router's own, usually 0.01",
        least=0.0,
        most=1e9,
    )
    pooled_balance: bool = _setting(
        False, "pool the balance loss over all layers, as transformers does, which hides the collapse of a layer"
    )
    importance_loss: float = _setting(0.0, "coefficient of the importance loss (CV²), per layer", least=0.0, most=1e9)
    load_loss: float = _setting(0.0, "coefficient of the load loss (CV²), per layer", least=0.0, most=1e9)
    z_loss: float = _setting(0.001, "coefficient of the router z-loss, per layer", least=0.0, most=1e9)
    sequence_loss: float = _setting(
        0.0, "coefficient of the balance loss within each sequence, per layer", least=0.0, most=1e9
    )
    bias_rate: float = _setting(
        0.003,
        "sigmoid_bias: how far the bias of an expert moves after each step; 0.001 in DeepSeek-V3",
        least=0.0,
        most=1e6,
    )
    capacity_factor: float | None = _setting(
        None,
        "limit on tokens per expert in training, as a multiple of the fair share; none: no limit",
        least=1e-6,
        most=65536,
    )
    evaluate_every: int = _setting(
        100, "steps between evaluations of the whole validation split; 0 for one at the end", least=0, most=10**9
    )
    save_every: int = _setting(100, "steps between checkpoints; 0 for one at the end", least=0, most=10**9)
    dtype: str = _setting("float32", "floating-point type", choices=("float32", "float64"))

    def __post_init__(self) -> None:
        _check_fields(self)
        if self.batch % self.accumulate:
            raise UserError(
                f"batch {self.batch} cannot be divided into accumulate {self.accumulate} equal parts: "
                "choose accumulate so that it divides batch."
            )


Config = TypeVar("Config", ModelConfig, TrainConfig)


def from_dict(kind: type[Config], values: Mapping[str, Any], source: str = "config") -> Config:
    """A config from plain values, such as those in ``config.json``; raises ``UserError`` for an unknown name."""
    known = [field.name for field in dataclasses.fields(kind)]
    for name in values:
        if name not in known:
            raise UserError(
                f"{source} has a setting {name!r} that {kind.__name__} does not know{suggestion(name, known)}."
            )
    return kind(**values)


def field_types(kind: type[Any]) -> dict[str, tuple[type, bool]]:
    """For each field of a config class: its type, and whether it may be None."""
    hints = typing.get_type_hints(kind)
    result = {}
    for field in dataclasses.fields(kind):
        hint = hints[field.name]
        optional = isinstance(hint, types.UnionType)
        result[field.name] = (typing.get_args(hint)[0] if optional else hint, optional)
    return result


def _check_fields(config: Any) -> None:
    """Checks the type, range and choices of every field; a whole number is accepted where a float is expected."""
    field_kinds = field_types(type(config))
    for field in dataclasses.fields(config):
        kind, optional = field_kinds[field.name]
        value = getattr(config, field.name)
        if value is None and optional:
            continue
        if type(value).__module__ == "numpy" and getattr(value, "shape", None) == ():
            value = value.item()  # a NumPy scalar, recognised without importing NumPy
            object.__setattr__(config, field.name, value)
        if kind is float and type(value) is int:
            value = float(value) if abs(value) < 2**1023 else math.inf
            object.__setattr__(config, field.name, value)
        if type(value) is not kind:
            raise UserError(f"{field.name} {value!r} is not {_KIND_NAMES[kind]}.")
        least, most, choices = (field.metadata[key] for key in ("least", "most", "choices"))
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{field.name} {value} is not a finite number: give a finite one.")
        if least is not None and value < least:
            raise UserError(f"{field.name} {value} is too small: it must be at least {_plain(least)}.")
        if most is not None and value > most:
            raise UserError(f"{field.name} {value} is too large: it must be at most {_plain(most)}.")
        if choices is not None and value not in choices:
            raise UserError(f"{field.name} {value!r} is unknown: choose one of {', '.join(choices)}.")


def _plain(bound: float) -> str:
    """A bound as people write it, such as 1,048,576 or 0.999999."""
    return f"{bound:,}" if isinstance(bound, int) else f"{bound:g}"


_KIND_NAMES: dict[type, str] = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
