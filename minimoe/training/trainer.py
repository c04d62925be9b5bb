"""The training loop: draw a batch, compute its gradient in shards, update the parameters, measure, save.

    trained = train("toy", corpus="data", out="runs/toy")

The folder always holds the last complete checkpoint. A run that was killed, interrupted or stopped by a NaN or
infinite loss continues with ``resume`` as if it had never stopped: with the same number of threads on the same machine,
it ends with the same bits. What a run learns is its ``Task``: see ``task``.  Lesson: lessons/11_training.ipynb
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from minimoe.core import console, files, presets, resources, tree
from minimoe.core.arrays import Array, Device, select_device, to_device, to_host
from minimoe.core.errors import UserError
from minimoe.core.presets import Preset
from minimoe.core.summary import brief
from minimoe.cost import memory
from minimoe.layers import decoder
from minimoe.layers.decoder import Decoder
from minimoe.losses.balance import Losses
from minimoe.losses.objective import Totals
from minimoe.optim import optimizer, schedule
from minimoe.parallel import thread_pool
from minimoe.storage import adapted, checkpoint, metrics
from minimoe.storage.checkpoint import Model, Progress, RunConfig
from minimoe.text import batches
from minimoe.text.corpus import Corpus
from minimoe.training import progress_bar, run_report
from minimoe.training import step as steps
from minimoe.training import task as tasks
from minimoe.training.task import Task


@brief
class Trained(NamedTuple):
    """A run that ended, or was interrupted and saved."""

    model: Model
    folder: Path
    metrics: list[dict[str, Any]]
    finished: bool
    problem: str | None = None  # why the sample, the figures or the page are missing; the model itself is saved


def train(
    preset: str | Preset = "toy",
    *,
    corpus: str | Corpus | None = None,
    out: str | Path | None = None,
    name: str | None = None,
    device: str = "auto",
    threads: int | None = None,
    progress: bool = True,
) -> Trained:
    """Trains a new model and writes a run folder.

    ``corpus`` is the name of a built-in corpus or a ``Corpus``; the default is the preset's. ``out`` must not hold a
    run yet; the default is a new folder under ``runs/``, called ``name`` or after the preset. ``threads`` defaults to
    the number of cores.

    Raises:
        UserError: the run is not possible. Wherever this can be known in advance, nothing is written.
    """
    chosen = presets.preset(preset) if isinstance(preset, str) else preset
    if not isinstance(chosen, Preset):
        raise UserError(f"{chosen!r:.60} is not a preset: give the name of one, or a minimoe.core.presets.Preset.")
    decoder.check(chosen.config)
    where, threads = select_device(device), resources.thread_count(threads)
    at_work = 1 if where == "gpu" else min(threads, chosen.recipe.batch)
    memory.check_memory(chosen.config, chosen.recipe, at_work)
    data, source, codec = batches.prepare(
        chosen.corpus if corpus is None else corpus, chosen.recipe, chosen.config.context
    )
    model = dataclasses.replace(chosen.config, vocab_size=codec.vocab_size)
    memory.check_memory(model, chosen.recipe, at_work)
    run = RunConfig(model, chosen.recipe, codec, source)
    name = name or (preset if isinstance(preset, str) else "run")
    return start(run, tasks.of_text(run, data), out=out, name=name, device=where, threads=threads, progress=progress)


def start(
    run: RunConfig,
    task: Task,
    params: Decoder | None = None,
    *,
    out: str | Path | None = None,
    name: str = "run",
    device: str = "auto",
    threads: int | None = None,
    progress: bool = True,
) -> Trained:
    """Begins a run that learns ``task``, in a new folder. ``out`` and ``name`` are those of ``train``.

    ``params``, on the host, are the parameters to begin with, such as those of another run; they are copied. By
    default, they are drawn from the seed. For a task other than ``task.of_text``, ``run.tuning`` must say how the task
    is made again, so that the run can be resumed.

    Raises:
        UserError: the folder holds a run or cannot be written.
    """
    where, threads = select_device(device), resources.thread_count(threads)
    folder = new_folder(out, name)
    with checkpoint.locked(folder):
        _refuse_a_run(folder)  # again: another run may have begun and ended before this one had the lock
        return _loop(folder, run, task, params, where, threads, progress)


def resume(
    folder: str | Path,
    *,
    corpus: Corpus | None = None,
    changes: Mapping[str, Any] | None = None,
    device: str = "auto",
    threads: int | None = None,
    progress: bool = True,
    task: Callable[[RunConfig], Task] | None = None,
) -> Trained:
    """Continues the run in ``folder`` from its last checkpoint, or from the start if it has none.

    ``corpus`` is needed only if the run began with a corpus made in Python, or if its text is in another place now; the
    run then remembers the new place. ``changes`` may hold new values of the settings in ``checkpoint.CHANGEABLE``.
    ``task`` makes the task of a tuned run again; ``tuning.resume`` knows the right ``task`` for every kind of run.

    Raises:
        UserError: another setting differs, ``steps`` is less than the steps already taken, the run's text has changed
            or is gone, or the run is a tuned one and ``task`` is missing.
    """
    folder = files.user_path(folder)
    run = checkpoint.load_config(folder)
    if run.tuning is not None and task is None:
        raise UserError(
            f"{folder} is a tuned run ({run.tuning.kind}): continue it with `minimoe train --resume`, or with "
            "minimoe.resume in Python."
        )
    stored = dataclasses.asdict(run.config) | dataclasses.asdict(run.recipe)
    for name, value in (changes or {}).items():
        if name not in checkpoint.CHANGEABLE and stored.get(name) != value:
            raise UserError(
                f"{name} was {stored.get(name)!r} when this run began and cannot become {value!r}: "
                "leave it out, or start a new run."
            )
    changed = {name: value for name, value in (changes or {}).items() if name in checkpoint.CHANGEABLE}
    run = run._replace(recipe=dataclasses.replace(run.recipe, **changed))
    where, threads = select_device(device), resources.thread_count(threads)
    memory.check_memory(run.config, run.recipe, 1 if where == "gpu" else min(threads, run.recipe.batch))
    if task is None:
        data = batches.reload(run.source, run.tokenizer, run.config.context, corpus)
        run = run._replace(source=batches.where_now(run.source, corpus))
    to_learn = tasks.of_text(run, data) if task is None else task(run)
    with checkpoint.locked(folder):
        return _loop(folder, run, to_learn, None, where, threads, progress)


def train_dense_twin(
    folder: str | Path,
    *,
    corpus: Corpus | None = None,
    changes: Mapping[str, Any] | None = None,
    out: str | Path | None = None,
    device: str = "auto",
    threads: int | None = None,
    progress: bool = True,
) -> Trained:
    """Trains a dense model with the same number of active parameters as the run in ``folder``, on its text, by its
    recipe.

    ``corpus`` is needed only if the run began with a corpus made in Python, or if its text is in another place now.
    ``changes`` may hold other settings, for example of the recipe: the best recipe for a mixture need not be the best
    for a dense model. Without ``out``, the new run has the name of the old one, followed by ``-dense``.

    Raises:
        UserError: as for ``train``; or the run itself is dense, or its text has changed.
    """
    run = checkpoint.load_config(folder)
    twin = presets.dense_twin(Preset("", run.config, run.recipe))
    read = batches.read_source(run.source) if corpus is None else corpus
    batches.reload(run.source, run.tokenizer, run.config.context, read)
    return train(
        presets.override(twin, changes or {}),
        corpus=read,
        out=out,
        name=f"{files.user_path(folder).resolve().name}-dense",
        device=device,
        threads=threads,
        progress=progress,
    )


class _State(NamedTuple):
    """Everything that changes during a run."""

    params: Decoder
    optimizer: optimizer.State
    rng: np.random.Generator
    step: int
    seconds: float


def _restore(folder: Path, run: RunConfig, begin: Decoder | None, device: Device) -> _State:
    """The state of the folder's last checkpoint; without one, the state before the first step, which is saved.

    Because it is saved, there is always a model to load, and a full disk is noticed before any work is done.
    """
    rng = np.random.default_rng(run.recipe.seed)
    saved = checkpoint.load_progress(folder, run)
    if saved is None:
        if begin is None and run.tuning is not None:
            raise UserError(f"{folder} was stopped before it saved anything: remove it, and tune again.")
        params = decoder.init(rng, run.config, run.recipe.dtype) if begin is None else tree.map(np.copy, begin)
        moments = optimizer.init(params, run.recipe, run.frozen)
        progress = Progress(0, 0.0, dict(rng.bit_generator.state))
    else:
        params, moments, progress = saved
        rng.bit_generator.state = progress.random_state
    if progress.step > run.recipe.steps:
        raise UserError(
            f"{folder} has taken {progress.step} steps already: give at least that many --steps, or start a new run."
        )
    checkpoint.save_config(folder, run)
    if saved is None:
        checkpoint.save(folder, run, params, moments, progress)

    def place(leaf: Array) -> Array:
        return to_device(leaf, device)

    moments = {name: tree.map(place, of_one) for name, of_one in moments.items()}
    return _State(tree.map(place, params), moments, rng, progress.step, progress.seconds)


def _loop(
    folder: Path, run: RunConfig, task: Task, begin: Decoder | None, device: Device, threads: int, progress: bool
) -> Trained:
    """Takes all steps from the folder's checkpoint, or from the parameters ``begin``, to the end of the run."""
    recipe = run.recipe
    params, moments, rng, first, seconds = _restore(folder, run, begin, device)
    before = metrics.read(folder, up_to=first)
    metrics.write(folder, before)
    seen = before[-1]["tokens"] if before else first * recipe.batch * run.config.context
    losses = [row["val_loss"] for row in before if "val_loss" in row]
    del before  # a row takes more than 1 kB of memory, and there can be many
    threads = 1 if device == "gpu" else min(threads, recipe.batch)
    if progress:
        console.show(run_report.opening(folder, run, task.reads, device, threads, first))

    batches = task.batches(first)
    done = kept = first
    over = tasks.is_over(losses, task.patience)
    with (
        thread_pool.pool(threads) as pool,
        steps.open_workers(params, moments, run.config, recipe, threads, task.objective, run.frozen) as workers,
        interruptible() as interrupted,
        progress_bar.bar(recipe.steps, first, progress) as bar,
    ):
        params, moments = workers.params, workers.moments
        for step in range(first, first if over else recipe.steps):
            started = time.perf_counter()
            batch = next(batches)
            shards = steps.cut(rng, params, batch, run.config, recipe, threads, task.together, task.noise)
            totals, norm = workers.step(shards, step)
            if not steps.is_finite(totals, norm):
                raise UserError(_diverged(folder, step, kept))
            elapsed = max(time.perf_counter() - started, 1e-9)  # a clock may stand still, or be set back
            seconds += elapsed

            done = step + 1
            tokens = batch.tokens.size if batch.mask is None else int(batch.mask.sum())
            seen += tokens
            row = _row(done, run, totals, norm, elapsed, seconds, tokens, seen)
            if task.measure is not None:
                row |= task.measure(totals)
            if done == recipe.steps or _is_due(done, recipe.evaluate_every):
                measured = task.validate(params, pool)
                row |= {"val_loss": measured.loss, **measured.details}
                losses.append(measured.loss)
                over = tasks.is_over(losses, task.patience)
                if task.patience is not None and tasks.is_best(losses):
                    checkpoint.save_model(folder, run, params, done)
            metrics.append(folder, row)
            bar.show(row)
            stop = interrupted.is_set()  # read once, so that the same Ctrl-C that ends the loop also saves
            if stop or over or done == recipe.steps or _is_due(done, recipe.save_every):
                progress_now = Progress(done, seconds, dict(rng.bit_generator.state))
                checkpoint.save(folder, run, params, moments, progress_now, model=task.patience is None)
                kept = done
            if stop or over:
                break

    finished = over or done == recipe.steps
    model = Model(adapted.merged(tree.map(to_host, params)), run.config, run.tokenizer, run, done)
    if task.patience is not None:  # the folder has the best model, which need not be the last
        model = checkpoint.load_model(folder)
    rows: list[dict[str, Any]] = []
    problem = None
    try:  # all is saved, so nothing that goes wrong from here on may lose the result
        rows = metrics.read(folder)  # read only now, because many rows take much memory
        if finished:
            task.report(folder, model, rows)
    except (Exception, KeyboardInterrupt) as error:
        reason = error if isinstance(error, UserError) else f"{type(error).__name__}: {error}".rstrip(": ")
        problem = f"the run is saved, but not everything about it could be read or drawn: {reason}"
    if progress:
        console.show(run_report.closing(folder, finished, rows, done, model))
        if problem:
            console.show(f"minimoe: {problem}", sys.stderr)
    return Trained(model, folder, rows, finished, problem)


