"""The memory that training takes: what is foretold, and what is really held."""

import contextlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from minimoe.core import presets, resources, tree
from minimoe.core.config import TrainConfig
from minimoe.core.errors import UserError
from minimoe.cost import memory, parameters
from minimoe.layers import decoder
from minimoe.losses import objective
from minimoe.losses.objective import Objective, Shard
from minimoe.optim import optimizer

TOY = presets.override(presets.preset("toy"), {"expert_width": 256})
RECIPES = [
    {},
    {"optimizer": "adamw"},
    {"dtype": "float64", "noisy_gating": False},
    {"tied_embeddings": True, "active_experts": 4, "experts": 4},
    {"context": 16, "batch": 6, "accumulate": 3},
    {"shared_experts": 2, "router": "sigmoid_bias"},
    {"layers": 3, "dense_layers": 2, "dense_width": 50, "qk_norm": "per_head"},
]


@pytest.mark.parametrize("settings", RECIPES, ids=lambda settings: "-".join(settings))
def test_training_takes_the_bytes_that_are_foretold(settings: dict[str, Any]) -> None:
    chosen = presets.override(presets.preset("tiny"), settings)
    params = decoder.init(np.random.default_rng(0), chosen.config, chosen.recipe.dtype)
    state = list(optimizer.init(params, chosen.recipe).values())
    weights, moments = (sum(leaf.nbytes for leaf in tree.leaves(part)) for part in (params, state))
    assert memory.training_bytes(chosen.config, chosen.recipe) == 2 * weights + moments
    assert memory.training_bytes(chosen.config, chosen.recipe, threads=4) == 9 * weights + moments


def test_where_rows_are_exchanged_there_is_one_gradient_of_the_experts() -> None:
    toy = presets.override(TOY, {"experts": 128, "optimizer": "adamw"})
    counts = parameters.count(toy.config)
    every = counts.total + counts.noise
    bytes_of_two = 4 * (3 * every + 4 * (every - counts.experts) + counts.experts)
    assert memory.training_bytes(toy.config, toy.recipe, threads=2) == bytes_of_two


@pytest.mark.parametrize("settings", RECIPES, ids=lambda settings: "-".join(settings))
def test_what_forward_leaves_for_backward_is_foretold_from_below(settings: dict[str, Any]) -> None:
    chosen = presets.override(presets.preset("tiny"), settings)
    config, recipe = chosen.config, chosen.recipe
    rng = np.random.default_rng(0)
    params = decoder.init(rng, config, recipe.dtype)
    shape = recipe.batch // recipe.accumulate, config.context
    noise = rng.standard_normal((config.layers, *shape, config.experts)).astype(recipe.dtype)
    tokens = np.zeros(shape, np.int32)
    forward = objective.forward(params, Shard(tokens, tokens, noise), config, Objective())
    held = sum(array.nbytes for array in buffers(forward.caches) if array.dtype == np.dtype(recipe.dtype))
    foretold = memory.activation_bytes(config, recipe)
    assert foretold <= held < 2 * foretold


def buffers(cache: Any) -> list[np.ndarray]:
    """Every block of memory behind the arrays of a cache, once."""
    found: dict[int, np.ndarray] = {}

    def walk(part: Any) -> None:
        if isinstance(part, np.ndarray):
            while isinstance(part.base, np.ndarray):
                part = part.base
            found[id(part)] = part
        elif isinstance(part, tuple | list):
            for branch in part:
                walk(branch)

    walk(cache)
    return list(found.values())


def test_a_model_or_a_step_that_cannot_fit_is_refused_with_its_size(monkeypatch: pytest.MonkeyPatch) -> None:
    toy = TOY
    monkeypatch.setattr(resources, "memory_bytes", lambda: 16 * 10**9)
    memory.check_memory(toy.config, toy.recipe, threads=8)
    mixtral = presets.preset("mixtral-8x7b").config
    state = memory.training_bytes(mixtral, TrainConfig()) / 1e9
    with pytest.raises(UserError, match=rf"46,702,792,704 parameters needs {state:.1f} GB .*this machine has 16.0 GB"):
        memory.check_memory(mixtral, TrainConfig())
    assert state > 46.7 * 4 * 3
    large = presets.override(toy, {"batch": 4096})
    with pytest.raises(UserError, match="for a step of 524,288 tokens.* choose a smaller .*batch"):
        memory.check_memory(large.config, large.recipe)
    memory.check_memory(large.config, presets.override(large, {"accumulate": 256}).recipe)


def test_a_container_that_has_too_little_memory_is_named_before_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    toy = TOY
    state, step = memory.training_bytes(toy.config, toy.recipe), memory.activation_bytes(toy.config, toy.recipe)
    enough = state + step + memory.LIBRARIES + 30_000_000
    monkeypatch.setattr(resources, "memory_in_use", lambda: 30_000_000)
    for limit, refused in ((enough, False), (enough - 1, True)):
        monkeypatch.setattr(resources, "memory_bytes", lambda limit=limit: limit)
        monkeypatch.setattr(resources, "memory_limit", lambda limit=limit: limit)
        says = "90 MB for Python.*the container may use 2\\d\\d MB: raise its memory limit"
        with pytest.raises(UserError, match=says) if refused else contextlib.nullcontext():
            memory.check_memory(toy.config, toy.recipe)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux limits and tells the address space")
@pytest.mark.parametrize("megabytes", [200, 320])
def test_a_run_that_cannot_have_its_address_space_says_so_before_it_starts(tmp_path: Path, megabytes: int) -> None:
    code = (
        "import resource, sys\n"
        "from minimoe.cli.main import main\n"
        f"resource.setrlimit(resource.RLIMIT_AS, ({megabytes} * 10**6,) * 2)\n"
        f"sys.exit(main(['train', '--threads', '2', '--out', {str(tmp_path / 'run')!r}]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8", timeout=60)
    assert done.returncode == 2
    assert "the limit on address space leaves" in done.stderr and done.stderr.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_machine_that_does_not_tell_its_memory_is_trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resources, "memory_bytes", lambda: None)
    memory.check_memory(presets.preset("mixtral-8x7b").config, TrainConfig())


def test_the_two_factors_of_every_shared_expert_are_kept_for_every_token() -> None:
    def kept(shared: int) -> int:
        tiny = presets.override(presets.preset("tiny"), {"shared_experts": shared})
        return memory.activation_bytes(tiny.config, tiny.recipe)

    tiny = presets.preset("tiny")
    numbers = tiny.recipe.batch * tiny.config.context * tiny.config.layers * 2 * tiny.config.expert_width
    assert [kept(shared) - kept(0) for shared in (1, 3)] == [4 * numbers, 3 * 4 * numbers]


def test_the_two_factors_of_a_dense_layer_are_kept_in_the_place_of_what_a_mixture_keeps() -> None:
    tiny = presets.override(presets.preset("tiny"), {"layers": 4, "shared_experts": 1})
    config = presets.override(tiny, {"dense_layers": 3, "dense_width": 17}).config
    mixture = config.active_experts * 2 * (config.width + config.expert_width) + 2 * config.expert_width
    tokens = tiny.recipe.batch * config.context
    spared = memory.activation_bytes(tiny.config, tiny.recipe) - memory.activation_bytes(config, tiny.recipe)
    assert spared == 4 * tokens * 3 * (mixture - 2 * 17)
