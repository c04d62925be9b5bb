"""The command line: ``minimoe train``, ``evaluate``, ``generate``, ``routing``, ``gradcheck``, ``params`` and more.

Longer lists of options are in ``options``. A command imports what it needs when it runs, so that ``--help`` appears at
once.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import io
import json
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, NoReturn, TextIO

from minimoe.cli import options
from minimoe.cli.options import number, whole_number
from minimoe.core import console, presets
from minimoe.core.errors import UserError, printable
from minimoe.version import __version__

if TYPE_CHECKING:
    from minimoe.storage.checkpoint import RunConfig
    from minimoe.text.corpus import Corpus

BAD_INPUT, INTERRUPTED = 2, 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code: 0, or 1 for a failed check, 2 for bad input, 130 for Ctrl-C.

    It may be called from Python too: nothing that it sets for the process outlasts it.
    """
    with _streams():
        return _main(sys.argv[1:] if arguments is None else list(arguments))


def _main(arguments: list[str]) -> int:
    chosen, unknown = _parser().parse_known_args(_with_prompt(arguments))
    if unknown:
        chosen.parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    try:
        _refuse_empty(chosen)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # a model that overflows is refused by a UserError
            code: int = chosen.run(chosen)
        if code == 0 and chosen.run is not _train:  # what training shows is not its result
            sys.stdout.flush()
    except UserError as error:
        return _refuse(str(error))
    except MemoryError as error:
        return _refuse(f"there is not enough memory ({error}): {MEMORY_ADVICE.get(chosen.command, 'free memory')}.")
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:  # the program that reads the output has ended, and with it the reason to write more
        return 0
    except OSError as error:
        advice = "free space, or choose another path"
        if error.errno in (errno.EMFILE, errno.ENFILE):
            advice = "raise the number of files that may be open, which `ulimit -n` shows"
        return _refuse(f"the system refuses the operation ({error}): {advice}.")
    return code


MEMORY_ADVICE = {
    "train": "choose a smaller --batch, --context or model, a larger --accumulate, or --threads 1",
    "bench": "choose a smaller --batch, --context or model, or --threads 1",
    "evaluate": "give --threads 1, a shorter --text, or a smaller model",
    "generate": "give a shorter --prompt or a smaller model",
    "routing": "give --threads 1, a shorter --text, or a smaller model",
}
"""What a command can do about too little memory, in options that it has."""


def _with_prompt(arguments: list[str]) -> list[str]:
    """The arguments with a prompt that begins with - tied to its option: argparse would take it for an option."""
    tied = list(arguments)
    for place in range(len(tied) - 2, -1, -1):
        prompt = tied[place + 1]
        is_option = re.fullmatch(r"-h|--[a-z][a-z-]*(=.*)?", prompt, re.DOTALL)
        if tied[place] == "--prompt" and prompt.startswith("-") and not is_option:
            tied[place : place + 2] = [f"--prompt={prompt}"]
    return tied


@contextlib.contextmanager
def _streams() -> Iterator[None]:
    """Standard streams that exist and can show every character, until the command ends.

    A program that was started with a closed stream would get its number for the next file that it opens, and write its
    messages into that.
    """
    with contextlib.suppress(OSError):
        while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
            pass
        os.close(descriptor)
    before = sys.stdout, sys.stderr
    nowhere = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - closed below
    sys.stdout, sys.stderr = sys.stdout or nowhere, sys.stderr or nowhere  # a closed stream is None
    errors = sys.stdout.errors if isinstance(sys.stdout, io.TextIOWrapper) else None
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # the terminal may not know all characters of the texts
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            _drop_output(stream)
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors=errors)
        sys.stdout, sys.stderr = before
        nowhere.close()


def _refuse_empty(chosen: argparse.Namespace) -> None:
    """Refuses empty arguments, which most likely come from unset shell variables; only a prompt may be empty."""
    for name, value in vars(chosen).items():
        if name != "prompt" and (value == "" or (isinstance(value, list) and "" in value)):
            if name in ("folder", "model", "name"):
                raise UserError(f"the argument {name} is empty, expected a value: give one.")
            raise UserError(f"--{name.replace('_', '-')} is empty, expected a value: give one, or leave it out.")


def _refuse(sentence: str) -> int:
    console.show(f"minimoe: {_in_a_line(sentence)}", sys.stderr)
    return BAD_INPUT


def _in_a_line(text: str) -> str:
    """``text`` in one line and without control characters, whatever file names it contains."""
    return printable(text).replace("\n", "\\n").replace("\t", "\\t")


