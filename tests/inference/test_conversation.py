"""Chatting: answers end at their end, the context is never exceeded, and a terminal can stop, save and begin again."""

import dataclasses
import io
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_chats
from small_runs import finished
from tokenizer_json import mixtral_like

from minimoe.core.errors import UserError
from minimoe.inference import conversation, generation
from minimoe.inference.conversation import Settings
from minimoe.layers import decoder
from minimoe.storage import checkpoint, huggingface, open_model
from minimoe.storage.checkpoint import Model
from minimoe.text import chat, instructions
from minimoe.text.chat import Turn
from minimoe.text.huggingface_tokenizer import PretrainedTokenizer

MODEL = small_chats.tuned()
END = MODEL.tokenizer.vocab_size - 1
QUESTION = [Turn("user", "2 + 2?")]


@pytest.fixture(name="says")
def _says(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[dict[str, Any]]]:
    """Lets the model say certain answers; returns what it was asked, with the settings."""

    def script(*answers: Any) -> list[dict[str, Any]]:
        left = iter(answers)
        calls: list[dict[str, Any]] = []

        def generate(params: Any, config: Any, prompt: Any, *, tokens: int, **settings: Any) -> Iterator[int]:
            calls.append({"prompt": prompt.tolist(), "tokens": tokens, **settings})
            ids: Any = next(left)
            return iter(ids() if callable(ids) else ids)

        monkeypatch.setattr(generation, "generate", generate)
        return calls

    return script


def ids(text: str, end: bool = True) -> list[int]:
    return [*MODEL.tokenizer.encode(text).tolist(), *[END] * end]


@pytest.fixture(name="talk")
def _talk(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[str, str]]:
    """Chats with lines that are piped in; returns what is on standard output and on standard error."""

    def run(*lines: str, model: Model = MODEL, **settings: Any) -> tuple[str, str]:
        monkeypatch.setattr("sys.stdin", io.StringIO("".join(line + "\n" for line in lines)))
        conversation.in_terminal(model, Settings(**settings))
        said = capsys.readouterr()
        return said.out, said.err

    return run


# Answers


def test_a_reply_is_what_the_model_generates_after_the_prompt_until_the_end() -> None:
    asked = chat.prompt(MODEL.tokenizer, QUESTION)
    room = MODEL.config.context - len(asked)
    for seed in range(20):
        drawn = list(generation.generate(MODEL.params, MODEL.config, asked, tokens=room, temperature=1.0, seed=seed))
        expected = drawn[: drawn.index(END) + 1] if END in drawn else drawn
        assert list(conversation.reply(MODEL, QUESTION, temperature=1.0, seed=seed)) == expected
        text = conversation.answer(MODEL, QUESTION, temperature=1.0, seed=seed)
        assert text == MODEL.tokenizer.decode([token for token in expected if token != END])


def test_nothing_is_written_after_the_end(says: Callable[..., Any]) -> None:
    says([*ids("four"), *ids("never")])
    assert conversation.answer(MODEL, QUESTION) == "four"


def test_prompt_and_answer_fill_the_context_and_no_more() -> None:
    length = len(chat.prompt(MODEL.tokenizer, QUESTION))
    for room in (1, 2):
        model = small_chats.tuned(context=length + room)
        lengths = [len(list(conversation.reply(model, QUESTION, temperature=1.0, seed=seed))) for seed in range(9)]
        assert max(lengths) == room
    with pytest.raises(UserError, match=f"has {length} tokens, which leaves no room .* of {length}: shorten it"):
        conversation.reply(small_chats.tuned(context=length), QUESTION)
    with pytest.raises(UserError, match="leaves no room .*: begin a new one"):
        conversation.reply(small_chats.tuned(context=length), [*QUESTION, Turn("assistant", "4"), *QUESTION])


def test_a_model_that_was_not_tuned_says_so() -> None:
    with pytest.raises(UserError, match="minimoe sft"):
        conversation.reply(checkpoint.load_model(finished()), QUESTION)


def test_a_tuned_run_ends_its_texts_too(tmp_path: Path) -> None:
    """Text generation stops at the end of an answer, which the run knows from its tokenizer."""
    loaded = open_model.load(small_chats.save(tmp_path / "run", MODEL))
    assert loaded.end_tokens == chat.end_ids(loaded.tokenizer) == (END,)
    assert checkpoint.load_model(finished()).end_tokens == ()


