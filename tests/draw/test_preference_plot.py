"""The figure of a run with preferences: the numbers that it draws."""

from typing import Any

import numpy as np
import pytest

from minimoe.core.errors import UserError
from minimoe.draw import preference_plot


def rows(count: int) -> list[dict[str, Any]]:
    made = []
    for step in range(1, count + 1):
        row: dict[str, Any] = {
            "step": step,
            "margin": 0.1 * step,
            "logp_chosen": -1.0 - step,
            "logp_rejected": -5.0 * step,
        }
        if step % 3 == 0:
            row |= {f"val_{name}": 2.0 * row[name] for name in ("margin", "logp_chosen", "logp_rejected")}
        made.append(row)
    return made


def test_curves_and_dots_are_those_of_the_rows() -> None:
    made = rows(7)
    left, right = preference_plot.curves(made).axes
    steps = [row["step"] for row in made]
    (margin, _, dots) = left.lines
    np.testing.assert_allclose(margin.get_xydata(), [(row["step"], row["margin"]) for row in made])
    np.testing.assert_allclose(
        dots.get_xydata(), [(row["step"], row["val_margin"]) for row in made if row["step"] % 3 == 0]
    )
    chosen, rejected = right.lines[0], right.lines[3]
    assert chosen.get_xdata().tolist() == steps
    np.testing.assert_allclose(chosen.get_ydata(), [row["logp_chosen"] for row in made])
    np.testing.assert_allclose(rejected.get_ydata(), [row["logp_rejected"] for row in made])
    assert [text.get_text() for text in right.get_legend().get_texts()] == ["chosen answer", "rejected answer"]


def test_without_a_validation_there_are_no_dots_and_without_rows_no_figure() -> None:
    left, _ = preference_plot.curves(rows(2)).axes
    assert len(left.lines[2].get_xdata()) == 0
    with pytest.raises(UserError, match="no metrics to draw"):
        preference_plot.curves([])