def _drop_output(stream: TextIO) -> None:
    """Discards output that cannot be written, so that the interpreter does not try again when it exits."""
    try:
        stream.flush()
    except (OSError, ValueError):
        with contextlib.suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream.fileno())
            os.close(nowhere)


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one sentence; only --help lists all options."""

    def error(self, message: str) -> NoReturn:
        option = re.fullmatch(r"argument (--[a-z-]+).*: expected (?:one|at least one) argument", message)
        if option:
            message += f", and one that begins with - is written {option[1]}=…"
        self.exit(BAD_INPUT, f"{self.prog}: {_in_a_line(message)} (see {self.prog} --help)\n")


class _Formatter(argparse.HelpFormatter):
    """Wraps text as usual, but keeps the lines of the examples."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return text if text.startswith("examples:") else super()._fill_text(text, width, indent)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="minimoe", description="A mixture-of-experts language model from scratch, small enough to understand."
    )
    parser.add_argument("--version", action="version", version=f"minimoe {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def command(name: str, run: Callable[[argparse.Namespace], int], doc: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(
            name,
            help=doc,
            description=doc,
            epilog=options.examples(name),
            formatter_class=_Formatter,
            allow_abbrev=False,
        )
        sub.set_defaults(run=run, parser=sub, command=name)
        return sub

    options.of_training(command("train", _train, "train a model, or resume a run"))

    sub = command(
        "evaluate",
        _evaluate,
        "print the loss on the validation split of a run, or on another text, as one JSON line; with --suite, measure "
        "what else the model can do, alone or compared with another one",
    )
    sub.add_argument("folder", metavar="RUN", help="folder of a run; with --text, also of a Hugging Face model")
    sub.add_argument(
        "--text", nargs="+", metavar="PATH", help="UTF-8 files to evaluate on, instead of the validation split"
    )
    options.of_the_suite(sub.add_argument_group("suite"))
    options.of_the_machine(sub)

    sub = command("generate", _generate, "continue a prompt with a model")
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
    options.of_the_machine(sub)

    sub = command("routing", _routing, "show what the experts do on one or several texts")
    sub.add_argument("folder", metavar="MODEL", help="folder of a run, or of a Hugging Face model")
    sub.add_argument(
        "--text", nargs="+", metavar="PATH", help="UTF-8 files to compare, instead of the run's validation split"
    )
    sub.add_argument("--html", metavar="FILE", help="write a page to this file, to explore in a browser")
    sub.add_argument("--json", action="store_true", help="print JSON instead of tables")
    options.of_the_machine(sub)

    sub = command("gradcheck", _gradcheck, "check every gradient against finite differences in float64")
    sub.add_argument("--json", action="store_true", help="print JSON instead of a table")
    sub.add_argument("--seed", type=whole_number, default=0, help="seed of the random parameters and inputs (0)")

    sub = command("params", _params, "count a model's parameters, and what it costs to run, store and train it")
    sub.add_argument(
        "model", metavar="MODEL", help=f"a preset, a folder, or a published model: {', '.join(options.PUBLISHED)}"
    )
    sub.add_argument("--shared", type=number, default=0.0, help="rumour-8x220b: fraction that all experts share (0)")
    sub.add_argument("--figure", metavar="PATH", help="draw total and active parameters to this file")
    sub.add_argument("--json", action="store_true", help="print JSON instead of a table")

    options.of_the_bench(
        command("bench", _bench, "measure how fast this machine trains and generates, and what slows it down")
    )

    sub = command("corpus", _corpus, "download a corpus and print its path")
    sub.add_argument("name", metavar="NAME", help="the corpus to download: shakespeare")

    command("info", _info, "show what this machine computes with: NumPy, BLAS, threads, GPU, memory")
    return parser


def _train(chosen: argparse.Namespace) -> int:
    from minimoe.text import corpus
    from minimoe.training import trainer

    settings = options.settings(chosen)
    if chosen.resume:
        _leave_out(chosen, "resume", "preset", "corpus", "out", "dense_twin")
        done = trainer.resume(
            chosen.resume,
            corpus=corpus.read_files(chosen.text) if chosen.text else None,  # the same text in another place
            changes=settings,
            device=chosen.device,
            threads=chosen.threads,
        )
    elif chosen.dense_twin:
        _leave_out(chosen, "dense-twin", "preset", "corpus")
        done = trainer.train_dense_twin(
            chosen.dense_twin,
            corpus=corpus.read_files(chosen.text) if chosen.text else None,
            changes=settings,
            out=chosen.out,
            device=chosen.device,
            threads=chosen.threads,
        )
    else:
        preset_name = chosen.preset or "toy"
        done = trainer.train(
            presets.override(presets.preset(preset_name), settings),
            corpus=corpus.read_files(chosen.text) if chosen.text else chosen.corpus,
            out=chosen.out,
            name=preset_name,
            device=chosen.device,
            threads=chosen.threads,
        )
    if not done.finished:
        return INTERRUPTED
    return 0 if done.problem is None else BAD_INPUT