def test_a_mixtral_folder_answers(tmp_path: Path, talk: Callable[..., tuple[str, str]]) -> None:
    """It reads [INST] … [/INST] and stops at </s>."""
    library = pytest.importorskip("tokenizers").Tokenizer.from_str(json.dumps(mixtral_like()))
    library.no_truncation()
    codec = PretrainedTokenizer(library)
    config = dataclasses.replace(MODEL.config, vocab_size=codec.vocab_size, window=None)
    params = decoder.init(np.random.default_rng(0), config, np.float32)
    huggingface.save(tmp_path / "mixtral", params, config, codec)
    model = open_model.load(tmp_path / "mixtral")
    asked = chat.prompt(model.tokenizer, [Turn("user", "the bread")])
    assert asked[0] == 1 and (asked == 1).sum() == 1
    drawn = list(generation.generate(params, config, asked, tokens=48 - len(asked), temperature=0))
    assert list(conversation.reply(model, [Turn("user", "the bread")], temperature=0)) == [
        *takewhile(lambda token: token != 2, drawn),
        *[2] * (2 in drawn),
    ]
    out, said = talk("the bread", model=model, temperature=0)
    assert out.count("\n") >= 1 and ("is full" in said) == (2 not in drawn)


# The terminal, with its input piped in


def test_each_answer_is_a_line_and_the_conversation_goes_on(
    talk: Callable[..., tuple[str, str]], says: Callable[..., Any]
) -> None:
    calls = says(ids("yes"), ids("no"))
    assert talk("a?", "", "  ", "b?", system="be.", temperature=0.25, seed=7) == ("yes\nno\n", "")
    first = [Turn("system", "be."), Turn("user", "a?")]
    second = [*first, Turn("assistant", "yes"), Turn("user", "b?")]
    assert [call["prompt"] for call in calls] == [chat.prompt(MODEL.tokenizer, t).tolist() for t in (first, second)]
    assert [(call["temperature"], call["seed"]) for call in calls] == [(0.25, 7), (0.25, 8)]


def test_reset_begins_again_with_the_system(talk: Callable[..., tuple[str, str]], says: Callable[..., Any]) -> None:
    calls = says(ids("yes"), ids("no"))
    talk("a?", "/reset", "b?", system="be.")
    alone = chat.prompt(MODEL.tokenizer, [Turn("system", "be."), Turn("user", "b?")])
    assert calls[1]["prompt"] == alone.tolist()


def test_help_names_every_command_and_an_unknown_one_says_so(talk: Callable[..., tuple[str, str]]) -> None:
    out, said = talk("/help", "/rest now")
    assert out == ""
    for command in ("/reset", "/save", "/help", "/exit"):
        assert command in said
    assert "There is no command /rest: /help lists the commands." in said


def test_exit_ends_the_chat(talk: Callable[..., tuple[str, str]], says: Callable[..., Any]) -> None:
    says(ids("yes"))
    assert talk("a?", "/exit ", "b?") == ("yes\n", "")


def test_a_saved_conversation_can_be_learned_from(
    talk: Callable[..., tuple[str, str]], says: Callable[..., Any], tmp_path: Path
) -> None:
    says(ids("yes"), ids("no"))
    path = tmp_path / "chat.jsonl"
    _, said = talk("/save", f"/save {path}", "a?", "b?", f"/save {path}", f"/save {path}", system="be.")
    lines = said.splitlines()
    assert "needs the name of a file" in lines[0] and "no answer to save" in lines[1]
    assert "is written" in lines[2] and "exists already" in lines[3]
    (saved,) = instructions.read(path)
    asked = [Turn("system", "be."), Turn("user", "a?"), Turn("assistant", "yes")]
    assert saved.turns == (*asked, Turn("user", "b?"), Turn("assistant", "no"))
    assert saved.document == "a?"


def test_a_question_that_cannot_be_asked_leaves_no_trace(
    talk: Callable[..., tuple[str, str]], says: Callable[..., Any]
) -> None:
    calls = says(ids("yes"), ids(""), ids("no"))
    out, said = talk("Ω?", "a?", "b?", "b" * 99, "c?")
    assert out == "yes\n\nno\n"
    assert "'Ω'" in said and "leaves no room for an answer" in said and "/reset" in said
    turns = [Turn("user", "a?"), Turn("assistant", "yes"), Turn("user", "c?")]  # b? was answered with nothing
    assert calls[2]["prompt"] == chat.prompt(MODEL.tokenizer, turns).tolist()


