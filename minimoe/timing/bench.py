"""How fast this machine trains and writes, where the time goes, and how close that is to what the machine can do.

    report = run(presets.preset("toy"))
    print(table(report))

The step is the trainer's own; only the text is random. The speed is compared with that of the machine itself: it is
given as a share of the speed that BLAS reaches on one large matrix product with the same number of threads.
"""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from minimoe.core import resources, tree
from minimoe.core.arrays import Array, array_module, select_device, to_device, to_host
from minimoe.core.config import ModelConfig, TrainConfig
from minimoe.core.errors import UserError
from minimoe.core.presets import Preset
from minimoe.cost import blueprint, memory, parameters
from minimoe.inference import generation
from minimoe.layers import decoder
from minimoe.layers.decoder import Decoder
from minimoe.optim import optimizer
from minimoe.timing import advice, stopwatch
from minimoe.training import step

GEMM = 2048
"""Rows and columns of the product that measures the machine's peak; a GPU gets four times as many."""

WARM_UP, LEAST_RUNS = 2, 3
PROMPT, WRITTEN = 8, 256
"""Tokens in the prompt of the decoding test, and the most tokens that it writes; fewer if the context is shorter."""


@dataclass(frozen=True)
class Component:
    """Milliseconds per step in one kind of layer; if several workers share the step, those of the first worker."""

    name: str
    forward: float
    backward: float


@dataclass(frozen=True)
class Report:
    """The measurements: medians for steps and decoding, means for components, the best run for the peak."""

    device: str
    threads: int
    parameters: int
    batch: int
    context: int
    optimizer: str
    training_tokens_per_second: float
    step_milliseconds: float
    components: list[Component]
    clip_milliseconds: float
    update_milliseconds: float
    matrix_operations: int  # per step
    peak_operations_per_second: float
    share_of_peak: float
    decoding_tokens_per_second: float
    peak_memory_bytes: int | None
    advice: list[str]


def run(chosen: Preset, device: str = "auto", threads: int | None = None, seconds: float = 3.0) -> Report:
    """Measures a model and a recipe; each part of the measurement takes about ``seconds`` seconds.

    Raises:
        UserError: the device or the number of threads is not available, there is too little memory, or ``seconds`` is
            negative or not finite.
    """
    if not 0 <= seconds < math.inf:
        raise UserError(f"seconds {seconds} is not a time to measure for: choose a number above 0, such as 3.")
    config, recipe = chosen.config, chosen.recipe
    where, threads = select_device(device), resources.thread_count(threads)
    at_work = 1 if where == "gpu" else min(threads, recipe.batch)
    memory.check_memory(config, recipe, at_work)
    rng = np.random.default_rng(recipe.seed)
    params = tree.map(lambda leaf: to_device(leaf, where), decoder.init(rng, config, recipe.dtype))

    def wait() -> None:
        """Waits for the device by copying from it: the copy is made only after all of the device's earlier work."""
        to_host(array_module(params.norm.gain).zeros(1))

    moments = optimizer.init(params, recipe)
    with step.open_workers(params, moments, config, recipe, at_work) as workers:
        train = _training(rng, workers, config, recipe, at_work, wait)
        step_times = measure(train, seconds)
        peak_bytes = peak_memory(params.norm.gain)
        with stopwatch.watch(wait) as spent:
            runs = WARM_UP + len(measure(train, seconds))
    peak = matrix_peak(params.norm.gain, at_work, wait, seconds)
    usual = statistics.median(step_times)
    operations = matrix_operations(config, recipe.batch)
    counts = parameters.count(config)

    def milliseconds(name: str, way: str) -> float:
        return 1000 * spent.get((name, way), 0.0) / runs

    return Report(
        device=where,
        threads=at_work,
        parameters=counts.total + counts.noise,
        batch=recipe.batch,
        context=config.context,
        optimizer=recipe.optimizer,
        training_tokens_per_second=recipe.batch * config.context / usual,
        step_milliseconds=1000 * usual,
        components=[
            Component(name, milliseconds(name, "forward"), milliseconds(name, "backward"))
            for name in stopwatch.components()
            if (name, "forward") in spent
        ],
        clip_milliseconds=milliseconds("clip", "after"),
        update_milliseconds=milliseconds("update", "after"),
        matrix_operations=operations,
        peak_operations_per_second=peak,
        share_of_peak=operations / usual / peak,
        decoding_tokens_per_second=_decoding(params, config, threads, seconds),
        peak_memory_bytes=peak_bytes,
        advice=[] if where == "gpu" else advice.found(threads),
    )


