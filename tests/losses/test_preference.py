"""Preference losses: golden values, the gradient of every coefficient, and what must cancel, add up or stay equal."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from preference_shards import CASES, Case, fingerprint, shard_of
from small_models import assert_same, drawn

from minimoe.core import tree
from minimoe.core.config import ModelConfig
from minimoe.core.errors import UserError
from minimoe.losses import objective, preference
from minimoe.losses.balance import Coefficients
from minimoe.losses.objective import Objective, Shard, loss_and_gradient
from minimoe.losses.preference import Answers, Preference, Sums, places
from minimoe.proof.finite_differences import gradient
from minimoe.storage import huggingface

GOLDEN = Path(__file__).parent.parent / "golden"
KINDS = {
    "dpo": Preference("dpo", 0.3),
    "dpo, smoothed": Preference("dpo", 0.3, label_smoothing=0.1),
    "ipo": Preference("ipo", 0.3),
    "simpo": Preference("simpo", 2.0, margin=0.5),
}
every_kind = pytest.mark.parametrize("loss", KINDS.values(), ids=KINDS)


def sums_of(chosen: float, rejected: float, lengths: tuple[float, float] = (1, 1)) -> Sums:
    """One pair with these Δ, and a reference that is not 0."""
    return Sums(np.array([[chosen - 2.0, rejected - 3.0]]), np.array([lengths]), np.array([[-2.0, -3.0]]))


def random_sums(rng: np.random.Generator, pairs: int = 3) -> Sums:
    lengths = rng.integers(1, 9, size=(pairs, 2)).astype(float)
    return Sums(-lengths * rng.uniform(0.2, 2, (pairs, 2)), lengths, -lengths * rng.uniform(0.2, 2, (pairs, 2)))


def batch_of(rng: np.random.Generator, config: ModelConfig, pairs: int = 3) -> Shard:
    """Pairs of answers of different lengths, the chosen ones first, with padding and a reference."""
    shape = (2 * pairs, config.context)
    tokens, targets = rng.integers(config.vocab_size, size=(2, *shape))
    starts = rng.integers(0, config.context - 2, size=2 * pairs)
    ends = rng.integers(starts + 1, config.context + 1)
    at = np.arange(config.context)
    mask = (at < ends[:, None]).astype(float)
    answer = (at >= starts[:, None]).astype(float)
    place = np.concatenate([places(pairs)[::2], places(pairs)[1::2]])
    reference = -2.5 * (mask * answer).sum(1) + rng.standard_normal(2 * pairs)
    return Shard(tokens, targets, None, mask, answer, extra=Answers(place, reference))


def rows(batch: Shard, chosen: Any) -> Shard:
    """Some sequences of a batch."""
    assert batch.mask is not None and batch.loss_mask is not None
    return Shard(
        batch.tokens[chosen],
        batch.targets[chosen],
        None,
        batch.mask[chosen],
        batch.loss_mask[chosen],
        extra=batch.extra._replace(place=batch.extra.place[chosen], reference=batch.extra.reference[chosen]),
    )


def value_and_dlogits(loss: Preference, logits: np.ndarray, shard: Any) -> tuple[float, np.ndarray]:
    sums, cache = loss.forward(logits, shard)
    value, dsums = loss.value(sums)
    return float(value), loss.backward(cache, dsums).reshape(logits.shape)


# Values and gradients


@pytest.mark.parametrize(
    ("loss", "value", "coefficient"),
    [
        (Preference("dpo", 0.1), 0.437488, -0.035434),  # modelscope/ms-swift#10167
        (Preference("dpo", 0.1, label_smoothing=0.2), 0.557488, -0.015434),
        (Preference("ipo", 0.1), 1.0, 2.0),
        (Preference("simpo", 0.1, margin=0.3), 0.554355, -0.042556),
    ],
)
def test_golden_values_of_one_pair(loss: Preference, value: float, coefficient: float) -> None:
    sums = sums_of(4.0, -2.0)
    if loss.kind == "simpo":
        sums = sums._replace(logp=np.array([[-1.0, -7.0]]))
    found, dsums = loss.value(sums)
    assert (found, dsums.logp[0, 0]) == pytest.approx((value, coefficient), abs=5e-7)
    assert dsums.logp[0, 1] == -dsums.logp[0, 0]


@every_kind
@given(seed=st.integers(0, 999), pairs=st.integers(1, 4), scale=st.sampled_from([1.0, 30.0]))
def test_the_gradient_with_respect_to_every_log_probability_is_right(
    loss: Preference, seed: int, pairs: int, scale: float
) -> None:
    sums = random_sums(np.random.default_rng(seed), pairs)
    sums = sums._replace(logp=scale * sums.logp)
    _, dsums = loss.value(sums)
    by_differences = gradient(lambda logp: loss.value(sums._replace(logp=logp))[0], sums.logp)
    np.testing.assert_allclose(dsums.logp, by_differences, rtol=1e-6, atol=1e-9)
    assert not dsums.length.any() and not dsums.reference.any()


@every_kind
def test_the_gradient_with_respect_to_the_logits_is_right(
    loss: Preference, rng: np.random.Generator, small: ModelConfig
) -> None:
    shard = batch_of(rng, small)
    logits = rng.standard_normal((*shard.tokens.shape, small.vocab_size))
    by_differences = gradient(lambda z: value_and_dlogits(loss, z, shard)[0], logits)
    np.testing.assert_allclose(value_and_dlogits(loss, logits, shard)[1], by_differences, atol=1e-8)


def test_the_sums_agree_with_a_loop(rng: np.random.Generator, small: ModelConfig) -> None:
    shard = batch_of(rng, small)
    logits = rng.standard_normal((*shard.tokens.shape, small.vocab_size))
    sums, _ = KINDS["dpo"].forward(logits, shard)
    assert shard.mask is not None and shard.loss_mask is not None
    for row, place in enumerate(shard.extra.place.argmax(1)):
        logp, length = 0.0, 0
        for t in range(small.context):
            if shard.mask[row, t] and shard.loss_mask[row, t]:
                z = logits[row, t]
                logp += z[shard.targets[row, t]] - math.log(sum(math.exp(one) for one in z))
                length += 1
        where = divmod(int(place), 2)
        assert sums.logp[where] == pytest.approx(logp, rel=1e-12)
        assert sums.length[where] == length
        assert sums.reference[where] == shard.extra.reference[row]


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_loss_and_gradient_are_those_of_trl(case: Case) -> None:
    """In a file that tests/golden/make_preferences.py writes; tests/peers/test_trl.py compares with trl itself."""
    params, config = huggingface.load_params(GOLDEN / "mixtral")
    (name,) = [name for name, other in CASES.items() if other == case]
    expected = json.loads((GOLDEN / "preferences.json").read_text())[name]
    shard = shard_of(case, np.array(expected["reference"], np.float32))
    totals, slope = loss_and_gradient(params, [shard], config, case.objective)
    assert float(totals.total) == pytest.approx(expected["loss"], rel=1e-5)
    found = {name: fingerprint(leaf) for name, leaf in tree.named_leaves(slope)}
    assert found == pytest.approx(expected["gradient"], rel=1e-3, abs=1e-4)


# Identities


@every_kind
def test_without_a_change_the_loss_is_that_of_no_preference_and_the_gradient_is_not_zero(loss: Preference) -> None:
    pairs = 4
    logp = -np.arange(1.0, 9).reshape(pairs, 2)
    sums = Sums(logp, np.full((pairs, 2), 2.0), logp)
    value, dsums = loss.value(sums)
    if loss.kind == "dpo":
        assert value == pytest.approx(math.log(2), rel=1e-15)
        np.testing.assert_allclose(dsums.logp[:, 0], loss.beta * (loss.label_smoothing - 0.5) / pairs, rtol=1e-14)
    if loss.kind == "ipo":
        assert value == pytest.approx((1 / (2 * loss.beta)) ** 2, rel=1e-15)
    assert (dsums.logp[:, 0] < 0).all() and (dsums.logp[:, 1] > 0).all()
    if loss.kind != "simpo":
        assert preference.measures(loss, sums)[1:5] == (0, 0, 0, 0), "no margin, and an equal reward is not right"


@pytest.mark.parametrize("epsilon", [0.1, 0.3])
def test_with_smoothed_labels_the_loss_is_least_at_a_finite_margin(epsilon: float) -> None:
    loss = Preference("dpo", 0.5, label_smoothing=epsilon)
    best = math.log((1 - epsilon) / epsilon) / loss.beta
    value, dsums = loss.value(sums_of(best, 0.0))
    assert abs(dsums.logp).max() < 1e-15
    assert loss.value(sums_of(best + 0.1, 0.0))[0] > value < loss.value(sums_of(best - 0.1, 0.0))[0]
    plain = loss._replace(label_smoothing=0.0)
    assert plain.value(sums_of(best + 0.1, 0.0))[0] < plain.value(sums_of(best, 0.0))[0], "without, more is better"


def test_ipo_is_least_where_the_mean_gap_is_one_over_two_beta() -> None:
    loss = Preference("ipo", 0.25)
    value, dsums = loss.value(sums_of(12.0, 4.0, (4, 4)))  # h = 3 − 1 = 1/(2·0.25)
    assert (value, abs(dsums.logp).max()) == (0, 0)
    assert loss.value(sums_of(13.0, 4.0, (4, 4)))[1].logp[0, 0] > 0, "beyond the target, the gap should shrink"


@given(seed=st.integers(0, 999))
def test_a_swapped_pair_has_the_opposite_preference(seed: int) -> None:
    sums = random_sums(np.random.default_rng(seed))
    swapped = Sums(*(leaf[:, ::-1] for leaf in sums))
    for loss in KINDS.values():
        np.testing.assert_array_equal(loss.score(swapped), loss.score(sums)[:, ::-1])
        before, after = preference.measures(loss, sums), preference.measures(loss, swapped)
        assert after.margin == pytest.approx(-before.margin, rel=1e-12)
        assert after.accuracy == pytest.approx(1 - before.accuracy)
        assert (after.logp_chosen, after.logp_rejected) == (before.logp_rejected, before.logp_chosen)
    plain = KINDS["dpo"]
    mu = plain.beta * (plain.score(sums)[:, 0] - plain.score(sums)[:, 1])
    assert float(plain.value(sums)[0] - plain.value(swapped)[0]) == pytest.approx(-mu.mean(), abs=1e-12)


def test_a_prompt_left_in_both_sums_cancels_only_where_sums_are_compared(
    rng: np.random.Generator, small: ModelConfig
) -> None:
    """Both answers of a pair have the same prompt: tokens, targets and the logits there."""
    start, context, V = 3, small.context, small.vocab_size
    targets = rng.integers(V, size=(2, context))
    logits = rng.standard_normal((2, context, V))
    targets[1, :start], logits[1, :start] = targets[0, :start], logits[0, :start]
    of_prompt = KINDS["dpo"].forward(logits, Shard(targets, targets, extra=Answers(places(1))))[0]
    answer = (np.arange(context) >= start).astype(float) * np.array([[1.0], [1.0]])
    answer[1, -1] = 0  # of another length than the first

    def shard(counts: np.ndarray, of_reference: np.ndarray) -> Shard:
        return Shard(targets, targets, None, None, counts, extra=Answers(places(1), of_reference))

    everything = answer.copy()
    everything[:, :start] = 1
    chosen_only = answer.copy()
    chosen_only[1, :start] = 1
    prompt = float(of_prompt.logp[0, 0])
    for loss in KINDS.values():
        without = value_and_dlogits(loss, logits, shard(answer, np.array([-9.0, -8.0])))
        within = value_and_dlogits(loss, logits, shard(everything, np.array([-9.0 + prompt, -8.0 + prompt])))
        one_side = value_and_dlogits(loss, logits, shard(chosen_only, np.array([-9.0, -8.0])))
        same = [np.allclose(a, b, rtol=0, atol=1e-12) for a, b in zip(without, within, strict=True)]
        if loss.kind == "dpo":
            assert same[0]
            np.testing.assert_allclose(without[1][:, start:], within[1][:, start:], atol=1e-12)
            # the prompt's own gradients are opposite, and the model computes both from the same tokens
            np.testing.assert_allclose(within[1][0, :start], -within[1][1, :start], atol=1e-12)
        else:
            assert same == [False, False]
        assert abs(one_side[0] - without[0]) > 1e-3, "masked on one side only, it does not cancel"


@pytest.mark.parametrize("name", ["ipo", "simpo"])
def test_a_mean_does_not_change_when_every_token_is_repeated(
    name: str, rng: np.random.Generator, small: ModelConfig
) -> None:
    loss, shard = KINDS[name], batch_of(rng, small)
    logits = rng.standard_normal((*shard.tokens.shape, small.vocab_size))
    assert shard.mask is not None and shard.loss_mask is not None
    twice = Shard(
        shard.tokens.repeat(2, 1),
        shard.targets.repeat(2, 1),
        None,
        shard.mask.repeat(2, 1),
        shard.loss_mask.repeat(2, 1),
        extra=shard.extra._replace(reference=2 * shard.extra.reference),
    )
    value, dlogits = value_and_dlogits(loss, logits, shard)
    doubled, ddoubled = value_and_dlogits(loss, logits.repeat(2, 1), twice)
    assert doubled == pytest.approx(value, rel=1e-12)
    np.testing.assert_allclose(ddoubled[:, ::2], dlogits / 2, atol=1e-15)
    dpo = KINDS["dpo"]
    assert value_and_dlogits(dpo, logits.repeat(2, 1), twice)[0] != pytest.approx(
        value_and_dlogits(dpo, logits, shard)[0], rel=1e-3
    )


@pytest.mark.parametrize("start", [0, 2])
def test_the_length_is_the_number_of_log_probabilities_that_were_summed(start: int, rng: np.random.Generator) -> None:
    """Also where the prompt is empty: uniform logits make ℓ = −|y| log V, so that a count that is off by one shows."""
    V, T = 7, 6
    answer = (np.arange(T) >= start).astype(float)[None]
    shard = Shard(np.zeros((1, T), int), rng.integers(V, size=(1, T)), None, None, answer, extra=Answers(places(1)[:1]))
    sums, _ = KINDS["ipo"].forward(np.zeros((1, T, V)), shard)
    assert sums.length[0, 0] == T - start
    assert sums.logp[0, 0] == pytest.approx(-sums.length[0, 0] * math.log(V), rel=1e-14)
    everything, _ = KINDS["ipo"].forward(np.zeros((1, T, V)), shard._replace(loss_mask=None))
    assert everything.length[0, 0] == T


# Shards


@every_kind
@pytest.mark.parametrize("cut", [[[0, 1, 2], [3, 4, 5]], [[0, 3], [5, 1, 4], [2]]], ids=["answers apart", "mixed"])
@pytest.mark.parametrize("recompute", [False, True])
def test_shards_give_the_loss_and_the_gradient_of_their_batch(
    loss: Preference, cut: list[list[int]], recompute: bool, rng: np.random.Generator, small: ModelConfig
) -> None:
    """The first cut puts all chosen answers into one shard and all rejected ones into the other."""
    params, batch = drawn(rng, small), batch_of(rng, small)
    goal = Objective(Coefficients(balance=0.5), token_loss=loss)
    whole = loss_and_gradient(params, [batch], small, goal)
    parts = loss_and_gradient(params, [rows(batch, one) for one in cut], small, goal, recompute=recompute)
    assert_same(parts, whole)
    measured = [preference.measures(loss, totals.sums) for totals, _ in (whole, parts)]
    assert measured[0] == pytest.approx(measured[1], rel=1e-12)


def test_the_auxiliary_loss_comes_on_top(rng: np.random.Generator, small: ModelConfig) -> None:
    """At the first step the total is ln 2 + α Σ auxiliary, over chosen and rejected answers."""
    params, batch = drawn(rng, small), batch_of(rng, small)
    loss = KINDS["dpo"]
    sums, _, _ = objective.forward(params, batch, small, Objective(token_loss=loss), keep=False).sums
    own = batch._replace(extra=batch.extra._replace(reference=sums.logp.T.reshape(-1)))  # chosen answers come first
    for alpha in (0.0, 0.25):
        goal = Objective(Coefficients(balance=alpha), token_loss=loss)
        totals, slope = loss_and_gradient(params, [own], small, goal)
        assert totals.loss == pytest.approx(math.log(2), rel=1e-14)
        added = alpha * sum(float(layer.balance) for layer in totals.auxiliary)
        assert totals.total == pytest.approx(math.log(2) + added, rel=1e-14)
        assert min(float(abs(leaf).max()) for leaf in tree.leaves(slope.blocks[0].attention)) > 1e-6


# Extremes and bad values


@every_kind
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("size", [1e4, -1e4])
def test_extreme_log_probabilities_stay_finite(loss: Preference, size: float, dtype: Any) -> None:
    sums = Sums(np.array([[size, -size]], dtype), np.ones((1, 2), dtype), np.zeros((1, 2), dtype))
    with np.errstate(all="raise", under="ignore"):
        value, dsums = loss.value(sums)
    assert np.isfinite(value) and np.isfinite(dsums.logp).all()
    assert value.dtype == dsums.logp.dtype == dtype
    if loss.kind != "ipo":
        slope = loss.beta * (loss.label_smoothing - (size < 0))
        assert dsums.logp[0, 0] == pytest.approx(slope, rel=1e-6)


def test_a_sure_preference_keeps_a_slope_in_float32() -> None:
    """σ(μ) − 1 would be 0 here; the slope is −σ(−μ)."""
    sums = Sums(np.array([[10, -10]], np.float32), np.ones((1, 2), np.float32), np.zeros((1, 2), np.float32))
    _, dsums = Preference("dpo", 1.0).value(sums)
    assert dsums.logp[0, 0] == pytest.approx(-math.exp(-20), rel=1e-5)


@every_kind
def test_an_answer_without_a_token_counts_for_nothing(loss: Preference, rng: np.random.Generator) -> None:
    answer = np.array([[1.0, 1.0], [0.0, 0.0]])
    shard = Shard(np.zeros((2, 2), int), np.ones((2, 2), int), None, None, answer, extra=Answers(places(1)))
    value, dlogits = value_and_dlogits(loss, rng.standard_normal((2, 2, 3)), shard)
    assert math.isfinite(value)
    assert not dlogits[1].any() and dlogits[0].any()


@pytest.mark.parametrize(
    ("loss", "words"),
    [
        (Preference("sigmoid"), "no preference loss 'sigmoid'.*dpo, ipo, simpo"),
        (Preference(beta=0.0), "beta 0.0 .*above 0"),
        (Preference(beta=math.nan), "beta nan"),
        (Preference(label_smoothing=0.5), "label_smoothing 0.5 .*below 0.5"),
        (Preference(label_smoothing=-0.1), "label_smoothing -0.1"),
        (Preference("ipo", label_smoothing=0.1), "label_smoothing 0.1 has no meaning for ipo"),
        (Preference("dpo", margin=0.5), "margin 0.5 belongs to simpo"),
        (Preference("simpo", margin=-1.0), "margin -1.0 .*at least 0"),
        (Preference("simpo", margin=math.inf), "margin inf"),
    ],
)
def test_a_setting_that_is_not_possible_is_refused_in_a_sentence(loss: Preference, words: str) -> None:
    with pytest.raises(UserError, match=words):
        preference.check(loss)


@every_kind
def test_a_possible_setting_is_accepted(loss: Preference) -> None:
    preference.check(loss)
