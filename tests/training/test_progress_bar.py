"""The progress bar: what it shows after each step."""

from typing import Any

import pytest

from minimoe.training import progress_bar


class Line:
    """Stands for tqdm's bar and keeps what it is told."""

    def __init__(self) -> None:
        self.text, self.updates = "", 0

    def set_postfix_str(self, text: str, refresh: bool) -> None:
        self.text = text

    def update(self) -> None:
        self.updates += 1


def test_the_bar_shows_loss_speed_balance_and_the_latest_validation_loss() -> None:
    line = Line()
    bar = progress_bar.Bar(line)
    row: dict[str, Any] = {
        "loss": 2.34567,
        "tokens_per_second": 12_345.6,
        "load": [[0.5, 0.25, 0.125, 0.125], [0.25] * 4],
    }
    bar.show(row)
    assert line.text == "loss 2.346, validation -, 12,346 tokens/s, fullest expert 2.0x"
    bar.show({**row, "val_loss": 2.5})
    bar.show(row)
    assert "validation 2.500" in line.text
    assert line.updates == 3


def test_the_bar_starts_where_the_run_stands(capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bar.bar(steps=10, first=7, visible=True):
        pass
    assert "7/10" in capsys.readouterr().err
    with progress_bar.bar(steps=10, first=7, visible=False):
        pass
    assert capsys.readouterr().err == ""
