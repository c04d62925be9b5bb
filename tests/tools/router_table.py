"""README's comparison of the routers: same text, same budget, three seeds. Run this file to measure it again.

    python tests/tools/router_table.py [--print]

Eight minutes or so on two cores. Another processor gives other digits.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any, NamedTuple

for library in ("OPENBLAS", "OMP", "MKL"):  # before NumPy is imported: a process per core is enough
    os.environ.setdefault(f"{library}_NUM_THREADS", "1")

import numpy as np  # noqa: E402
import readme_numbers  # noqa: E402

from minimoe.analysis.routing_trace import jensen_shannon, max_violation  # noqa: E402
from minimoe.core.config import ModelConfig, TrainConfig  # noqa: E402
from minimoe.evaluate import text_loss  # noqa: E402
from minimoe.layers import decoder, embedding, moe, rmsnorm  # noqa: E402
from minimoe.layers.mode import Mode  # noqa: E402
from minimoe.optim import optimizer  # noqa: E402
from minimoe.proof import continuity  # noqa: E402
from minimoe.text import batches  # noqa: E402
from minimoe.text.batches import Texts  # noqa: E402
from minimoe.training import experiment  # noqa: E402
from minimoe.training import step as steps  # noqa: E402
from minimoe.training.experiment import Learned  # noqa: E402

SEEDS = (0, 1, 2)
CONFIG = ModelConfig(
    width=64, layers=2, heads=4, kv_heads=2, head_width=16, context=64, experts=8, active_experts=2, expert_width=64
)
RECIPE = TrainConfig(steps=400, batch=16, learning_rate=6e-3, warmup=40, evaluate_every=0, save_every=0)


class Contender(NamedTuple):
    """A line of the table."""

    name: str
    config: ModelConfig
    recipe: TrainConfig = RECIPE
    frozen_router: bool = False


def of(name: str, router: str, *, frozen: bool = False, **settings: Any) -> Contender:
    return Contender(name, dataclasses.replace(CONFIG, router=router, **settings), frozen_router=frozen)


DENSE = dataclasses.replace(CONFIG, experts=1, active_experts=1, expert_width=128, noisy_gating=False)
CONTENDERS = (
    Contender("dense, equal active width", DENSE, dataclasses.replace(RECIPE, balance_loss=0.0, z_loss=0.0)),
    of("noisy top-2", "noisy_top_k"),
    of("top-2, router frozen at random", "noisy_top_k", frozen=True, noisy_gating=False),
    of("Switch, experts twice as wide", "switch", active_experts=1, expert_width=128),
    of("GShard", "gshard"),
    of("cosine, Tutel's form", "cosine"),
    of("cosine, X-MoE's form", "cosine", cosine_form="x-moe"),
    of("sigmoid + bias", "sigmoid_bias"),
    of("sigmoid + bias, half of the width shared", "sigmoid_bias", active_experts=2, shared_experts=2, expert_width=32),
    of("expert threshold", "expert_threshold"),
    of("expert choice", "expert_choice"),
    of("hash", "token_hash", noisy_gating=False),
    of("hash, gate weighs", "token_hash", noisy_gating=False, hash_gate=True),
    of("ReMoE", "remoe"),
    of("noisy top-2, zero and copy experts", "noisy_top_k", expert_kind="zero_computation"),
)


UNIT = "noisy top-2"
"""The contender whose step is the unit of time."""


class Measured(NamedTuple):
    loss: float
    violation: float
    active: float
    divergence: float
    chance: float
    jump: float


def prepare() -> tuple[Texts, int]:
    data, _, codec = batches.prepare("data", RECIPE, CONFIG.context)
    return data, codec.vocab_size


def measure(contender: Contender, seed: int) -> Measured:
    data, vocabulary = prepare()
    config = dataclasses.replace(contender.config, vocab_size=vocabulary)
    learned = experiment.learn(
        config,
        contender.recipe,
        data,
        seed,
        frozen=lambda name: contender.frozen_router and ".router." in name,
        look_ahead=True,  # expert choice is shown beside the routers that a language model may use
    )
    return Measured(
        learned.loss,
        float(max_violation(learned.load).mean()),
        learned.active,
        divergence(learned, config, data.validation),
        divergence(learned, config, shuffled(data.validation, config.context, seed)),
        jump(learned, config, data, seed),
    )


def divergence(learned: Learned, config: ModelConfig, texts: Sequence[np.ndarray]) -> float:
    """How differently the experts are used by several texts: Jensen-Shannon, bits, averaged over the layers."""
    loads = [text_loss.evaluate(learned.params, config, [text]).load for text in texts]
    return float(jensen_shannon(*loads).mean())


def shuffled(texts: Sequence[np.ndarray], context: int, seed: int) -> list[np.ndarray]:
    """As many texts of the same lengths, each made of pieces of all: what divergence is left by chance."""
    pieces = [text[start : start + context] for text in texts for start in range(0, len(text) - context, context)]
    order = np.random.default_rng(seed).permutation(len(pieces))
    stops = np.cumsum([len(text) // context for text in texts])[:-1]
    return [np.concatenate([pieces[i] for i in part]) for part in np.split(order, stops) if len(part)]


def jump(learned: Learned, config: ModelConfig, data: Texts, seed: int) -> float:
    """The largest jump of the first layer's mixture between pairs of tokens, as a share of its output; the median."""
    rng = np.random.default_rng(seed)
    block, jumps = learned.params.blocks[0], []
    for _ in range(10):
        ids = rng.choice(data.train, 2)
        ends = rmsnorm.forward(block.moe_norm, embedding.forward(learned.params.embedding, ids)[0], config.norm_eps)[0]
        ends = ends.astype(np.float64)
        mode = Mode(labels=ids[:1, None])
        jumps.append(
            continuity.largest_jump(
                lambda t, ends=ends, mode=mode: moe.forward(
                    block.moe, ((1 - t) * ends[0] + t * ends[1])[None, None], config, mode
                ).y[0, 0],
                candidates=2,
            )
        )
    return float(np.median(jumps))


