"""Parity with trl: the loss of a batch of pairs, and its gradient for every parameter of a Mixtral.

trl has no label smoothing for its sigmoid loss and ignores the setting there; ``preference_shards.CASES`` says with
which loss of trl each of ours is compared.
"""

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("trl")

import torch
import transformers
from preference_shards import CASES, PAIRS, Case, shard_of
from trl_preferences import loss_of, trainer_of

from minimoe.core import tree
from minimoe.layers.decoder import Decoder
from minimoe.losses import objective
from minimoe.losses.objective import Objective, Shard, loss_and_gradient
from minimoe.losses.preference import Answers, places
from minimoe.storage import huggingface

pytestmark = pytest.mark.torch

SIZES: dict[str, Any] = {
    "vocab_size": 13,
    "hidden_size": 24,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 5,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 64,
    "sliding_window": None,
    "initializer_range": 0.3,
    "attn_implementation": "eager",
    "experts_implementation": "eager",
}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


def make() -> Any:
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(**SIZES)).eval()


def ours(model: Any, folder: Path) -> Decoder:
    model.save_pretrained(folder)
    return huggingface.load_params(folder)[0]


def loss_here(case: Case, model: Any, reference: Any, folder: Path) -> tuple[Any, Decoder]:
    """Our loss of the same pairs, with the reference's log-probabilities computed here."""
    params, of_reference = ours(model, folder / "model"), ours(reference, folder / "reference")
    _, config = huggingface.load_params(folder / "model")
    shard = shard_of(case)
    sums = objective.forward(of_reference, shard, config, Objective(token_loss=case.loss), keep=False).sums.loss
    return loss_and_gradient(params, [shard_of(case, sums.logp.T.reshape(-1))], config, case.objective)


@every_case
def test_the_batch_is_the_same(case: Case) -> None:
    batch = loss_of(case, make(), make()).batch
    shard = shard_of(case)
    assert shard.mask is not None and shard.loss_mask is not None
    np.testing.assert_array_equal(shard.tokens, batch["input_ids"])
    np.testing.assert_array_equal(shard.mask, batch["attention_mask"])
    np.testing.assert_array_equal(shard.loss_mask[:, :-1], batch["completion_mask"][:, 1:])


@every_case
def test_the_loss_and_every_gradient_agree(case: Case, tmp_path: Path) -> None:
    model, reference = make(), make()
    totals, gradient = loss_here(case, model, reference, tmp_path)
    theirs = loss_of(case, model, reference)
    theirs.loss.backward()
    assert float(totals.total) == pytest.approx(theirs.loss.item(), rel=2e-6)
    for parameter in model.parameters():
        parameter.data = parameter.grad
    for (name, mine), other in zip(
        tree.named_leaves(gradient), tree.leaves(ours(model, tmp_path / "gradient")), strict=True
    ):
        assert abs(other).max() > 0, f"{name} is zero, which proves nothing"
        assert abs(mine - other).max() < 2e-5 * abs(other).max(), name


def test_at_the_first_step_both_start_from_log_2_with_the_same_gradient(tmp_path: Path) -> None:
    """The auxiliary loss comes on top: the library's, which is not divided by K."""
    model = make()
    for case in (CASES["dpo"], CASES["dpo, auxiliary loss"]):
        totals, _ = loss_here(case, model, model, tmp_path / str(case.auxiliary))
        theirs = loss_of(case, model, copy.deepcopy(model))
        assert float(totals.loss) == pytest.approx(np.log(2), rel=1e-6)
        assert float(totals.total) == pytest.approx(theirs.loss.item(), rel=1e-6)
        assert (float(totals.total) > np.log(2) + 0.4) == (case.auxiliary > 0)


def test_trl_ignores_label_smoothing_in_its_sigmoid_loss_and_minimoe_does_not(tmp_path: Path) -> None:
    model, reference = make(), make()
    plain = CASES["dpo"]
    smoothed = plain._replace(loss=plain.loss._replace(label_smoothing=0.2))
    theirs = [loss_of(case, model, reference).loss.item() for case in (plain, smoothed)]
    mine = [float(loss_here(case, model, reference, tmp_path)[0].loss) for case in (plain, smoothed)]
    assert theirs[0] == theirs[1] == pytest.approx(mine[0], rel=2e-6)
    assert abs(mine[1] - mine[0]) > 1e-3


def test_without_a_prompt_trl_divides_by_a_token_that_it_does_not_score(tmp_path: Path) -> None:
    """It takes IPO's lengths from the mask before it is shifted (huggingface/trl#6879); nothing predicts that token."""
    case = CASES["ipo"]._replace(pairs=1)
    model, reference = make(), make()
    _, chosen, rejected = PAIRS[0]
    trainer = trainer_of(case, model, reference)
    batch = trainer.data_collator([{"prompt_ids": [], "chosen_ids": chosen, "rejected_ids": rejected}])
    theirs = trainer.compute_loss(model, batch).item()

    tokens, mask = np.asarray(batch["input_ids"]), np.asarray(batch["attention_mask"], float)
    shard = Shard(tokens[:, :-1], tokens[:, 1:], None, mask[:, :-1], mask[:, 1:], extra=Answers(places(1)))
    sums = []
    for name, one in (("model", model), ("reference", reference)):
        params = ours(one, tmp_path / name)
        _, config = huggingface.load_params(tmp_path / name)
        sums.append(objective.forward(params, shard, config, Objective(token_loss=case.loss), keep=False).sums.loss)
    right = sums[0]._replace(reference=sums[1].logp)
    np.testing.assert_array_equal(right.length, [[len(chosen) - 1, len(rejected) - 1]])
    assert theirs == pytest.approx(float(case.loss.value(right._replace(length=right.length + 1))[0]), rel=1e-5)
    assert theirs != pytest.approx(float(case.loss.value(right)[0]), rel=1e-3)


def test_the_golden_file_is_what_trl_computes_now() -> None:
    golden = Path(__file__).parent.parent / "golden"
    made = json.loads((golden / "preferences.json").read_text())
    assert made.keys() == CASES.keys()
    model = transformers.MixtralForCausalLM.from_pretrained(
        golden / "mixtral", dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
    )
    reference = copy.deepcopy(model)
    for weight in (reference.lm_head.weight, reference.model.layers[-1].mlp.experts.down_proj):
        weight.data *= 0.7
    theirs = loss_of(CASES["ipo"], model, reference)
    assert theirs.loss.item() == pytest.approx(made["ipo"]["loss"], rel=1e-5)