def _leave_out(chosen: argparse.Namespace, option: str, *others: str) -> None:
    """Raises ``UserError`` if an option was given together with one whose folder already determines it."""
    for name in others:
        if getattr(chosen, name) is not None:
            other = name.replace("_", "-")
            raise UserError(f"--{other} cannot go with --{option}: the folder determines it; leave --{other} out.")


def _evaluate(chosen: argparse.Namespace) -> int:
    from minimoe.core import resources
    from minimoe.core.arrays import select_device
    from minimoe.evaluate import text_loss
    from minimoe.parallel import thread_pool
    from minimoe.storage import open_model
    from minimoe.text import batches, corpus

    if chosen.suite:
        return _evaluate_suite(chosen)
    for name in ("against", "json", "samples", "questions", "tokens", "temperature", "seed"):
        if getattr(chosen, name) is not None:
            raise UserError(f"--{name} belongs to the suite: add --suite, or leave --{name} out.")
    model = open_model.load(chosen.folder).to(select_device(chosen.device))
    given = corpus.read_files(chosen.text) if chosen.text else None
    if given is not None and model.run is not None and (moved := _found_again(chosen.folder, model.run, given)):
        model, given = model._replace(run=moved), None
    if given is not None:
        read = list(given.documents.values())
        documents = [model.tokenizer.encode(text) for text in read]
        # counted in the text itself: a tokenizer from elsewhere may encode unknown characters as a token without text
        sizes = [
            len(text.encode()) - model.tokenizer.bytes_of(ids[:1]) for text, ids in zip(read, documents, strict=True)
        ]
    elif model.run is None:
        raise UserError(f"{chosen.folder} was trained elsewhere and has no validation split: give a text with --text.")
    else:
        documents = list(batches.reload(model.run.source, model.tokenizer, model.config.context).validation)
        sizes = [model.tokenizer.bytes_of(ids[1:]) for ids in documents]
    with thread_pool.pool(1 if model.on_gpu else resources.thread_count(chosen.threads)) as pool:
        result = text_loss.evaluate(model.params, model.config, documents, pool)
    print(
        json.dumps(
            {
                "loss": round(result.loss, 5),
                "bits_per_byte": round(text_loss.bits_per_byte(result, sum(sizes)), 5),
                "tokens": result.tokens,
                "load": result.load.round(5).tolist(),
            }
        )
    )
    return 0


def _found_again(folder: str, run: RunConfig, given: Corpus) -> RunConfig | None:
    """The run with the new place of its text, if that is what was given; says so, because it is not another text."""
    from minimoe.storage import checkpoint

    moved = checkpoint.with_moved_text(folder, run, given)
    if moved is not None:
        places = ", ".join(moved.source.paths)
        console.show(
            f"minimoe: {folder} has its text in {places} from now on; this is about the part that it held out.",
            sys.stderr,
        )
    return moved


def _is_moved_text(folder: str, paths: list[str]) -> bool:
    from minimoe.storage import checkpoint
    from minimoe.text import corpus

    with contextlib.suppress(UserError):
        return _found_again(folder, checkpoint.load_config(folder), corpus.read_files(paths)) is not None
    return False


def _evaluate_suite(chosen: argparse.Namespace) -> int:
    from minimoe.evaluate import suite, suite_table

    if chosen.text and not _is_moved_text(chosen.folder, chosen.text):
        raise UserError(
            "--text cannot go with --suite, which reads the text that the run held out, unless it is that text in "
            "another place: leave one out."
        )
    given = {name: value for name in suite.Settings._fields if (value := getattr(chosen, name)) is not None}
    results = suite.run(
        chosen.folder, chosen.against, suite.Settings(**given), device=chosen.device, threads=chosen.threads
    )
    print(suite_table.to_json(results) if chosen.json else suite_table.table(results))
    return 0


