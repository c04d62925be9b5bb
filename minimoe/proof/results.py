"""The results of a gradient check: one row per tensor, as a table to read or as JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from minimoe.core.summary import Listed


class Row(NamedTuple):
    """The result for one tensor."""

    component: str
    tensor: str  # "x", or the name of a parameter
    shape: tuple[int, ...]
    bound: float  # the largest error that passes
    margin: float | None  # smallest gap between a chosen logit and one that is not; None if nothing can flip
    checked: int = 0  # probes compared: single entries, and directions through the whole tensor
    refused: int = 0  # probes that would have changed the ranking of the experts or crossed a kink
    error: float = math.inf  # largest |numeric − analytic|, relative to the largest gradient
    largest: float = 0.0  # the largest gradient; if it is 0, a check proves little
    problem: str = ""  # a sentence if something is wrong
    kinks: int = 0  # those of the refused probes that would have crossed a kink

    @property
    def passed(self) -> bool:
        return not self.problem


class Rows(Listed[Row]):
    """The results of many tensors."""

    hint = "results of a gradient check; gradcheck.table shows them"


def failed(rows: Iterable[Row]) -> list[Row]:
    """The rows that did not pass."""
    return [row for row in rows if not row.passed]


def table(rows: Sequence[Row]) -> str:
    """The rows as an aligned text, with a last line that sums them up."""
    lines = [("component", "tensor", "worst relative error", "margin to a routing flip", "verdict")]
    lines += [(row.component, row.tensor, f"{row.error:.1e}", _margin(row), _verdict(row)) for row in rows]
    widths = [max(len(line[column]) for line in lines) for column in range(4)]
    text = [
        f"{component:<{widths[0]}}  {tensor:<{widths[1]}}  {error:>{widths[2]}}  {margin:>{widths[3]}}  {verdict}"
        for component, tensor, error, margin, verdict in lines
    ]
    bad = len(failed(rows))
    worst = max((row.error for row in rows), default=0.0)
    text.append(f"{len(rows)} tensors checked, {bad or 'none'} failed; worst relative error {worst:.1e}")
    return "\n".join(text)


def _margin(row: Row) -> str:
    return "-" if row.margin is None else f"{row.margin:.1e}"


def _verdict(row: Row) -> str:
    if not row.passed:
        return f"FAILED: {row.problem}"
    if not row.refused:
        return "ok"
    near = ["a flip"] * (row.refused > row.kinks) + ["a kink"] * (row.kinks > 0)
    return f"ok ({row.refused} of {row.refused + row.checked} probes refused: too near {' or '.join(near)})"


def to_json(rows: Iterable[Row]) -> str:
    """The rows as a JSON list of objects, whose keys are the fields of ``Row`` and ``passed``."""
    objects = [{name: _finite(value) for name, value in row._asdict().items()} for row in rows]
    return json.dumps([{**fields, "passed": not fields["problem"]} for fields in objects], indent=1)


def _finite(value: Any) -> Any:
    """The value, or None for infinity and NaN, which JSON does not have."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
