"""Everyone who takes part in the comparison, each in a process of its own: minimoe, its twins in PyTorch, transformers.

A process keeps the memory, the threads and the imports of one contender apart from all others, so that a round can ask
one after the other and no one pays for its neighbour. ``Process`` is a contender as the comparison sees it; ``serve``
is what runs behind it.
"""

from __future__ import annotations

import importlib
import multiprocessing
import resource
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from minimoe.core import resources
from minimoe.core.config import ModelConfig, TrainConfig

PROMPT = 8
"""Tokens that decoding starts from; it then fills the model's context."""

GEMM = 2048
"""Rows and columns of the product that measures the machine's peak."""


class Task(NamedTuple):
    """What a contender is to do."""

    who: str  # of CONTENDERS
    work: str  # step: a training step; gradient: forward and backward alone; decode; peak
    config: ModelConfig
    recipe: TrainConfig
    threads: int
    device: str = "cpu"

    @property
    def tokens(self) -> int:
        """Tokens that a run of the work handles."""
        return self.config.context - PROMPT if self.work == "decode" else self.recipe.batch * self.config.context


Result = dict[str, np.ndarray]
"""What a contender computes, by name: the loss, the logits and every gradient, or the tokens that it writes."""


class Contender(NamedTuple):
    """A task made ready in this process."""

    run: Callable[[], Any]  # does the work once, and waits for it
    result: Callable[[], Result] = dict  # what must agree with minimoe's


class Process:
    """A contender in a process of its own, asked by messages."""

    def __init__(self, task: Task) -> None:
        self.task = task
        context = multiprocessing.get_context("spawn")
        self.pipe, there = context.Pipe()
        self.process = context.Process(target=serve, args=(there, task), daemon=True)
        self.process.start()
        there.close()

    def ask(self, question: str, *values: Any) -> Any:
        """One of three questions.

        ``result``           what must agree with minimoe's, by name
        ``times``, count     seconds of each of so many runs
        ``memory``           bytes at the peak, and just after the imports
        """
        self.pipe.send((question, *values))
        try:
            answer = self.pipe.recv()
        except EOFError:
            raise SystemExit(f"{self.task.who} ended without an answer to {question!r}: see its words above.") from None
        return answer

    def close(self) -> None:
        self.pipe.close()
        self.process.join()


def serve(pipe: Connection, task: Task) -> None:
    """Answers ``Process.ask`` until the other end closes."""
    import_what_it_needs(task)
    imported = resident()
    from threadpoolctl import threadpool_limits

    with ExitStack() as stack:
        stack.enter_context(threadpool_limits(task.threads, user_api="blas"))
        contender = CONTENDERS[task.who](task, stack)
        while True:
            try:
                question, *values = pipe.recv()
            except EOFError:
                return
            if question == "result":
                answer = contender.result()
            elif question == "times":
                answer = [timed(contender.run) for _ in range(values[0])]
            else:
                answer = resources.peak_memory_bytes(), imported
            pipe.send(answer)


def import_what_it_needs(task: Task) -> None:
    """What every process of the kind has in memory, whatever it computes."""
    numpy_alone = task.who in ("minimoe", "peak")
    for name in ("minimoe.inference.generation", "minimoe.training.step") if numpy_alone else ("torch", "twins"):
        importlib.import_module(name)


