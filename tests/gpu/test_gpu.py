"""On a real GPU: every layer, training, evaluation and generation against NumPy. Run with ``pytest -m gpu``."""

import inspect
from pathlib import Path
from typing import Any

import numpy as np
import on_devices
import pytest
import strict_cupy
from on_devices import assert_equal, cases, mover

from minimoe.core import arrays

pytestmark = pytest.mark.gpu

DTYPES = (np.float64, np.float32)
ROUNDING = {np.float64: 1e-9, np.float32: 1e-4}
NAMES = [name for name, _ in cases(mover("cpu", np.float64), np.float64)]


@pytest.fixture(scope="module")
def gpu() -> None:
    problem = arrays.gpu_problem()
    if problem is not None:
        pytest.skip(problem)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return on_devices.run(tmp_path_factory.mktemp("runs") / "run", "cpu", steps=20)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_a_layer_gives_numpys_results_and_gradients(gpu: None, name: str, dtype: Any) -> None:
    on_cpu, on_gpu = (dict(cases(mover(device, dtype), dtype))[name] for device in ("cpu", "gpu"))
    (y, cache), (y_gpu, cache_gpu) = on_cpu.forward(), on_gpu.forward()
    assert_equal(y, y_gpu, ROUNDING[dtype], name)
    assert_equal(on_cpu.backward(cache), on_gpu.backward(cache_gpu), ROUNDING[dtype], name)


def test_the_loss_curve_is_that_of_the_cpu(gpu: None, tmp_path: Path, trained: Any) -> None:
    on_gpu = on_devices.run(tmp_path / "run", "gpu", steps=20)
    np.testing.assert_allclose(on_devices.losses(on_gpu), on_devices.losses(trained), rtol=0.01)
    first = len(on_devices.losses(trained)) // 4
    np.testing.assert_allclose(on_devices.losses(on_gpu)[:first], on_devices.losses(trained)[:first], rtol=1e-3)


def test_the_same_seed_gives_the_same_run_to_the_bit(gpu: None, tmp_path: Path) -> None:
    one, other = (on_devices.run(tmp_path / name, "gpu") for name in ("one", "other"))
    assert on_devices.losses(one) == on_devices.losses(other)


@pytest.mark.parametrize(("first", "then"), [("cpu", "gpu"), ("gpu", "cpu")])
def test_a_run_continues_on_another_device(gpu: None, tmp_path: Path, first: str, then: str) -> None:
    constant = {"warmup": 0, "final_rate": 1.0}  # so that the first steps do not depend on how many follow
    alone = on_devices.run(tmp_path / "alone", "cpu", steps=4, **constant)
    on_devices.run(tmp_path / "moved", first, steps=2, **constant)
    moved = on_devices.resume(tmp_path / "moved", then, steps=4)
    np.testing.assert_allclose(on_devices.losses(moved), on_devices.losses(alone), rtol=1e-3)


def test_evaluation_is_the_same(gpu: None, trained: Any) -> None:
    on_cpu, on_gpu = on_devices.evaluated(trained, "cpu"), on_devices.evaluated(trained, "gpu")
    assert on_gpu.loss == pytest.approx(on_cpu.loss, rel=1e-4)
    assert on_gpu.tokens == on_cpu.tokens
    np.testing.assert_allclose(on_gpu.load, on_cpu.load, atol=0.01)  # a near tie may fall the other way


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_the_same_text_is_written(gpu: None, trained: Any, temperature: float) -> None:
    assert on_devices.written(trained, "gpu", temperature) == on_devices.written(trained, "cpu", temperature)


# The stand-in against the real CuPy, which needs no GPU for this

TABLES = strict_cupy.FUNCTIONS | strict_cupy.CREATORS | strict_cupy.JOINERS
OWN = {function.__name__: " ".join(inspect.signature(function).parameters) for function in strict_cupy.OWN}


@pytest.mark.parametrize("name", [*TABLES, *OWN])
def test_the_stand_in_takes_no_parameter_that_cupy_lacks(name: str) -> None:
    function = getattr(pytest.importorskip("cupy"), name)
    if name in ("einsum", "matmul"):  # these take *operands
        return
    assert set((TABLES | OWN)[name].split()) <= set(inspect.signature(function).parameters)


@pytest.mark.parametrize("name", [*strict_cupy.UFUNCS.split(), *strict_cupy.CONSTANTS.split()])
def test_the_stand_in_knows_no_name_that_cupy_lacks(name: str) -> None:
    cupy = pytest.importorskip("cupy")
    assert name not in strict_cupy.UFUNCS.split() or isinstance(getattr(cupy, name), cupy.ufunc)
    assert hasattr(cupy, name)


@pytest.mark.parametrize("name", strict_cupy.METHODS)
def test_the_stand_ins_methods_are_cupys(name: str) -> None:
    documented = getattr(pytest.importorskip("cupy").ndarray, name).__doc__.splitlines()[0]
    parameters = documented.partition("(")[2].partition(")")[0].split(", ")
    names = [parameter.partition("=")[0].split()[-1] for parameter in parameters]
    assert ["self", *strict_cupy.METHODS[name].split()] == names
