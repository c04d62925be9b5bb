"""Write instructions.jsonl and preferences.jsonl: short exchanges, the same bytes on every run.

    python data/make_instructions.py

Each kind is made by one small function below, from rules or from the tables of phrases.py. An exchange belongs to a
document, the thing that it is about, and ``minimoe.text.instructions.split`` holds out whole documents.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import phrases
from make_sums import Draw

from minimoe.text.instructions import is_held_out

SEED = 11
DIGITS = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen",
)  # fmt: skip


class Exchange(NamedTuple):
    """One line of instructions.jsonl."""

    kind: str
    document: str
    turns: tuple[tuple[str, str], ...]


def ask(kind: str, document: str, question: str, answer: str, *more: str, system: str = "") -> Exchange:
    """An exchange; ``more`` is a second question and its answer."""
    said = [question, answer, *more]
    turns = [("assistant" if place % 2 else "user", text) for place, text in enumerate(said)]
    return Exchange(kind, document, tuple([("system", system)] * bool(system) + turns))


def some(draw: Draw, items: Sequence[Any], count: int) -> list[Any]:
    """``count`` of the items, in a random order."""
    left = list(items)
    return [left.pop(draw.number(0, len(left) - 1)) for _ in range(min(count, len(left)))]


def capital(text: str) -> str:
    """``text`` with a capital at its beginning."""
    return text[:1].upper() + text[1:]


def small(text: str) -> str:
    """``text`` with a small letter at its beginning."""
    return text[:1].lower() + text[1:]


PLUS = ("{a} + {b}", "{a} + {b} = ?", "What is {a} + {b}?", "How much is {a} + {b}?", "Add {a} and {b}.")
MINUS = ("{a} - {b}", "{a} - {b} = ?", "What is {a} - {b}?", "How much is {a} - {b}?", "Take {b} from {a}.")
IN_WORDS = "Answer in words."


def sums(draw: Draw) -> Iterator[Exchange]:
    """Sums and differences of one digit; the document is the sum and its wording."""
    for a in range(10):
        for b in range(10):
            for forms, sign, result in ((PLUS, "+", a + b), (MINUS, "-", a - b)):
                if result < 0:
                    continue
                for form in some(draw, forms, 4):
                    question = form.format(a=a, b=b)
                    yield ask("sums", question, question, str(result))
                if draw.number(1, 3) == 1:
                    question = draw.one_of(forms).format(a=a, b=b)
                    yield ask("sums", f"{a} {sign} {b} in words", question, DIGITS[result], system=IN_WORDS)


def a_word(draw: Draw) -> str:
    """Two to four letters that can be said."""
    vowels, others = "aeiou", "bcdfghklmnprstvw"
    forms = ("vc", "cv", "cvc", "cvc", "vcv", "cvcv", "vcvc", "cvcc")
    return "".join(draw.one_of(vowels if kind == "v" else others) for kind in draw.one_of(forms))


WORD_TASKS = {
    "say": ("Say {w}.", "Repeat {w}.", "Copy: {w}"),
    "reverse": ("Reverse {w}.", "Write {w} backwards.", "Backwards: {w}"),
    "count": ("How many letters has {w}?", "Count the letters of {w}."),
    "first": ("First letter of {w}?", "What letter begins {w}?"),
    "last": ("Last letter of {w}?", "What letter ends {w}?"),
}


def result_of(task: str, word: str) -> str:
    """What a task of ``WORD_TASKS`` makes of a word."""
    results = {"say": word, "reverse": word[::-1], "count": str(len(word)), "first": word[0], "last": word[-1]}
    return results[task]


def words(draw: Draw) -> Iterator[Exchange]:
    """Tasks about the letters of a short word; the document is the word."""
    known: dict[str, None] = {}
    while len(known) < 160:
        known[a_word(draw)] = None
    for word in known:
        for task in some(draw, list(WORD_TASKS), 3):
            yield ask("words", word, draw.one_of(WORD_TASKS[task]).format(w=word), result_of(task, word))
        if draw.number(1, 3) == 1:
            yield ask("words", word, f"Say {word} for me.", word, "Now backwards.", word[::-1])


def facts(draw: Draw) -> Iterator[Exchange]:
    """Questions about the fables and the play; the document is the question with its wording."""
    for answer, *questions in phrases.FACTS:
        for question in questions:
            for wording in some(draw, phrases.FACT_WORDINGS, 4):
                asked = wording.format(Q=question, q=small(question))
                yield ask("facts", asked, asked, answer)


def translation(draw: Draw) -> Iterator[Exchange]:
    """Small phrases, in both directions; the document is the phrase with its wording."""
    for english, french in phrases.TRANSLATIONS:
        for forms, word, answer in ((phrases.TO_FRENCH, english, french), (phrases.TO_ENGLISH, french, english)):
            for form in some(draw, forms, 4):
                asked = form.format(word=word)
                yield ask("translation", asked, asked, answer)


COMPARED = {"more than": int.__gt__, "less than": int.__lt__, "equal to": int.__eq__}


def yes_or_no(draw: Draw) -> Iterator[Exchange]:
    """Comparisons of digits, and what is an animal; the document is the question."""
    made: dict[str, str] = {}
    yes = no = 0
    while len(made) < 180:
        a, b, relation = draw.number(0, 9), draw.number(0, 9), draw.one_of(list(COMPARED))
        if relation == "equal to" and draw.number(0, 1):
            b = a
        holds = COMPARED[relation](a, b)
        if holds and yes > no or not holds and no > yes:
            continue  # as many times yes as no
        question = f"Is {a} {relation} {b}?"
        if question not in made:
            made[question] = "Yes." if holds else "No."
            yes, no = yes + holds, no + (not holds)
    for kind, things in phrases.THINGS.items():
        for thing in things:
            for other in (kind, *some(draw, [one for one in phrases.THINGS if one != kind], 2)):
                made[f"Is {thing} {other}?"] = "Yes." if other == kind else "No."
            made[f"{capital(thing)} is {kind}, right?"] = "Yes."
    for question, answer in made.items():
        yield ask("yes or no", question, question, answer)


def refusals(draw: Draw) -> Iterator[Exchange]:
    """What a model that only writes cannot do or know; the document is the wish."""
    for action in phrases.ACTIONS:
        for thing in some(draw, phrases.OBJECTS, 5):
            wish = action.format(thing=thing)
            for wording in some(draw, phrases.ACTION_WORDINGS, 2):
                asked = wording.format(Q=capital(wish), q=wish)
                yield ask("refusals", wish, asked, phrases.CANNOT_DO)
    for question in phrases.UNKNOWN:
        made = {question.format(thing=thing, day=day) for thing in phrases.BELONGINGS for day in phrases.DAYS}
        for asked in some(draw, sorted(made), 8):
            yield ask("refusals", asked, asked, phrases.CANNOT_KNOW)


def manners(draw: Draw) -> Iterator[Exchange]:
    """Greetings and thanks; the document is what is said."""
    for answer, said in phrases.MANNERS:
        for text in said:
            for addressed in some(draw, phrases.ADDRESSED, 4):
                end = "?" if text.split()[0] in ("How", "Who", "What", "Are") else draw.one_of(".!")
                yield ask("manners", text + addressed, text + addressed + end, answer)


def conversations(exchanges: Sequence[Exchange], draw: Draw) -> Iterator[Exchange]:
    """Two or three questions on different things, one after the other, so that a model learns to answer the last one.

    All are of the same side of the split, and the document is that of the first: no held-out question is seen.
    """
    short = [one for one in exchanges if len(one.turns) == 2]
    sides = [[one for one in short if is_held_out(one.document) == held_out] for held_out in (False, True)]
    for side, count in zip(sides, (450, 50), strict=True):
        made: set[tuple[tuple[str, str], ...]] = set()
        kinds = sorted({one.kind for one in side})
        while len(made) < count:
            parts = []
            for kind in some(draw, kinds, draw.number(2, 3)):
                parts.append(draw.one_of([one for one in side if one.kind == kind]))
            turns = tuple(turn for part in parts for turn in part.turns)
            if sum(len(text) for _, text in turns) <= LONGEST and turns not in made:
                made.add(turns)
                yield Exchange("conversations", parts[0].document, turns)


KINDS = (sums, words, facts, translation, yes_or_no, refusals, manners)


class Preference(NamedTuple):
    """One line of preferences.jsonl."""

    kind: str
    document: str
    prompt: tuple[tuple[str, str], ...]
    chosen: str
    rejected: str


def sentence(answer: str) -> str:
    """``answer`` as a sentence, to be a part of a longer one."""
    return capital(answer) if answer.endswith(".") else capital(answer) + "."


def preferences(exchanges: Sequence[Exchange], draw: Draw) -> Iterator[Preference]:
    """Pairs about a part of the exchanges: short or rambling, right or wrong, polite or rude."""
    short = [one for one in exchanges if len(one.turns) == 2]
    by_kind = {kind: [one for one in short if one.kind == kind] for kind in dict.fromkeys(one.kind for one in short)}
    known = [one for kind in ("sums", "facts", "translation", "yes or no") for one in some(draw, by_kind[kind], 65)]
    for one in known:
        (_, question), (_, answer) = one.turns
        fitting = [text for form in phrases.RAMBLING if fits(question, text := form.format(answer=sentence(answer)))]
        if fitting:
            yield Preference("length", one.document, one.turns[:1], answer, draw.one_of(fitting))
    for kind in ("sums", "facts", "translation", "yes or no", "words"):
        for one in some(draw, by_kind[kind], 52):
            answer = one.turns[1][1]
            wrong = answer
            while wrong == answer:
                wrong = draw.one_of(by_kind[kind]).turns[1][1]
            yield Preference("truth", one.document, one.turns[:1], answer, wrong)
    for one in (*by_kind["manners"], *some(draw, by_kind["refusals"], 100)):
        yield Preference("politeness", one.document, one.turns[:1], one.turns[1][1], draw.one_of(phrases.RUDE))
    for one in some(draw, by_kind["facts"], 70):
        (_, question), (_, answer) = one.turns
        fitting = [text for form in phrases.RUDE_ANSWERS if fits(question, text := form.format(answer=answer))]
        if fitting:
            yield Preference("politeness", one.document, one.turns[:1], answer, draw.one_of(fitting))


LONGEST = 110
"""An exchange has at most this many characters, so that it fits a context of 128 with its marks."""


def fits(question: str, answer: str) -> bool:
    """Whether an exchange is short enough."""
    return len(question) + len(answer) <= LONGEST


def make(seed: int = SEED) -> tuple[str, str]:
    """The contents of the two files."""
    draw = Draw(seed)
    exchanges = [one for kind in KINDS for one in kind(draw)]
    pairs = list(preferences(exchanges, draw))
    return _lines([*exchanges, *conversations(exchanges, draw)]), _lines(pairs)


def _lines(items: Sequence[NamedTuple]) -> str:
    return "".join(json.dumps(item._asdict(), ensure_ascii=False) + "\n" for item in items)


if __name__ == "__main__":
    for name, text in zip(("instructions.jsonl", "preferences.jsonl"), make(), strict=True):
        path = Path(__file__).with_name(name)
        path.write_bytes(text.encode())
        print(f"{path.name}: {text.count(chr(10)):,} lines, {path.stat().st_size:,} bytes")
