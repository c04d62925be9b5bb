"""The package under CuPy's rules: the same results as on NumPy, nothing that CuPy refuses, no wait that is not needed.

A real GPU is asked the same questions by ``pytest -m gpu``; here ``strict_cupy`` plays CuPy.
"""

import ctypes
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import on_devices
import pytest
import strict_cupy
from on_devices import WHOLE, assert_equal, cases, mover

from minimoe.cli import main
from minimoe.core.config import TrainConfig
from minimoe.inference import generation
from minimoe.inference.kv_cache import init as empty_cache
from minimoe.losses import objective
from minimoe.losses.objective import Objective
from minimoe.optim import clipping, optimizer
from minimoe.training import run_report

DTYPES = (np.float64, np.float32)
ROUNDING = {np.float64: 1e-14, np.float32: 1e-6}
NAMES = [name for name, _ in cases(mover("cpu", np.float64), np.float64)]


@pytest.fixture(autouse=True)
def cupy(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return strict_cupy.install(monkeypatch)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs without figures at their end."""
    monkeypatch.setattr(run_report, "write", lambda *_: None)


# Layers


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_a_layer_gives_numpys_results_and_gradients(name: str, dtype: Any) -> None:
    host, gpu = (dict(cases(mover(device, dtype), dtype))[name] for device in ("cpu", "gpu"))
    (y, cache), (y_gpu, cache_gpu) = host.forward(), gpu.forward()
    assert_equal(y, y_gpu, ROUNDING[dtype], name)
    assert_equal(host.backward(cache), gpu.backward(cache_gpu), ROUNDING[dtype], name)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in on_devices.NOT_IN_A_STEP])
def test_a_layer_waits_for_its_expert_counts_and_for_nothing_else(name: str) -> None:
    case = dict(cases(mover("gpu", np.float32), np.float32))[name]
    with strict_cupy.watch() as forward:
        _, cache = case.forward()
    with strict_cupy.watch() as backward:
        case.backward(cache)
    assert forward.waits == (["get"] if name.startswith(("moe", "block")) else [])
    assert backward.waits == []
    assert forward.uploads == backward.uploads == [], "nothing is fetched from the host on the way"


# Training


@pytest.mark.parametrize("name", WHOLE)
def test_a_training_step_waits_once_in_each_layer_of_each_shard(name: str) -> None:
    params, shards, config = on_devices.whole(mover("gpu", np.float32), np.float32, **WHOLE[name])
    with strict_cupy.watch() as seen:
        totals, gradient = objective.loss_and_gradient(params, shards, config, Objective(on_devices.EVERY_LOSS))
        clipping.clip(gradient, 1.0)
        recipe = TrainConfig()
        optimizer.update(params, gradient, optimizer.init(params, recipe), recipe, 0)
    assert seen.waits == ["get"] * config.layers * len(shards)
    assert seen.uploads == []


def test_a_run_on_the_gpu_is_the_run_on_the_cpu(tmp_path: Path) -> None:
    cpu, gpu = (on_devices.run(tmp_path / device, device) for device in ("cpu", "gpu"))
    np.testing.assert_allclose(on_devices.losses(gpu), on_devices.losses(cpu), rtol=1e-4)
    assert gpu.metrics[-1]["load"] == cpu.metrics[-1]["load"]
    assert not gpu.model.on_gpu, "a trained model is handed over on the host"
    assert_equal(cpu.model.params, gpu.model.params, 1e-3)


@pytest.mark.parametrize(("first", "then"), [("cpu", "gpu"), ("gpu", "cpu")])
def test_a_run_continues_on_another_device(tmp_path: Path, quick: None, first: str, then: str) -> None:
    constant = {"warmup": 0, "final_rate": 1.0}  # so that the first steps do not depend on how many follow
    alone = on_devices.run(tmp_path / "alone", "cpu", steps=4, **constant)
    on_devices.run(tmp_path / "moved", first, steps=2, **constant)
    moved = on_devices.resume(tmp_path / "moved", then, steps=4)
    np.testing.assert_allclose(on_devices.losses(moved), on_devices.losses(alone), rtol=1e-4)


# Evaluation and generation


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return on_devices.run(tmp_path_factory.mktemp("runs") / "run", "cpu")


def test_evaluation_is_the_same(trained: Any) -> None:
    cpu, gpu = on_devices.evaluated(trained, "cpu"), on_devices.evaluated(trained, "gpu")
    assert gpu.loss == pytest.approx(cpu.loss, rel=1e-6)
    assert gpu.tokens == cpu.tokens
    np.testing.assert_array_equal(gpu.load, cpu.load)


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_the_same_text_is_written(trained: Any, temperature: float) -> None:
    assert on_devices.written(trained, "gpu", temperature) == on_devices.written(trained, "cpu", temperature)


def test_a_written_token_waits_once_in_each_layer(trained: Any) -> None:
    model = trained.model.to("gpu")
    cache = empty_cache(model.params, model.config)
    with strict_cupy.watch() as prompt:
        generation.extend(model.params, cache, np.array([[1, 2, 3]]))
    with strict_cupy.watch() as token:
        generation.extend(model.params, cache, np.array([[4]]))
    assert prompt.waits == token.waits == ["get"] * model.config.layers
    assert len(prompt.uploads) == 1, "the prompt's tokens"
    assert token.uploads == []


# What is said where there is no GPU


class CompileError(Exception):
    """CuPy's compiler raises an exception that is no RuntimeError."""


def no_cupy(monkeypatch: pytest.MonkeyPatch, cupy: ModuleType) -> None:
    def driver_of_cuda_13(name: str) -> Any:
        return SimpleNamespace(cuDriverGetVersion=lambda version: setattr(version._obj, "value", 13_000))

    monkeypatch.setitem(sys.modules, "cupy", None)  # makes the import fail
    monkeypatch.setattr(ctypes, "CDLL", driver_of_cuda_13)


def old_cupy(monkeypatch: pytest.MonkeyPatch, cupy: ModuleType) -> None:
    cupy.__version__ = "13.6.0"


def no_driver(monkeypatch: pytest.MonkeyPatch, cupy: ModuleType) -> None:
    def no_answer() -> int:
        raise RuntimeError("cudaErrorInsufficientDriver: too old")

    cupy.cuda.runtime.getDeviceCount = no_answer


def no_gpu(monkeypatch: pytest.MonkeyPatch, cupy: ModuleType) -> None:
    cupy.cuda.runtime.getDeviceCount = lambda: 0


def no_libraries(monkeypatch: pytest.MonkeyPatch, cupy: ModuleType) -> None:
    def fail(*_: Any) -> Any:
        raise ImportError("libcublas.so.12: not found")

    monkeypatch.setattr(strict_cupy.ndarray, "__matmul__", fail)


def no_compiler(monkeypatch: pytest.MonkeyPatch, cupy: ModuleType) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise CompileError("cannot open source file cuda_fp16.h\nand more")

    monkeypatch.setattr(cupy, "ones", fail)


STATES = [
    (no_cupy, "CuPy is not installed: run `pip install cupy-cuda13x`"),
    (old_cupy, "CuPy 13.6.0 is too old: run `pip install --upgrade cupy-cuda1"),
    (no_driver, "no GPU or driver responds (cudaErrorInsufficientDriver: too old): check `nvidia-smi`"),
    (no_gpu, "no GPU was found: check `nvidia-smi`"),
    (no_libraries, "cannot load its CUDA libraries (libcublas.so.12: not found): run `pip install"),
    (no_compiler, "cannot load its CUDA libraries (cannot open source file cuda_fp16.h): run `pip install"),
]


@pytest.mark.parametrize(("state", "sentence"), STATES)
def test_info_says_why_the_gpu_is_not_used(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], cupy: ModuleType, state: Any, sentence: str
) -> None:
    state(monkeypatch, cupy)
    assert main.main(["info"]) == 0
    line = capsys.readouterr().out.splitlines()[-1]
    assert line.startswith("GPU       none in use.") and sentence in line


@pytest.mark.parametrize(("state", "sentence"), STATES)
@pytest.mark.parametrize("command", ["train", "evaluate", "generate"])
def test_a_wish_for_the_gpu_that_cannot_be_met_is_refused_with_the_reason(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    cupy: ModuleType,
    trained: Any,
    tmp_path: Path,
    state: Any,
    sentence: str,
    command: str,
) -> None:
    state(monkeypatch, cupy)
    options = {
        "train": ["--preset", "tiny", "--out", str(tmp_path / "new")],
        "evaluate": [str(trained.folder)],
        "generate": [str(trained.folder), "--prompt", "1"],
    }
    assert main.main([command, *options[command], "--device", "gpu"]) == 2
    said = capsys.readouterr()
    assert sentence in said.err and "or use --device cpu" in said.err and said.out == ""
    assert not (tmp_path / "new").exists()


def test_info_names_a_gpu_that_computes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["info"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "GPU       stand-in, 1.0 of 2.0 GB free, CuPy 14.2.0"
