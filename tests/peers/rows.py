"""What is compared: one function for each line of the table, each with its target.

Contenders take turns, round after round, so that what slows the machine for a while slows all of them.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from contenders import GEMM, Process, Result, Task

from minimoe.core import presets
from minimoe.core.config import ModelConfig, TrainConfig
from minimoe.timing.bench import matrix_operations

TWINS = ("loop", "sorted", "loop compiled", "sorted compiled")
DECODERS = ("cached", "cached compiled")
PEAKS = ("peak", "torch peak")

TOLERANCE = 1e-4
"""Of an array's largest entry: both compute in float32 and add up in different orders."""

WARM_UP = 3
"""Runs before the first that counts."""


class Plan(NamedTuple):
    """How much is measured, and where."""

    toy: ModelConfig
    toy_batch: int
    larger: ModelConfig
    larger_batch: int
    threads: int
    rounds: int
    seconds: float  # that a contender works in a round, about
    device: str = "cpu"
    twins: Sequence[str] = TWINS
    decoders: Sequence[str] = DECODERS

    def task(
        self, who: str, work: str = "step", *, threads: int | None = None, batch: int | None = None, **shape: int
    ) -> Task:
        """A task in the shapes of the toy, or with other values for some."""
        config = dataclasses.replace(self.toy, **shape)
        return Task(who, work, config, recipe(batch or self.toy_batch), threads or self.threads, self.device)

    def larger_task(self, who: str) -> Task:
        return Task(who, "step", self.larger, recipe(self.larger_batch), self.threads, self.device)


def recipe(batch: int) -> TrainConfig:
    return dataclasses.replace(presets.preset("toy").recipe, optimizer="adamw", batch=batch, balance_loss=0.01)


class Measured(NamedTuple):
    """One contender of a row: a value for each round."""

    name: str
    unit: str
    values: list[float]


class Row(NamedTuple):
    """A line of the table."""

    work: str
    target: str
    found: str
    reached: bool
    details: list[Measured]
    proofs: list[str]


def save(path: Path, known: Mapping[str, list[Row]]) -> None:
    """Keeps what was measured, so that a long comparison can be made in parts."""
    path.write_text(json.dumps(known, indent=1))


def load(path: Path) -> dict[str, list[Row]]:
    """What was kept; nothing if there is no such file."""
    known = json.loads(path.read_text()) if path.exists() else {}
    return {
        name: [Row(*row[:4], [Measured(*one) for one in row[4]], row[5]) for row in of_name]
        for name, of_name in known.items()
    }


# Taking turns


def take_turns(tasks: Mapping[str, Task], plan: Plan) -> tuple[dict[str, list[float]], list[str]]:
    """Seconds of one run by contender, a median for each round; and what was proved before."""
    contenders = {name: Process(task) for name, task in tasks.items()}
    try:
        proofs = []
        if others := [name for name, task in tasks.items() if task.who not in ("minimoe", *PEAKS)]:
            ours = contenders["minimoe"].ask("result")
            proofs = [prove(name, ours, contenders[name].ask("result")) for name in others]
        usual = {name: min(one.ask("times", WARM_UP)) for name, one in contenders.items()}
        found: dict[str, list[float]] = {name: [] for name in contenders}
        for _ in range(plan.rounds):
            for name, one in contenders.items():
                runs = max(1, round(plan.seconds / usual[name]))
                found[name].append(statistics.median(one.ask("times", runs)))
    finally:
        for one in contenders.values():
            one.close()
    return found, proofs


def prove(name: str, ours: Result, theirs: Result) -> str:
    """One sentence on how close a contender is to minimoe; ends everything if it is not close.

    Each has computed its own in its own process: minimoe tells the allocator of a process to keep what is freed, which
    would make a twin beside it faster than it is for those who write one.
    """
    assert ours.keys() == theirs.keys()
    errors = {what: float(np.abs(theirs[what] - ours[what]).max() / np.abs(ours[what]).max()) for what in ours}
    gradients = [error for what, error in errors.items() if what.startswith("gradient")]
    kinds = {what: error for what, error in errors.items() if not what.startswith("gradient")}
    if gradients:
        kinds[f"all {len(gradients)} gradients"] = float(np.max(gradients))  # a NaN is larger than any number
    sentence = f"{name}: " + ", ".join(
        f"{what} equal" if what == "ids" and not error else f"{what} to {error:.0e}" for what, error in kinds.items()
    )
    if not np.max(list(kinds.values())) < TOLERANCE:
        raise SystemExit(f"{sentence}: this is not the same computation, so no times are compared.")
    return sentence


