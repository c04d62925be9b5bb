"""Makes packed.safetensors: what transformers computes of two packed rows with the golden Mixtral, in float64.

    python tests/golden/make_packed.py            needs the peers extra

    tokens, targets, starts   (2, 8)
    loss_mask                 (2, 8)      1 where a target counts; the others are labels of −100 there
    logits                    (2, 8, 13)
    loss                      ()          mean nats of the targets that count
    gradient                  (13, 6)     of the embedding
    leaking                   ()          the loss without the mask between documents

transformers masks documents if the position ids begin again and there is neither a cache nor an attention mask; with
either, it lets documents read each other.
"""

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch.nn import functional
from transformers import MixtralForCausalLM

HERE = Path(__file__).parent


def main() -> None:
    model = MixtralForCausalLM.from_pretrained(
        HERE / "mixtral", attn_implementation="eager", experts_implementation="eager", dtype=torch.float64
    )
    generator = torch.Generator().manual_seed(40)
    tokens = torch.randint(13, (2, 8), generator=generator)
    targets = torch.randint(13, (2, 8), generator=generator)
    starts = torch.tensor([[0, 0, 0, 3, 3, 3, 3, 7], [0, 0, 0, 0, 0, 5, 5, 5]])
    loss_mask = torch.tensor([[0, 1, 1, 0, 0, 1, 1, 1], [0, 0, 0, 1, 1, 0, 1, 1]])
    labels = torch.where(loss_mask == 1, targets, -100)

    def loss_of(**how: object) -> tuple[torch.Tensor, torch.Tensor]:
        logits = model(tokens, position_ids=torch.arange(8) - starts, **how).logits
        return logits, functional.cross_entropy(logits.reshape(-1, 13), labels.reshape(-1))

    logits, loss = loss_of(use_cache=False)
    loss.backward()
    gradient = model.model.embed_tokens.weight.grad
    tensors = {"tokens": tokens, "targets": targets, "starts": starts, "loss_mask": loss_mask, "logits": logits}
    tensors |= {"loss": loss, "gradient": gradient, "leaking": loss_of(use_cache=True)[1]}
    save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, HERE / "packed.safetensors")


if __name__ == "__main__":
    main()
