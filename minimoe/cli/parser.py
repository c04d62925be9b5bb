"""The parser of the command line: every command, its options and its help. It imports nothing that is slow."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from typing import NoReturn

from minimoe.cli import commands, compression, options, tuning
from minimoe.cli.commands import BAD_INPUT
from minimoe.cli.options import number, whole_number
from minimoe.core.errors import printable
from minimoe.version import __version__


def in_a_line(text: str) -> str:
    """``text`` in one line and without control characters, whatever file names it contains."""
    return printable(text).replace("\n", "\\n").replace("\t", "\\t")


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one sentence; only --help lists all options."""

    def error(self, message: str) -> NoReturn:
        option = re.fullmatch(r"argument (--[a-z-]+).*: expected (?:one|at least one) argument", message)
        if option:
            message += f", and one that begins with - is written {option[1]}=…"
        self.exit(BAD_INPUT, f"{self.prog}: {in_a_line(message)} (see {self.prog} --help)\n")


class _Formatter(argparse.HelpFormatter):
    """Wraps text as usual, but keeps the lines of the examples."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return text if text.startswith("examples:") else super()._fill_text(text, width, indent)


def build() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="minimoe", description="A mixture-of-experts language model from scratch, small enough to understand."
    )
    parser.add_argument("--version", action="version", version=f"minimoe {__version__}")
    subparsers = parser.add_subparsers(metavar="COMMAND", required=True)

    def command(name: str, run: Callable[[argparse.Namespace], int], doc: str) -> argparse.ArgumentParser:
        sub = subparsers.add_parser(
            name,
            help=doc,
            description=doc,
            epilog=options.examples(name),
            formatter_class=_Formatter,
            allow_abbrev=False,
        )
        sub.set_defaults(run=run, parser=sub, command=name)
        return sub

    options.of_training(command("train", commands.train, "train a model, or resume a run"))

    tuning.of_sft(command("sft", tuning.sft, "tune a model to answer instructions, or resume such a run"))

    tuning.of_dpo(command("dpo", tuning.dpo, "tune a model to prefer some answers to others, or resume such a run"))

    sub = command(
        "evaluate",
        commands.evaluate,
        "print the loss on the validation split of a run, or on another text, as one JSON line; with --suite, measure "
        "what else the model can do, alone or compared with another one",
    )
    sub.add_argument("folder", metavar="RUN", help="folder of a run; with --text, also of a Hugging Face model")
    sub.add_argument(
        "--text", nargs="+", metavar="PATH", help="UTF-8 files to evaluate on, instead of the validation split"
    )
    options.of_the_suite(sub.add_argument_group("suite"))
    options.of_the_memory(sub)
    options.of_the_machine(sub)

    sub = command("generate", commands.generate, "continue a prompt with a model")
    sub.add_argument("folder", metavar="MODEL", help="folder of a run, or of a Hugging Face model")
    sub.add_argument("--prompt", required=True, help="the text to continue; - reads it from standard input")
    sub.add_argument("--tokens", type=whole_number, default=300, help="number of tokens to generate (300)")
    sub.add_argument("--samples", type=whole_number, default=1, metavar="N", help="number of texts to generate (1)")
    sub.add_argument(
        "--temperature", type=number, default=0.8, help="0 takes the likeliest token, 1 samples from the model (0.8)"
    )
    sub.add_argument("--top-k", type=whole_number, help="sample from the K likeliest tokens only")
    sub.add_argument(
        "--top-p", type=number, help="sample from the likeliest tokens that together have this probability"
    )
    sub.add_argument("--seed", type=whole_number, default=0, help="the same seed gives the same text (0)")
    options.of_the_memory(sub)
    options.of_the_machine(sub)

    sub = command("chat", tuning.chat, "talk with a model that was tuned to answer")
    sub.add_argument("folder", metavar="MODEL", help="folder of a tuned run, or of a Mixtral in Hugging Face's layout")
    sub.add_argument("--system", metavar="TEXT", help="text that opens the first question (none)")
    sub.add_argument(
        "--temperature", type=number, default=0.5, help="0 takes the likeliest token, 1 samples from the model (0.5)"
    )
    sub.add_argument("--seed", type=whole_number, default=0, help="the same seed gives the same answers (0)")
    options.of_the_machine(sub)

    sub = command("routing", commands.routing, "show what the experts do on one or several texts")
    sub.add_argument("folder", metavar="MODEL", help="folder of a run, or of a Hugging Face model")
    sub.add_argument(
        "--text", nargs="+", metavar="PATH", help="UTF-8 files to compare, instead of the run's validation split"
    )
    sub.add_argument("--html", metavar="FILE", help="write a page to this file, to explore in a browser")
    sub.add_argument("--json", action="store_true", help="print JSON instead of tables")
    options.of_the_machine(sub)

    sub = command("gradcheck", commands.gradcheck, "check every gradient against finite differences in float64")
    sub.add_argument("--json", action="store_true", help="print JSON instead of a table")
    sub.add_argument("--seed", type=whole_number, default=0, help="seed of the random parameters and inputs (0)")

    sub = command("params", commands.params, "count a model's parameters, and what it costs to run, store and train it")
    sub.add_argument(
        "model", metavar="MODEL", help=f"a preset, a folder, or a published model: {', '.join(options.PUBLISHED)}"
    )
    sub.add_argument("--shared", type=number, default=0.0, help="rumour-8x220b: fraction that all experts share (0)")
    sub.add_argument("--figure", metavar="PATH", help="draw total and active parameters to this file")
    sub.add_argument("--json", action="store_true", help="print JSON instead of a table")

    sub = command("quantize", compression.quantize, "write a model with fewer bits per weight, and show its size")
    sub.add_argument("folder", metavar="MODEL", help="folder of a run, or of a Hugging Face model")
    sub.add_argument(
        "--scheme", required=True, metavar="NAME", help=f"scheme of the experts: {', '.join(options.SCHEMES)}"
    )
    sub.add_argument("--attention", metavar="NAME", help="scheme of the attention weights (that of the experts)")
    sub.add_argument("--out", required=True, metavar="DIR", help="the new folder")

    compression.of_distillation(
        command(
            "distill", compression.distill, "train a smaller model on the probabilities that a run gives to its text"
        )
    )

    compression.of_pruning(
        command("prune", compression.prune, "write a model with fewer experts per layer, without training")
    )

    compression.of_merging(command("merge", compression.merge, "merge runs of one shape into a new run"))
    compression.of_upcycling(
        command("upcycle", compression.upcycle, "make a mixture of experts of a dense run, or of several, as a new run")
    )
    options.of_the_bench(
        command("bench", commands.bench, "measure how fast this machine trains and generates, and what slows it down")
    )

    sub = command("corpus", commands.corpus, "download a corpus and print its path")
    sub.add_argument("name", metavar="NAME", help="the corpus to download: shakespeare")

    command("info", commands.info, "show what this machine computes with: NumPy, BLAS, threads, GPU, memory")
    return parser
