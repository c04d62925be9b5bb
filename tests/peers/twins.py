"""The model in PyTorch, as one would write it there, with the weights of a minimoe model: what minimoe is measured by.

Two twins differ in how tokens reach their experts:

    loop      for each expert, where() finds its tokens and index_add_ brings back its answers, as tutorials do
    sorted    tokens sorted by expert once, one segment for each expert, the sorting undone at the end

Everything else is what PyTorch offers for the purpose: nn.RMSNorm, scaled_dot_product_attention, cross_entropy, fused
AdamW. A twin also decodes with a key/value cache of fixed size, in two ways: ``Cached`` calls the modules of the K
chosen experts, ``Gathered`` gathers their weights from one stack, so that all shapes are fixed and torch.compile makes
one graph of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minimoe.core import tree
from minimoe.core.config import ModelConfig, TrainConfig
from minimoe.layers.decoder import Decoder
from minimoe.layers.routers.noisy_top_k import NOISE_FLOOR

Dispatch = Literal["loop", "sorted"]
PARTS = ("gate", "up", "down")
"""Of an expert."""


class Attention(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.head_width = config.head_width
        self.query = nn.Linear(config.width, config.heads * config.head_width, bias=False)
        self.key = nn.Linear(config.width, config.kv_heads * config.head_width, bias=False)
        self.value = nn.Linear(config.width, config.kv_heads * config.head_width, bias=False)
        self.output = nn.Linear(config.heads * config.head_width, config.width, bias=False)

    def project(self, x: Tensor, rotation: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """x (B, T, D) → q (B, H, T, C), k and v (B, G, T, C)."""
        q, k, v = (
            layer(x).unflatten(-1, (-1, self.head_width)).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        return rotate(q, rotation), rotate(k, rotation), v

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
        q, k, v = self.project(x, rotation)
        o = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.output(o.transpose(1, 2).flatten(2))


def rotate(x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    cos, sin = rotation  # (T, C/2)
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


class Expert(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate = nn.Linear(config.width, config.expert_width, bias=False)
        self.up = nn.Linear(config.width, config.expert_width, bias=False)
        self.down = nn.Linear(config.expert_width, config.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Router(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.experts, self.top_k, self.renormalize = config.experts, config.active_experts, config.renormalize
        self.gate = nn.Linear(config.width, config.experts, bias=False)
        self.noise = nn.Linear(config.width, config.experts, bias=False) if config.noisy_gating else None

    def forward(self, x: Tensor, noise: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """x (N, D) → chosen and weights (N, K), the layer's balance loss and z-loss."""
        clean = noisy = self.gate(x)
        if noise is not None and self.noise is not None:
            noisy = clean + noise * (F.softplus(self.noise(x)) + NOISE_FLOOR)
        chosen, weights = self.choose(noisy)
        share = torch.bincount(chosen.flatten(), minlength=self.experts) / chosen.numel()
        balance = self.experts * (share * clean.softmax(-1).mean(0)).sum()
        return chosen, weights, balance, clean.logsumexp(-1).square().mean()

    def choose(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """logits (..., E) → the chosen experts and their weights (..., K)."""
        if self.renormalize:
            best, chosen = logits.topk(self.top_k)
            return chosen, best.softmax(-1)
        weights, chosen = logits.softmax(-1).topk(self.top_k)
        return chosen, weights


class MoE(nn.Module):
    def __init__(self, config: ModelConfig, dispatch: Dispatch) -> None:
        super().__init__()
        self.router = Router(config)
        self.experts = nn.ModuleList(Expert(config) for _ in range(config.experts))
        self.mix = {"loop": self.mix_in_loop, "sorted": self.mix_sorted}[dispatch]

    def forward(self, x: Tensor, noise: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        rows = x.flatten(0, -2)
        chosen, weights, balance, z = self.router(rows, None if noise is None else noise.flatten(0, -2))
        return self.mix(rows, chosen, weights).view_as(x), balance, z

    def mix_in_loop(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        y = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            token, k = torch.where(chosen == e)
            y.index_add_(0, token, expert(x[token]) * weights[token, k, None])
        return y

    def mix_sorted(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        entries = chosen.flatten()
        order = entries.argsort(stable=True)
        segments = x[order // chosen.shape[1]].split(entries.bincount(minlength=len(self.experts)).tolist())
        y = torch.cat([expert(rows) for expert, rows in zip(self.experts, segments, strict=True)])
        place = torch.empty_like(order)
        place[order] = torch.arange(len(order), device=order.device)
        return (y[place].view(*chosen.shape, -1) * weights[..., None]).sum(1)


class Block(nn.Module):
    def __init__(self, config: ModelConfig, dispatch: Dispatch) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.width, eps=config.norm_eps)
        self.attention = Attention(config)
        self.moe_norm = nn.RMSNorm(config.width, eps=config.norm_eps)
        self.moe = MoE(config, dispatch)

    def forward(
        self, x: Tensor, rotation: tuple[Tensor, Tensor], noise: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        x = x + self.attention(self.attention_norm(x), rotation)
        y, balance, z = self.moe(self.moe_norm(x), noise)
        return x + y, balance, z


class Twin(nn.Module):
    """A decoder in the shapes of ``config``; its weights are random until ``copy_weights``."""

    def __init__(self, config: ModelConfig, dispatch: Dispatch = "sorted") -> None:
        super().__init__()
        assert not config.tied_embeddings and config.window is None, "a twin has its own head and sees all that is past"
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.width)
        self.blocks = nn.ModuleList(Block(config, dispatch) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.width, eps=config.norm_eps)
        self.head = nn.Linear(config.width, config.vocab_size, bias=False)
        frequency = config.rope_theta ** (-2.0 * np.arange(config.head_width // 2) / config.head_width)
        angle = torch.tensor(np.arange(config.context)[:, None] * frequency)  # in float64, then rounded
        self.register_buffer("cos", angle.cos().to(self.head.weight.dtype))
        self.register_buffer("sin", angle.sin().to(self.head.weight.dtype))

    def forward(self, tokens: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """tokens (B, T), noise (L, B, T, E) → logits (B, T, V), and both auxiliary losses, summed over the layers."""
        rotation = self.cos[: tokens.shape[1]], self.sin[: tokens.shape[1]]
        x = self.embedding(tokens)
        balance = z = 0.0
        for layer, block in enumerate(self.blocks):
            x, layer_balance, layer_z = block(x, rotation, None if noise is None else noise[layer])
            balance, z = balance + layer_balance, z + layer_z
        return self.head(self.norm(x)), balance, z


def loss(
    model: Any, recipe: TrainConfig, tokens: Tensor, targets: Tensor, noise: Tensor | None
) -> tuple[Tensor, Tensor]:
    """What minimoe minimises with the same recipe, and the logits. ``model`` is a twin, compiled or not."""
    assert recipe.importance_loss == recipe.load_loss == 0, "the twins know the losses that are on by default"
    logits, balance, z = model(tokens, noise)
    mean = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    return mean + recipe.balance_loss * balance + recipe.z_loss * z, logits


# Weights


def beside(twin: Twin, ours: Decoder) -> Iterator[tuple[str, nn.Parameter, Any]]:
    """Each parameter of a twin with its name and a view of its place in ``ours``: parameters, or their gradient.

    A matrix lies there as (outputs, inputs) and here as (inputs, outputs).
    """
    yield "embedding", twin.embedding.weight, ours.embedding.table
    for i, (theirs, block) in enumerate(zip(twin.blocks, ours.blocks, strict=True)):
        yield f"{i}.attention_norm", theirs.attention_norm.weight, block.attention_norm.gain
        for name in ("query", "key", "value", "output"):
            projection = getattr(block.attention, name)
            yield f"{i}.{name}", getattr(theirs.attention, name).weight, projection.weight.T
        yield f"{i}.moe_norm", theirs.moe_norm.weight, block.moe_norm.gain
        yield f"{i}.router.gate", theirs.moe.router.gate.weight, block.moe.router.w_gate.T
        if theirs.moe.router.noise is not None:
            yield f"{i}.router.noise", theirs.moe.router.noise.weight, block.moe.router.w_noise.T
        for e, expert in enumerate(theirs.moe.experts):
            yield f"{i}.expert.{e}.gate", expert.gate.weight, block.moe.experts.w_gate[e].T
            yield f"{i}.expert.{e}.up", expert.up.weight, block.moe.experts.w_up[e].T
            yield f"{i}.expert.{e}.down", expert.down.weight, block.moe.experts.w_down[e].T
    yield "norm", twin.norm.weight, ours.norm.gain
    yield "head", twin.head.weight, ours.head.weight.T


def copy_weights(twin: Twin, params: Decoder) -> Twin:
    """The twin, with the weights of ``params``; every parameter of both is met once."""
    places = list(beside(twin, params))
    assert len(places) == len(list(twin.parameters()))
    assert sum(values.size for _, _, values in places) == tree.size(params)
    with torch.no_grad():
        for _, parameter, values in places:
            parameter.copy_(torch.from_numpy(np.ascontiguousarray(values)))
    return twin


# Decoding


class Cached:
    """Greedy decoding at batch 1 with a key/value cache of the model's context."""

    def __init__(self, twin: Twin) -> None:
        self.twin = twin.eval()
        config, where = twin.config, twin.head.weight
        shape = (1, config.kv_heads, config.context, config.head_width)
        self.caches = [
            (torch.zeros(shape, device=where.device), torch.zeros(shape, device=where.device)) for _ in twin.blocks
        ]

    @torch.inference_mode()
    def write(self, prompt: Tensor, count: int) -> list[int]:
        """prompt (n,) → the ``count`` likeliest ids after it, n + count at most the context."""
        unread, position, written = prompt, 0, []
        while len(written) < count:
            token = self.read(unread, position).argmax()
            position += len(unread)
            unread = token[None]
            written.append(int(token))
        return written

    def read(self, tokens: Tensor, position: int) -> Tensor:
        """tokens (n,) from ``position`` on → logits (V,) of what follows."""
        stop = position + len(tokens)
        rotation = self.twin.cos[position:stop], self.twin.sin[position:stop]
        x = self.twin.embedding(tokens)[None]
        for block, (keys, values) in zip(self.twin.blocks, self.caches, strict=True):
            q, k, v = block.attention.project(block.attention_norm(x), rotation)
            keys[:, :, position:stop], values[:, :, position:stop] = k, v
            seen = keys[:, :, :stop], values[:, :, :stop]
            o = F.scaled_dot_product_attention(q, *seen, is_causal=len(tokens) > 1, enable_gqa=True)
            x = x + block.attention.output(o.transpose(1, 2).flatten(2))
            x = x + self.mix(block.moe, block.moe_norm(x))
        return self.twin.head(self.twin.norm(x[0, -1]))

    def mix(self, moe: MoE, x: Tensor) -> Tensor:
        """A single token calls its experts and no other."""
        if x.shape[1] > 1:
            return moe(x, None)[0]
        chosen, weights = moe.router.choose(moe.router.gate(x[0]))
        answers = [moe.experts[e](x[0]) for e in chosen[0].tolist()]
        return (weights @ torch.cat(answers))[None]


class Gathered(Cached):
    """The same with all shapes fixed, so that a token is one compiled graph: the weights of the chosen experts are
    gathered from a stack, and attention reads the whole cache through a mask."""

    def __init__(self, twin: Twin) -> None:
        super().__init__(twin)
        with torch.no_grad():
            self.stacks = [
                [torch.stack([getattr(expert, part).weight for expert in block.moe.experts]) for part in PARTS]
                for block in twin.blocks
            ]
        self.compiled = torch.compile(self.read_one, fullgraph=True)

    def read(self, tokens: Tensor, position: int) -> Tensor:
        if len(tokens) > 1:
            return super().read(tokens, position)
        return self.compiled(tokens, torch.tensor([position], device=tokens.device))

    def read_one(self, token: Tensor, position: Tensor) -> Tensor:
        """token (1,), position (1,) → logits (V,)."""
        rotation = self.twin.cos[position], self.twin.sin[position]
        seen = torch.arange(self.twin.config.context, device=token.device) <= position  # (T,)
        x = self.twin.embedding(token)[None]
        for block, stacks, (keys, values) in zip(self.twin.blocks, self.stacks, self.caches, strict=True):
            q, k, v = block.attention.project(block.attention_norm(x), rotation)
            keys.index_copy_(2, position, k)
            values.index_copy_(2, position, v)
            o = F.scaled_dot_product_attention(q, keys, values, attn_mask=seen[None, None, None], enable_gqa=True)
            x = x + block.attention.output(o.transpose(1, 2).flatten(2))
            normed = block.moe_norm(x)[0, 0]  # (D,)
            chosen, weights = block.moe.router.choose(block.moe.router.gate(normed))
            gate, up, down = (stack[chosen] for stack in stacks)  # (K, F, D), (K, F, D), (K, D, F)
            h = F.silu(gate @ normed) * (up @ normed)  # (K, F)
            x = x + weights @ (down @ h[..., None])[..., 0]
        return self.twin.head(self.twin.norm(x[0, -1]))
