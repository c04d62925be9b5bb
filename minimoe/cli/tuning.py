"""The commands that tune a model (sft and dpo), the one that talks with a model, and their options."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from minimoe.cli import commands, options
from minimoe.cli.options import number, whole_number
from minimoe.core import presets
from minimoe.core.config import TrainConfig
from minimoe.core.errors import UserError

if TYPE_CHECKING:
    from minimoe.tuning.lora_run import Lora


def of_sft(sub: argparse.ArgumentParser) -> None:
    """Adds options: what to tune, with what, and the settings of the recipe, by default those of the run."""
    sub.add_argument("folder", nargs="?", metavar="MODEL", help="folder of a run, or of a Hugging Face model")
    sub.add_argument("--instructions", metavar="PATH", help="a file like data/instructions.jsonl, which is the default")
    sub.add_argument("--out", metavar="DIR", help="folder of the new run (a new one under runs/)")
    sub.add_argument("--resume", metavar="DIR", help="resume the run in this folder")
    sub.add_argument(
        "--freeze", nargs="+", metavar="PART", help=f"parts that stay as they are: {', '.join(options.SFT_GROUPS)}"
    )
    sub.add_argument("--lora", type=whole_number, metavar="RANK", help="freeze the weights and train adapters (LoRA)")
    sub.add_argument("--lora-alpha", type=number, metavar="A", help="adapters are scaled by A/RANK (2 · RANK)")
    sub.add_argument(
        "--lora-dropout", type=number, metavar="P", help="share of the adapters' inputs that is dropped (0)"
    )
    sub.add_argument("--qlora", action="store_true", default=None, help="keep the frozen weights in 4 bits, nf4")
    rows = sub.add_mutually_exclusive_group()
    rows.add_argument(
        "--pack",
        action="store_true",
        default=None,
        help="several instructions in each sequence (the default without a capacity and a sequence loss)",
    )
    rows.add_argument("--pad", action="store_false", dest="pack", help="one instruction in each sequence, and padding")
    _add_patience(sub, presets.SFT_PATIENCE)
    options.of_the_machine(sub)
    options.fields(sub, "training", TrainConfig, leave_out=("tokenizer",), usual=presets.SFT_RECIPE)


def of_dpo(sub: argparse.ArgumentParser) -> None:
    """Adds options: what to tune, with what, by which loss, and the settings of the recipe."""
    sub.add_argument("folder", nargs="?", metavar="MODEL", help="folder of a model that answers instructions")
    sub.add_argument("--pairs", metavar="PATH", help="a file like data/preferences.jsonl, which is the default")
    sub.add_argument("--out", metavar="DIR", help="folder of the new run (a new one under runs/)")
    sub.add_argument("--resume", metavar="DIR", help="resume the run in this folder")
    sub.add_argument(
        "--freeze", nargs="+", metavar="PART", help=f"parts that stay as they are: {', '.join(options.SFT_GROUPS)}"
    )
    group = sub.add_argument_group("preference")
    group.add_argument("--loss", metavar="NAME", help=f"{', '.join(options.PREFERENCES)} (dpo)")
    group.add_argument(
        "--beta", type=number, metavar="X", help="how much a change of the log-probability counts as reward (0.1)"
    )
    group.add_argument(
        "--label-smoothing", type=number, metavar="X", help="dpo, simpo: probability of a wrong label (0)"
    )
    group.add_argument("--margin", type=number, metavar="X", help="simpo: by how much the reward should be larger (0)")
    _add_patience(sub, presets.DPO_PATIENCE)
    options.of_the_machine(sub)
    options.fields(sub, "training", TrainConfig, leave_out=("tokenizer", "capacity_factor"), usual=presets.DPO_RECIPE)


def _add_patience(sub: argparse.ArgumentParser, usual: int) -> None:
    sub.add_argument(
        "--patience",
        type=options.whole_number_or_none,
        default=argparse.SUPPRESS,
        metavar="N",
        help=f"stop after N evaluations without a new lowest loss, and keep the best model ({usual}; or none)",
    )


LORA = ("lora", "lora_alpha", "lora_dropout", "qlora")


def sft(chosen: argparse.Namespace) -> int:
    from minimoe.tuning import resume
    from minimoe.tuning import sft as tuning

    settings = options.settings(chosen)
    machine = {"device": chosen.device, "threads": chosen.threads}
    if chosen.resume:
        _no_model(chosen)
        commands.leave_out(chosen, "resume", "instructions", "out", "freeze", "pack", *LORA)
        if hasattr(chosen, "patience"):  # None is a value of its own
            raise UserError("--patience cannot go with --resume: the folder determines it; leave --patience out.")
        return commands.outcome(resume.resume(chosen.resume, changes=settings, kind=tuning.KIND, **machine))
    if chosen.folder is None:
        raise UserError("there is no model to tune: give the folder of a run, or --resume and the folder of one.")
    patience = {"patience": chosen.patience} if hasattr(chosen, "patience") else {}
    return commands.outcome(
        tuning.tune(
            chosen.folder,
            data=chosen.instructions,
            out=chosen.out,
            freeze=chosen.freeze or (),
            lora=_lora(chosen),
            changes=settings,
            pack=chosen.pack,
            **patience,
            **machine,
        )
    )


def _no_model(chosen: argparse.Namespace) -> None:
    if chosen.folder is not None:
        raise UserError(f"{chosen.folder} and --resume {chosen.resume} are two models: leave one of the two out.")


def _lora(chosen: argparse.Namespace) -> Lora | None:
    """The settings of adapters, or None if none are to be trained."""
    from minimoe.tuning.lora_run import Lora

    if chosen.lora is None:
        for name in LORA[1:]:
            if getattr(chosen, name) is not None:
                raise UserError(f"--{name.replace('_', '-')} is a setting of adapters: give --lora RANK too.")
        return None
    return Lora(chosen.lora, chosen.lora_alpha, chosen.lora_dropout or 0.0, quantize="nf4" if chosen.qlora else None)


def dpo(chosen: argparse.Namespace) -> int:
    from minimoe.losses.preference import Preference
    from minimoe.tuning import dpo as tuning
    from minimoe.tuning import resume

    settings = options.settings(chosen)
    machine = {"device": chosen.device, "threads": chosen.threads}
    given = {name: value for name in Preference._fields[1:] if (value := getattr(chosen, name)) is not None}
    if chosen.resume:
        _no_model(chosen)
        commands.leave_out(chosen, "resume", "pairs", "out", "freeze", "loss", *Preference._fields[1:])
        if hasattr(chosen, "patience"):
            raise UserError("--patience cannot go with --resume: the folder determines it; leave --patience out.")
        return commands.outcome(resume.resume(chosen.resume, changes=settings, kind=tuning.KIND, **machine))
    if chosen.folder is None:
        raise UserError("there is no model to tune: give the folder of a run, or --resume and the folder of one.")
    patience = {"patience": chosen.patience} if hasattr(chosen, "patience") else {}
    return commands.outcome(
        tuning.tune(
            chosen.folder,
            data=chosen.pairs,
            loss=Preference(chosen.loss or "dpo", **given),
            out=chosen.out,
            freeze=chosen.freeze or (),
            changes=settings,
            **patience,
            **machine,
        )
    )


def chat(chosen: argparse.Namespace) -> int:
    from threadpoolctl import threadpool_limits

    from minimoe.core import resources
    from minimoe.core.arrays import select_device
    from minimoe.inference import conversation
    from minimoe.storage import open_model

    threads = None if chosen.threads is None else resources.thread_count(chosen.threads)
    model = open_model.load(chosen.folder).to(select_device(chosen.device))
    with threadpool_limits(threads, user_api="blas"):
        conversation.in_terminal(model, conversation.Settings(chosen.system or "", chosen.temperature, chosen.seed))
    return 0
