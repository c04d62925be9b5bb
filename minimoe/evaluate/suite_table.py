"""The results of the evaluation suite as a table or as JSON: one model, or two side by side with their difference.

print(table(suite.run("runs/toy", against="runs/toy-dense")))
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from minimoe.core.errors import printable
from minimoe.evaluate import intervals, tuned
from minimoe.evaluate.changes import Changes
from minimoe.evaluate.intervals import Interval
from minimoe.evaluate.suite import SUMS, Losses, Measured, Results
from minimoe.evaluate.tuned import Marks, Means

LOSS = "held-out text"


class Cell(NamedTuple):
    """One model's number on one row."""

    number: Interval
    right: int | None  # attempts that were right; None for a loss
    of: int  # attempts, or bytes
    chance: float | None  # what needs no skill; for written texts, that of this model's own texts, shuffled


class Row(NamedTuple):
    """One line of the table; a cell that was not measured is None, and ``note`` says why."""

    group: str
    name: str
    cells: tuple[Cell | None, ...]  # one or two models
    difference: Interval | None  # first − second
    reachable: float | None
    note: str = ""
    unit: str = "share"


def rows(results: Results) -> list[Row]:
    """Every line of the table: losses in bits per byte, then shares, then means."""
    models, seed = results.models, results.settings.seed
    found = [_loss_row(name, [model.losses[name] for model in models], seed) for name in models[0].losses]
    if len(found) > 1:
        found.append(_loss_row("all", [_joined(list(model.losses.values())) for model in models], seed))
    found += [_share_row(task, [model.marks[task] for model in models]) for task in models[0].marks]
    return found + [_mean_row(task, [model.means[task] for model in models], seed) for task in models[0].means]


def notes(results: Results) -> list[str]:
    """One sentence for each reason why the comparison of two models is not fair."""
    if len(results.models) == 1:
        return []
    one, other = results.models
    found = []
    if one.tuned != other.tuned:
        tuned_one, untuned = (one, other) if one.tuned else (other, one)
        found.append(
            f"Unequal training: {tuned_one.name} was tuned on {tuned_one.trained_tokens:,} tokens after its training, "
            f"{untuned.name} was not tuned."
        )
    elif one.trained_tokens != other.trained_tokens:
        found.append(
            f"Unequal training: {one.name} was {_learned(one)} on {one.trained_tokens:,} tokens, {other.name} on "
            f"{other.trained_tokens:,}."
        )
    if abs(one.active / other.active - 1) > 0.01:
        found.append(
            f"Unequal models: {one.name} uses {one.active:,} parameters per token, {other.name} uses {other.active:,}."
        )
    return found


def _learned(model: Measured) -> str:
    return "tuned" if model.tuned else "trained"


def to_json(results: Results) -> str:
    """One JSON object, in ASCII; an unknown bound is null."""
    values = {
        "settings": results.settings._asdict(),
        "models": [
            {
                "name": model.name,
                "active_parameters": model.active,
                "total_parameters": model.total,
                "trained_tokens": model.trained_tokens,
            }
            for model in results.models
        ],
        "rows": [
            {
                "group": row.group,
                "name": row.name,
                "unit": row.unit,
                "models": [cell and _cell_to_dict(cell, "bytes" if row.group == LOSS else "of") for cell in row.cells],
                "difference": row.difference and _interval_to_dict(row.difference),
                "reachable": row.reachable,
                "note": row.note,
            }
            for row in rows(results)
        ],
        "notes": notes(results),
        "quantisation": results.changes and _changes_to_dict(results.changes),
    }
    return json.dumps(values, indent=2, allow_nan=False)