def _row(
    step: int, run: RunConfig, totals: Totals, norm: float, elapsed: float, seconds: float, tokens: int, seen: int
) -> dict[str, Any]:
    """One line of metrics.jsonl: ``tokens`` were read in this step, and ``seen`` in all steps so far."""
    assignments = [to_host(layer.assignments).astype(np.float64) for layer in totals.stats]
    return {
        "step": step,
        "tokens": seen,
        "loss": float(totals.loss),
        "total": float(totals.total),
        "auxiliary": {
            name: [round(float(getattr(layer, name)), 6) for layer in totals.auxiliary] for name in Losses._fields
        },
        "learning_rate": schedule.learning_rate(step - 1, run.recipe),
        "gradient_norm": norm,
        "tokens_per_second": round(tokens / elapsed, 1),
        "seconds": round(seconds, 4),
        "load": [(counts / max(counts.sum(), 1)).round(5).tolist() for counts in assignments],
        "active_experts": [round(counts.sum() / tokens, 4) for counts in assignments],
        # of the entries that were asked for: of K per token, or of as many as the router of this run makes
        "dropped": [count / max(counts.sum(), 1) for count, counts in zip(totals.dropped, assignments, strict=True)],
        "router_entropy": [round(float(layer.entropy / layer.tokens), 5) for layer in totals.stats],
    }


