"""The README's numbers, each over several seeds: trains what is missing, measures, and brings the README up to date.

    minimoe corpus shakespeare
    python tests/tools/readme_numbers.py runs/readme

The folder keeps the runs, so that a second call measures at once. On two cores the first takes about an hour, and with
``--only tuning`` a few minutes. Another
processor, another BLAS or another number of threads gives other digits.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from minimoe.analysis import microscope
from minimoe.core.presets import override, preset
from minimoe.evaluate import exchanges, intervals, suite, suite_table, text_loss, tuned
from minimoe.storage import checkpoint, metrics
from minimoe.text import batches, instructions
from minimoe.training import trainer
from minimoe.tuning import dpo, sft

ROOT = Path(__file__).resolve().parent.parent.parent
SEEDS = (0, 1, 2)
PROSE = ("fables", "dialogues", "contes")


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the README's numbers over several seeds.")
    parser.add_argument("folder", type=Path, help="where the runs are kept")
    parser.add_argument("--print", action="store_true", help="print the blocks, and leave the README as it is")
    parser.add_argument(
        "--seconds", action="store_true", help="with times of training, if the machine had nothing else to do"
    )
    parser.add_argument("--as-it-is", action="store_true", help="train nothing, and leave out what is missing")
    parser.add_argument("--only", choices=("results", "tuning"), help="the tables of one part (both)")
    chosen = parser.parse_args()
    folder = chosen.folder
    blocks: dict[str, Callable[[], str]] = {}
    if chosen.only != "tuning":
        if not chosen.as_it_is:
            train_missing(folder)
        blocks |= {"reached": lambda: reached(folder, chosen.seconds), "routing": lambda: routing(folder)}
    if chosen.only != "results":
        if not chosen.as_it_is:
            tune_missing(folder)
        blocks["tuning"] = lambda: tuning(folder)
    for name, block in blocks.items():
        if chosen.print:
            print(block(), end="\n\n")
        else:
            write(name, block())


def tune_missing(folder: Path) -> None:
    """Each toy, tuned with the instructions and then with the preferences of ``data/``."""
    for seed in SEEDS:
        toy, answering, preferring = (folder / f"{name}-{seed}" for name in ("toy", "toy-sft", "toy-dpo"))
        train(toy, "toy", seed)
        if not is_finished(answering):
            sft.tune(toy, out=answering, changes={"seed": seed}, device="cpu")
        if not is_finished(preferring):
            dpo.tune(answering, out=preferring, changes={"seed": seed}, device="cpu")


def train_missing(folder: Path) -> None:
    for seed in SEEDS:
        for name in ("toy", "nanogpt-cpu", "makemoe", "shakespeare-fast"):
            train(folder / f"{name}-{seed}", name, seed)
        twin = folder / f"toy-{seed}-dense"
        if not is_finished(twin):
            trainer.train_dense_twin(folder / f"toy-{seed}", out=twin, device="cpu")


def train(folder: Path, name: str, seed: int) -> None:
    """The run of a preset with a seed, unless it is there."""
    if not is_finished(folder):
        trainer.train(override(preset(name), {"seed": seed}), corpus=preset(name).corpus, out=folder, device="cpu")


def is_finished(folder: Path) -> bool:
    return (folder / "sample.txt").exists()


def reached(folder: Path, with_seconds: bool) -> str:
    """What the presets reach, and the toy beside its dense twin."""

    def last(name: str) -> list[dict[str, Any]]:
        return [metrics.read(folder / f"{name}-{seed}")[-1] for seed in SEEDS if is_finished(folder / f"{name}-{seed}")]

    def row(budget: str, reference: str, name: str, steps: str = "") -> list[str]:
        found = last(name)
        if not found:
            return []
        seeds = "" if len(found) == len(SEEDS) else f", {len(found)} of {len(SEEDS)} seeds"
        time = f" in {span([one['seconds'] for one in found], 0)} s" if with_seconds else ""
        return [f"| {budget} | {reference} | **{span([one['val_loss'] for one in found], 3)}**{time}{seeds} |"]

    nano = "2000 steps × 12 × 64 tokens, 0.51M active parameters"
    lines = [
        "| budget | validation loss of the reference | of minimoe |",
        "|---|---|---|",
        *row(nano, "nanoGPT's CPU recipe: 1.874", "nanogpt-cpu"),
        *row("5000 steps × 16 × 32 tokens, 1.40M active parameters", "makeMoE: 1.744 at best", "makemoe"),
        *row("470 steps × 12 × 64 tokens, the shortest way to makeMoE's 1.744", "", "shakespeare-fast"),
        "",
        f"The toy of `make train` ends at {span([one['val_loss'] for one in last('toy')], 3)} nats per character on "
        "text that it never saw. On this text, the share of every expert, in every layer, is "
        f"{span(toy_shares(folder), 2)} times the fair one.",
        "",
        *against_the_twin(folder),
    ]
    return "\n".join(lines)


def toy_shares(folder: Path) -> list[float]:
    """Each expert's share of the held-out text over the fair one, for all layers and seeds."""
    found = []
    for seed in SEEDS:
        model = checkpoint.load_model(folder / f"toy-{seed}")
        held = batches.reload(model.run.source, model.tokenizer, model.config.context).validation
        found.append(text_loss.evaluate(model.params, model.config, list(held)).load * model.config.experts)
    return np.concatenate(found).ravel().tolist()


