"""DeepSeekMoE in PyTorch, for comparison: the model of deepseek-moe-16b, whose code transformers does not contain.

The published model brings its own code. This is a plain independent form of it, with the names of the published
weights, and with the interface of transformers as far as the tests use it. What the layout means was taken from the
published code: the gate is a softmax over all experts, of which the largest K count; with norm_topk_prob they are
divided by their sum, unless K is 1; the shared experts are one SwiGLU of n_shared_experts · moe_intermediate_size
channels, added without a weight; layer i is dense if i < first_k_dense_replace or i is no multiple of moe_layer_freq.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional

DEFAULTS: dict[str, Any] = {
    "architectures": ["DeepseekForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "auto_map": {"AutoModelForCausalLM": "modeling_deepseek.DeepseekForCausalLM"},
    "aux_loss_alpha": 0.001,
    "first_k_dense_replace": 1,
    "hidden_act": "silu",
    "model_type": "deepseek",
    "moe_layer_freq": 1,
    "n_shared_experts": 2,
    "norm_topk_prob": False,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-6,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "scoring_func": "softmax",
    "seq_aux": True,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "use_cache": True,
}
"""The fields of the published config.json, without the sizes."""


class Norm(nn.Module):
    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Any) -> Any:
        return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)


class SwiGLU(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, hidden, bias=False)
        self.up_proj = nn.Linear(width, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Any) -> Any:
        return self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x))


class Gate(nn.Module):
    def __init__(self, width: int, experts: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(experts, width))


class Mixture(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        width, hidden = config.hidden_size, config.moe_intermediate_size
        self.config = config
        self.gate = Gate(width, config.n_routed_experts)
        self.experts = nn.ModuleList(SwiGLU(width, hidden) for _ in range(config.n_routed_experts))
        if config.n_shared_experts is not None:
            self.shared_experts = SwiGLU(width, hidden * config.n_shared_experts)

    def forward(self, x: Any) -> tuple[Any, Any, Any]:
        """x (B, T, D) → y, the logits of the router (B·T, E), and its loss within each sequence."""
        config, rows = self.config, x.reshape(-1, x.shape[-1])
        logits = rows @ self.gate.weight.T
        scores = logits.softmax(-1)
        weights, chosen = scores.topk(config.num_experts_per_tok, dim=-1)
        if config.num_experts_per_tok > 1 and config.norm_topk_prob:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        y = torch.zeros_like(rows)
        for row in range(len(rows)):
            for weight, expert in zip(weights[row], chosen[row].tolist(), strict=True):
                y[row] = y[row] + weight * self.experts[expert](rows[row])
        if config.n_shared_experts is not None:
            y = y + self.shared_experts(rows)
        B, T, E = *x.shape[:2], config.n_routed_experts
        counts = functional.one_hot(chosen, E).reshape(B, -1, E).sum(1)  # of each sequence
        fraction = counts * E / (T * config.num_experts_per_tok)
        loss = (fraction * scores.reshape(B, T, E).mean(1)).sum(1).mean()
        return y.reshape(x.shape), logits, loss


class Attention(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.width, self.theta = config.hidden_size // config.num_attention_heads, config.rope_theta
        of = {"q": self.heads, "k": self.kv_heads, "v": self.kv_heads}
        for letter, heads in of.items():
            self.add_module(f"{letter}_proj", nn.Linear(config.hidden_size, heads * self.width, bias=False))
        self.o_proj = nn.Linear(self.heads * self.width, config.hidden_size, bias=False)

    def turned(self, x: Any) -> Any:
        """x (B, H, T, C): the halves of a head are the two coordinates of its points."""
        angle = torch.outer(
            torch.arange(x.shape[2]).float(), self.theta ** (-torch.arange(0, self.width, 2).float() / self.width)
        )
        a, b = x.chunk(2, dim=-1)
        return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], dim=-1)

    def forward(self, x: Any, hidden: Any) -> Any:
        B, T, _ = x.shape
        q, k, v = (
            self.get_submodule(f"{letter}_proj")(x).reshape(B, T, -1, self.width).transpose(1, 2) for letter in "qkv"
        )
        q, k = self.turned(q), self.turned(k)
        k, v = (part.repeat_interleave(self.heads // self.kv_heads, dim=1) for part in (k, v))
        scores = (q @ k.transpose(2, 3) * self.width**-0.5).masked_fill(hidden, float("-inf"))
        return self.o_proj((scores.softmax(-1) @ v).transpose(1, 2).reshape(B, T, -1))


class Layer(nn.Module):
    def __init__(self, config: Any, index: int) -> None:
        super().__init__()
        dense = index < config.first_k_dense_replace or index % config.moe_layer_freq != 0
        self.self_attn = Attention(config)
        self.mlp = SwiGLU(config.hidden_size, config.intermediate_size) if dense else Mixture(config)
        self.input_layernorm = Norm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = Norm(config.hidden_size, config.rms_norm_eps)


class DeepseekForCausalLM(nn.Module):
    """The model, with random weights of standard deviation ``initializer_range``."""

    def __init__(self, **sizes: Any) -> None:
        super().__init__()
        self.values = DEFAULTS | sizes
        self.config = config = SimpleNamespace(**self.values)
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.model.layers = nn.ModuleList(Layer(config, index) for index in range(config.num_hidden_layers))
        self.model.norm = Norm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        for parameter in self.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=self.values["initializer_range"])

    def forward(self, tokens: Any, attention_mask: Any = None, output_router_logits: bool = False) -> Any:
        """Logits (B, T, V), the logits of every router (B·T, E), and the sum of the losses within sequences."""
        T = tokens.shape[1]
        hidden = torch.ones(T, T).triu(1).bool()[None, None]
        if attention_mask is not None:
            hidden = hidden | (attention_mask == 0)[:, None, None] & ~torch.eye(T).bool()
        x = self.model.embed_tokens(tokens)
        router_logits, losses = [], []
        for layer in self.model.layers:
            x = x + layer.self_attn(layer.input_layernorm(x), hidden)
            normed = layer.post_attention_layernorm(x)
            if isinstance(layer.mlp, Mixture):
                y, logits, loss = layer.mlp(normed)
                router_logits.append(logits)
                losses.append(loss)
            else:
                y = layer.mlp(normed)
            x = x + y
        return SimpleNamespace(
            logits=self.lm_head(self.model.norm(x)), router_logits=tuple(router_logits), sequence_loss=sum(losses)
        )

    def generate(self, tokens: Any, max_new_tokens: int, do_sample: bool, use_cache: bool = True) -> Any:
        """The tokens with the likeliest continuation; every token is computed anew."""
        assert not do_sample
        with torch.no_grad():
            for _ in range(max_new_tokens):
                tokens = torch.cat([tokens, self(tokens).logits[:, -1:].argmax(-1)], dim=1)
        return tokens

    def save_pretrained(self, folder: Path) -> None:
        """A folder as the published one: one tensor for each matrix of each expert."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        state = {name: value.contiguous() for name, value in self.state_dict().items()}
        if self.config.tie_word_embeddings:
            del state["lm_head.weight"]
        save_file(state, Path(folder) / "model.safetensors", {"format": "pt"})
        (Path(folder) / "config.json").write_text(json.dumps(self.values))