@contextlib.contextmanager
def interruptible() -> Iterator[threading.Event]:
    """An event that the first Ctrl-C sets, so that no step is cut in two; the second Ctrl-C interrupts at once."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return

    def on_interrupt(*_: Any) -> None:
        event.set()
        signal.signal(signal.SIGINT, before)

    before = signal.signal(signal.SIGINT, on_interrupt)
    try:
        yield event
    finally:
        signal.signal(signal.SIGINT, before)


def _is_due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _diverged(folder: Path, step: int, kept: int) -> str:
    return (
        f"the loss or its gradient is not a finite number at step {step + 1}; the checkpoint of step {kept} in "
        f"{folder} is untouched: start a new run in another --out, with a lower --learning-rate, smaller loss "
        "coefficients, or a --clip."
    )


def new_folder(out: str | Path | None, name: str) -> Path:
    """``out``, or a new folder under runs/; it is created if it does not exist, and a file is written as a test."""
    if out is None:
        if not name or name in (".", "..") or {"/", os.sep, "\0"} & set(name):
            raise UserError(f"name {name!r:.80} is not the name of a folder in runs/: give one, or a path as out=.")
        numbered = (Path("runs", name if n == 1 else f"{name}-{n}") for n in range(1, 10**6))
        folder = next(path for path in numbered if not path.exists())
    else:
        folder = files.user_path(out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _refuse_a_run(folder)
        files.open_regular(folder / checkpoint.LOCK, "ab").close()
    except OSError as error:
        raise UserError(
            f"{folder} cannot be written ({error.strerror or error}): choose another folder with --out."
        ) from None
    return folder


def _refuse_a_run(folder: Path) -> None:
    if any((folder / file).exists() for file in checkpoint.FILES):
        raise UserError(f"{folder} already holds a run: continue it with --resume {folder}, or choose another --out.")
