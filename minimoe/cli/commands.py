"""The commands: each takes its parsed arguments, prints its result and returns the exit code.

A command imports what it needs when it runs, so that ``--help`` answers at once.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from typing import TYPE_CHECKING, Any

from minimoe.cli import options
from minimoe.core import console, presets
from minimoe.core.errors import UserError, printable

BAD_INPUT, INTERRUPTED = 2, 130
"""Exit codes other than 0 and 1; 1 means that a check failed."""

if TYPE_CHECKING:
    from minimoe.storage.checkpoint import RunConfig
    from minimoe.text.corpus import Corpus
    from minimoe.training.trainer import Trained


def train(chosen: argparse.Namespace) -> int:
    from minimoe.text import corpus
    from minimoe.training import trainer
    from minimoe.tuning import resume

    settings = options.settings(chosen)
    if chosen.resume:
        leave_out(chosen, "resume", "preset", "corpus", "out", "dense_twin", "from")
        done = resume.resume(
            chosen.resume,
            corpus=corpus.read_files(chosen.text) if chosen.text else None,  # the same text in another place
            changes=settings,
            device=chosen.device,
            threads=chosen.threads,
        )
    elif chosen.dense_twin:
        leave_out(chosen, "dense-twin", "preset", "corpus", "from")
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

        leave_out(chosen, "from", "preset")
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
    return outcome(done)


def outcome(done: Trained) -> int:
    """The exit code of a run that ended or was interrupted."""
    if not done.finished:
        return INTERRUPTED
    return 0 if done.problem is None else BAD_INPUT


def leave_out(chosen: argparse.Namespace, option: str, *others: str) -> None:
    """Raises ``UserError`` if one of ``others`` was given although the folder of ``option`` already determines it."""
    for name in others:
        if getattr(chosen, "origin" if name == "from" else name) is not None:
            other = name.replace("_", "-")
            raise UserError(f"--{other} cannot go with --{option}: the folder determines it; leave --{other} out.")


def evaluate(chosen: argparse.Namespace) -> int:
    from threadpoolctl import threadpool_limits

    from minimoe.core import resources
    from minimoe.core.arrays import select_device
    from minimoe.evaluate import text_loss
    from minimoe.inference import reading
    from minimoe.parallel import thread_pool
    from minimoe.storage import bounded, open_model
    from minimoe.text import batches, corpus

    if chosen.suite:
        if chosen.memory is not None or chosen.report:
            raise UserError("--memory and --report cannot go with --suite: leave one of the two out.")
        return _evaluate_suite(chosen)
    for name in ("against", "json", "samples", "questions", "tokens", "temperature", "seed"):
        if getattr(chosen, name) is not None:
            raise UserError(f"--{name} belongs to the suite: add --suite, or leave --{name} out.")
    bound = _bound(chosen)
    opened: Any = bounded.open_folder(chosen.folder) if bound else open_model.load(chosen.folder)
    model = opened if bound else opened.to(select_device(chosen.device))
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
    if bound:
        longest = max(map(len, documents), default=0)
        model = model.load(bound, min(reading.TOKENS, longest), min(model.config.context, longest))
        with threadpool_limits(1, user_api="blas"):  # as in the pool, so that the numbers are the same
            result = text_loss.evaluate(model.params, model.config, documents)
    else:
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
    _report(chosen, model)
    return 0


def _bound(chosen: argparse.Namespace) -> int | None:
    """The bound of memory in bytes, if one is given; raises ``UserError`` for options that cannot go with it."""
    from minimoe.cost import offloading

    if chosen.memory is None:
        if chosen.report:
            raise UserError("--report says what a run with a bound of memory did: add --memory, or leave it out.")
        return None
    if chosen.device == "gpu":
        raise UserError("--memory runs on the CPU and cannot go with --device gpu: leave one of the two out.")
    return offloading.parse_bytes(chosen.memory)


def _report(chosen: argparse.Namespace, model: Any) -> None:
    """Shows what a run with a bound of memory did, if this was asked for; not on standard output, which has results."""
    if chosen.report:
        from minimoe.storage import offload_report

        sys.stdout.flush()
        console.show(offload_report.report(model), sys.stderr)


def _found_again(folder: str, run: RunConfig, given: Corpus) -> RunConfig | None:
    """The run with the new place of its text, if ``given`` is this text; says so, because it is not another text."""
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
    from minimoe.storage import bounded, open_model

    if chosen.samples < 1:
        raise UserError(f"samples {chosen.samples} is too small: generate at least 1 text.")
    prompt = _standard_input() if chosen.prompt == "-" else chosen.prompt
    threads = None if chosen.threads is None else resources.thread_count(chosen.threads)
    model: Any
    if bound := _bound(chosen):
        opened = bounded.open_folder(chosen.folder)
        length = len(opened.tokenizer.encode(prompt))
        model = opened.load(bound, min(generation.PIECE, length), length + max(chosen.tokens, 0))
    else:
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
    _report(chosen, model)
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
    from minimoe.compression import quantize
    from minimoe.core import files
    from minimoe.cost import blueprint, costs, published
    from minimoe.storage import open_model

    folder = files.user_path(chosen.model)
    by_part = []
    if folder.is_dir():
        config, schemes = open_model.shape(folder), open_model.quantization(folder)
        plan = blueprint.of_config(folder.resolve().name, config)
        by_part = [] if schemes is None else quantize.sizes(config, schemes)
    else:
        plan = published.named(chosen.model, chosen.shared)
    found = costs.of(plan)
    if chosen.figure:
        from minimoe.draw import cost_plot, plots

        plots.save(cost_plot.parameters(found), files.chosen_place(chosen.figure))
    if chosen.json:
        quantised = {"quantised": [row._asdict() for row in by_part]} if by_part else {}
        print(json.dumps(json.loads(costs.to_json(found)) | quantised, indent=2))
    else:
        print(printable(costs.table(found)))
        if by_part:
            print(f"\nThis folder is quantised:\n\n{quantize.table(by_part)}")
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
