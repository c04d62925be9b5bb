"""A conversation with a model that was tuned to answer: in a terminal, or in Python.

    for token in conversation.reply(model, [Turn("user", "3 + 4")], temperature=0): ...

The model reads the whole conversation before each answer and stops at the id that ends an answer. No turn is left out:
if the conversation no longer fits the context that the model was trained with, ``reply`` refuses the conversation,
because a conversation without its beginning is something that the model never saw in training.

A terminal shows the answer while it is written. Ctrl-C stops the answer, and what was written stays a part of the
conversation; the end of the input, or /exit, ends the chat.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

import numpy as np

from minimoe.core import console, files
from minimoe.core.config import ModelConfig
from minimoe.core.errors import UserError, printable
from minimoe.inference import generation, sampling
from minimoe.layers.decoder import Decoder
from minimoe.text import chat
from minimoe.text.chat import AnyTokenizer, Turn
from minimoe.text.tokenizer import Ids

HELP = """\
/reset       begin a new conversation
/save PATH   write the conversation to a new file, one that minimoe sft can read
/help        show this text
/exit        end the chat, as does the end of the input (Ctrl-D)
Ctrl-C       stop the answer"""


class Talker(Protocol):
    """A model that can answer, such as ``checkpoint.Model`` and ``huggingface.Pretrained``."""

    @property
    def params(self) -> Decoder: ...
    @property
    def config(self) -> ModelConfig: ...
    @property
    def tokenizer(self) -> AnyTokenizer: ...


class Settings(NamedTuple):
    """How a model answers."""

    system: str = ""  # what opens the first question
    temperature: float = 0.5
    seed: int = 0  # of the first answer; the next one has the next seed


def reply(
    model: Talker, turns: Sequence[Turn], *, temperature: float = 0.5, seed: int = 0, tokens: int | None = None
) -> Iterator[int]:
    """Yields the ids of the answer to the last turn, each as soon as it is drawn; the id of the end comes last.

    If the context is full before the answer ends, or ``tokens`` are written, that id is missing.

    Raises:
        UserError: at the call, if the model has no tokens for a chat, the turns are not a conversation that ends with a
            turn of the user, the context has no room for an answer, or a setting is out of its range.
    """
    asked = _prompt(model, turns)
    ends = chat.end_ids(model.tokenizer)
    room = model.config.context - len(asked)
    room = room if tokens is None else min(room, tokens)
    written = generation.generate(model.params, model.config, asked, tokens=room, temperature=temperature, seed=seed)

    def until_the_end() -> Iterator[int]:
        for token in written:
            yield token
            if token in ends:
                return

    return until_the_end()


def _prompt(model: Talker, turns: Sequence[Turn]) -> Ids:
    """The ids of the conversation, if the context has room for an answer; otherwise raises ``UserError``."""
    asked = chat.prompt(model.tokenizer, turns)
    if len(asked) >= model.config.context:
        named, advice = "question", "shorten it"
        if any(Turn(*turn).role == "assistant" for turn in turns):
            named, advice = "conversation", "begin a new one (in a terminal, with /reset)"
        raise UserError(
            f"The {named} has {len(asked):,} tokens, which leaves no room for an answer in the model's context of "
            f"{model.config.context:,}: {advice}."
        )
    return asked


def answer(model: Talker, turns: Sequence[Turn], *, temperature: float = 0.0, seed: int = 0) -> str:
    """The text of the answer to the last turn, the likeliest one by default; raises ``UserError`` like ``reply``."""
    ids = np.array(list(reply(model, turns, temperature=temperature, seed=seed)), dtype=np.int32)
    ends = chat.end_ids(model.tokenizer)
    return model.tokenizer.decode(ids[~np.isin(ids, ends)])


def in_terminal(model: Talker, settings: Settings | None = None) -> None:
    """Reads questions from standard input and answers on standard output until the input ends.

    Standard output gets the answers, one after the other, and standard error everything else. If the input is not a
    terminal, no prompt is shown.

    Raises:
        UserError: the model cannot chat, the system's text does not fit it, or standard input is closed.
    """
    settings = settings or Settings()
    _check(model, settings)
    interactive = sys.stdin.isatty()
    if interactive:
        with contextlib.suppress(ImportError):  # it gives input() the arrow keys; Windows does not have it
            import readline  # noqa: F401
        console.show("/help lists the commands; Ctrl-D ends the chat.", sys.stderr)
    turns = start = [Turn("system", settings.system)] * bool(settings.system)
    answers = 0
    while True:
        try:
            said = input("> " if interactive else "").strip("\r")
        except EOFError:
            if interactive:
                print()
            return
        except KeyboardInterrupt:
            console.show("\n/exit ends the chat.", sys.stderr)
            continue
        except UnicodeDecodeError as error:
            raise UserError(f"standard input is not UTF-8 ({error.reason}): convert it.") from None
        try:
            if said.startswith("/"):
                if said.strip() == "/exit":
                    return
                turns = _command(said, turns, start)
            elif said.strip():
                turns = _exchange(model, [*turns, Turn("user", said)], settings, answers)
                answers += 1
        except UserError as error:
            console.show(str(error), sys.stderr)


def _check(model: Talker, settings: Settings) -> None:
    """Raises ``UserError`` for errors that do not depend on the question."""
    chat.end_ids(model.tokenizer)
    sampling.check(settings.temperature, None, None)
    if settings.seed < 0:
        raise UserError(f"seed {settings.seed} is not a seed: choose a whole number of at least 0.")
    if settings.system:
        try:
            _prompt(model, [Turn("system", settings.system), Turn("user", settings.system[:1])])
        except UserError as error:
            raise UserError(f"The system's text cannot be used: {error}") from None
    if sys.stdin is None:
        raise UserError("Standard input is closed, so there is nothing to answer: run the chat in a terminal.")


def _command(said: str, turns: list[Turn], start: list[Turn]) -> list[Turn]:
    """Does what a line that begins with / asks for, and returns the turns of the conversation from now on."""
    name, _, rest = said.partition(" ")
    if name == "/reset":
        return start
    if name == "/save":
        _save(rest.strip(), turns)
    elif name == "/help":
        console.show(HELP, sys.stderr)
    else:
        raise UserError(f"There is no command {name:.40}: /help lists the commands.")
    return turns


def _save(path: str, turns: list[Turn]) -> None:
    """Writes the conversation as one line, as ``minimoe.text.instructions`` reads it."""
    if not path:
        raise UserError("/save needs the name of a file: write /save PATH.")
    if not any(role == "assistant" for role, _ in turns):
        raise UserError("There is no answer to save: ask something first.")
    place = files.chosen_place(path)
    if place.exists():
        raise UserError(f"{path} exists already: give the name of a new file.")
    asked = next(text for role, text in turns if role == "user")
    line = json.dumps({"kind": "chat", "document": asked, "turns": turns}, ensure_ascii=False)
    files.write_atomically(place, (line + "\n").encode(errors="backslashreplace"))
    console.show(f"{path} is written.", sys.stderr)


def _exchange(model: Talker, turns: list[Turn], settings: Settings, answers: int) -> list[Turn]:
    """Shows the answer to the last turn while it is written, and returns the turns with this answer.

    If the answer has no text, its question is removed too, since two turns of the user cannot follow each other.
    """
    ids = reply(model, turns, temperature=settings.temperature, seed=settings.seed + answers)
    ends = chat.end_ids(model.tokenizer)
    ended: list[int] = []

    def text_ids() -> Iterator[int]:
        for token in ids:
            if token in ends:
                ended.append(token)
            else:
                yield token

    text, note = "", ""
    try:
        for piece in model.tokenizer.stream(text_ids()):
            text += piece
            print(printable(piece), end="", flush=True)
        if not ended:
            note = (
                f"The answer stops here, because the model's context of {model.config.context:,} tokens is full: "
                "/reset begins a new conversation."
            )
    except KeyboardInterrupt:
        note = "The answer was stopped."
    print(flush=True)
    if note:
        console.show(note, sys.stderr)
    return [*turns, Turn("assistant", text)] if text else turns[:-1]
