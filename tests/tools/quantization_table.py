"""What each scheme of quantisation costs, by part: loss, and routings that change. Run this file to measure it again.

    python tests/tools/quantization_table.py

Three small mixtures are trained from different seeds and quantised in every way, which takes a minute of one core. The
whole table is printed, and the README's small table is written. A loss is
given as its difference from that of the same model in float32: the median of the seeds, then the smallest and largest.
A routing is the set of experts that a token has in a layer; it has changed if it is not the set that the same token has
in the float32 model. By chance, a routing is that of another token of the same layer.

The router, which ``minimoe quantize`` leaves alone, is quantised here too, to see what that would do. Another processor
gives other digits.
"""

from __future__ import annotations

import argparse
import os
from concurrent.futures import ProcessPoolExecutor
from typing import NamedTuple

for library in ("OPENBLAS", "OMP", "MKL"):  # before NumPy is imported: a process per core is enough
    os.environ.setdefault(f"{library}_NUM_THREADS", "1")

import dataclasses  # noqa: E402

import numpy as np  # noqa: E402
import readme_numbers  # noqa: E402
from numpy.typing import NDArray  # noqa: E402

from minimoe.analysis import routing_trace  # noqa: E402
from minimoe.compression import quantize  # noqa: E402
from minimoe.compression.quantize import SCHEMES  # noqa: E402
from minimoe.core.config import ModelConfig, TrainConfig  # noqa: E402
from minimoe.evaluate import text_loss  # noqa: E402
from minimoe.layers.decoder import Decoder  # noqa: E402
from minimoe.text import batches  # noqa: E402
from minimoe.training import experiment  # noqa: E402

SEEDS = (0, 1, 2)
CONFIG = ModelConfig(
    width=64, layers=2, heads=4, kv_heads=2, head_width=16, context=64, experts=8, active_experts=2, expert_width=64
)
RECIPE = TrainConfig(steps=400, batch=16, learning_rate=6e-3, warmup=40, evaluate_every=0, save_every=0)

CASES = {
    "experts": ("experts",),
    "attention": ("attention",),
    "both": ("experts", "attention"),
    "router": ("router",),
}


class Cost(NamedTuple):
    """What a scheme costs in one part of one model."""

    loss: float  # nats per character more than in float32
    changed: float  # share of routings that changed


class Measured(NamedTuple):
    """One trained model."""

    loss: float
    chance: float  # share of routings that differ between two tokens
    costs: dict[tuple[str, str], Cost]  # by scheme and case


def measure(seed: int, steps: int) -> Measured:
    """Trains a model and quantises it in every way."""
    data, _, codec = batches.prepare("data", RECIPE, CONFIG.context)
    config = dataclasses.replace(CONFIG, vocab_size=codec.vocab_size)
    learned = experiment.learn(config, dataclasses.replace(RECIPE, steps=steps), data, seed)
    chosen = routings(learned.params, config, data.validation)
    costs = {}
    for scheme in SCHEMES:
        for case, parts in CASES.items():
            params = quantize.approximate(learned.params, dict.fromkeys(parts, scheme))
            loss = text_loss.evaluate(params, config, data.validation).loss
            changed = differing(chosen, routings(params, config, data.validation))
            costs[scheme, case] = Cost(loss - learned.loss, changed)
    others = np.random.default_rng(seed).permutation(chosen.shape[1])
    return Measured(learned.loss, differing(chosen, chosen[:, others]), costs)


def routings(params: Decoder, config: ModelConfig, texts: list[NDArray[np.int32]]) -> NDArray[np.intp]:
    """The experts (L, N, K) of every token of the texts, each set in ascending order."""
    traces = [routing_trace.trace(params, config, text) for text in texts]
    return np.sort(np.concatenate([trace.experts for trace in traces], axis=1), axis=2)


def differing(one: NDArray[np.intp], other: NDArray[np.intp]) -> float:
    """The share of layers and tokens whose sets are not equal."""
    return float((one != other).any(2).mean())


