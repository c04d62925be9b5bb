"""Options of the command line. Every field of ``ModelConfig`` and ``TrainConfig`` becomes an option."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from minimoe.core import config, presets
from minimoe.core.config import ModelConfig, TrainConfig

CORPORA = ("data", "fables", "dialogues", "contes", "sums", "python-docs", "python-code", "shakespeare")
PUBLISHED = (
    "mixtral-8x22b",
    "mistral-7b",
    "olmoe-1b-7b",
    "deepseek-moe-16b",
    "switch-base-N (N from 8 to 256)",
    "rumour-8x220b",
)
METHODS = ("average", "slerp", "task", "ties", "dare")
SCHEMES = ("int8", "nf4", "hqq4", "hqq3", "hqq2", "rtn4", "rtn3", "rtn2", "float")
"""Names that --help shows. They are repeated here so that --help need not import NumPy; tests compare the lists."""

EXAMPLES = {
    "train": (
        "minimoe train                                              the toy, on data/, in a minute or two",
        "minimoe train --text notes.txt --steps 1000                your own text",
        "minimoe train --preset tiny --experts 16 --out runs/wide   a preset with other settings",
        "minimoe train --router switch --active-experts 1           another router",
        "minimoe train --resume runs/toy --steps 1000               continue a run",
        "minimoe train --from runs/toy --corpus sums --out runs/2   a new run that begins with another one's weights",
    ),
    "evaluate": (
        "minimoe evaluate runs/toy",
        "minimoe evaluate runs/toy --text letter.txt",
        "minimoe evaluate runs/toy --suite --against runs/toy-dense",
    ),
    "generate": (
        'minimoe generate runs/toy --prompt "Once upon a time"',
        'minimoe generate runs/toy --prompt "12 + 30 =" --tokens 5 --temperature 0',
        "cat story.txt | minimoe generate runs/toy --prompt - --samples 3",
    ),
    "routing": (
        "minimoe routing runs/toy",
        "minimoe routing runs/toy --html routing.html",
        "minimoe routing runs/toy --text english.txt french.txt",
    ),
    "gradcheck": ("minimoe gradcheck", "minimoe gradcheck --seed 7 --json"),
    "params": ("minimoe params mixtral-8x7b", "minimoe params runs/toy --figure parameters.png"),
    "quantize": (
        "minimoe quantize runs/toy --scheme nf4 --out runs/toy-nf4",
        "minimoe quantize runs/toy --scheme hqq2 --attention hqq4 --out runs/toy-2-bit",
    ),
    "merge": (
        "minimoe merge runs/one runs/two --method slerp --out runs/between",
        "minimoe merge runs/fables runs/contes --method ties --base runs/seed --out runs/both",
    ),
    "upcycle": (
        "minimoe upcycle runs/toy-dense --out runs/up --experts 8 --steps 300   train it next, with train --resume",
        "minimoe upcycle runs/fables runs/contes runs/sums --out runs/mix --corpus data",
    ),
    "bench": ("minimoe bench", "minimoe bench --experts 64 --threads 1"),
    "corpus": ("minimoe corpus shakespeare",),
    "info": ("minimoe info",),
}


def examples(command: str) -> str:
    """The end of a command's --help."""
    return "\n  ".join(["examples:", *EXAMPLES[command]])


def of_training(sub: argparse.ArgumentParser) -> None:
    """Adds the text, the folder, and every setting; a setting that is not given keeps the value of the preset."""
    sub.add_argument("--preset", help=f"preset to start from: {', '.join(presets.PRESETS)} (toy)")
    source = sub.add_mutually_exclusive_group()
    source.add_argument(
        "--corpus",
        metavar="NAME",
        help=f"a built-in corpus: {', '.join(CORPORA)} (data joins the four texts that follow it in this list)",
    )
    source.add_argument(
        "--text",
        nargs="+",
        metavar="PATH",
        help="UTF-8 files to train on; with --resume or --dense-twin, the new place of the run's text",
    )
    sub.add_argument("--out", metavar="DIR", help="folder of the run (a new one under runs/)")
    sub.add_argument("--resume", metavar="DIR", help="resume the run in this folder")
    sub.add_argument(
        "--dense-twin",
        metavar="DIR",
        help="train the dense twin of this run: the same number of active parameters, the same text and recipe",
    )
    sub.add_argument(
        "--from",
        dest="origin",
        metavar="DIR",
        help="begin a new run with the weights and the tokenizer of this run; the text and the recipe may be others",
    )
    of_the_machine(sub)
    _fields(sub, "model", ModelConfig, leave_out=("vocab_size",))  # it comes from the tokenizer
    _fields(sub, "training", TrainConfig)


