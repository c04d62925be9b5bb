"""The chat template: a conversation as one row of ids; special ids say who speaks and where an answer ends.

    minimoe's own tokenizers    begin  user u₁ assistant  a₁ end  user u₂ assistant  a₂ end
    Mixtral-Instruct            <s>    ▁[INST]▁u₁▁[/INST]  ▁a₁ </s>  ▁[INST]▁u₂▁[/INST]  ▁a₂ </s>

In both, the conversation has one beginning, and an end after every answer and nowhere else. Three rules make a template
exact, and public code broke each of them:

- Special ids are written as ids and never read from a text: a user who types "</s>" ends nothing.
- Every piece (a question with its marks, an answer) is encoded on its own and the ids are joined. If the whole were
  encoded as one text, letters on both sides of a border could become one token.
- The id of the beginning occurs once. Encoding the prompt as a text would add this id once more.

The system's text has no mark of its own. It opens the first question, followed by an empty line. In Mixtral, "[INST]"
is ordinary text, so there a user can close a question by typing "[/INST]"; in minimoe's own template nobody can.

Jiang et al. 2024, arXiv 2401.04088 (Mixtral-Instruct). The ids agree with those of the mistral-common library.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import numpy as np
import numpy.typing as npt

from minimoe.core.errors import UserError
from minimoe.text.huggingface_tokenizer import MissingTokenizer, PretrainedTokenizer, written_as
from minimoe.text.tokenizer import CHAT_TOKENS, ChatTokenizer, Ids, Tokenizer

AnyTokenizer: TypeAlias = Tokenizer | PretrainedTokenizer | MissingTokenizer
Role: TypeAlias = Literal["system", "user", "assistant"]


class Turn(NamedTuple):
    """What one side says."""

    role: Role
    text: str


class Encoded(NamedTuple):
    """A conversation as ids."""

    ids: Ids  # (n,)
    answer: npt.NDArray[np.bool_]  # (n,)  True for the tokens of an answer and for its end: what a model learns to say


class _Template(NamedTuple):
    """How one tokenizer writes a conversation."""

    begin: int
    end: int
    question: Callable[[str], list[int]]  # a user's text with its marks; after it, the assistant speaks
    answer: Callable[[str], list[int]]  # without its end


def check(turns: Sequence[Turn]) -> None:
    """Raises ``UserError`` unless user and assistant speak in turn, after a system's text or none."""
    _joined(turns)


def encode(tokenizer: AnyTokenizer, turns: Sequence[Turn]) -> Encoded:
    """A whole conversation: a system's text or none, then questions and answers in turn, an answer last.

    Raises:
        UserError: the tokenizer has no tokens for a chat or does not know a character; or the turns are not such a
            conversation.
    """
    template = _template(tokenizer)
    pieces = _joined(turns)
    if len(pieces) % 2:
        raise UserError("The conversation ends with a question, so there is no answer to learn: add the answer.")
    return _encode(template, pieces)


def prompt(tokenizer: AnyTokenizer, turns: Sequence[Turn]) -> Ids:
    """The ids (n,) after which the model's answer begins; the last turn is the user's.

    Raises:
        UserError: as ``encode``.
    """
    template = _template(tokenizer)
    pieces = _joined(turns)
    if len(pieces) % 2 == 0:
        raise UserError("The conversation ends with an answer, so there is nothing to answer: add a question.")
    return _encode(template, pieces).ids


def end_ids(tokenizer: AnyTokenizer) -> tuple[int, ...]:
    """The ids that end an answer.

    Raises:
        UserError: the tokenizer has no tokens for a chat.
    """
    return (_template(tokenizer).end,)


def can_chat(tokenizer: AnyTokenizer) -> bool:
    """Whether the tokenizer has tokens for a chat. A Mixtral has these tokens even before it is tuned to answer."""
    try:
        return bool(end_ids(tokenizer))
    except UserError:
        return False


def _encode(template: _Template, pieces: list[str]) -> Encoded:
    ids, answer = [template.begin], [False]
    for place, text in enumerate(pieces):
        is_answer = place % 2 == 1
        piece = [*template.answer(text), template.end] if is_answer else template.question(text)
        ids += piece
        answer += [is_answer] * len(piece)
    return Encoded(np.array(ids, dtype=np.int32), np.array(answer, dtype=np.bool_))


def _joined(turns: Sequence[Turn]) -> list[str]:
    """Question, answer, question, …: the system's text is part of the first question.

    Raises:
        UserError: there is no question, two turns of one role follow each other, or a turn is not a text.
    """
    if isinstance(turns, str) or not all(isinstance(turn, tuple | list) and len(turn) == 2 for turn in turns):
        raise UserError(f"{turns!r:.40} is not a conversation: give a list of turns, such as [Turn('user', 'Hello')].")
    turns = [Turn(*turn) for turn in turns]
    for place, (role, text) in enumerate(turns, start=1):
        if role not in get_args(Role):
            raise UserError(f"Turn {place} has the role {role!r:.40}: use one of {', '.join(get_args(Role))}.")
        if not isinstance(text, str) or not text:
            raise UserError(f"Turn {place}, of the {role}, is {text!r:.40}, expected a text: write one.")
    system = ""
    if turns and turns[0].role == "system":
        system = turns[0].text + "\n\n"
        turns = turns[1:]
    if not turns:
        raise UserError("The conversation has no question: add a turn of the user.")
    for place, (role, _) in enumerate(turns):
        expected = "assistant" if place % 2 else "user"
        if role != expected:
            raise UserError(
                f"A turn of the {role} stands where one of the {expected} is expected: begin with the system or the "
                "user, and let user and assistant speak in turn."
            )
    texts = [text for _, text in turns]
    return [system + texts[0], *texts[1:]]


def _template(tokenizer: AnyTokenizer) -> _Template:
    if isinstance(tokenizer, ChatTokenizer):
        ids: dict[str, Any] = {name: tokenizer.id_of(name) for name in CHAT_TOKENS}
        return _own(ids, tokenizer.encode)
    if isinstance(tokenizer, MissingTokenizer):
        raise UserError(tokenizer.reason)
    if isinstance(tokenizer, PretrainedTokenizer):
        ids = {name: tokenizer.id_of(written_as(name)) for name in CHAT_TOKENS}
        if None not in ids.values():  # a model of minimoe that was written as a Hugging Face folder
            return _own(ids, tokenizer.encode_text)
        begin, end = tokenizer.id_of("<s>"), tokenizer.id_of("</s>")
        if begin is not None and end is not None:
            encode = tokenizer.encode_text
            return _Template(begin, end, lambda u: encode(f"[INST] {u} [/INST]").tolist(), lambda a: encode(a).tolist())
        raise UserError("The tokenizer has no <s> and </s>, with which Mixtral writes a chat: use a Mixtral folder.")
    raise UserError("The model has no tokens for a chat: tune it to answer with minimoe sft first.")


def _own(ids: dict[str, int], encode: Callable[[str], Ids]) -> _Template:
    """minimoe's own template."""

    def question(text: str) -> list[int]:
        return [ids["user"], *encode(text).tolist(), ids["assistant"]]

    return _Template(ids["begin"], ids["end"], question, lambda text: encode(text).tolist())
