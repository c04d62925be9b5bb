"""When does a mixture beat its dense twin? Paired runs over three seeds; lesson 14 quotes the table.

    python tests/tools/dense_or_sparse.py

Ten minutes or so on two cores. Each row changes one thing of a small mixture and trains its dense twin, which has as
many active parameters, on the same batches. Another processor gives other digits.
"""

from __future__ import annotations

import dataclasses
import os
from concurrent.futures import ProcessPoolExecutor
from typing import Any, NamedTuple

for library in ("OPENBLAS", "OMP", "MKL"):  # before NumPy is imported: a process per core is enough
    os.environ.setdefault(f"{library}_NUM_THREADS", "1")

import numpy as np  # noqa: E402

from minimoe.core import presets  # noqa: E402
from minimoe.core.config import ModelConfig, TrainConfig  # noqa: E402
from minimoe.core.presets import Preset  # noqa: E402
from minimoe.cost import parameters  # noqa: E402
from minimoe.text import batches  # noqa: E402
from minimoe.training import experiment  # noqa: E402

SEEDS = (0, 1, 2)
STUDENT = 4.303
"""Student's t for a 95 % interval from three seeds, two degrees of freedom."""

BASE = Preset(
    "",
    ModelConfig(
        width=64, layers=2, heads=4, kv_heads=2, head_width=16, context=64, experts=8, active_experts=2, expert_width=64
    ),
    TrainConfig(steps=400, batch=16, learning_rate=6e-3, warmup=40, evaluate_every=0, save_every=0),
)
CHANGES: dict[str, dict[str, Any]] = {
    "8 experts of 64, 400 steps": {},
    "experts of 16": {"expert_width": 16},
    "experts of 128": {"expert_width": 128},
    "experts of 256": {"expert_width": 256},
    "100 steps": {"steps": 100, "warmup": 10},
    "1600 steps": {"steps": 1600},
    "4 experts": {"experts": 4},
    "32 experts": {"experts": 32},
    "16 experts of 32, four active": {"experts": 16, "active_experts": 4, "expert_width": 32},
    "one shared, one of seven routed": {"experts": 7, "active_experts": 1, "shared_experts": 1, "renormalize": False},
    "router: hash": {"router": "token_hash", "noisy_gating": False},
    "router: sigmoid + bias": {"router": "sigmoid_bias"},
    "four blocks of width 128": {"width": 128, "head_width": 32, "layers": 4},
}


class Pair(NamedTuple):
    """The validation losses of a mixture and of its twin, which read the same batches."""

    sparse: float
    dense: float
    parameters: int


def run(changes: dict[str, Any], seed: int) -> Pair:
    mixture = presets.override(BASE, changes)
    twin = presets.dense_twin(mixture)
    losses = []
    for one in (mixture, twin):
        data, _, codec = batches.prepare("data", one.recipe, one.config.context)
        config = dataclasses.replace(one.config, vocab_size=codec.vocab_size)
        losses.append(experiment.learn(config, one.recipe, data, seed).loss)
    return Pair(losses[0], losses[1], parameters.count(mixture.config).total)


def main() -> None:
    print("| change | dense twin | mixture | mixture − twin, 95 % | training tokens per parameter |")
    print("|---|---|---|---|---|")
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        futures = {name: [pool.submit(run, changes, seed) for seed in SEEDS] for name, changes in CHANGES.items()}
        for name, of_name in futures.items():
            pairs = [future.result() for future in of_name]
            apart = np.array([pair.sparse - pair.dense for pair in pairs])
            half = STUDENT * apart.std(ddof=1) / len(apart) ** 0.5
            dense, sparse = (np.mean([getattr(pair, kind) for pair in pairs]) for kind in ("dense", "sparse"))
            recipe = presets.override(BASE, CHANGES[name]).recipe
            tokens = recipe.steps * recipe.batch * BASE.config.context / pairs[0].parameters
            difference = f"{apart.mean():+.3f} ± {half:.3f}"
            print(f"| {name} | {dense:.3f} | {sparse:.3f} | {difference} | {tokens:.1f} |", flush=True)


if __name__ == "__main__":
    main()
