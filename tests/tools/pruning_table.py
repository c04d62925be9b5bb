"""What a smaller model costs: fewer experts, by the way in which they are chosen, and a student, by its loss. Run this
file to measure it again.

    python tests/tools/pruning_table.py

Three mixtures are trained from different seeds, pruned, and used as teachers of a dense student, which takes a few
minutes on one core. A loss is given as its difference: from that of the whole mixture, or from that of the student that
learned from labels alone and read the same batches. Each cell is the median of the seeds, then the smallest and
largest. Another processor gives other digits.
"""

from __future__ import annotations

import argparse
import os
from concurrent.futures import ProcessPoolExecutor

for library in ("OPENBLAS", "OMP", "MKL"):  # before NumPy is imported: a process per core is enough
    os.environ.setdefault(f"{library}_NUM_THREADS", "1")

import dataclasses  # noqa: E402
from typing import NamedTuple  # noqa: E402

import numpy as np  # noqa: E402

from minimoe.compression import prune  # noqa: E402
from minimoe.core.config import ModelConfig, TrainConfig  # noqa: E402
from minimoe.evaluate import text_loss  # noqa: E402
from minimoe.inference.reading import READING  # noqa: E402
from minimoe.losses.distillation import Distillation, Settings  # noqa: E402
from minimoe.text import batches  # noqa: E402
from minimoe.training import experiment  # noqa: E402

CONFIG = ModelConfig(
    width=64, layers=3, heads=4, kv_heads=2, head_width=16, context=64, experts=8, active_experts=2, expert_width=96
)
RECIPE = TrainConfig(steps=600, batch=16, learning_rate=6e-3, warmup=40, evaluate_every=0, save_every=0)
STUDENT = dataclasses.replace(
    CONFIG, width=48, layers=2, heads=3, kv_heads=1, experts=1, active_experts=1, noisy_gating=False
)
OF_STUDENT = dataclasses.replace(RECIPE, steps=300, warmup=30, balance_loss=0.0, z_loss=0.0)

KEPT = (7, 6, 4, 2)
DRAWS = 4
"""How often lots are drawn for each model."""

LOSSES = {
    "half label, half teacher": Settings(1.0, 0.5),
    "a quarter label, τ = 2": Settings(2.0, 0.25),
    "teacher": Settings(1.0, 0.0),
    "teacher, τ = 2": Settings(2.0, 0.0),
    "teacher, reverse KL": Settings(1.0, 0.0, True),
}


class Measured(NamedTuple):
    """One mixture and its students; all but the first two are differences in nats a character."""

    mixture: float
    labels: float
    pruned: dict[tuple[int, str], list[float]]
    skipped: dict[str, float]
    students: dict[str, float]


def measure(seed: int, steps: int) -> Measured:
    """Trains a mixture, prunes it in every way, and trains its students."""
    data, _, codec = batches.prepare("data", RECIPE, CONFIG.context)
    config, student = (dataclasses.replace(one, vocab_size=codec.vocab_size) for one in (CONFIG, STUDENT))
    params = experiment.learn(config, dataclasses.replace(RECIPE, steps=steps), data, seed).params
    sample = next(data.batches(32, config.context, seed=99 + seed))[0]
    whole = text_loss.evaluate(params, config, data.validation).loss

    def cost(keep: int, method: str, draw: int) -> float:
        done = prune.prune(params, config, sample, keep, method, draw)
        return text_loss.evaluate(done.params, done.config, data.validation).loss - whole

    pruned = {
        (keep, method): [cost(keep, method, draw) for draw in range(DRAWS if method == "random" else 1)]
        for keep in KEPT
        for method in prune.METHODS
    }
    betas = {"half of the tokens": prune.median_ratios(params, config, sample), "every token": [2.0] * config.layers}
    skipped = {
        name: text_loss.evaluate(params, config, data.validation, mode=READING._replace(skip_below=below)).loss - whole
        for name, below in betas.items()
    }
    recipe = dataclasses.replace(OF_STUDENT, steps=steps // 2)
    labels = experiment.learn(student, recipe, data, 10 + seed).loss
    students = {
        name: experiment.learn(student, recipe, data, 10 + seed, token_loss=Distillation(params, config, settings)).loss
        - labels
        for name, settings in LOSSES.items()
    }
    return Measured(whole, labels, pruned, skipped, students)


def table(found: list[Measured]) -> str:
    """Markdown: experts left by method, skipped second experts, students by loss."""
    lines = [
        f"{len(found)} mixtures: {spread([one.mixture for one in found])} nats a character.",
        "",
        f"| experts left | {' | '.join(prune.METHODS)} |",
        "|---|" + "---|" * len(prune.METHODS),
    ]
    for keep in KEPT:
        cells = [spread([x for one in found for x in one.pruned[keep, method]], "+") for method in prune.METHODS]
        lines.append(f"| {keep} | {' | '.join(cells)} |")
    lines += ["", "| second expert skipped by | |", "|---|---|"]
    lines += [f"| {name} | {spread([one.skipped[name] for one in found], '+', 4)} |" for name in found[0].skipped]
    lines += ["", f"| student, labels alone: {spread([one.labels for one in found])} | difference |", "|---|---|"]
    lines += [f"| {name} | {spread([one.students[name] for one in found], '+')} |" for name in LOSSES]
    return "\n".join(lines)


def spread(values: list[float], sign: str = "", digits: int = 3) -> str:
    """The median, and in brackets the smallest and the largest."""
    middle, least, most = (f"{value:{sign}.{digits}f}" for value in (np.median(values), min(values), max(values)))
    return f"{middle} [{least}, {most}]"


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure what fewer experts cost, and what a teacher adds.")
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="number of mixtures (3)")
    parser.add_argument("--steps", type=int, default=RECIPE.steps, metavar="N", help=f"of each ({RECIPE.steps})")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), metavar="N", help="processes (one a core)")
    chosen = parser.parse_args()
    with ProcessPoolExecutor(chosen.workers) as pool:
        print(table(list(pool.map(measure, range(chosen.seeds), [chosen.steps] * chosen.seeds))))


if __name__ == "__main__":
    main()
