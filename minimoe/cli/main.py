"""Runs one command of the command line: standard streams, errors in one sentence, and the exit code.

The commands are in ``commands``, ``tuning`` and ``compression``, and their options in ``parser`` and ``options``.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import io
import os
import re
import sys
import warnings
from collections.abc import Iterator, Sequence
from typing import TextIO

from minimoe.cli import parser
from minimoe.cli.commands import BAD_INPUT, INTERRUPTED
from minimoe.cli.parser import in_a_line
from minimoe.core import console
from minimoe.core.errors import UserError


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code: 0, or 1 for a failed check, 2 for bad input, 130 for Ctrl-C.

    It may be called from Python too: nothing that it sets for the process outlasts it.
    """
    with _streams():
        return _main(sys.argv[1:] if arguments is None else list(arguments))


def _main(arguments: list[str]) -> int:
    chosen, unknown = parser.build().parse_known_args(_with_prompt(arguments))
    if unknown:
        chosen.parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    try:
        _refuse_empty(chosen)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # a model that overflows is refused by a UserError
            code: int = chosen.run(chosen)
        if code == 0 and chosen.command not in TRAINING:
            sys.stdout.flush()
    except UserError as error:
        return _refuse(str(error))
    except MemoryError as error:
        return _refuse(f"there is not enough memory ({error}): {MEMORY_ADVICE.get(chosen.command, 'free memory')}.")
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:  # the program that reads the output has ended, and with it the reason to write more
        return 0
    except OSError as error:
        advice = "free space, or choose another path"
        if error.errno in (errno.EMFILE, errno.ENFILE):
            advice = "raise the number of files that may be open, which `ulimit -n` shows"
        return _refuse(f"the system refuses the operation ({error}): {advice}.")
    return code


TRAINING = ("train", "sft", "dpo", "distill")
"""Commands whose result is a run folder; what they show meanwhile is no result."""

MEMORY_ADVICE = {
    "train": "choose a smaller --batch, --context or model, a larger --accumulate, or --threads 1",
    "sft": "choose a smaller --batch or model, a larger --accumulate, or --threads 1",
    "dpo": "choose a smaller --batch or model, a larger --accumulate, or --threads 1",
    "distill": "choose a smaller --batch or student, a larger --accumulate, or --threads 1",
    "prune": "give fewer --tokens or a smaller model",
    "bench": "choose a smaller --batch, --context or model, or --threads 1",
    "evaluate": "give --threads 1, a shorter --text, a smaller model, or a bound with --memory",
    "generate": "give a shorter --prompt, a smaller model, or a bound with --memory",
    "routing": "give --threads 1, a shorter --text, or a smaller model",
}
"""What the user can change, for each command, if there is too little memory."""


def _with_prompt(arguments: list[str]) -> list[str]:
    """The arguments with a prompt that begins with - tied to its option: argparse would take it for an option."""
    tied = list(arguments)
    for place in range(len(tied) - 2, -1, -1):
        prompt = tied[place + 1]
        is_option = re.fullmatch(r"-h|--[a-z][a-z-]*(=.*)?", prompt, re.DOTALL)
        if tied[place] == "--prompt" and prompt.startswith("-") and not is_option:
            tied[place : place + 2] = [f"--prompt={prompt}"]
    return tied


@contextlib.contextmanager
def _streams() -> Iterator[None]:
    """Standard streams that exist and can show every character, until the command ends.

    If a program is started with a closed stream, the next file that it opens gets the number of this stream, and the
    messages of the program would be written into this file.
    """
    with contextlib.suppress(OSError):
        while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
            pass
        os.close(descriptor)
    before = sys.stdout, sys.stderr
    nowhere = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - closed below
    sys.stdout, sys.stderr = sys.stdout or nowhere, sys.stderr or nowhere  # a closed stream is None
    errors = sys.stdout.errors if isinstance(sys.stdout, io.TextIOWrapper) else None
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # the terminal may not know all characters of the texts
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            _drop_output(stream)
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors=errors)
        sys.stdout, sys.stderr = before
        nowhere.close()


def _refuse_empty(chosen: argparse.Namespace) -> None:
    """Refuses empty arguments, which most likely come from unset shell variables; only a prompt may be empty."""
    for name, value in vars(chosen).items():
        if name != "prompt" and (value == "" or (isinstance(value, list) and "" in value)):
            if name in ("folder", "model", "name"):
                raise UserError(f"the argument {name} is empty, expected a value: give one.")
            raise UserError(f"--{name.replace('_', '-')} is empty, expected a value: give one, or leave it out.")


def _refuse(sentence: str) -> int:
    console.show(f"minimoe: {in_a_line(sentence)}", sys.stderr)
    return BAD_INPUT


def _drop_output(stream: TextIO) -> None:
    """Discards output that cannot be written, so that the interpreter does not try again when it exits."""
    try:
        stream.flush()
    except (OSError, ValueError):
        with contextlib.suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream.fileno())
            os.close(nowhere)