def table(results: Results) -> str:
    """The results in columns, without characters that could control a terminal."""
    heads = ["", *(model.name for model in results.models), *["difference"] * (len(results.models) - 1)]
    lines = [[*heads, "by chance", "real text"]]
    group, found = "", rows(results)
    for row in found:
        if row.group != group:
            group = row.group
            lines.append([group + ("" if row.unit == "share" else f", {row.unit}")])
        shown = {"bits per byte": _bits, "share": _percent}.get(row.unit, _number)
        cells = [cell and _shown(cell, shown) for cell in row.cells]
        apart = [_between(row.difference, shown, "+")] if len(row.cells) > 1 else []
        by_chance = [cell.chance for cell in row.cells if cell is not None and cell.chance is not None]
        chance = " / ".join(dict.fromkeys(shown(number, "") for number in by_chance))
        real = None if row.reachable is None else shown(row.reachable, "")
        lines.append(["  " + row.name, *(text or "-" for text in (*cells, *apart, chance, real))])
    about = [
        f"{model.name}: uses {model.active:,} of {model.total:,} parameters per token; {_learned(model)} on "
        f"{model.trained_tokens:,} tokens."
        for model in results.models
    ]
    missing: dict[tuple[str, str], list[str]] = {}  # several rows of a group may lack their numbers for one reason
    for row in found:
        if row.note:
            missing.setdefault((row.group, row.note.removesuffix(".")), []).append(row.name)
    reasons = [f"{group}, {', '.join(names)}: {note}." for (group, note), names in missing.items()]
    lost = [] if results.changes is None else [*_lost(results.changes), ""]
    parts = [*about, *notes(results), "", *_columns(lines), "", *lost, *reasons, *_explained(results)]
    return printable("\n".join(parts))


def _lost(changes: Changes) -> list[str]:
    """What quantisation changed, in sentences."""
    shown = str(_between(changes.nats, lambda number, sign: f"{number:{sign}.4f}", "+"))
    found = [f"Loss of {changes.name} against {changes.against}: {shown} nats per token of held-out text."]
    if len(changes.others):
        layers = ", ".join(_percent(count / changes.tokens, "") for count in changes.others.tolist())
        found.append(
            f"Changed routings: {_percent(changes.share, '')}, by layer {layers}: the set of experts that a token is "
            "sent to."
        )
    return found


def _changes_to_dict(changes: Changes) -> dict[str, Any]:
    return {
        "name": changes.name,
        "against": changes.against,
        "nats_per_token": _interval_to_dict(changes.nats),
        "changed_routings": {
            "share": changes.share,
            "layers": changes.others.tolist(),
            "of": changes.tokens,
        },
    }


def _explained(results: Results) -> list[str]:
    settings = results.settings
    return [
        "[ ] contains the true value 19 times out of 20: a bootstrap over pieces of text for losses, Wilson's interval "
        "for shares.",
        f"Written: {settings.samples} texts and definitions of {settings.tokens} tokens at temperature "
        f"{settings.temperature:g}, seed {settings.seed}.",
        "By chance: characters predicted by their frequency; the commonest answer every time; the written texts with "
        "their characters shuffled.",
        "Real text: held-out text, cut like the written texts.",
        *(_explained_tuned() if results.models[0].means else []),
    ]


def _explained_tuned() -> list[str]:
    return [
        "Preferred answers: pairs of answers of which the better one is likelier. A longer answer is less likely, so "
        "'length' says little.",
        "Praise and blame: how much more likely praise is, rather than blame, after the first word than after the "
        "second; 0 is no difference. What this can and cannot say: minimoe/evaluate/bias.py.",
    ]


def _joined(losses: Sequence[Losses]) -> Losses:
    """The losses of all documents as those of one."""
    sizes = np.concatenate([part.sizes for part in losses])
    chance = sum(part.chance * int(part.sizes.sum()) for part in losses) / int(sizes.sum())
    return Losses(np.concatenate([part.bits for part in losses]), sizes, chance)


