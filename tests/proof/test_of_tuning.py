"""The losses of tuning have a row for every tensor of the decoder, and each row can fail."""

from typing import Any

import numpy as np
import pytest

from minimoe.core import tree
from minimoe.layers import decoder
from minimoe.losses import objective
from minimoe.losses.objective import Objective
from minimoe.losses.preference import Preference
from minimoe.proof import of_tuning
from minimoe.proof.results import failed


def test_every_tensor_of_the_decoder_has_a_row_for_every_loss(rng: np.random.Generator) -> None:
    rows = of_tuning.rows(rng)
    assert failed(rows) == []
    names = [name for name, _ in tree.named_leaves(decoder.init(rng, of_tuning.CONFIG))]
    assert [(row.component, row.tensor) for row in rows] == [
        (loss, name) for loss in ("DPO", "IPO", "SimPO") for name in names
    ]


@pytest.mark.parametrize("name", of_tuning.PREFERENCES)
def test_a_pair_is_in_two_shards_and_some_tokens_are_prompts_or_padding(name: str, rng: np.random.Generator) -> None:
    loss = of_tuning.PREFERENCES[name]
    assert loss.kind == name.lower()
    one, other = of_tuning.pairs(rng, loss)
    assert (one.extra.place.argmax(1).tolist(), other.extra.place.argmax(1).tolist()) == ([0, 1, 2], [3])
    assert one.mask is not None and one.loss_mask is not None and other.loss_mask is not None
    assert (one.mask == 0).any()
    assert (one.loss_mask == 0).any(1).all() and one.loss_mask.any(1).all()
    lengths = [*(one.loss_mask * one.mask).sum(1), *other.loss_mask.sum(1)]
    assert (one.loss_mask > one.mask).any(), "padding is more than what is no answer"
    assert lengths[0] != lengths[1] and lengths[2] != lengths[3], "or a mean could not be told from a sum"


def test_a_wrong_sign_is_seen_in_every_tensor(monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator) -> None:
    right = Preference.backward
    monkeypatch.setattr(Preference, "backward", lambda self, cache, dsums: -right(self, cache, dsums))
    monkeypatch.setattr(of_tuning, "PREFERENCES", {"IPO": of_tuning.PREFERENCES["IPO"]})
    rows = of_tuning.rows(rng)
    assert len(failed(rows)) > 0.8 * len(rows)


def test_the_balance_loss_is_part_of_what_is_checked(monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator) -> None:
    right = objective.add_up

    def forgetful(params: Any, forwards: Any, config: Any, goal: Objective, *more: Any) -> Any:
        totals = right(params, forwards, config, goal, *more)
        return totals._replace(dstats=[tree.map(lambda leaf: 0 * leaf, layer) for layer in totals.dstats])

    monkeypatch.setattr(objective, "add_up", forgetful)
    monkeypatch.setattr(of_tuning, "PREFERENCES", {"DPO": of_tuning.PREFERENCES["DPO"]})
    assert "blocks[0].moe.router.w_gate" in {row.tensor for row in failed(of_tuning.rows(rng))}