def measure(work: Callable[[], Any], seconds: float) -> list[float]:
    """The seconds of each run: ``WARM_UP`` uncounted runs, then runs for ``seconds``, ``LEAST_RUNS`` at least."""
    for _ in range(WARM_UP):
        work()
    times: list[float] = []
    while len(times) < LEAST_RUNS or sum(times) < seconds:
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return times


def matrix_operations(config: ModelConfig, batch: int) -> int:
    """Operations (products and sums) in the matrix products of one step: forward, and twice as many backward.

    The count is exact: every active parameter that multiplies a token counts 2, and every pair of a query and a key
    that this query sees counts 4·H·C in each layer. Anything else that an implementation computes, such as masked
    scores or scores computed again, is not counted, because the result does not need it.
    """
    plan = blueprint.of_config("", config)
    weights = sum(part.active for part in plan.parts if part.multiplied) + parameters.count(config).noise
    sight = config.context if config.window is None else config.window
    pairs = sum(min(i + 1, sight) for i in range(config.context))
    return 3 * batch * (2 * weights * config.context + 4 * plan.attention_width * pairs)


def matrix_peak(like: Array, threads: int, wait: Callable[[], Any], seconds: float) -> float:
    """Operations per second of the fastest of several large products, in the dtype and on the device of ``like``."""
    from threadpoolctl import threadpool_limits

    xp = array_module(like)
    size = GEMM if xp is np else 4 * GEMM
    a, b = xp.ones((size, size), like.dtype), xp.ones((size, size), like.dtype)
    c = xp.empty_like(a)

    def multiply() -> None:
        xp.matmul(a, b, out=c)
        wait()

    with threadpool_limits(threads, user_api="blas"):
        return 2 * size**3 / min(measure(multiply, seconds))


def peak_memory(like: Array) -> int | None:
    """The most bytes that this process and its workers, or CuPy's pool, have held; None if that is unknown."""
    if isinstance(like, np.ndarray):
        return resources.peak_memory_bytes()
    return int(array_module(like).get_default_memory_pool().total_bytes())


def _training(
    rng: np.random.Generator,
    workers: step.Workers,
    config: ModelConfig,
    recipe: TrainConfig,
    threads: int,
    wait: Callable[[], None],
) -> Callable[[], None]:
    """A function that takes one training step each time it is called."""
    tokens, targets = rng.integers(config.vocab_size, size=(2, recipe.batch, config.context))
    taken = 0

    def train() -> None:
        nonlocal taken
        workers.step(step.shard_batch(rng, workers.params, tokens, targets, config, recipe, threads), taken)
        wait()
        taken += 1

    return train


def _decoding(params: Decoder, config: ModelConfig, threads: int, seconds: float) -> float:
    """Tokens per second of greedy decoding, one sequence, with the key/value cache."""
    from threadpoolctl import threadpool_limits

    prompt = np.arange(min(PROMPT, max(1, config.context // 2))) % config.vocab_size
    tokens = min(WRITTEN, max(1, config.context - len(prompt)))

    def write() -> None:
        for _ in generation.generate(params, config, prompt, tokens=tokens, temperature=0.0):
            pass

    with threadpool_limits(threads, user_api="blas"):
        return tokens / statistics.median(measure(write, seconds))


# The report as text


def to_json(report: Report) -> str:
    """One JSON object."""
    return json.dumps(dataclasses.asdict(report), indent=2)


def table(report: Report) -> str:
    """The report as a table, slowest component first."""
    on = "a GPU" if report.device == "gpu" else f"{report.threads} thread{'s' if report.threads > 1 else ''}"
    lines = [
        f"{report.parameters:,} parameters, {report.batch} × {report.context} tokens per step, "
        f"{report.optimizer}, {on}",
        "",
        f"training   {report.training_tokens_per_second:,.0f} tokens/s, {report.step_milliseconds:,.1f} ms per step",
        f"matrices   {report.matrix_operations / 1e9:,.2f} billion operations per step, at {report.share_of_peak:.0%} "
        f"of this machine's {report.peak_operations_per_second / 1e9:,.0f} billion per second",
        f"decoding   {report.decoding_tokens_per_second:,.0f} tokens/s, greedy, one sequence",
    ]
    if report.peak_memory_bytes is not None:
        lines.append(f"memory     {report.peak_memory_bytes / 1e6:,.0f} MB at the peak of training")
    lines += ["", f"{'ms per step':16}{'forward':>9}{'backward':>10}"]
    for one in sorted(report.components, key=lambda one: -one.forward - one.backward):
        lines.append(f"{one.name:16}{one.forward:9.2f}{one.backward:10.2f}")
    lines.append(f"{'clip, update':16}{report.clip_milliseconds:9.2f}{report.update_milliseconds:10.2f}")
    return "\n".join([*lines, *(["", *report.advice] if report.advice else [])])