def _loss_row(name: str, losses: Sequence[Losses], seed: int) -> Row:
    first = losses[0]
    size = int(first.sizes.sum())
    apart = [intervals.ratios_apart(first.bits, other.bits, first.sizes, seed) for other in losses[1:]]
    cells = tuple(Cell(intervals.ratio(one.bits, one.sizes, seed), None, size, one.chance) for one in losses)
    return Row(LOSS, name, cells, apart[0] if apart else None, None, unit="bits per byte")


def _share_row(task: str, marks: Sequence[Marks | str]) -> Row:
    group, name = task.split(", ")
    cells = tuple(None if isinstance(one, str) else _share(one) for one in marks)
    measured = [one for one in marks if isinstance(one, Marks)]
    return Row(
        group,
        name,
        cells,
        _shares_apart(group, *measured) if len(measured) == 2 else None,
        measured[0].reachable if measured else None,
        "; ".join(dict.fromkeys(one for one in marks if isinstance(one, str))),
    )


def _mean_row(task: str, means: Sequence[Means | str], seed: int) -> Row:
    heading, name = task.split(", ", 1)
    unit, name = name.split(": ", 1)
    measured = [one for one in means if isinstance(one, Means)]

    def cell(one: Means) -> Cell:
        return Cell(intervals.ratio(one.values, np.ones(len(one.values)), seed), None, len(one.values), one.chance)

    apart = None
    if len(measured) == 2:
        first, second = measured
        apart = intervals.ratios_apart(first.values, second.values, np.ones(len(first.values)), seed)
    cells = tuple(None if isinstance(one, str) else cell(one) for one in means)
    note = "; ".join(dict.fromkeys(one for one in means if isinstance(one, str)))
    return Row(heading, name, cells, apart, measured[0].reachable if measured else None, note, unit)


def _share(marks: Marks) -> Cell:
    right, of = int(marks.right.sum()), len(marks.right)
    return Cell(intervals.wilson(right, of), right, of, marks.chance)


def _shares_apart(group: str, one: Marks, other: Marks) -> Interval:
    """Paired where both models answer the same questions; unpaired for texts, since each writes its own."""
    if group in (SUMS, tuned.INSTRUCTIONS, tuned.PREFERENCES):
        return intervals.answers_apart(one.right, other.right)
    return intervals.shares_apart(_share(one).number, _share(other).number)


def _cell_to_dict(cell: Cell, unit: str) -> dict[str, Any]:
    counted = {unit: cell.of} if cell.right is None else {"right": cell.right, "of": cell.of}
    return {**_interval_to_dict(cell.number), **counted, "chance": cell.chance}


def _interval_to_dict(interval: Interval) -> dict[str, float | None]:
    return {name: value if math.isfinite(value) else None for name, value in interval._asdict().items()}


def _bits(number: float, sign: str) -> str:
    return f"{number:{sign}.3f}"


def _number(number: float, sign: str) -> str:
    return f"{number:{sign}.2f}"


def _percent(number: float, sign: str) -> str:
    return f"{100 * number:{sign}.1f}%"


def _shown(cell: Cell, shown: Callable[[float, str], str]) -> str:
    counted = "" if cell.right is None else f"{cell.right}/{cell.of}  "
    return counted + str(_between(cell.number, shown, ""))


def _between(interval: Interval | None, shown: Callable[[float, str], str], sign: str) -> str | None:
    if interval is None:
        return None
    value, low, high = (shown(number, sign) for number in interval)
    return f"{value} [{low.rstrip('%')}, {high.rstrip('%')}]" if math.isfinite(interval.low) else f"{value} [too short]"


def _columns(lines: Sequence[Sequence[str]]) -> list[str]:
    """Aligns lines of cells, the first cell to the left and the others to the right; a single cell is a heading."""
    whole = [line for line in lines if len(line) > 1]
    widths = [max(map(len, column)) for column in zip(*whole, strict=True)]
    return [
        "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]).rstrip()
        if len(line) > 1
        else "\n" + line[0]
        for line in lines
    ]
