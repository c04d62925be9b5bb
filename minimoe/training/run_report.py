"""What the user sees of a training run: first the opening; at the end, figures, a sample and a page."""

from __future__ import annotations

import contextlib
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

from minimoe.analysis import microscope, microscope_page, routing_trace
from minimoe.core import files
from minimoe.core.arrays import Device
from minimoe.core.errors import UserError
from minimoe.cost import parameters
from minimoe.draw import plots
from minimoe.inference import generation
from minimoe.storage.checkpoint import Model, RunConfig
from minimoe.text import chat
from minimoe.text.batches import Texts

LOSS, EXPERTS, SAMPLE, PAGE = "loss.png", "experts.png", "sample.txt", "routing.html"
PROMPT_TOKENS, SAMPLE_TOKENS, TEMPERATURE = 40, 300, 0.7
PAGE_TOKENS = 10_000
"""Tokens of each validation text that the page shows, at most, so that the page is written in seconds."""


def opening(folder: Path, run: RunConfig, reads: str, device: Device, threads: int, first: int) -> str:
    """Three lines about the model, the data and the steps to come; ``reads`` is the one about the data."""
    counts = parameters.count(run.config)
    begin = f"continues at step {first} of" if first else "takes"
    steps = f"{run.recipe.steps:,} step{'s' * (run.recipe.steps != 1)}"
    kind = (
        "A dense model"
        if run.config.experts == 1
        else f"A mixture of {run.config.experts} experts, {run.config.active_experts} active per token"
    )
    return (
        f"{kind}: {counts.total / 1e6:.2f}M parameters, {counts.active / 1e6:.2f}M active.\n"
        f"{reads}\n"
        f"Training {begin} {steps} of {run.recipe.batch * run.config.context:,} tokens "
        f"on {'the GPU' if device == 'gpu' else f'{threads} CPU core' + 's' * (threads > 1)} and writes to {folder}."
    )


def about_texts(data: Texts) -> str:
    """A sentence about the texts that a run reads."""
    held_out = sum(len(ids) for ids in data.validation)
    return f"It reads {', '.join(data.names)}: {len(data.train):,} tokens for training, {held_out:,} for validation."


def closing(
    folder: Path, finished: bool, metrics: list[dict[str, Any]], step: int | None = None, model: Model | None = None
) -> str:
    """The sample, the validation loss and the paths of the files; for an interrupted run, how to resume it.

    ``step`` is the number of steps that the run has taken; by default, it is read from the metrics. ``model`` is what
    the run keeps, which may be the model of an earlier step; if it can answer, the closing says how to talk with it.
    """
    if step is None:
        step = metrics[-1]["step"] if metrics else 0
    if not finished:
        resume = f"{command()} train --resume {shlex.quote(str(folder))}"
        return f"\nInterrupted at step {step}; everything is saved. Continue with:\n  {resume}"
    paths = "\n".join(f"  {folder / name}" for name in (LOSS, EXPERTS, SAMPLE, PAGE) if (folder / name).exists())
    kept = step if model is None else model.step
    measured = (row for row in reversed(metrics) if "val_loss" in row and row["step"] <= kept)
    validation = next((f"{row['val_loss']:.3f}" for row in measured), "none")
    best = "" if kept == step else f", the lowest of {step:,}; the model of that step is kept"
    written = ""
    with contextlib.suppress(OSError, ValueError):  # there is no sample if it could not be written
        written = f"\n{files.read_text(folder / SAMPLE)}\n"
    place = shlex.quote(str(folder))
    talk = f"Talk with it:\n  {command()} chat {place}"
    generate = f"Generate text with:\n  {command()} generate {place} --prompt 'Once upon a time'"
    return (
        f"{written}"
        f"Validation loss {validation} nats per token after {kept:,} steps{best}. Look at:\n{paths}\n"
        f"{talk if model is not None and chat.can_chat(model.tokenizer) else generate}"
    )


def write(folder: Path, model: Model, data: Texts, metrics: list[dict[str, Any]]) -> None:
    """Writes sample.txt to the folder and, if there are metrics, loss.png.

    A mixture also gets experts.png, and routing.html: the page of ``minimoe routing --html``.
    """
    files.write_atomically(folder / SAMPLE, sample(model, data).encode(errors="backslashreplace"))
    if metrics:
        plots.save(plots.loss_curves(metrics), folder / LOSS)
        if model.config.experts > 1:
            domains = dict(zip(data.names, data.validation, strict=True))
            by_domain = routing_trace.load_by_domain(model.params, model.config, domains)
            plots.save(plots.experts(metrics, by_domain, model.config.dense_layers), folder / EXPERTS)
            try:
                seen = microscope.look(model, {name: ids[:PAGE_TOKENS] for name, ids in domains.items()})
            except UserError:  # the model has too many experts for the page, or reads single tokens
                return
            microscope_page.write(folder / PAGE, seen, f"Routing of {folder.resolve().name}")


def command() -> str:
    """The command that starts minimoe from the current folder: ``minimoe`` if it is on the PATH, else this Python."""
    python = Path(sys.executable)
    found = shutil.which("minimoe")
    if found is not None and Path(found).parent == python.parent:
        return "minimoe"
    with contextlib.suppress(ValueError):
        python = python.relative_to(Path.cwd())
    return f"{shlex.quote(str(python))} -m minimoe"


def sample(model: Model, data: Texts) -> str:
    """For each document, a passage that the model never saw, the mark ``|>``, and the model's continuation."""
    parts = []
    for name, ids in zip(data.names, data.validation, strict=True):
        prompt = ids[:PROMPT_TOKENS]
        written = generation.generate(
            model.params, model.config, prompt, tokens=SAMPLE_TOKENS, temperature=TEMPERATURE, seed=0
        )
        parts.append(f"--- {name} ---\n{model.tokenizer.decode(prompt)}|>{model.tokenizer.decode(list(written))}\n")
    return "\n".join(parts)
