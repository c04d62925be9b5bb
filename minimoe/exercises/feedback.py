"""The report of an exercise's check: a sentence and a small table, as plain text and as HTML."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from html import escape
from typing import Literal, NamedTuple

from minimoe.draw import palette

State = Literal["right", "wrong", "not attempted"]

MARKS: dict[State, str] = {"right": "✓", "wrong": "✗", "not attempted": "○"}
COLOURS: dict[State, str] = {"right": palette.colour(2), "wrong": palette.colour(5), "not attempted": "#888888"}


class Row(NamedTuple):
    """The verdict on one value that an answer returned."""

    what: str  # "dx"
    shape: str
    error: str  # worst relative error, or how many entries differ
    verdict: str


HEADER = Row("what", "shape", "worst relative error", "verdict")


@dataclass(frozen=True)
class Report:
    """The result of a check; Jupyter displays it when it is the last value of a cell."""

    exercise: str
    state: State
    sentence: str
    rows: tuple[Row, ...] = ()

    @property
    def passed(self) -> bool:
        return self.state == "right"

    def __repr__(self) -> str:
        lines = [f"{MARKS[self.state]} {self.exercise}: {self.sentence}"]
        if self.rows:
            table = (HEADER, *self.rows)
            widths = [max(len(row[column]) for row in table) for column in range(len(HEADER))]
            for row in table:
                cells = (f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True))
                lines.append("    " + "  ".join(cells).rstrip())
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        sentence = f"<b>{MARKS[self.state]} {escape(self.exercise)}</b>: {escape(self.sentence)}"
        table = ""
        if self.rows:
            body = _html_row(HEADER, "th") + "".join(_html_row(row, "td") for row in self.rows)
            table = f'<table style="margin:0.5em 0 0 0">{body}</table>'
        return f'<div style="border-left:4px solid {COLOURS[self.state]};padding:0.2em 0.9em">{sentence}{table}</div>'


def first_failure(reports: Iterable[Report]) -> Report:
    """The first report that is not right, or the last one if all are right: for an exercise with several cases.

    If ``reports`` is a generator, no case is tried after one that failed.
    """
    for report in reports:
        if not report.passed:
            break
    return report


def _html_row(row: Row, tag: str) -> str:
    cells = "".join(f'<{tag} style="text-align:left">{escape(cell)}</{tag}>' for cell in row)
    return f"<tr>{cells}</tr>"
