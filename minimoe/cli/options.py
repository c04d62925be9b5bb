"""Options of the command line. Every field of ``ModelConfig`` and ``TrainConfig`` becomes an option."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from minimoe.core import config, presets
from minimoe.core.config import ModelConfig, TrainConfig

CORPORA = ("data", "fables", "dialogues", "contes", "sums", "python-docs", "python-code", "shakespeare")
PUBLISHED = (
    "mixtral-8x22b",
    "mistral-7b",
    "olmoe-1b-7b",
    "qwen3-30b-a3b",
    "deepseek-moe-16b",
    "switch-base-N (N from 8 to 256)",
    "rumour-8x220b",
)
MERGING = ("average", "slerp", "task", "ties", "dare")
SCHEMES = ("int8", "nf4", "hqq4", "hqq3", "hqq2", "hqq4m", "hqq3m", "hqq2m", "rtn4", "rtn3", "rtn2", "float")
PREFERENCES = ("dpo", "ipo", "simpo")
SFT_GROUPS = ("router", "experts", "attention", "embedding", "norms")
PRUNING = ("reconstruction", "frequency", "random")
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
    "sft": (
        "minimoe sft runs/toy --out runs/toy-sft                    the instructions of data/, in a minute or two",
        "minimoe sft runs/toy --instructions mine.jsonl             your own instructions",
        "minimoe sft runs/toy --freeze router experts               only attention, norms and the embedding learn",
        "minimoe sft runs/toy --lora 8                              only adapters of rank 8 learn",
        "minimoe sft --resume runs/toy-sft                          continue a run",
    ),
    "dpo": (
        "minimoe dpo runs/toy-sft --out runs/toy-dpo                the pairs of data/, in less than a minute",
        "minimoe dpo runs/toy-sft --loss ipo --pairs mine.jsonl     another loss, your own pairs",
        "minimoe dpo runs/toy-sft --loss simpo --beta 2             without a reference",
        "minimoe dpo --resume runs/toy-dpo                          continue a run",
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
        'minimoe generate mixtral --prompt "Once" --memory 8GB --report   a model larger than the memory',
    ),
    "chat": (
        "minimoe chat runs/toy-sft",
        'minimoe chat runs/toy-sft --system "Answer in words." --temperature 0',
        'echo "What is 3 + 4?" | minimoe chat runs/toy-sft',
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
    "distill": (
        "minimoe distill runs/toy                                   its dense twin learns from it",
        "minimoe distill runs/toy --student tiny --steps 500",
        "minimoe distill runs/toy --student teacher --experts 4 --from-teacher",
        "minimoe distill runs/toy --temperature 2 --hard-share 0.25 --out runs/student",
    ),
    "prune": (
        "minimoe prune runs/toy --keep 6 --out runs/toy-6",
        "minimoe prune runs/toy --keep 4 --method frequency --out runs/toy-4",
        "minimoe prune mixtral --keep 6 --text letters.txt --out mixtral-6",
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
    fields(sub, "model", ModelConfig, leave_out=("vocab_size",))  # it comes from the tokenizer
    fields(sub, "training", TrainConfig)


def of_the_bench(sub: argparse.ArgumentParser) -> None:
    """Adds what to measure, and every setting that changes how long a step takes."""
    sub.add_argument("--preset", default="toy", help=f"preset to measure: {', '.join(presets.PRESETS)} (toy)")
    sub.add_argument("--seconds", type=number, default=3.0, help="about how long each of four measurements takes (3)")
    sub.add_argument("--json", action="store_true", help="print JSON instead of a table")
    of_the_machine(sub)
    fields(sub, "model", ModelConfig)
    of_a_step = ("batch", "accumulate", "optimizer", "newton_schulz_steps", "capacity_factor", "dtype")
    others = [field.name for field in dataclasses.fields(TrainConfig) if field.name not in of_a_step]
    fields(sub, "training", TrainConfig, leave_out=others)


def fields(
    sub: argparse.ArgumentParser,
    title: str,
    kind: type[ModelConfig] | type[TrainConfig],
    leave_out: Sequence[str] = (),
    usual: Mapping[str, Any] | None = None,
) -> None:
    """Adds an option for each field of a config. Its help shows what is ``usual``: by default, the toy's value."""
    group = sub.add_argument_group(title)
    types = config.field_types(kind)
    for field in dataclasses.fields(kind):
        if field.name not in leave_out:
            if usual is None:
                default = f"toy: {_none_or(_of_the_toy(field.name))}"
            else:
                default = str(usual.get(field.name, "that of the run"))
            group.add_argument(f"--{field.name.replace('_', '-')}", **_option(field, *types[field.name], default))