def step_times(contenders: Sequence[Contender], rounds: int = 15) -> dict[str, float]:
    """The time of a training step of each contender, with noisy top-2 as 1: medians over rounds of all."""
    data, vocabulary = prepare()
    everyone = {one.name: one for one in (*contenders, *(c for c in CONTENDERS if c.name == UNIT))}
    take = {}
    for name, one in everyone.items():
        config = dataclasses.replace(one.config, vocab_size=vocabulary)
        params = decoder.init(np.random.default_rng(0), config, look_ahead=True)
        moments, rng = optimizer.init(params, one.recipe), np.random.default_rng(0)
        text = data.batches(one.recipe.batch, config.context, 0)

        def one_step(
            params: Any = params, moments: Any = moments, rng: Any = rng, text: Any = text, config: Any = config,
            recipe: Any = one.recipe,
        ) -> float:  # fmt: skip
            shards = steps.shard_batch(rng, params, *next(text), config, recipe, 1)
            started = time.perf_counter()
            steps.train_step(params, moments, shards, config, recipe, 50)
            return time.perf_counter() - started

        take[name] = one_step
    times: dict[str, list[float]] = {name: [] for name in take}
    for _ in range(rounds):
        for name, one_step in take.items():
            times[name].append(one_step())
    return {name: float(np.median(np.divide(of_one[2:], times[UNIT][2:]))) for name, of_one in times.items()}


def table(found: dict[str, list[Measured]], relative: dict[str, float]) -> str:
    lines = [
        "| router | validation loss | MaxVio | experts per token | texts apart (chance), bits | jumps | causal | "
        "time of a step |",
        "|---|---|---|---|---|---|---|---|",
    ]
    routers = {contender.name: contender.config.router for contender in CONTENDERS}
    for name, rows in found.items():
        by_field = Measured(*(list(values) for values in zip(*rows, strict=True)))
        span = readme_numbers.span
        dense = name.startswith("dense")
        ahead = routers[name] not in moe.causal_routers()  # a token alone shows nothing of a choice among tokens
        cells = [
            span(by_field.loss, 3),
            "" if dense else span(by_field.violation, 2),
            span(by_field.active, 2),
            "" if dense else f"{span(by_field.divergence, 3)} ({span(by_field.chance, 3)})",
            "" if dense or ahead else "no" if max(by_field.jump) < 1e-4 else f"{100 * np.median(by_field.jump):.0f} %",
            "" if dense else "no" if ahead else "yes",
            f"{relative[name]:.2f}",
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare the routers over three seeds.")
    parser.add_argument("--print", action="store_true", help="print the table, and leave the README as it is")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="rows whose names begin with one of these words")
    chosen = parser.parse_args()
    contenders = [c for c in CONTENDERS if not chosen.only or c.name.startswith(tuple(chosen.only))]
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        futures = {c.name: [pool.submit(measure, c, seed) for seed in SEEDS] for c in contenders}
        found = {name: [future.result() for future in of_name] for name, of_name in futures.items()}
    written = table(found, step_times(contenders))
    if chosen.print or chosen.only:
        print(written)
    else:
        readme_numbers.write("routers", written, "router_table.py")


if __name__ == "__main__":
    main()
