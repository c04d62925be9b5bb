"""The table of the suite: two models side by side, each difference as it was paired, and every number shown."""

import json

import numpy as np
import pytest

from minimoe.evaluate import intervals, suite, suite_table, tuned
from minimoe.evaluate.suite import Losses, Marks, Measured, Results, Settings
from minimoe.evaluate.tuned import Means

FEW = Settings(samples=6, questions=9, tokens=12)


def of(name: str, bits: float, right: int, active: int = 1000, tokens: int = 5000) -> Measured:
    """A result that was made up: 40 pieces of 100 bytes, 50 attempts."""
    hard = np.linspace(50, 150, 40)
    losses = {
        "fables": Losses(bits * hard, np.full(40, 100), 4.5),
        "short": Losses(np.full(3, 10.0), np.full(3, 4), 5.0),
    }
    marks = {"unseen sums, addition": Marks(np.arange(50) < right, 0.04), suite.PYTHON: "not measured: no Python"}
    return Measured(name, active, 3000, tokens, losses, marks)  # type: ignore[arg-type]


def test_rows_set_two_models_side_by_side() -> None:
    rows = suite_table.rows(Results(FEW, (of("mixture", 1.9, 30), of("dense", 2.0, 10))))
    assert [(row.group, row.name) for row in rows] == [
        ("held-out text", "fables"),
        ("held-out text", "short"),
        ("held-out text", "all"),
        ("unseen sums", "addition"),
        ("written texts", "Python that parses"),
    ]
    fables, short, every, addition, python = rows
    one, other = fables.cells
    assert one is not None and other is not None and fables.difference is not None
    assert (one.number.value, other.number.value) == pytest.approx((1.9, 2.0))
    assert one.number.low < 1.9 < one.number.high
    assert fables.difference.value == pytest.approx(-0.1)
    assert fables.difference.high - fables.difference.low < 0.1 * (one.number.high - one.number.low), "it is paired"
    assert short.cells[0] is not None and np.isnan(short.cells[0].number.low)
    assert every.cells[0] is not None and every.cells[0].number.value == pytest.approx((7600 + 30) / (4000 + 12))
    assert every.cells[0].chance == pytest.approx((4.5 * 4000 + 5 * 12) / 4012)
    assert addition.cells[0] is not None and (addition.cells[0].right, addition.cells[0].of) == (30, 50)
    assert addition.difference is not None and addition.difference.value == pytest.approx(0.4)
    assert addition.difference.low > 0.2
    assert python.cells == (None, None) and python.note == "not measured: no Python"


def test_sums_are_compared_in_pairs_and_written_texts_are_not() -> None:
    one, other = np.arange(50) < 30, np.arange(50) < 25

    def measured(right: np.ndarray) -> Measured:
        losses = {"fables": Losses(np.arange(40.0) * 10, np.full(40, 100), 4.5)}
        marks = {"unseen sums, addition": Marks(right, 0.04), suite.PYTHON: Marks(right, 0.25, 0.9)}
        return Measured("x", 1000, 3000, 5000, losses, marks)  # type: ignore[arg-type]

    results = Results(FEW, (measured(one), measured(other)))
    _, addition, python = suite_table.rows(results)
    assert addition.difference == intervals.answers_apart(one, other)
    assert python.difference == intervals.shares_apart(intervals.wilson(30, 50), intervals.wilson(25, 50))
    row = json.loads(suite_table.to_json(results))["rows"][-1]
    assert row["reachable"] == 0.9 and row["difference"]["value"] == pytest.approx(0.1)
    (line,) = (line for line in suite_table.table(results).splitlines() if line.startswith("  Python that parses"))
    assert line.split()[-2:] == ["25.0%", "90.0%"]
    loss, again = (suite_table.rows(Results(FEW._replace(seed=seed), results.models))[0].cells[0] for seed in (0, 1))
    assert loss is not None and again is not None and loss.number.low != again.number.low


def test_a_comparison_that_is_less_than_fair_says_so() -> None:
    def notes(*models: Measured) -> list[str]:
        return suite_table.notes(Results(FEW, models))

    ours = of("ours", 1.9, 3)
    assert notes(ours) == notes(ours, of("other", 2.0, 3)) == notes(ours, of("other", 2.0, 3, active=1005)) == []
    assert "ours was trained on 5,000 tokens, other on 6,000" in notes(ours, of("other", 2.0, 3, tokens=6000))[0]
    tuned_one, later = ours._replace(tuned=True), ours._replace(name="later", tuned=True, trained_tokens=7)
    for pair in ((tuned_one, of("other", 2.0, 3)), (of("other", 2.0, 3), tuned_one)):
        assert "ours was tuned on 5,000 tokens after its training, other was not tuned" in notes(*pair)[0]
    assert "ours was tuned on 5,000 tokens, later on 7" in notes(tuned_one, later)[0]
    assert "tuned on 5,000 tokens." in suite_table.table(Results(FEW, (tuned_one,)))
    assert "ours uses 1,000 parameters per token, other uses 1,500" in notes(ours, of("other", 2, 3, active=1500))[0]


