"""The progress bar of a training run, with the numbers worth watching."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from minimoe.core.console import Shown


class Bar:
    """A progress bar that shows the numbers worth watching."""

    def __init__(self, tqdm: Any) -> None:
        self._tqdm = tqdm
        self._validation = "-"

    def show(self, row: dict[str, Any]) -> None:
        """Advances by one step; ``row`` is its line of the metrics."""
        if "val_loss" in row:
            self._validation = f"{row['val_loss']:.3f}"
        fullest = max(max(layer) * len(layer) for layer in row["load"])
        with contextlib.suppress(Exception):  # in a notebook, the bar is not a stream but a widget
            self._tqdm.set_postfix_str(
                f"loss {row['loss']:.3f}, validation {self._validation}, {row['tokens_per_second']:,.0f} tokens/s, "
                f"fullest expert {fullest:.1f}x",
                refresh=False,
            )
            self._tqdm.update()


@contextmanager
def bar(steps: int, first: int, visible: bool) -> Iterator[Bar]:
    """A bar from step ``first`` to ``steps``, for the terminal or, in a notebook, for the notebook.

    If the bar cannot be shown, or stops working later, the run continues without it.
    """
    from tqdm import tqdm as plain
    from tqdm.auto import tqdm

    settings: dict[str, Any] = {"total": steps, "initial": first, "unit": "step", "file": Shown(sys.stderr)}
    try:
        shown = tqdm(disable=not visible, dynamic_ncols=True, **settings)
    except Exception:
        shown = plain(disable=True, **settings)
    try:
        yield Bar(shown)
    finally:
        with contextlib.suppress(Exception):
            shown.close()
