"""Options of the command line. Every setting of ``ModelConfig`` and ``TrainConfig`` is one, made from the class."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from minimoe.core import config, presets
from minimoe.core.config import ModelConfig, TrainConfig


def of_training(sub: argparse.ArgumentParser) -> None:
    """What to learn from, where to, and every setting; a setting that was not given is left to the preset."""
    sub.add_argument("--preset", help=f"settings to start from: {', '.join(presets.PRESETS)} (toy)")
    source = sub.add_mutually_exclusive_group()
    source.add_argument(
        "--corpus",
        metavar="NAME",
        help="a built-in corpus: data (four small texts), fables, python-docs, shakespeare, ...",
    )
    source.add_argument("--text", nargs="+", metavar="PATH", help="UTF-8 files to learn from")
    sub.add_argument("--out", metavar="DIR", help="folder of the run (a new one under runs/)")
    sub.add_argument("--resume", metavar="DIR", help="continue the run in this folder")
    sub.add_argument(
        "--dense-twin", metavar="DIR", help="train the dense model of equal active parameters, as this run was trained"
    )
    of_the_machine(sub)
    _fields(sub, "model", ModelConfig, leave_out=("vocab_size",))  # the tokenizer's to say
    _fields(sub, "training", TrainConfig)


def of_the_bench(sub: argparse.ArgumentParser) -> None:
    """What to measure, and every setting that changes how long a step takes."""
    sub.add_argument("--preset", default="toy", help=f"what to measure: {', '.join(presets.PRESETS)} (toy)")
    sub.add_argument("--seconds", type=number, default=3.0, help="for each of four measurements, about (3)")
    sub.add_argument("--json", action="store_true", help="print JSON instead of a table")
    of_the_machine(sub)
    _fields(sub, "model", ModelConfig)
    of_a_step = ("batch", "accumulate", "optimizer", "newton_schulz_steps", "capacity_factor", "dtype")
    others = [field.name for field in dataclasses.fields(TrainConfig) if field.name not in of_a_step]
    _fields(sub, "training", TrainConfig, leave_out=others)


def _fields(
    sub: argparse.ArgumentParser,
    title: str,
    kind: type[ModelConfig] | type[TrainConfig],
    leave_out: Sequence[str] = (),
) -> None:
    """An option for each field of a config."""
    group = sub.add_argument_group(title)
    types = config.field_types(kind)
    for field in dataclasses.fields(kind):
        if field.name not in leave_out:
            group.add_argument(f"--{field.name.replace('_', '-')}", **_option(field, *types[field.name]))


def settings(chosen: argparse.Namespace) -> dict[str, Any]:
    """The fields of the configs that were given."""
    known = {field.name for kind in (ModelConfig, TrainConfig) for field in dataclasses.fields(kind)}
    return {name: value for name, value in vars(chosen).items() if name in known}


def of_the_suite(group: argparse._ArgumentGroup) -> None:
    """These mean nothing without ``--suite``, so they have no default here: what was not given is None."""
    group.add_argument(
        "--suite",
        action="store_true",
        help="loss by document, unseen sums, Python that parses, brackets closed, with confidence intervals",
    )
    group.add_argument("--against", metavar="RUN", help="another run on the same text, to be shown beside it")
    group.add_argument("--samples", type=whole_number, metavar="N", help="texts that a model writes (100)")
    group.add_argument("--questions", type=whole_number, metavar="N", help="sums of each kind (200)")
    group.add_argument("--tokens", type=whole_number, metavar="N", help="tokens of a text (256)")
    group.add_argument("--temperature", type=number, metavar="X", help="at which it writes (0.8)")
    group.add_argument("--seed", type=whole_number, metavar="N", help="the same seed gives the same numbers (0)")
    group.add_argument("--json", action="store_true", default=None, help="print JSON instead of a table")


def _option(field: dataclasses.Field[Any], kind: type, optional: bool) -> dict[str, Any]:
    """How argparse reads one field of a config; left out, it stays as the preset has it."""
    toy = presets.PRESETS["toy"]
    usual = getattr(toy.config, field.name) if hasattr(toy.config, field.name) else getattr(toy.recipe, field.name)
    choices = field.metadata["choices"]
    doc = field.metadata["doc"] + (f": {' or '.join(choices)}" if choices else "")
    common: dict[str, Any] = {
        "help": f"{doc} (toy: {'none' if usual is None else usual})".replace("%", "%%"),
        "default": argparse.SUPPRESS,
    }
    if kind is bool:
        return common | {"action": argparse.BooleanOptionalAction}
    read: Callable[[str], Any] = {int: whole_number, float: number}.get(kind, kind)

    def read_or_none(text: str) -> Any:
        return None if text == "none" else read(text)

    read_or_none.__name__ = read.__name__
    return common | {
        "type": read_or_none if optional else read,
        "metavar": {int: "N", float: "X"}.get(kind, "NAME"),
    }


def whole_number(text: str) -> int:
    """For argparse, which names the type in its errors."""
    return int(text)


def number(text: str) -> float:
    """For argparse, which names the type in its errors."""
    return float(text)


whole_number.__name__ = "whole number"


def of_the_machine(sub: argparse.ArgumentParser) -> None:
    """What to compute with."""
    sub.add_argument("--device", default="auto", help="auto, cpu or gpu (auto)")
    sub.add_argument("--threads", type=whole_number, metavar="N", help="CPU cores to use (all)")
