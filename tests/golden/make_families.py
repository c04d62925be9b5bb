"""Makes the golden folders of the families besides Mixtral: tiny random models, and what PyTorch computes with them.

    python tests/golden/make_families.py            needs the peers extra

    olmoe/, qwen3_moe/, deepseek/   each a model in bfloat16, with a file
    expected.safetensors
        tokens, mask                (2, 7)     the second sequence ends in padding; 1 counts
        logits                      (2, 7, 13)
        router_logits               (2, 14, E) of each layer with a router
        cross_entropy               ()         of the next token, mean over those that count
        greedy                      (12,)      three tokens of the first sequence, continued with the likeliest
        gradient.<name>             of the cross-entropy with respect to the tensor of this name

transformers computes the first two; tests/peers/deepseek_moe.py the third, because transformers has no such model.
"""

import re
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional
from transformers import OlmoeConfig, OlmoeForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

HERE = Path(__file__).parent
sys.path.append(str(HERE.parent / "peers"))

from deepseek_moe import DeepseekForCausalLM  # noqa: E402

SIZES: dict[str, Any] = {
    "vocab_size": 13,
    "hidden_size": 8,
    "intermediate_size": 6,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 32,
    "rope_theta": 100.0,
    "initializer_range": 0.5,
    "num_experts_per_tok": 2,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
SEEDS = {"olmoe": 9, "qwen3_moe": 6, "deepseek": 9}
"""With these, every expert gets a token that counts, and the greedy texts do not repeat themselves."""

EAGER = {"experts_implementation": "eager"}  # the default implementation needs widths that are multiples of 4


def models() -> dict[str, Any]:
    """One of each family, with what is its own: OLMoE does not renormalise, and two families have a dense layer."""
    qwen = {"num_experts": 3, "moe_intermediate_size": 4, "head_dim": 6, "num_hidden_layers": 3}
    return {
        "olmoe": OlmoeForCausalLM(OlmoeConfig(**SIZES | {"num_experts": 3} | EAGER)),
        "qwen3_moe": Qwen3MoeForCausalLM(
            Qwen3MoeConfig(**SIZES | qwen | {"mlp_only_layers": [0], "norm_topk_prob": True} | EAGER)
        ),
        "deepseek": DeepseekForCausalLM(
            **SIZES | {"n_routed_experts": 3, "moe_intermediate_size": 4, "num_hidden_layers": 3}
        ),
    }


def separate(gradient: dict[str, Any]) -> dict[str, Any]:
    """The tensors that the library keeps fused in memory, under the names that they have in a file."""
    found = {}
    for name, value in gradient.items():
        fused = re.fullmatch(r"(.*\.experts)\.(gate_up_proj|down_proj)", name)
        if fused is None:
            found[name] = value
            continue
        for e, matrix in enumerate(value):
            halves = matrix.chunk(2) if fused[2] == "gate_up_proj" else [matrix]
            for of, half in zip(("gate", "up") if len(halves) == 2 else ("down",), halves, strict=True):
                found[f"{fused[1]}.{e}.{of}_proj.weight"] = half
    return found


def main() -> None:
    for name, seed in SEEDS.items():
        torch.manual_seed(seed)
        model = models()[name]
        for of, parameter in model.named_parameters():
            if "norm" in of:  # all ones would not show a gain in the wrong place
                parameter.data.uniform_(0.5, 1.5)
            parameter.data = parameter.data.to(torch.bfloat16).to(torch.float32)
        model.save_pretrained(HERE / name)
        (HERE / name / "generation_config.json").unlink(missing_ok=True)
        weights = load_file(HERE / name / "model.safetensors")
        halves = {of: value.to(torch.bfloat16) for of, value in weights.items()}
        save_file(halves, HERE / name / "model.safetensors", {"format": "pt"})

        tokens = torch.randint(13, (2, 7))
        mask = torch.ones_like(tokens)
        mask[1, 5:] = 0
        out = model(tokens, attention_mask=mask, output_router_logits=True)
        targets = tokens[:, 1:].masked_fill(mask[:, 1:] == 0, -100)
        cross_entropy = functional.cross_entropy(out.logits[:, :-1].reshape(-1, 13), targets.reshape(-1))
        cross_entropy.backward()
        assert all(parameter.grad.any() for parameter in model.parameters())
        gradient = separate({of: parameter.grad for of, parameter in model.named_parameters()})
        assert gradient.keys() == weights.keys()
        expected = {
            "tokens": tokens,
            "mask": mask,
            "logits": out.logits,
            "router_logits": torch.stack(out.router_logits),
            "cross_entropy": cross_entropy,
            "greedy": model.generate(tokens[:1, :3], max_new_tokens=9, do_sample=False)[0],
            **{f"gradient.{of}": value for of, value in gradient.items()},
        }
        save_file(
            {of: value.detach().contiguous() for of, value in expected.items()}, HERE / name / "expected.safetensors"
        )


if __name__ == "__main__":
    main()
