"""The commands that write another model from one or several, smaller or merged, and their options."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from minimoe.cli import commands, options
from minimoe.cli.options import number, whole_number
from minimoe.core import presets
from minimoe.core.config import ModelConfig, TrainConfig
from minimoe.core.errors import printable

if TYPE_CHECKING:
    pass


def of_pruning(sub: argparse.ArgumentParser) -> None:
    """Adds how many experts are kept, how they are chosen, and on which text."""
    sub.add_argument("folder", metavar="MODEL", help="folder of a run, or of a Hugging Face model")
    sub.add_argument("--keep", type=whole_number, required=True, metavar="R", help="experts to keep in each layer")
    sub.add_argument(
        "--method",
        default=options.PRUNING[0],
        metavar="NAME",
        help=f"how they are chosen: {', '.join(options.PRUNING)} ({options.PRUNING[0]})",
    )
    sub.add_argument(
        "--text", nargs="+", metavar="PATH", help="UTF-8 files to compare experts on (the text of the run)"
    )
    sub.add_argument("--tokens", type=whole_number, default=2048, metavar="N", help="tokens of this text (2048)")
    sub.add_argument("--seed", type=whole_number, default=0, metavar="N", help="seed of the sample, and of random (0)")
    sub.add_argument("--out", required=True, metavar="DIR", help="the new folder")


def of_merging(sub: argparse.ArgumentParser) -> None:
    """Adds the runs to merge, and how."""
    sub.add_argument("folders", nargs="+", metavar="RUN", help="folders of runs of the same shape and tokenizer")
    sub.add_argument("--method", default="average", metavar="NAME", help=f"{', '.join(options.MERGING)} (average)")
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
    options.fields(sub, "training", TrainConfig, leave_out=("tokenizer", "dtype"))


def _other_text(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--out", required=True, metavar="DIR", help="folder of the new run")
    source = sub.add_mutually_exclusive_group()
    source.add_argument("--corpus", metavar="NAME", help="a built-in corpus to train on next (that of the first run)")
    source.add_argument("--text", nargs="+", metavar="PATH", help="UTF-8 files to train on next")


def of_distillation(sub: argparse.ArgumentParser) -> None:
    """Adds the teacher, the student, the loss, and every setting of the student."""
    sub.add_argument("folder", metavar="TEACHER", help="folder of a run")
    sub.add_argument(
        "--student",
        default="dense-twin",
        metavar="NAME",
        help=f"settings of the student: dense-twin or teacher, which follow from the teacher, or a preset: "
        f"{', '.join(presets.PRESETS)} (dense-twin)",
    )
    sub.add_argument(
        "--temperature", type=number, default=1.0, metavar="X", help="both distributions are flatter above 1 (1)"
    )
    sub.add_argument(
        "--hard-share", type=number, default=0.0, metavar="X", help="share of the label in the loss, 0 to 1 (0)"
    )
    sub.add_argument("--reverse", action="store_true", help="minimise KL(student, teacher) for KL(teacher, student)")
    sub.add_argument(
        "--from-teacher",
        action="store_true",
        help="begin with the weights of the teacher except for routers and experts: same width, layers and heads",
    )
    sub.add_argument("--text", nargs="+", metavar="PATH", help="UTF-8 files to learn from (the text of the teacher)")
    sub.add_argument("--out", metavar="DIR", help="folder of the run (a new one under runs/)")
    options.of_the_machine(sub)
    options.fields(sub, "model of the student", ModelConfig, leave_out=("vocab_size",))
    options.fields(sub, "training", TrainConfig)


def quantize(chosen: argparse.Namespace) -> int:
    from minimoe.compression import quantize
    from minimoe.storage import quantized

    rows = quantized.write(chosen.folder, chosen.out, chosen.scheme, chosen.attention)
    print(quantize.table(rows))
    return 0


def prune(chosen: argparse.Namespace) -> int:
    from minimoe.storage import pruned
    from minimoe.text import corpus

    done = pruned.write(
        chosen.folder,
        chosen.out,
        chosen.keep,
        chosen.method,
        corpus=corpus.read_files(chosen.text) if chosen.text else None,
        tokens=chosen.tokens,
        seed=chosen.seed,
    )
    print(pruned.table(done))
    return 0


def merge(chosen: argparse.Namespace) -> int:
    from minimoe.storage import merged
    from minimoe.text import corpus

    merged.merge(
        chosen.folders,
        chosen.out,
        chosen.method,
        base=chosen.base,
        align=chosen.align,
        t=chosen.t,
        keep=chosen.keep,
        strength=chosen.strength,
        seed=chosen.seed,
        corpus=corpus.read_files(chosen.text) if chosen.text else chosen.corpus,
    )
    print(printable(f"{chosen.out} is the merged model: evaluate it, or train it with --resume {chosen.out}."))
    return 0


def upcycle(chosen: argparse.Namespace) -> int:
    from minimoe.storage import merged
    from minimoe.text import corpus

    made = merged.upcycled(
        chosen.folders,
        chosen.out,
        experts=chosen.copies,
        active=chosen.active,
        granularity=chosen.granularity,
        renormalize=chosen.renormalize,
        noisy_gating=chosen.noisy,
        noise=chosen.noise,
        corpus=corpus.read_files(chosen.text) if chosen.text else chosen.corpus,
        changes=options.settings(argparse.Namespace(**{k: v for k, v in vars(chosen).items() if k != "renormalize"})),
    )
    size = f"{made.config.experts} experts of width {made.config.expert_width}, {made.config.active_experts} per token"
    print(printable(f"{chosen.out} has {size}: train it with --resume {chosen.out}."))
    return 0


def distill(chosen: argparse.Namespace) -> int:
    from minimoe.losses.distillation import Settings
    from minimoe.text import corpus
    from minimoe.training import distill

    done = distill.distill(
        chosen.folder,
        chosen.student,
        Settings(chosen.temperature, chosen.hard_share, chosen.reverse),
        from_teacher=chosen.from_teacher,
        corpus=corpus.read_files(chosen.text) if chosen.text else None,
        changes=options.settings(chosen),
        out=chosen.out,
        device=chosen.device,
        threads=chosen.threads,
    )
    if not done.finished:
        return commands.INTERRUPTED
    return 0 if done.problem is None else commands.BAD_INPUT
