"""A tuning run that trains adapters in the place of the weights: its settings, what is frozen, and its dropout.

    params, frozen = lora_run.begin(params, Lora(rank=8), parts, also=("embedding.table",), seed=0)

Everything but the adapters is frozen. If the model has gained tokens, the embedding and the output layer must learn
too: the new column of the output layer is the mean of the others, so a new token could never become the likeliest one
if this column did not learn.

The folder of such a run is an ordinary one: its model has the adapters merged. ``of_run`` reads the adapters apart.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from minimoe.core import files, tree
from minimoe.core.arrays import placeholder, select_device
from minimoe.core.errors import UserError
from minimoe.layers import decoder
from minimoe.layers.decoder import Decoder
from minimoe.losses.objective import Shard
from minimoe.storage import checkpoint
from minimoe.storage.checkpoint import RunConfig
from minimoe.tuning import adapters

SETTING = "lora"
"""The name of these settings in ``checkpoint.Tuning.settings``."""


class Lora(NamedTuple):
    """How adapters are trained."""

    rank: int
    alpha: float | None = None  # 2 · rank if None
    dropout: float = 0.0
    stabilized: bool = False  # rsLoRA
    quantize: str | None = None  # "nf4" or "int8": the form of the frozen bases (QLoRA)


def checked(lora: Lora) -> Lora:
    """The same settings as plain numbers, which JSON can write; raises ``UserError`` if one is of another kind."""
    if not isinstance(lora, Lora):
        raise UserError(f"lora {lora!r:.40} does not say how adapters are trained: give a Lora, such as Lora(rank=8).")
    for name in ("rank", "alpha", "dropout"):
        value = getattr(lora, name)
        if not (isinstance(value, int | float | np.number) or (name == "alpha" and value is None)):
            raise UserError(f"{name} {value!r:.40} is not a number: give one.")
    plain: list[Any] = [value.item() if isinstance(value, np.generic) else value for value in lora]
    return Lora(*plain)


def begin(
    params: Decoder, lora: Lora, freeze: Collection[str], also: Collection[str], seed: int, device: str
) -> tuple[Decoder, tuple[str, ...]]:
    """Parameters on the host → the same with fresh adapters, and the names of the leaves that are frozen.

    The parts in ``freeze`` get no adapters. The leaves ``also`` learn too, besides the adapters.

    Raises:
        UserError: a setting is not possible, all parts are frozen, or bases are to be quantised on a GPU.
    """
    if lora.quantize is not None and select_device(device) == "gpu":
        raise UserError("quantised bases are dequantised by the CPU, but the run is on a GPU: give --device cpu.")
    parts = parts_of(freeze)
    if not parts:
        raise UserError(f"{' and '.join(adapters.PARTS)} are all frozen, so nothing can have adapters: freeze less.")
    rng = np.random.default_rng((seed, 1))
    params = adapters.add(params, lora.rank, rng=rng, alpha=lora.alpha, stabilized=lora.stabilized, parts=parts)
    adapters.draw_dropout(params, lora.dropout, rng)  # raises if the rate is not possible
    if lora.quantize is not None:
        params = adapters.quantize(params, lora.quantize)
    learns = adapters.trainable(params) | set(also)
    return params, tuple(name for name, _ in tree.named_leaves(params) if name not in learns)


def parts_of(freeze: Collection[str]) -> list[str]:
    """The parts that get adapters if some groups of leaves are frozen."""
    return [part for part in adapters.PARTS if part not in freeze]


def with_dropout(
    read: Callable[[int], Iterator[Shard]], run: RunConfig, freeze: Collection[str]
) -> Callable[[int], Iterator[Shard]]:
    """The batches of ``read`` with the dropout of the run's adapters, which depends on the step alone."""
    assert run.tuning is not None
    lora = Lora(**run.tuning.settings[SETTING])
    if not lora.dropout:
        return read
    shapes = decoder.blank(run.config, lambda shape: placeholder(shape, run.recipe.dtype))
    shapes = adapters.add(shapes, lora.rank, rng=np.random.default_rng(0), parts=parts_of(freeze))

    def batches(first: int) -> Iterator[Shard]:
        for step, shard in enumerate(read(first), first):
            rng = np.random.default_rng((run.recipe.seed, step, 1))
            yield shard._replace(dropout=adapters.draw_dropout(shapes, lora.dropout, rng))

    return batches


def of_run(folder: str | Path) -> Decoder:
    """The model in the folder of a run that trains adapters, with the adapters apart from their bases.

    ``adapter_files.save`` writes them in peft's layout, and ``adapters.merge`` gives model.safetensors. With early
    stopping, this is the best model, which need not be the last one.

    Raises:
        UserError: the folder is no run, is damaged, or trains no adapters.
    """
    folder = files.user_path(folder)
    run = checkpoint.load_config(folder)
    found = checkpoint.load_progress(folder, run)
    if found is None or not adapters.adapted_leaves(found[0]):
        raise UserError(f"{folder} has no adapters: give the folder of a run that was tuned with --lora.")
    return checkpoint.with_adapters(folder, run, found[0])