def settings(chosen: argparse.Namespace) -> dict[str, Any]:
    """The fields of the configs that were given as options, by name."""
    known = {field.name for kind in (ModelConfig, TrainConfig) for field in dataclasses.fields(kind)}
    return {name: value for name, value in vars(chosen).items() if name in known}


def of_the_suite(group: argparse._ArgumentGroup) -> None:
    """Adds the options of ``--suite``. They have no default here, so an option that is not given is None."""
    group.add_argument(
        "--suite",
        action="store_true",
        help="measure loss per document, unseen sums, Python that parses, closed brackets, and exact and preferred "
        "answers of tuned models, with confidence intervals",
    )
    group.add_argument(
        "--against", metavar="RUN", help="another run on the same text, such as a dense twin, or the run before tuning"
    )
    group.add_argument("--samples", type=whole_number, metavar="N", help="number of texts to generate (100)")
    group.add_argument("--questions", type=whole_number, metavar="N", help="number of sums of each kind (200)")
    group.add_argument("--tokens", type=whole_number, metavar="N", help="tokens per text (256)")
    group.add_argument("--temperature", type=number, metavar="X", help="temperature of the generated texts (0.8)")
    group.add_argument("--seed", type=whole_number, metavar="N", help="the same seed gives the same numbers (0)")
    group.add_argument("--json", action="store_true", default=None, help="print JSON instead of a table")


def _of_the_toy(name: str) -> Any:
    toy = presets.PRESETS["toy"]
    return getattr(toy.config, name) if hasattr(toy.config, name) else getattr(toy.recipe, name)


def _none_or(value: Any) -> Any:
    return "none" if value is None else value


def _option(field: dataclasses.Field[Any], kind: type, optional: bool, default: str) -> dict[str, Any]:
    """The arguments of ``add_argument`` for a field of a config; an option that is left out is not in the namespace."""
    choices = field.metadata["choices"]
    doc = field.metadata["doc"] + (f": {' or '.join(choices)}" if choices else "")
    common: dict[str, Any] = {
        "help": f"{doc} ({default})".replace("%", "%%"),
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


def whole_number_or_none(text: str) -> int | None:
    return None if text == "none" else int(text)


def number(text: str) -> float:
    """``float`` for argparse, whose errors show the name of the function."""
    return float(text)


whole_number.__name__ = whole_number_or_none.__name__ = "whole number"


def of_the_memory(sub: argparse.ArgumentParser) -> None:
    """Adds the bound of memory for a model that may not fit, and the report about it."""
    sub.add_argument(
        "--memory",
        metavar="SIZE",
        help="leave the experts on the disk and hold those used last, with at most this much memory: 8GB, 800MB",
    )
    sub.add_argument(
        "--report", action="store_true", help="with --memory: say at the end what was read and what took the time"
    )


def of_the_machine(sub: argparse.ArgumentParser) -> None:
    """Adds the device and the number of CPU cores."""
    sub.add_argument("--device", default="auto", help="auto, cpu or gpu (auto)")
    sub.add_argument("--threads", type=whole_number, metavar="N", help="CPU cores to use (all)")