def against_the_twin(folder: Path) -> list[str]:
    """The suite of each toy and its dense twin."""
    results = [
        json.loads(suite_table.to_json(suite.run(folder / f"toy-{seed}", folder / f"toy-{seed}-dense")))["rows"]
        for seed in SEEDS
    ]

    def of(name: str, value: Callable[[dict[str, Any]], float], digits: int, scale: float = 1) -> str:
        return span([scale * value(row) for rows in results for row in rows if row["name"] == name], digits)

    def mine(row: dict[str, Any]) -> float:
        return float(row["models"][0]["value"])

    def twins(row: dict[str, Any]) -> float:
        return float(row["models"][1]["value"])

    lines = ["| | toy | dense twin |", "|---|---|---|"]
    names = list(dict.fromkeys(row["name"] for row in results[0]))
    for name in names:
        (unit,) = {row["unit"] for row in results[0] if row["name"] == name}
        if all(row["models"][0] is not None for rows in results for row in rows if row["name"] == name):
            digits, scale, sign = (2, 1.0, "bits per byte") if unit == "bits per byte" else (0, 100.0, "%")
            ours, theirs = of(name, mine, digits, scale), of(name, twins, digits, scale)
            lines.append(f"| {name} | {ours} {sign} | {theirs} {sign} |")
    return lines


def routing(folder: Path) -> str:
    """The questions of section 5 of the Mixtral paper, asked of the toy's held-out text."""
    seen = []
    for seed in SEEDS:
        model = checkpoint.load_model(folder / f"toy-{seed}")
        seen.append(microscope.to_dict(microscope.look(model, microscope.read(model))))
    layers = range(seen[0]["layers"])

    def rates(texts: Iterable[str], kind: str) -> str:
        texts = list(texts)

        def of_layer(layer: int) -> list[float]:
            repetitions = [one["by_layer"][layer]["choices"]["first"]["repetition"] for one in seen]
            return [100 * repetition[text][kind] for repetition in repetitions for text in texts]

        return ", ".join(span(of_layer(layer), 0) for layer in layers)

    apart = ", ".join(span([one["by_layer"][n]["choices"]["either"]["divergence"] for one in seen], 2) for n in layers)
    return "\n".join(
        [
            "| | toy, layers 0 to 3, three seeds | Mixtral 8x7B |",
            "|---|---|---|",
            f"| neighbours with the same first choice, three prose texts | {rates(PROSE, 'observed')} % | 14–15, "
            "24–28, 20–26 % (layers 0, 15, 31; eight texts, Table 5) |",
            f"| the same tokens shuffled | {rates(PROSE, 'shuffled')} % | |",
            f"| neighbours with the same first choice, sums | {rates(['sums'], 'observed')} % | 14, 28, 20 % (DM "
            "Mathematics) |",
            f"| the same tokens shuffled | {rates(['sums'], 'shuffled')} % | |",
            f"| how far apart the texts are, Jensen–Shannon | {apart} bits (four texts) | 0.003, 0.004, 0.009 bits "
            "(layers 0, 7, 15; five texts, from the counts of arXiv 2409.02060) |",
        ]
    )


