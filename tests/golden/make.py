"""Makes the golden folders: a tiny Mixtral with random weights, and what PyTorch computes with it.

    python tests/golden/make.py            needs the peers extra

    mixtral/       the model as transformers saves it, in bfloat16 and in two shards
    gradients/     the gradient of every parameter, saved as if it were a model
    expected.safetensors
        tokens         (2, 7)     the second sequence ends in padding
        mask           (2, 7)     1 counts, 0 is padding
        logits         (2, 7, 13)
        router_logits  (2, 14, 3) of each layer
        cross_entropy  ()         of the next token, mean over those that count
        auxiliary      ()         the library's pooled balance loss
        greedy         (12,)      the first three tokens of the first sequence, continued with the likeliest

The loss that is differentiated is cross_entropy + AUXILIARY · auxiliary.
"""

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch.nn import functional
from transformers import MixtralConfig, MixtralForCausalLM

HERE = Path(__file__).parent
AUXILIARY = 0.1
EXPERTS = "eager"  # the default implementation needs widths that are multiples of 4


def main() -> None:
    torch.manual_seed(2)
    config = MixtralConfig(
        vocab_size=13,
        hidden_size=6,
        intermediate_size=4,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=4,
        num_local_experts=3,
        num_experts_per_tok=2,
        sliding_window=3,
        max_position_embeddings=32,
        rope_theta=100.0,
        initializer_range=0.5,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = MixtralForCausalLM(config)
    for name, parameter in model.named_parameters():
        if "norm" in name:  # all ones would not show a gain in the wrong place
            parameter.data.uniform_(0.5, 1.5)
    model.to(torch.bfloat16).save_pretrained(HERE / "mixtral", max_shard_size=1500)
    # loaded again, because `to` has rounded the frequencies of RoPE as well
    model = MixtralForCausalLM.from_pretrained(HERE / "mixtral", dtype=torch.float32, experts_implementation=EXPERTS)

    tokens = torch.randint(13, (2, 7))
    mask = torch.ones_like(tokens)
    mask[1, 5:] = 0
    out = model(tokens, attention_mask=mask, output_router_logits=True)
    targets = tokens[:, 1:].masked_fill(mask[:, 1:] == 0, -100)
    cross_entropy = functional.cross_entropy(out.logits[:, :-1].reshape(-1, 13), targets.reshape(-1))
    (cross_entropy + AUXILIARY * out.aux_loss).backward()
    greedy = model.generate(tokens[:1, :3], attention_mask=mask[:1, :3], max_new_tokens=9, do_sample=False)
    expected = {
        "tokens": tokens,
        "mask": mask,
        "logits": out.logits,
        "router_logits": torch.stack(out.router_logits),
        "cross_entropy": cross_entropy,
        "auxiliary": out.aux_loss,
        "greedy": greedy[0],
    }
    save_file({name: values.detach().contiguous() for name, values in expected.items()}, HERE / "expected.safetensors")
    for parameter in model.parameters():
        parameter.data = parameter.grad
    model.save_pretrained(HERE / "gradients")
    for folder in ("mixtral", "gradients"):
        (HERE / folder / "generation_config.json").unlink()


if __name__ == "__main__":
    main()