def test_a_full_context_is_said_in_a_sentence(talk: Callable[..., tuple[str, str]], says: Callable[..., Any]) -> None:
    says(ids("and", end=False))
    out, said = talk("a?")
    assert out == "and\n"
    assert said.count("\n") == 1 and "context of 48 tokens is full: /reset" in said


def test_ctrl_c_stops_the_answer_but_not_the_chat(
    talk: Callable[..., tuple[str, str]], says: Callable[..., Any]
) -> None:
    def stopped() -> Iterator[int]:
        yield from ids("and", end=False)
        raise KeyboardInterrupt

    calls = says(stopped, ids("no"))
    assert talk("a?", "b?") == ("and\nno\n", "The answer was stopped.\n")
    turns = [Turn("user", "a?"), Turn("assistant", "and"), Turn("user", "b?")]
    assert calls[1]["prompt"] == chat.prompt(MODEL.tokenizer, turns).tolist()


def test_an_answer_cannot_control_the_terminal(talk: Callable[..., tuple[str, str]]) -> None:
    model = small_chats.tuned(tokenizer=small_chats.build("char", "\x1b\x07a?"), context=200)
    out, _ = talk("a?", model=model, temperature=1.0)
    assert "\\x" in out and not {"\x1b", "\x07"} & set(out)


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"temperature": -1.0}, "temperature -1.0"),
        ({"seed": -1}, "seed -1"),
        ({"system": "Ω"}, "The system's text cannot be used: The text contains 'Ω'"),
        ({"system": "a" * 60}, "The system's text cannot be used: .* no room"),
    ],
)
def test_settings_that_spoil_every_answer_are_refused_at_once(
    talk: Callable[..., tuple[str, str]], settings: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(UserError, match=complaint):
        talk("a?", **settings)


def test_bad_input_streams_are_sentences(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", None)
    with pytest.raises(UserError, match="Standard input is closed"):
        conversation.in_terminal(MODEL)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"\xe9t\xe9\n"), "utf-8"))
    with pytest.raises(UserError, match="standard input is not UTF-8"):
        conversation.in_terminal(MODEL)


# A real terminal


@pytest.mark.skipif(sys.platform == "win32", reason="pseudo terminals are Unix's")
def test_in_a_terminal(tmp_path: Path) -> None:
    """A prompt is shown, Ctrl-C stops a long answer, the chat goes on, and Ctrl-D ends it."""
    import pty

    folder = small_chats.save(tmp_path / "run", small_chats.tuned(context=100_000))
    ours, theirs = pty.openpty()
    words = [sys.executable, "-m", "minimoe", "chat", str(folder), "--temperature", "0", "--threads", "1"]
    chatting = subprocess.Popen(  # a shell's background job ignores Ctrl-C, and so would all that it starts
        words,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    os.close(theirs)
    seen = ""

    def wait_for(text: str, at_least: int = 0, interrupt: bool = False) -> None:
        nonlocal seen
        deadline = time.monotonic() + 120
        while text not in seen or len(seen) < at_least:
            assert time.monotonic() < deadline, seen[-300:]
            if interrupt:  # again: a signal that comes between the prompt and the wait for a key wakes up nobody
                os.kill(chatting.pid, signal.SIGINT)
            if select.select([ours], [], [], 10)[0]:
                interrupt = False
                seen += os.read(ours, 1000).decode(errors="replace")

    try:
        wait_for("> ")
        assert "/help lists the commands" in seen
        os.write(ours, b"hey?\n")
        wait_for("hey?", at_least=len(seen) + 100)  # it is in the middle of an endless answer
        os.kill(chatting.pid, signal.SIGINT)
        wait_for("The answer was stopped.")
        seen = seen.partition("The answer was stopped.")[2]
        wait_for("> ")
        wait_for("/exit ends the chat", interrupt=True)  # while it waits for a question
        seen = seen.partition("/exit ends the chat")[2]
        wait_for("> ")
        os.write(ours, f"/save {tmp_path / 'saved.jsonl'}\n".encode())
        wait_for("is written")
        seen = seen.partition("is written")[2]
        wait_for("> ")  # only then the terminal hands every key over; before that, Ctrl-D would be lost
        os.write(ours, b"\x04")
        assert chatting.wait(timeout=60) == 0
    finally:
        chatting.kill()
        os.close(ours)
    (line,) = (tmp_path / "saved.jsonl").read_text().splitlines()
    assert len(json.loads(line)["turns"]) == 2