def timed(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def resident() -> int:
    """Bytes that this process holds now, as Linux says."""
    return resource.getpagesize() * int(Path("/proc/self/statm").read_text().split()[1])


# What is computed


def parameters(task: Task) -> Any:
    """The weights that all contenders of a task start from, away from the ones and zeros of a fresh model."""
    from minimoe.core import tree
    from minimoe.layers import decoder

    rng = np.random.default_rng(0)

    def moved(leaf: np.ndarray) -> np.ndarray:
        return leaf + np.float32(0.02) * rng.standard_normal(leaf.shape, np.float32)

    return tree.map(moved, decoder.init(rng, task.config))


def batch(task: Task) -> tuple[np.ndarray, np.ndarray]:
    """tokens and targets (B, T)."""
    rng = np.random.default_rng(1)
    shape = (2, task.recipe.batch, task.config.context)
    tokens, targets = rng.integers(task.config.vocab_size, size=shape)
    return tokens, targets


def decided_noise(task: Task) -> np.ndarray:
    """Noise (L, B, T, E) that favours K experts of each token by so much that rounding cannot flip a routing."""
    rng = np.random.default_rng(2)
    shape = (task.config.layers, task.recipe.batch, task.config.context, task.config.experts)
    favoured = rng.random(shape, np.float32).argsort(-1) < task.config.active_experts
    return (np.where(favoured, 1, -1) * rng.uniform(3, 5, shape)).astype(np.float32)


def prompt(task: Task) -> np.ndarray:
    return np.random.default_rng(3).integers(task.config.vocab_size, size=PROMPT)


# minimoe


def minimoe(task: Task, stack: ExitStack) -> Contender:
    from minimoe.core import tree
    from minimoe.core.arrays import array_module, like, to_device, to_host
    from minimoe.inference import generation
    from minimoe.layers import decoder
    from minimoe.layers.mode import Mode
    from minimoe.losses import objective
    from minimoe.losses.balance import Coefficients
    from minimoe.losses.objective import Objective, Shard
    from minimoe.optim import optimizer
    from minimoe.parallel.group import Group
    from minimoe.training import step

    params = tree.map(lambda leaf: to_device(leaf, task.device), parameters(task))
    where = params.norm.gain

    def wait() -> None:
        if task.device == "gpu":
            array_module(where).cuda.get_current_stream().synchronize()

    if task.work == "decode":

        def write() -> list[int]:
            return list(
                generation.generate(
                    params, task.config, prompt(task), tokens=task.config.context - PROMPT, temperature=0.0
                )
            )

        return Contender(write, lambda: {"ids": 1 + np.array(write())})

    goal = Objective(Coefficients(balance=task.recipe.balance_loss, z=task.recipe.z_loss))
    tokens, targets = batch(task)
    rng = np.random.default_rng(4)
    moments = optimizer.init(params, task.recipe)
    at_work = 1 if task.device == "gpu" else min(task.threads, task.recipe.batch)
    taken = 0

    def shards() -> list[Shard]:
        return step.shard_batch(rng, params, tokens, targets, task.config, task.recipe, at_work)

    def gradient_alone(group: Group, mine: Sequence[Shard]) -> None:
        step.gradient(params, mine, task.config, task.recipe, group)
        group.barrier()

    if task.work == "gradient":
        run_all = stack.enter_context(step.launch_for(at_work, gradient_alone, params, task.config, task.recipe))
    else:
        workers = stack.enter_context(step.open_workers(params, moments, task.config, task.recipe, at_work))

    def run_gradient() -> None:
        run_all([[shard] for shard in shards()])
        wait()

    def run_step() -> None:
        nonlocal taken
        workers.step(shards(), taken)
        taken += 1
        wait()

    def result() -> Result:
        noise = decided_noise(task)
        shard = Shard(like(where, tokens), like(where, targets), like(where, noise))
        totals, gradient = objective.loss_and_gradient(params, [shard], task.config, goal)
        logits, _, _ = decoder.forward(params, shard.tokens, task.config, Mode(noise=shard.noise))
        named = {f"gradient of {name}": to_host(leaf) for name, leaf in tree.named_leaves(gradient)}
        return {"loss": np.array(float(totals.total)), "logits": to_host(logits)} | named

    return Contender(run_gradient if task.work == "gradient" else run_step, result)


# PyTorch


def twin(task: Task, _: ExitStack) -> Contender:
    import torch
    import twins

    from minimoe.core import tree

    torch.set_num_threads(task.threads)
    torch._dynamo.config.recompile_limit = 64  # every layer is compiled, however uneven its routing
    dispatch, _, compiled = task.who.partition(" ")
    params = parameters(task)
    device = {"cpu": "cpu", "gpu": "cuda"}[task.device]
    model = twins.copy_weights(twins.Twin(task.config, dispatch), params).to(device)
    called = torch.compile(model) if compiled else model
    tokens, targets = (torch.tensor(ids, device=device) for ids in batch(task))
    recipe = task.recipe
    optimizer = torch.optim.AdamW(
        model.parameters(),
        recipe.learning_rate,
        (recipe.beta1, recipe.beta2),
        weight_decay=recipe.weight_decay,
        fused=True,
    )
    shape = (task.config.layers, recipe.batch, task.config.context, task.config.experts)

    def gradient(noise: Any) -> tuple[Any, Any]:
        optimizer.zero_grad()
        loss, logits = twins.loss(called, recipe, tokens, targets, noise)
        loss.backward()
        return loss, logits

    def run_step() -> None:
        gradient(torch.randn(shape, device=device))
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
        optimizer.step()
        if task.device == "gpu":
            torch.cuda.synchronize()

    def result() -> Result:
        loss, logits = gradient(torch.tensor(decided_noise(task), device=device))
        found = tree.zeros_like(params)
        for _, parameter, place in twins.beside(model, found):
            place[...] = parameter.grad.cpu().numpy()
        named = {f"gradient of {name}": leaf for name, leaf in tree.named_leaves(found)}
        return {"loss": loss.detach().cpu().numpy(), "logits": logits.detach().cpu().numpy()} | named

    return Contender(run_step, result)


def decoding_twin(task: Task, _: ExitStack) -> Contender:
    import torch
    import twins

    torch.set_num_threads(task.threads)
    kind = {"cached": twins.Cached, "cached compiled": twins.Gathered}[task.who]
    writer = kind(twins.copy_weights(twins.Twin(task.config), parameters(task)))
    ids = torch.tensor(prompt(task))

    def write() -> list[int]:
        return writer.write(ids, task.config.context - PROMPT)

    return Contender(write, lambda: {"ids": 1 + np.array(write())})


def transformers(task: Task, _: ExitStack) -> Contender:
    import torch
    from transformers import MixtralForCausalLM

    from minimoe.storage import huggingface

    torch.set_num_threads(task.threads)
    with tempfile.TemporaryDirectory() as folder:
        huggingface.save(Path(folder, "model"), parameters(task), task.config)
        model = MixtralForCausalLM.from_pretrained(Path(folder, "model"), dtype=torch.float32).eval()
    ids = torch.tensor(prompt(task))[None]
    count = task.config.context - PROMPT

    def write() -> list[int]:
        with torch.inference_mode():
            whole = model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False, pad_token_id=0
            )
        return whole[0, PROMPT:].tolist()

    return Contender(write, lambda: {"ids": 1 + np.array(write())})


# The machine


def peak(task: Task, _: ExitStack) -> Contender:
    """Single-precision products large enough for the BLAS to give all it has."""
    a, b = np.random.default_rng(0).standard_normal((2, GEMM, GEMM), np.float32)
    c = np.empty_like(a)
    return Contender(lambda: np.matmul(a, b, out=c))


def torch_peak(task: Task, _: ExitStack) -> Contender:
    """The same product by PyTorch, which brings a BLAS of its own."""
    import torch

    torch.set_num_threads(task.threads)
    a, b = (torch.from_numpy(one) for one in np.random.default_rng(0).standard_normal((2, GEMM, GEMM), np.float32))
    c = torch.empty_like(a)
    return Contender(lambda: torch.mm(a, b, out=c))


CONTENDERS: dict[str, Callable[[Task, ExitStack], Contender]] = {
    "minimoe": minimoe,
    "loop": twin,
    "sorted": twin,
    "loop compiled": twin,
    "sorted compiled": twin,
    "cached": decoding_twin,
    "cached compiled": decoding_twin,
    "transformers": transformers,
    "peak": peak,
    "torch peak": torch_peak,
}
