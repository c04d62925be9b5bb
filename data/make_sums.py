"""Write sums.txt: worked arithmetic, the same bytes on every run.

    python data/make_sums.py

Each exercise is made by one small function below, so a new kind of exercise is one more function in ``EXERCISES``.
"""

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

SEED = 7
SIZE = 45_000  # bytes; the last exercise is allowed to run over

Item = TypeVar("Item")


class Draw:
    """Random draws by ``Random.random`` alone, the one method whose sequence Python promises never to change."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed).random

    def number(self, low: int, high: int) -> int:
        """An integer from ``low`` to ``high``, both included."""
        return low + int(self._random() * (high - low + 1))

    def one_of(self, items: Sequence[Item]) -> Item:
        """One of the items."""
        return items[self.number(0, len(items) - 1)]


def counted(n: int, noun: str) -> str:
    """``1 ten is`` but ``2 tens are``."""
    return f"{n} {noun} is" if n == 1 else f"{n} {noun}s are"


def addition_with_carry(draw: Draw) -> str:
    """47 + 38, told digit by digit."""
    a, b = draw.number(12, 79), draw.number(12, 79)
    ones, tens = a % 10 + b % 10, a // 10 + b // 10
    carry = ones // 10
    written = f"Write {ones % 10}, carry 1." if carry else f"Write {ones}, nothing to carry."
    carried = f" + {carry}" if carry else ""
    return (
        f"{a} + {b} = ?\n"
        f"Ones: {a % 10} + {b % 10} = {ones}. {written}\n"
        f"Tens: {a // 10} + {b // 10}{carried} = {tens + carry}.\n"
        f"{a} + {b} = {a + b}"
    )


def addition_in_columns(draw: Draw) -> str:
    """The sum as it stands in an exercise book, with the carries above it."""
    a, b = draw.number(105, 899), draw.number(105, 899)
    carries, carry = [" "], 0
    for place in (1, 10, 100):
        carry = (a // place % 10 + b // place % 10 + carry) // 10
        carries.append("1" if carry else " ")
    above = "".join(reversed(carries)).rstrip()
    lines = [f"  {above}   carried"] if above else []
    return "\n".join([*lines, f"   {a}", f"+  {b}", "------", f"{a + b:6d}"])


def subtraction_with_borrowing(draw: Draw) -> str:
    """52 - 17, told digit by digit and checked by adding back."""
    a, b = sorted((draw.number(21, 99), draw.number(11, 89)), reverse=True)
    ones, tens = a % 10 - b % 10, a // 10 - b // 10
    if ones < 0:
        steps = (
            f"{a % 10} is less than {b % 10}, so borrow a ten: {a % 10 + 10} - {b % 10} = {ones + 10}.\n"
            f"Tens: {a // 10 - 1} - {b // 10} = {tens - 1}."
        )
    else:
        steps = f"Ones: {a % 10} - {b % 10} = {ones}.\nTens: {a // 10} - {b // 10} = {tens}."
    return f"{a} - {b} = ?\n{steps}\n{a} - {b} = {a - b}, and back again {a - b} + {b} = {a}"


def through_ten(draw: Draw) -> str:
    """8 + 7 by way of 10."""
    a, b = draw.number(6, 9), draw.number(5, 9)
    to_ten, left = 10 - a, b - (10 - a)
    return f"{a} + {b} = {a} + {to_ten} + {left} = 10 + {left} = {a + b}"


def short_sums(draw: Draw) -> str:
    """A row of quick sums."""
    sums = []
    for _ in range(draw.number(3, 5)):
        a, b = draw.number(1, 20), draw.number(1, 20)
        sums.append(f"{a} + {b} = {a + b}" if draw.number(0, 1) else f"{a + b} - {a} = {b}")
    return "    ".join(sums)


def family(draw: Draw) -> str:
    """The four facts that three numbers make."""
    a, b = draw.number(3, 60), draw.number(3, 39)
    return f"{a}, {b} and {a + b}:\n{a} + {b} = {a + b}\n{b} + {a} = {a + b}\n{a + b} - {b} = {a}\n{a + b} - {a} = {b}"


def times_table(draw: Draw) -> str:
    """A few lines of a times table."""
    n, start = draw.number(2, 12), draw.number(1, 7)
    lines = [f"{k:2d} x {n:2d} = {k * n:3d}" for k in range(start, start + draw.number(4, 6))]
    return "\n".join([f"The table of {n}:", *lines])


def times_by_parts(draw: Draw) -> str:
    """6 x 14 as 6 x 10 + 6 x 4."""
    a, b = draw.number(3, 9), draw.number(12, 49)
    tens, ones = b // 10 * 10, b % 10
    if ones == 0:
        return f"{a} x {b} = {a * b}, since {a} x {b // 10} = {a * b // 10}"
    return f"{a} x {b} = {a} x {tens} + {a} x {ones} = {a * tens} + {a * ones} = {a * b}"


def division(draw: Draw) -> str:
    """23 / 5, with what is left."""
    by, times, left = draw.number(2, 9), draw.number(2, 12), draw.number(0, 8)
    left %= by
    n = by * times + left
    if left == 0:
        return f"{n} / {by} = {times} exactly, because {times} x {by} = {n}"
    return f"{n} / {by} is {times}, remainder {left}: {times} x {by} = {times * by}, and {times * by} + {left} = {n}"


def comparison(draw: Draw) -> str:
    """Which is more, and why."""
    a, b = draw.number(10, 99), draw.number(10, 99)
    if a == b:
        return f"{a} = {b}: the same tens, the same ones."
    sign, word = ("<", "fewer") if a < b else (">", "more")
    if a // 10 == b // 10:
        return f"{a} {sign} {b}: the tens are equal, and {counted(a % 10, 'one')} {word} than {b % 10}."
    return f"{a} {sign} {b}: {counted(a // 10, 'ten')} {word} than {b // 10}."


def comparison_of_sums(draw: Draw) -> str:
    """Two sums on a pair of scales."""
    a, b, c, d = (draw.number(2, 30) for _ in range(4))
    left, right = a + b, c + d
    sign = "<" if left < right else ">" if left > right else "="
    return f"{a} + {b} or {c} + {d}?   {left} {sign} {right}, so {a} + {b} {sign} {c} + {d}"


def true_or_false(draw: Draw) -> str:
    """A sum to be marked, right half of the time."""
    a, b = draw.number(5, 60), draw.number(5, 39)
    claimed = a + b + draw.one_of((0, 0, 0, 1, -1, 10))
    if claimed == a + b:
        return f"True or false: is {a} + {b} equal to {claimed}? True."
    return f"True or false: is {a} + {b} equal to {claimed}? False, {a} + {b} = {a + b}"


def halves_and_doubles(draw: Draw) -> str:
    """Doubling one way, halving the other."""
    n = draw.number(6, 75)
    if draw.number(0, 1):
        return f"Twice {n} is {2 * n}, so half of {2 * n} is {n}."
    return f"Half of {2 * n} is {n}, for {n} + {n} = {2 * n}"


def sequence(draw: Draw) -> str:
    """Counting on, or back, in steps."""
    step, start = draw.number(2, 12), draw.number(0, 20)
    terms = [start + step * k for k in range(6)]
    rule, word = f"add {step}", "on"
    if draw.number(0, 2) == 0:
        terms, rule, word = terms[::-1], f"take away {step}", "back"
    return f"Count {word}: {', '.join(map(str, terms[:5]))}, ... The rule is {rule}. Next comes {terms[5]}."


def chain(draw: Draw) -> str:
    """Several terms, from left to right."""
    terms = [draw.number(2, 25) for _ in range(draw.number(3, 4))]
    steps = []
    while len(terms) > 1:
        steps.append(" + ".join(map(str, terms)))
        terms = [terms[0] + terms[1], *terms[2:]]
    return " = ".join([*steps, str(terms[0])])


def missing_number(draw: Draw) -> str:
    """A sum with a hole in it."""
    a, b = draw.number(4, 60), draw.number(4, 39)
    if draw.number(0, 1):
        return f"{a} + [ ] = {a + b}   The box holds {a + b} - {a} = {b}"
    return f"[ ] - {a} = {b}   The box holds {a} + {b} = {a + b}"


def clock(draw: Draw) -> str:
    """Minutes that pass the hour."""
    hour, minute, wait = draw.number(1, 11), draw.number(1, 11) * 5, draw.number(2, 11) * 5
    total = minute + wait
    if total < 60:
        return f"It is {hour}:{minute:02d}. In {wait} minutes it will be {hour}:{total:02d}."
    over = total - 60
    return (
        f"It is {hour}:{minute:02d}. In {wait} minutes? {60 - minute} minutes to {hour + 1} o'clock, "
        f"then {over} more: {hour + 1}:{over:02d}."
    )


NAMES = ("Ada", "Ben", "Chloe", "Dan", "Emmy", "Felix", "Grace", "Hugo", "Ines", "Karl", "Mina", "Noor", "Oscar")
THINGS = ("apples", "pears", "marbles", "shells", "stamps", "buttons", "walnuts", "pencils", "beads", "plums")
HOLDERS = ("basket", "box", "jar", "bag", "drawer")


def story_of_more(draw: Draw) -> str:
    """A story that adds."""
    who, what, a, b = draw.one_of(NAMES), draw.one_of(THINGS), draw.number(3, 48), draw.number(3, 48)
    event = draw.one_of(("finds {b} more", "is given {b} more", "buys another {b}", "picks up {b} more")).format(b=b)
    return f"{who} has {a} {what} and {event}. Now there are {a + b} {what}: {a} + {b} = {a + b}"


def story_of_less(draw: Draw) -> str:
    """A story that takes away."""
    who, what, left, gone = draw.one_of(NAMES), draw.one_of(THINGS), draw.number(2, 40), draw.number(2, 40)
    event = draw.one_of(("gives away {b}", "loses {b}", "sells {b}", "puts {b} aside")).format(b=gone)
    return (
        f"There are {left + gone} {what} in the {draw.one_of(HOLDERS)}. {who} {event}. How many are left?\n"
        f"{left + gone} - {gone} = {left}, so {left} {what} are left."
    )


def story_of_times(draw: Draw) -> str:
    """A story that multiplies."""
    what, holder, a, b = draw.one_of(THINGS), draw.one_of(HOLDERS), draw.number(2, 9), draw.number(3, 12)
    plural = holder + ("es" if holder == "box" else "s")
    return f"{a} {plural}, {b} {what} in each {holder}: {a} x {b} = {a * b} {what} in all."


def story_of_sharing(draw: Draw) -> str:
    """A story that divides."""
    what, friends, each, left = draw.one_of(THINGS), draw.number(2, 8), draw.number(2, 9), draw.number(0, 1)
    n = friends * each + left
    rest = ", and 1 is left over" if left else ", and none is left over"
    return (
        f"{draw.one_of(NAMES)} shares {n} {what} among {friends} friends.\n"
        f"Each friend gets {each}{rest}: {friends} x {each} = {friends * each}"
    )


def story_of_two(draw: Draw) -> str:
    """Who has more, and by how many."""
    first = draw.one_of(NAMES)
    second = draw.one_of([name for name in NAMES if name != first])
    what, few, extra = draw.one_of(THINGS), draw.number(3, 40), draw.number(2, 30)
    return (
        f"{first} has {few + extra} {what}, {second} has {few}. "
        f"{first} has {extra} more than {second}: {few + extra} - {few} = {extra}"
    )


def change(draw: Draw) -> str:
    """Paying at the market."""
    what, count, price = draw.one_of(THINGS), draw.number(2, 9), draw.number(2, 9)
    cost = count * price
    coin = next(coin for coin in (10, 20, 50, 100) if coin > cost)
    return (
        f"{count} {what} at {price} cents each cost {count} x {price} = {cost} cents.\n"
        f"Pay with {coin} cents and the change is {coin} - {cost} = {coin - cost} cent{'s' * (coin - cost > 1)}."
    )


EXERCISES: tuple[Callable[[Draw], str], ...] = (
    addition_with_carry,
    addition_in_columns,
    subtraction_with_borrowing,
    through_ten,
    short_sums,
    family,
    times_table,
    times_by_parts,
    division,
    comparison,
    comparison_of_sums,
    true_or_false,
    halves_and_doubles,
    sequence,
    chain,
    missing_number,
    clock,
    story_of_more,
    story_of_less,
    story_of_times,
    story_of_sharing,
    story_of_two,
    change,
)


def make(seed: int = SEED, size: int = SIZE) -> str:
    """Exercises one after the other, a blank line between them, until there are at least ``size`` characters."""
    draw = Draw(seed)
    exercises: list[str] = []
    length = 0
    while length < size:
        exercises.append(draw.one_of(EXERCISES)(draw))
        length += len(exercises[-1]) + 2
    return "\n\n".join(exercises) + "\n"


if __name__ == "__main__":
    path = Path(__file__).with_name("sums.txt")
    path.write_bytes(make().encode("ascii"))
    print(f"{path.name}: {path.stat().st_size:,} bytes")