def _generate(chosen: argparse.Namespace) -> int:
    from threadpoolctl import threadpool_limits

    from minimoe.core import resources
    from minimoe.core.arrays import select_device
    from minimoe.inference import generation
    from minimoe.storage import open_model

    if chosen.samples < 1:
        raise UserError(f"samples {chosen.samples} is too small: generate at least 1 text.")
    prompt = _standard_input() if chosen.prompt == "-" else chosen.prompt
    threads = None if chosen.threads is None else resources.thread_count(chosen.threads)
    model = open_model.load(chosen.folder).to(select_device(chosen.device))
    with threadpool_limits(threads, user_api="blas"):
        for seed in range(chosen.seed, chosen.seed + chosen.samples):
            if chosen.samples > 1:
                print(f"--- seed {seed} ---")
            pieces = generation.stream(
                model,
                prompt,
                chosen.tokens,
                temperature=chosen.temperature,
                top_k=chosen.top_k,
                top_p=chosen.top_p,
                seed=seed,
            )
            for piece in pieces:
                print(printable(piece), end="", flush=True)
            print()
    return 0


def _standard_input() -> str:
    """What is piped in, without the line end that ``echo`` adds."""
    if sys.stdin is None:
        raise UserError("--prompt - reads standard input, which is closed: pipe a text in, or give the prompt itself.")
    try:
        return sys.stdin.buffer.read().decode("utf-8").removesuffix("\n").removesuffix("\r")
    except UnicodeDecodeError as error:
        raise UserError(f"standard input is not UTF-8 ({error.reason} at byte {error.start}): convert it.") from None


def _routing(chosen: argparse.Namespace) -> int:
    from minimoe.analysis import microscope, microscope_page
    from minimoe.core import files, resources
    from minimoe.core.arrays import select_device
    from minimoe.parallel import thread_pool
    from minimoe.storage import open_model
    from minimoe.text import corpus

    model = open_model.load(chosen.folder).to(select_device(chosen.device))
    given = corpus.read_files(chosen.text) if chosen.text else None
    if given is not None and model.run is not None and (moved := _found_again(chosen.folder, model.run, given)):
        model, given = model._replace(run=moved), None
    tokens = microscope.read(model, given)
    with thread_pool.pool(1 if model.on_gpu else resources.thread_count(chosen.threads)) as pool:
        seen = microscope.look(model, tokens, pool)
    if chosen.html:
        name = files.user_path(chosen.folder).resolve().name
        microscope_page.write(files.chosen_place(chosen.html), seen, f"Routing of {name}")
    if chosen.json:
        print(microscope.to_json(seen))
    elif chosen.html:
        print(printable(f"{chosen.html} is written: open it in a browser."))
    else:
        print(microscope.table(seen))
    return 0


def _gradcheck(chosen: argparse.Namespace) -> int:
    from minimoe.proof import gradcheck

    rows = gradcheck.run(chosen.seed)
    print(gradcheck.to_json(rows) if chosen.json else gradcheck.table(rows))
    return 0 if all(row.passed for row in rows) else 1


def _params(chosen: argparse.Namespace) -> int:
    from minimoe.core import files
    from minimoe.cost import blueprint, costs, published
    from minimoe.storage import open_model

    folder = files.user_path(chosen.model)
    if folder.is_dir():
        plan = blueprint.of_config(folder.resolve().name, open_model.shape(folder))
    else:
        plan = published.named(chosen.model, chosen.shared)
    found = costs.of(plan)
    if chosen.figure:
        from minimoe.draw import cost_plot, plots

        plots.save(cost_plot.parameters(found), files.chosen_place(chosen.figure))
    print(costs.to_json(found) if chosen.json else printable(costs.table(found)))
    return 0


def _bench(chosen: argparse.Namespace) -> int:
    from minimoe.timing import bench

    preset = presets.override(presets.preset(chosen.preset), options.settings(chosen))
    report = bench.run(preset, chosen.device, chosen.threads, chosen.seconds)
    print(bench.to_json(report) if chosen.json else bench.table(report))
    return 0


def _corpus(chosen: argparse.Namespace) -> int:
    from minimoe.text import corpus, shakespeare

    if chosen.name != "shakespeare":
        if chosen.name in corpus.NAMES:
            raise UserError(f"The corpus {chosen.name!r} is here already: train on it with --corpus {chosen.name}.")
        raise UserError(f"The corpus {chosen.name!r} is unknown; the only one to download is 'shakespeare'.")
    print(printable(str(shakespeare.download())))
    return 0


def _info(_: argparse.Namespace) -> int:
    from minimoe.timing import machine

    print(printable(machine.describe()))
    return 0