def tuning(folder: Path) -> str:
    """Exact answers by kind, and the accuracy of the reward; the interval is that of all three seeds together."""
    lines = [
        "| held out | number | `minimoe sft` | then `minimoe dpo` | by chance |",
        "|---|---|---|---|---|",
    ]
    stages = ("toy-sft", "toy-dpo")
    found: dict[str, list[exchanges.Answered]] = {}
    for stage in stages:
        models = [checkpoint.load_model(folder / f"{stage}-{seed}") for seed in SEEDS]
        asked = tuned.questions_for(models[0].run).instructions
        found[stage] = [exchanges.answer(model, asked, len(asked)) for model in models]
    for kind in [*found["toy-sft"][0].right, "all"]:
        cells = [right(found[stage], kind) for stage in stages]
        first = found["toy-sft"][0]
        size = sum(map(len, first.right.values())) if kind == "all" else len(first.right[kind])
        chance = "" if kind == "all" else f"{100 * first.chance[kind]:.0f} %"
        lines.append(f"| {kind}, answered exactly | {size} | {cells[0]} | {cells[1]} | {chance} |")
    rewards = []
    pairs = len(instructions.split(instructions.read_pairs())[1])
    for seed in SEEDS:
        best = min(
            (row for row in metrics.read(folder / f"toy-dpo-{seed}") if "val_loss" in row),
            key=lambda row: row["val_loss"],
        )
        rewards.append(best["val_accuracy"])
    interval = intervals.wilson(round(sum(rewards) * pairs), pairs * len(SEEDS))
    cell = f"{span((100 * value for value in rewards), 0)} % [{100 * interval.low:.0f}, {100 * interval.high:.0f}]"
    lines.append(f"| pairs in which the better answer gained more | {pairs} | – | {cell} | 50 % |")
    return "\n".join(lines)


def right(answered: list[exchanges.Answered], kind: str) -> str:
    """``80–86 % [79, 85]``: the share of each seed, and the interval of all seeds together."""
    marks = [np.concatenate([*of.right.values()]) if kind == "all" else of.right[kind] for of in answered]
    together = np.concatenate(marks)
    interval = intervals.wilson(int(together.sum()), len(together))
    shares = span((100 * of_seed.mean() for of_seed in marks), 0)
    return f"{shares} % [{100 * interval.low:.0f}, {100 * interval.high:.0f}]"


def span(values: Iterable[float], digits: int) -> str:
    """``1.55–1.56``, or one number where both ends are the same."""
    values = list(values)
    low, high = f"{min(values):.{digits}f}", f"{max(values):.{digits}f}"
    return low if low == high else f"{low}–{high}"


def write(name: str, block: str, by: str = "readme_numbers.py") -> None:
    """Puts a block between its two marks in the README; ``by`` is the tool that the first mark names."""
    path = ROOT / "README.md"
    begin, end = f"<!-- {name}: written by tests/tools/{by} -->", f"<!-- end of {name} -->"
    text = path.read_text(encoding="utf-8")
    if not re.search(f"{re.escape(begin)}.*{re.escape(end)}", text, re.DOTALL):
        raise SystemExit(f"README.md has no marks for {name}: {begin} … {end}")
    head, _, rest = text.partition(begin)
    path.write_text(f"{head}{begin}\n{block}\n{end}{rest.partition(end)[2]}", encoding="utf-8")


if __name__ == "__main__":
    main()
