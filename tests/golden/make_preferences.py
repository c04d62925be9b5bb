"""Makes preferences.json: what trl computes of pairs of answers with the golden Mixtral, and autograd of its losses.

    python tests/golden/make_preferences.py        needs torch, transformers and trl

The reference is the golden model with its output layer and its last experts scaled by 0.7. For each case: the loss, ℓ′
of each answer as trl computes it, and of the gradient of every parameter the sum of its entries times cos 0, cos 1, ….
"""

import copy
import json
import sys
import tempfile
from pathlib import Path

import torch
from transformers import MixtralForCausalLM

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent / "support"), str(HERE.parent.parent)]

from preference_shards import CASES, fingerprint  # noqa: E402
from trl_preferences import loss_of  # noqa: E402

from minimoe.core import tree  # noqa: E402
from minimoe.storage import huggingface  # noqa: E402


def main() -> None:
    made = {}
    for name, case in CASES.items():
        model = MixtralForCausalLM.from_pretrained(
            HERE / "mixtral", dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
        )
        reference = copy.deepcopy(model)
        for weight in (reference.lm_head.weight, reference.model.layers[-1].mlp.experts.down_proj):
            weight.data *= 0.7
        loss, batch = loss_of(case, model, reference)
        loss.backward()
        labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)[:, 1:]
        with torch.no_grad():
            logits = reference(batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
        nats = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
        for parameter in model.parameters():
            parameter.data = parameter.grad
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            gradient, _ = huggingface.load_params(Path(folder))
        made[name] = {
            "loss": loss.item(),
            "reference": [round(value, 7) for value in (-nats.sum(1)).tolist()],
            "gradient": {name: float(f"{fingerprint(leaf):.6g}") for name, leaf in tree.named_leaves(gradient)},
        }
    (HERE / "preferences.json").write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
