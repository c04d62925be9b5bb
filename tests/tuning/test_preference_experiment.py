"""The small runs of the lesson: what their base knows, and that runs of one base can be compared."""

import math

import numpy as np
import pytest

from minimoe.core import tree
from minimoe.losses.preference import Preference
from minimoe.text import instructions
from minimoe.tuning import dpo, preference_experiment
from minimoe.tuning.preference_experiment import Base


@pytest.fixture(scope="module")
def base() -> Base:
    return preference_experiment.begin(seed=1, steps=10)


def test_its_pairs_ask_what_it_learned_to_answer_and_none_is_in_both_parts(base: Base) -> None:
    questions = {one.turns[:-1] for one in instructions.read() if one.kind in preference_experiment.INSTRUCTIONS}
    held_out = [one for one in instructions.read_pairs() if one.prompt in questions]
    assert 100 < len(base.train) + len(base.validation) < len(held_out)
    assert {one.kind for one in base.train} == set(preference_experiment.PAIRS)
    train, validation = (
        {example.chosen.ids.tobytes() + example.rejected.ids.tobytes() for example in part}
        for part in (base.train, base.validation)
    )
    assert not train & validation
    longest = max(len(one.ids) for example in base.train for one in (example.chosen, example.rejected))
    assert longest <= base.config.context + 1


def test_a_base_learns_and_a_seed_repeats_it(base: Base) -> None:
    again = preference_experiment.begin(seed=1, steps=10)
    assert all((a == b).all() for a, b in zip(tree.leaves(base.params), tree.leaves(again.params), strict=True))
    fresh = preference_experiment.begin(seed=1, steps=0)
    before, after = (dpo.sums_of(one.params, one.config, one.validation).logp[:, 0].mean() for one in (fresh, base))
    assert after > before + 2


def test_a_run_begins_at_the_reference_measures_every_tenth_step_and_leaves_the_base_alone(base: Base) -> None:
    kept = tree.map(np.copy, base.params)
    rows = preference_experiment.prefer(base, Preference("dpo", beta=0.1), steps=12, learning_rate=1e-2)
    assert [row.step for row in rows] == list(range(12))
    assert (
        [row.step for row in rows if row.held_out] == [0, 10] == [row.step for row in rows if row.likelier is not None]
    )
    assert rows[0].training.loss == pytest.approx(math.log(2), abs=1e-5)
    first, last = (row.held_out for row in rows if row.held_out)
    assert first is not None and last is not None
    assert abs(first.margin) < 1e-5 < last.margin and last.loss < first.loss
    assert rows[-1].gap > 1 and rows[-1].training.margin == pytest.approx(0.1 * rows[-1].gap, rel=1e-5)
    assert all((a == b).all() for a, b in zip(tree.leaves(kept), tree.leaves(base.params), strict=True))


def test_another_loss_reads_the_same_pairs(base: Base) -> None:
    losses = (Preference("dpo"), Preference("ipo"))
    one, other = (preference_experiment.prefer(base, loss, steps=4, learning_rate=0.0) for loss in losses)
    assert [row.training.logp_chosen for row in one] == [row.training.logp_chosen for row in other]
    assert len({row.training.logp_chosen for row in one}) == 4


def test_each_loss_takes_its_own_steps(base: Base) -> None:
    one, other = (
        preference_experiment.prefer(base, Preference(kind), steps=2, learning_rate=1e-2) for kind in ("dpo", "ipo")
    )
    assert abs(one[1].training.logp_rejected - other[1].training.logp_rejected) > 1e-3