def ratio(slow: Sequence[float], fast: Sequence[float], digits: int = 2) -> tuple[float, str]:
    """slow/fast of the medians; in words, with the smallest and largest of a round."""
    each = [s / f for s, f in zip(slow, fast, strict=False)]
    value = statistics.median(slow) / statistics.median(fast)
    return value, f"{value:.{digits}f}× ({min(each):.{digits}f}–{max(each):.{digits}f})"


def best(found: Mapping[str, list[float]], names: Sequence[str]) -> str:
    return min(names, key=lambda name: statistics.median(found[name]))


def rates(found: Mapping[str, list[float]], tasks: Mapping[str, Task]) -> list[Measured]:
    """Tokens a second of every contender."""
    return [
        Measured(name, "tokens/s", [task.tokens / t for t in found[name]])
        for name, task in tasks.items()
        if task.who not in PEAKS
    ]


# The rows


def toy_step(plan: Plan) -> list[Row]:
    tasks = {who: plan.task(who) for who in ("minimoe", *plan.twins)}
    found, proofs = take_turns(tasks, plan)
    work = f"toy: training step of {plan.toy_batch} × {plan.toy.context} tokens"
    if plan.device == "gpu":
        return [against_eager(work, found, tasks, proofs)]
    rival = best(found, plan.twins)
    value, words = ratio(found[rival], found["minimoe"])
    return [Row(work, "≥ 2.0× the best twin", f"{words}, {rival}", value >= 2, rates(found, tasks), proofs)]


def larger_step(plan: Plan) -> list[Row]:
    m = plan.larger
    tasks = {who: plan.larger_task(who) for who in ("minimoe", *plan.twins)}
    work = f"larger (D {m.width}, {m.layers} layers, T {m.context}, batch {plan.larger_batch}): training step"
    if plan.device == "gpu":
        found, proofs = take_turns(tasks, plan)
        return [against_eager(work, found, tasks, proofs)]
    tasks |= {who: plan.larger_task(who) for who in PEAKS}
    found, proofs = take_turns(tasks, plan)
    rival = best(found, plan.twins)
    value, words = ratio(found[rival], found["minimoe"])
    operations = matrix_operations(m, plan.larger_batch)
    speeds = [operations / t for t in found["minimoe"]]
    peaks, torch_peaks = ([2 * GEMM**3 / t for t in found[who]] for who in PEAKS)
    share, share_words = statistics.median(speeds) / max(peaks), [s / max(peaks) for s in speeds]
    return [
        Row(work, "≥ 1.8× the best twin", f"{words}, {rival}", value >= 1.8, rates(found, tasks), proofs),
        Row(
            f"larger: share of the machine's matrix peak ({operations / 1e9:.0f} GFLOP a step)",
            "≥ 60 %",
            f"{share:.0%} ({min(share_words):.0%}–{max(share_words):.0%})",
            share >= 0.6,
            [
                Measured("minimoe", "GFLOP/s", [s / 1e9 for s in speeds]),
                Measured(f"peak ({GEMM}³ sgemm)", "GFLOP/s", [p / 1e9 for p in peaks]),
                Measured("the same product by PyTorch", "GFLOP/s", [p / 1e9 for p in torch_peaks]),
            ],
            [],
        ),
    ]


def against_eager(work: str, found: Mapping[str, list[float]], tasks: Mapping[str, Task], proofs: list[str]) -> Row:
    compiled = [who for who in tasks if who.endswith("compiled")]
    eager = best(found, [who for who in tasks if who != "minimoe" and who not in compiled])
    value, words = ratio(found[eager], found["minimoe"])
    words += f", {eager}"
    if compiled:
        words += f"; against {best(found, compiled)} {ratio(found[best(found, compiled)], found['minimoe'])[1]}"
    return Row(work, "≥ 1.0× the best eager twin", words, value >= 1.0, rates(found, tasks), proofs)


def decoding(plan: Plan) -> list[Row]:
    tasks = {who: plan.task(who, "decode") for who in ("minimoe", *plan.decoders, "transformers")}
    found, proofs = take_turns(tasks, plan)
    rival = best(found, plan.decoders)
    value, words = ratio(found[rival], found["minimoe"])
    against_library, library_words = ratio(found["transformers"], found["minimoe"])
    details = rates(found, tasks)
    return [
        Row(
            "decoding: greedy, batch 1, key/value cache",
            "≥ 4× the best twin",
            f"{words}, {rival}",
            value >= 4,
            details,
            proofs,
        ),
        Row(
            "decoding: against MixtralForCausalLM.generate",
            "≥ 8×",
            library_words,
            against_library >= 8,
            [],
            [],
        ),
    ]


