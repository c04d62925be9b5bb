"""What is only shown: it never stops the work, whatever stands in the place of the console."""

import io
import os
from typing import Any

import pytest
from tqdm import tqdm

from minimoe.core import console


class Broken(io.StringIO):
    """A stream that fails in some way."""

    def __init__(self, error: Exception, on: str = "write") -> None:
        super().__init__()
        self.error, self.on = error, on

    def write(self, text: str) -> int:
        if self.on == "write":
            raise self.error
        return super().write(text)

    def flush(self) -> None:
        if self.on == "flush":
            raise self.error


ERRORS = [BrokenPipeError(), OSError(28, "No space left on device"), ValueError("closed file"), AttributeError("write")]


@pytest.mark.parametrize("on", ["write", "flush"])
@pytest.mark.parametrize("error", ERRORS, ids=repr)
def test_a_stream_that_fails_is_left_alone_from_then_on(error: Exception, on: str) -> None:
    stream = Broken(error, on)
    assert console.show("text", stream) is False
    shown = console.Shown(stream)
    for _ in range(3):
        shown.write("text", flush=True)
        shown.flush()
    assert stream.getvalue() == ("text\ntext" if on == "flush" else "")
    with tqdm(total=3, file=console.Shown(Broken(error, on)), mininterval=0) as bar:
        bar.update()


@pytest.mark.parametrize("encoding", ["cp1252", "ascii", "cp437", "utf-8", "latin-1"])
def test_a_console_gets_the_characters_that_it_knows_and_the_others_spelled_out(encoding: str) -> None:
    data = io.BytesIO()
    stream = io.TextIOWrapper(data, encoding=encoding)
    assert console.show("жил é 🦉 \x1b[2J \ud800", stream)
    said = data.getvalue().decode(encoding)
    assert said.endswith("\n") and r"\x1b[2J" in said
    assert ("жил" in said) == (encoding == "utf-8")
    assert (r"\u0436\u0438\u043b" in said) == (encoding != "utf-8")


def test_where_there_is_no_stream_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdout", None)
    assert console.show("text") is False
    nothing: Any = console.Shown(None)
    assert not nothing.write("text") and not nothing.isatty()
    with open(os.devnull, "w") as stream:
        assert console.Shown(stream).fileno() == stream.fileno()