def table(found: list[Measured]) -> str:
    """Markdown: a line for each scheme, with its bits a weight."""
    lines = [
        f"Loss in float32 {spread([one.loss for one in found], 3)} nats a character; by chance "
        f"{spread([100 * one.chance for one in found], 0)} % of the routings differ. {len(found)} seeds.",
        "",
        "| scheme | bits | " + " | ".join(f"{case}: loss | changed, %" for case in CASES) + " |",
        "|---|---|" + "---|---|" * len(CASES),
    ]
    for scheme in SCHEMES:
        cells = [scheme, bits_of(scheme)]
        for case in CASES:
            costs = [one.costs[scheme, case] for one in found]
            cells.append(spread([cost.loss for cost in costs], 4, sign="+"))
            cells.append(spread([100 * cost.changed for cost in costs], 1))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", by_weight(found)])


def small_table(found: list[Measured]) -> str:
    """Markdown for the README: ranges over the seeds, and of the router only whom it chooses."""
    loss = readme_numbers.span([one.loss for one in found], 3)
    chance = readme_numbers.span([100 * one.chance for one in found], 0)
    lines = [
        "| scheme | bits a weight | experts | attention | both | changed by both | changed by the router |",
        "|---|---|---|---|---|---|---|",
        f"| float | 32 | {loss} | {loss} | {loss} | (chance: {chance} %) | |",
    ]
    for scheme in SCHEMES:
        costs = {case: [one.costs[scheme, case] for one in found] for case in CASES}
        cells = [scheme, bits_of(scheme)]
        for case in ("experts", "attention", "both"):
            least, most = (f"{bound(cost.loss for cost in costs[case]):+.3f}" for bound in (min, max))
            cells.append(f"{least} to {most}".replace("-", "−").replace("−0.000", "0.000").replace("+0.000", "0.000"))
        for case in ("both", "router"):
            cells.append(readme_numbers.span([100 * cost.changed for cost in costs[case]], 0) + " %")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def bits_of(scheme: str) -> str:
    """What a weight of the experts takes, with the numbers that it shares with others."""
    experts = next(row for row in quantize.sizes(CONFIG, quantize.plan(scheme)) if row.part == "experts")
    return f"{8 * experts.bytes / experts.parameters:.2f}"


NOISE = 5e-4
"""A smaller difference of losses, in nats, is too near to zero to be divided by."""


def by_weight(found: list[Measured]) -> str:
    """How much more a quantised weight of the attention costs than one of the experts, at equal bits."""
    counts = {row.part: row.parameters for row in quantize.sizes(CONFIG, quantize.plan("nf4"))}
    lines = [
        f"The experts have {counts['experts']:,} weights, the attention {counts['attention']:,}. Loss for each weight, "
        f"that of the attention over that of the experts (a token uses only {CONFIG.active_experts} of "
        f"{CONFIG.experts} experts, but all of the attention):",
        "",
    ]
    for scheme in SCHEMES:
        experts, attention = ([one.costs[scheme, part].loss for one in found] for part in ("experts", "attention"))
        if min(experts) < NOISE:
            lines.append(f"- {scheme}: the experts cost too little to tell")
            continue
        factor = counts["experts"] / counts["attention"]
        lines.append(f"- {scheme}: {spread([factor * a / e for a, e in zip(attention, experts, strict=True)], 1)}")
    return "\n".join(lines)


def spread(values: list[float], digits: int, sign: str = "") -> str:
    """The median, and in brackets the smallest and the largest."""
    middle, least, most = (f"{value:{sign}.{digits}f}" for value in (np.median(values), min(values), max(values)))
    return f"{middle} [{least}, {most}]"


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure what each scheme of quantisation costs, by part.")
    parser.add_argument("--seeds", type=int, default=len(SEEDS), metavar="N", help=f"number of models ({len(SEEDS)})")
    parser.add_argument("--steps", type=int, default=RECIPE.steps, metavar="N", help=f"of each ({RECIPE.steps})")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), metavar="N", help="processes (one a core)")
    parser.add_argument("--print", action="store_true", help="leave the README as it is")
    chosen = parser.parse_args()
    with ProcessPoolExecutor(chosen.workers) as pool:
        found = list(pool.map(measure, range(chosen.seeds), [chosen.steps] * chosen.seeds))
    print(table(found))
    if not chosen.print:
        readme_numbers.write("quantisers", small_table(found), "quantization_table.py")


if __name__ == "__main__":
    main()