def test_the_table_shows_every_number_and_cannot_steer_a_terminal() -> None:
    table = suite_table.table(Results(FEW, (of("mix\x1b[2J", 1.9, 30), of("dense", 2.0, 10, tokens=1))))
    assert "\x1b" not in table
    for shown in ("1.900 [", "2.000 [", "-0.100 [-0.1", "30/50  60.0% [46.2, 72.4]", "+40.0% [+", "too short", "4.0%",
                  "Unequal training", "written texts, Python that parses: not measured: no Python."):  # fmt: skip
        assert shown in table, shown
    alone = suite_table.table(Results(FEW, (of("mixture", 1.9, 30),)))
    assert "difference" not in alone and "60.0%" in alone


def test_tuned_models_are_compared_in_pairs_and_their_means_have_units() -> None:
    one, other = np.arange(50) < 30, np.arange(50) < 25
    noise = np.linspace(-3, 3, 12)

    def measured(right: np.ndarray, shift: float) -> Measured:
        marks = {f"{group}, any": Marks(right, 0.5) for group in (tuned.INSTRUCTIONS, tuned.PREFERENCES)}
        means = {
            f"{tuned.LENGTH}: mean": Means(noise + 9 + shift, None, 6.5),
            f"{tuned.BIAS}: he, not she": Means(noise + shift, 0.0, None),
        }
        losses = {"fables": Losses(np.arange(40.0) * 10, np.full(40, 100), 4.5)}
        return Measured("x", 1000, 3000, 5000, losses, marks, means)  # type: ignore[arg-type]

    results = Results(FEW, (measured(one, 0.25), measured(other, 0.0)))
    _, asked, preferred, length, praise = suite_table.rows(results)
    assert asked.difference == preferred.difference == intervals.answers_apart(one, other)
    assert (length.group, length.name, length.unit) == ("length of answers", "mean", "characters")
    assert (praise.group, praise.name, praise.unit) == ("praise and blame", "he, not she", "nats")
    assert praise.cells[0] is not None and praise.cells[0].number.low < 0 < praise.cells[0].number.high
    assert praise.difference is not None and praise.difference == pytest.approx((0.25, 0.25, 0.25)), "it is paired"
    table = suite_table.table(results)
    assert "length of answers, characters" in table and "praise and blame, nats" in table
    (line,) = (line for line in table.splitlines() if line.startswith("  he, not she"))
    assert line.split()[-2:] == ["0.00", "-"] and "+0.25 [+0.25, +0.25]" in line
    (line,) = (line for line in table.splitlines() if line.startswith("  mean"))
    assert line.split()[-2:] == ["-", "6.50"] and "9.25 [" in line
    row = json.loads(suite_table.to_json(results))["rows"][-1]
    assert row["unit"] == "nats" and row["models"][0]["of"] == 12 and row["models"][0]["chance"] == 0
    assert "Preferred answers:" in table
    assert "Preferred answers:" not in suite_table.table(Results(FEW, (of("mixture", 1.9, 30),)))


def test_one_reason_for_several_rows_is_said_once() -> None:
    base = of("base", 1.9, 30)
    reason = "not asked: tune it."
    base = base._replace(marks={f"{tuned.INSTRUCTIONS}, {kind}": reason for kind in ("sums", "words")})
    base = base._replace(means={f"{tuned.LENGTH}: mean": reason})
    table = suite_table.table(Results(FEW, (base,)))
    assert "\nheld-out instructions, sums, words: not asked: tune it.\n" in table
    assert "\nlength of answers, mean: not asked: tune it.\n" in table


def test_json_holds_the_same_and_no_nan() -> None:
    found = json.loads(suite_table.to_json(Results(FEW, (of("mixture", 1.9, 30), of("dense", 2.0, 10)))))
    assert found["settings"] == FEW._asdict()
    assert [model["name"] for model in found["models"]] == ["mixture", "dense"]
    fables, short, _, addition, python = found["rows"]
    assert fables["unit"] == "bits per byte" and fables["models"][1]["bytes"] == 4000
    assert short["models"][0]["low"] is None
    assert (addition["unit"], addition["models"][0]["right"], addition["models"][0]["of"]) == ("share", 30, 50)
    assert python["models"] == [None, None] and python["note"]
    assert [model["chance"] for model in addition["models"]] == [0.04, 0.04]
