"""Parity of packed rows with transformers: documents apart, answers alone learned, every gradient."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional
from transformers import MixtralConfig, MixtralForCausalLM

from minimoe.core import tree
from minimoe.losses import objective
from minimoe.losses.objective import Objective, Shard
from minimoe.storage import huggingface

pytestmark = pytest.mark.torch

STARTS = np.array([[0] * 5 + [5] * 6 + [11], [0] * 2 + [2] * 3 + [5] * 7])


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("tied", [False, True])
def test_the_loss_of_answers_and_every_gradient_agree(tmp_path: Path, window: int | None, tied: bool) -> None:
    torch.manual_seed(3)
    sizes = MixtralConfig(
        vocab_size=23, hidden_size=16, intermediate_size=12, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4, max_position_embeddings=32, sliding_window=window,
        initializer_range=0.2, tie_word_embeddings=tied, attn_implementation="eager", experts_implementation="eager",
        bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    theirs = MixtralForCausalLM(sizes)
    theirs.save_pretrained(tmp_path / "saved")
    params, config = huggingface.load_params(tmp_path / "saved")
    params, theirs = tree.map(lambda leaf: leaf.astype(np.float64), params), theirs.double()
    rng = np.random.default_rng(1)
    tokens, targets = rng.integers(23, size=(2, *STARTS.shape))
    loss_mask = rng.integers(2, size=STARTS.shape)

    def their_loss(**how: bool) -> torch.Tensor:
        positions = torch.tensor(np.arange(STARTS.shape[1]) - STARTS)
        logits = theirs(torch.tensor(tokens), position_ids=positions, **how).logits
        labels = torch.tensor(np.where(loss_mask == 1, targets, -100))
        return functional.cross_entropy(logits.reshape(-1, 23), labels.reshape(-1))

    loss = their_loss(use_cache=False)
    loss.backward()
    shard = Shard(tokens, targets, loss_mask=loss_mask, starts=STARTS)
    totals, gradient = objective.loss_and_gradient(params, [shard], config, Objective())
    assert float(totals.loss) == pytest.approx(loss.item(), abs=1e-6)
    named = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    compared = 0
    for name, mine in huggingface.layout(gradient, config, "mixtral"):
        if name in named:  # the experts are fused there
            np.testing.assert_allclose(mine, named[name].numpy(), rtol=0, atol=2e-6, err_msg=name)
            compared += 1
    assert compared >= 2 * 6 + 2
    with torch.no_grad():
        leaking = their_loss(use_cache=True).item()
    assert abs(leaking - loss.item()) > 1e-3, "transformers masks documents with a cache now: say so where it is told"
