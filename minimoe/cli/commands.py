"""The commands: each takes its parsed arguments, prints its result and returns the exit code.

A command imports what it needs when it runs, so that ``--help`` answers at once.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from typing import TYPE_CHECKING

from minimoe.cli import options
from minimoe.core import console, presets
from minimoe.core.errors import UserError, printable

BAD_INPUT, INTERRUPTED = 2, 130
"""Exit codes other than 0 and 1; 1 means that a check failed."""

if TYPE_CHECKING:
    from minimoe.storage.checkpoint import RunConfig
    from minimoe.text.corpus import Corpus


def train(chosen: argparse.Namespace) -> int:
    from minimoe.text import corpus
    from minimoe.training import trainer

    settings = options.settings(chosen)
    if chosen.resume:
        _leave_out(chosen, "resume", "preset", "corpus", "out", "dense_twin", "from")
        done = trainer.resume(
            chosen.resume,
            corpus=corpus.read_files(chosen.text) if chosen.text else None,  # the same text in another place
            changes=settings,
            device=chosen.device,
            threads=chosen.threads,
        )
    elif chosen.dense_twin:
        _leave_out(chosen, "dense-twin", "preset", "corpus", "from")
        done = trainer.train_dense_twin(
            chosen.dense_twin,
            corpus=corpus.read_files(chosen.text) if chosen.text else None,
            changes=settings,
            out=chosen.out,
            device=chosen.device,
            threads=chosen.threads,
        )
    elif chosen.origin:
        from minimoe.training import continued

        _leave_out(chosen, "from", "preset")
        if chosen.out is None:
            raise UserError("--from begins a new run, which needs a folder of its own: give one with --out.")
        done = continued.train(
            chosen.origin,
            chosen.out,
            corpus=corpus.read_files(chosen.text) if chosen.text else chosen.corpus,
            changes=settings,
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
        if getattr(chosen, "origin" if name == "from" else name) is not None:
            other = name.replace("_", "-")
            raise UserError(f"--{other} cannot go with --{option}: the folder determines it; leave --{other} out.")


def evaluate(chosen: argparse.Namespace) -> int:
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
            "--text cannot go with --suite, which reads the text that the run held out; --text may only say where this "
            "text is now: leave one of the two out."
        )
    given = {name: value for name in suite.Settings._fields if (value := getattr(chosen, name)) is not None}
    results = suite.run(
        chosen.folder, chosen.against, suite.Settings(**given), device=chosen.device, threads=chosen.threads
    )
    print(suite_table.to_json(results) if chosen.json else suite_table.table(results))
    return 0


def generate(chosen: argparse.Namespace) -> int:
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


def routing(chosen: argparse.Namespace) -> int:
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


def gradcheck(chosen: argparse.Namespace) -> int:
    from minimoe.proof import gradcheck

    rows = gradcheck.run(chosen.seed)
    print(gradcheck.to_json(rows) if chosen.json else gradcheck.table(rows))
    return 0 if all(row.passed for row in rows) else 1


def params(chosen: argparse.Namespace) -> int:
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


def quantize(chosen: argparse.Namespace) -> int:
    from minimoe.compression import quantize
    from minimoe.storage import quantized

    rows = quantized.write(chosen.folder, chosen.out, chosen.scheme, chosen.attention)
    print(quantize.table(rows))
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


def bench(chosen: argparse.Namespace) -> int:
    from minimoe.timing import bench

    preset = presets.override(presets.preset(chosen.preset), options.settings(chosen))
    report = bench.run(preset, chosen.device, chosen.threads, chosen.seconds)
    print(bench.to_json(report) if chosen.json else bench.table(report))
    return 0


def corpus(chosen: argparse.Namespace) -> int:
    from minimoe.text import corpus, shakespeare

    if chosen.name != "shakespeare":
        if chosen.name in corpus.NAMES:
            raise UserError(f"The corpus {chosen.name!r} is here already: train on it with --corpus {chosen.name}.")
        raise UserError(f"The corpus {chosen.name!r} is unknown; the only one to download is 'shakespeare'.")
    print(printable(str(shakespeare.download())))
    return 0


def info(_: argparse.Namespace) -> int:
    from minimoe.timing import machine

    print(printable(machine.describe()))
    return 0