def experts(plan: Plan) -> list[Row]:
    few, many = plan.toy.experts, 8 * plan.toy.experts
    tasks = {f"E = {count}": plan.task("minimoe", "gradient", experts=count) for count in (few, many)}
    found, _ = take_turns(tasks, plan)
    value, words = ratio(found[f"E = {many}"], found[f"E = {few}"])
    return [
        Row(
            f"experts: {few} → {many} at K = {plan.toy.active_experts}, forward and backward a token",
            "≤ 1.5× the time",
            words,
            value <= 1.5,
            rates(found, tasks),
            [],
        )
    ]


def threads(plan: Plan) -> list[Row]:
    tasks = {f"{n} threads": plan.task("minimoe", threads=n) for n in (1, 2)}
    found, _ = take_turns(tasks, plan)
    value, words = ratio(found["1 threads"], found["2 threads"])
    return [Row("threads: 2 against 1, toy step", "≥ 1.7×", words, value >= 1.7, rates(found, tasks), [])]


def memory(plan: Plan) -> list[Row]:
    tasks = {who: plan.task(who) for who in ("minimoe", *plan.twins)}
    whole, own = peaks(tasks, plan)
    rival = best(whole, plan.twins)
    value, words = ratio(whole["minimoe"], whole[rival])
    _, own_words = ratio(own["minimoe"], own[rival])
    return [
        Row(
            "memory: peak resident of the toy training step",
            "≤ 0.6× the best twin",
            f"{words}, {rival}; above imports {own_words}",
            value <= 0.6,
            in_megabytes(whole, own),
            [],
        )
    ]


def context(plan: Plan) -> list[Row]:
    short, long = plan.toy.context, 8 * plan.toy.context
    tasks = {
        f"T = {length}": plan.task("minimoe", batch=plan.toy_batch * short // length, context=length)
        for length in (short, long)
    }
    whole, own = peaks(tasks, plan)
    value, words = ratio(whole[f"T = {long}"], whole[f"T = {short}"])
    _, own_words = ratio(own[f"T = {long}"], own[f"T = {short}"])
    return [
        Row(
            f"context: T {short} → {long} at equal tokens a step, peak resident memory",
            "≤ 1.5×",
            f"{words}; above imports {own_words}",
            value <= 1.5,
            in_megabytes(whole, own),
            [],
        )
    ]


def peaks(tasks: Mapping[str, Task], plan: Plan) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Bytes at the peak of a few steps, in all and above what the imports took; every value from a fresh process.

    What is compiled has one turn: the compiler alone takes more memory than anyone's training.
    """
    whole: dict[str, list[float]] = {name: [] for name in tasks}
    own: dict[str, list[float]] = {name: [] for name in tasks}
    for turn in range(plan.rounds):
        for name, task in tasks.items():
            if turn and task.who.endswith("compiled"):
                continue
            contender = Process(task)
            contender.ask("times", WARM_UP)
            peak, imported = contender.ask("memory")
            contender.close()
            whole[name].append(peak)
            own[name].append(peak - imported)
    return whole, own


def in_megabytes(whole: Mapping[str, list[float]], own: Mapping[str, list[float]]) -> list[Measured]:
    return [
        Measured(f"{name}{which}", "MB", [value / 1e6 for value in values])
        for which, found in (("", whole), (", above imports", own))
        for name, values in found.items()
    ]


def start(plan: Plan) -> list[Row]:
    seconds = []
    for _ in range(plan.rounds + 1):
        began = time.perf_counter()
        subprocess.run([sys.executable, "-m", "minimoe", "--help"], check=True, stdout=subprocess.DEVNULL)
        seconds.append(time.perf_counter() - began)
    seconds = seconds[1:]  # the first reads the files from the disk
    value = statistics.median(seconds)
    words = f"{value:.2f} s ({min(seconds):.2f}–{max(seconds):.2f})"
    details = [Measured("minimoe --help", "s", seconds)]
    return [Row("start: minimoe --help", "≤ 0.3 s", words, value <= 0.3, details, [])]


ROWS: dict[str, Callable[[Plan], list[Row]]] = {
    "toy": toy_step,
    "larger": larger_step,
    "decoding": decoding,
    "experts": experts,
    "context": context,
    "memory": memory,
    "start": start,
    "threads": threads,
}
ON_GPU = ("toy", "larger")