def of_merging(sub: argparse.ArgumentParser) -> None:
    """Adds the runs to merge, and how."""
    sub.add_argument("folders", nargs="+", metavar="RUN", help="folders of runs of the same shape and tokenizer")
    sub.add_argument("--method", default="average", metavar="NAME", help=f"{', '.join(METHODS)} (average)")
    sub.add_argument("--base", metavar="RUN", help="the run that all began from; task, ties and dare need it")
    sub.add_argument("--align", action="store_true", help="first put experts and neurons in the order of the first run")
    sub.add_argument("--t", type=number, default=0.5, metavar="X", help="slerp: from 0, the first run, to 1 (0.5)")
    sub.add_argument("--keep", type=number, metavar="X", help="share of a change that ties (0.2) or dare (0.5) keeps")
    sub.add_argument("--strength", type=number, default=1.0, metavar="X", help="multiple of the merged change (1)")
    sub.add_argument("--seed", type=whole_number, default=0, metavar="N", help="dare: seed of the draw (0)")
    _other_text(sub)


def of_upcycling(sub: argparse.ArgumentParser) -> None:
    """Adds the dense runs, the shape of the mixture, and every setting of its training."""
    sub.add_argument(
        "folders", nargs="+", metavar="RUN", help="folder of a dense run; several become the experts (Branch-Train-MiX)"
    )
    sub.add_argument("--experts", dest="copies", type=whole_number, metavar="N", help="copies of one run (8)")
    sub.add_argument("--active", type=whole_number, default=2, metavar="N", help="copies that each token uses (2)")
    sub.add_argument(
        "--granularity", type=whole_number, default=1, metavar="N", help="experts that each copy is cut into (1)"
    )
    sub.add_argument(
        "--renormalize",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="weights that add up to 1: the function stays the same exactly (default), rather than nearly",
    )
    sub.add_argument("--noisy-gating", dest="noisy", action="store_true", help="add trainable noise to the new router")
    sub.add_argument(
        "--noise", type=number, default=0.0, metavar="X", help="noise on the copies, as a fraction of their weights (0)"
    )
    _other_text(sub)
    _fields(sub, "training", TrainConfig, leave_out=("tokenizer", "dtype"))


def _other_text(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--out", required=True, metavar="DIR", help="folder of the new run")
    source = sub.add_mutually_exclusive_group()
    source.add_argument("--corpus", metavar="NAME", help="a built-in corpus to train on next (that of the first run)")
    source.add_argument("--text", nargs="+", metavar="PATH", help="UTF-8 files to train on next")


def of_the_bench(sub: argparse.ArgumentParser) -> None:
    """Adds what to measure, and every setting that changes how long a step takes."""
    sub.add_argument("--preset", default="toy", help=f"preset to measure: {', '.join(presets.PRESETS)} (toy)")
    sub.add_argument("--seconds", type=number, default=3.0, help="about how long each of four measurements takes (3)")
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
    """Adds an option for each field of a config."""
    group = sub.add_argument_group(title)
    types = config.field_types(kind)
    for field in dataclasses.fields(kind):
        if field.name not in leave_out:
            group.add_argument(f"--{field.name.replace('_', '-')}", **_option(field, *types[field.name]))


def settings(chosen: argparse.Namespace) -> dict[str, Any]:
    """The fields of the configs that were given as options, by name."""
    known = {field.name for kind in (ModelConfig, TrainConfig) for field in dataclasses.fields(kind)}
    return {name: value for name, value in vars(chosen).items() if name in known}


def of_the_suite(group: argparse._ArgumentGroup) -> None:
    """Adds the options of ``--suite``. They have no default here, so an option that is not given is None."""
    group.add_argument(
        "--suite",
        action="store_true",
        help="measure loss per document, unseen sums, Python that parses, closed brackets, with confidence intervals",
    )
    group.add_argument("--against", metavar="RUN", help="another run on the same text, to compare with")
    group.add_argument("--samples", type=whole_number, metavar="N", help="number of texts to generate (100)")
    group.add_argument("--questions", type=whole_number, metavar="N", help="number of sums of each kind (200)")
    group.add_argument("--tokens", type=whole_number, metavar="N", help="tokens per text (256)")
    group.add_argument("--temperature", type=number, metavar="X", help="temperature of the generated texts (0.8)")
    group.add_argument("--seed", type=whole_number, metavar="N", help="the same seed gives the same numbers (0)")
    group.add_argument("--json", action="store_true", default=None, help="print JSON instead of a table")


def _option(field: dataclasses.Field[Any], kind: type, optional: bool) -> dict[str, Any]:
    """The arguments of ``add_argument`` for a field of a config; an option that is left out is not in the namespace."""
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
    """``int`` for argparse, whose errors show the name of the function."""
    return int(text)


def number(text: str) -> float:
    """``float`` for argparse, whose errors show the name of the function."""
    return float(text)


whole_number.__name__ = "whole number"


def of_the_machine(sub: argparse.ArgumentParser) -> None:
    """Adds the device and the number of CPU cores."""
    sub.add_argument("--device", default="auto", help="auto, cpu or gpu (auto)")
    sub.add_argument("--threads", type=whole_number, metavar="N", help="CPU cores to use (all)")
