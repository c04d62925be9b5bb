"""Choosing between NumPy and CuPy, as far as a machine without a GPU can tell: CuPy is played by small impostors."""

import ctypes
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from minimoe.core import arrays
from minimoe.core.errors import UserError


class Impostor(ModuleType):
    """A module called cupy: how many GPUs it claims, and what its first product does."""

    def __init__(self, gpus: Any = 1, product: Any = 8.0) -> None:
        super().__init__("cupy")
        self.gpus, self.product, self.__version__ = gpus, product, "14.2.0"
        self.cuda = SimpleNamespace(runtime=SimpleNamespace(getDeviceCount=self.count))

    def count(self) -> int:
        if isinstance(self.gpus, Exception):
            raise self.gpus
        return self.gpus

    def ones(self, shape: tuple[int, ...], dtype: Any = None) -> Any:
        if isinstance(self.product, Exception):
            raise self.product
        return np.full(shape, (self.product / 8) ** 0.5, dtype)

    def asarray(self, x: np.ndarray) -> tuple[str, np.ndarray]:
        return "on the GPU", x


def install(monkeypatch: pytest.MonkeyPatch, module: ModuleType | None) -> None:
    monkeypatch.setitem(sys.modules, "cupy", module)  # None makes the import fail


def test_without_cupy_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, None)
    assert "CuPy is not installed: run `pip install cupy-cuda1" in str(arrays.gpu_problem())
    assert arrays.select_device("auto") == "cpu"
    with pytest.raises(UserError, match="CuPy is not installed.*or use --device cpu"):
        arrays.select_device("gpu")


@pytest.mark.parametrize(
    ("code", "cause"),
    [
        ("import numpy; numpy.no_longer_there", "cannot be imported (AttributeError: "),
        ("raise ImportError('libcudart.so.12: cannot open\\nmore')", "(ImportError: libcudart.so.12: cannot open)"),
        ("import a_part_that_is_missing", "(ModuleNotFoundError: No module named 'a_part_that_is_missing')"),
        ("raise RuntimeError", "cannot be imported (RuntimeError: RuntimeError)"),
        ("", "CuPy of no version is not a whole installation"),
        ("__version__ = 'main'", "CuPy main is not a whole installation"),
        ("__version__ = '13.6.0'", "CuPy 13.6.0 is too old"),
        ("__version__ = '14.0.0rc1'", "no GPU or driver responds (module 'cupy' has no attribute 'cuda')"),
    ],
)
def test_a_broken_cupy_falls_back_to_the_cpu_with_its_true_cause(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, cause: str
) -> None:
    (tmp_path / "cupy.py").write_text(code)
    monkeypatch.delitem(sys.modules, "cupy", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    said = str(arrays.gpu_problem())
    assert cause in said and "\n" not in said and said.endswith("or use --device cpu.")
    assert arrays.select_device("auto") == "cpu"
    with pytest.raises(UserError) as caught:
        arrays.select_device("gpu")
    assert str(caught.value) == said
    sys.modules.pop("cupy", None)


@pytest.mark.parametrize(
    ("module", "sentence"),
    [
        (Impostor(gpus=0), "no GPU was found"),
        (Impostor(gpus=RuntimeError("no driver")), "no GPU or driver responds (no driver)"),
        (Impostor(product=ImportError("libcublas.so.12: not found\nmore")), "libraries (libcublas.so.12: not found)"),
        (Impostor(product=RuntimeError("")), "cannot load its CUDA libraries (RuntimeError)"),
        (Impostor(product=OSError("libnvrtc")), "cannot load its CUDA libraries (libnvrtc)"),
        (Impostor(product=7.0), "wrong results"),
    ],
)
def test_a_gpu_that_does_not_compute_is_not_used_and_the_reason_is_said(
    monkeypatch: pytest.MonkeyPatch, module: Impostor, sentence: str
) -> None:
    install(monkeypatch, module)
    assert sentence in str(arrays.gpu_problem())
    assert arrays.select_device() == "cpu"
    with pytest.raises(UserError) as caught:
        arrays.select_device("gpu")
    assert sentence in str(caught.value)


def test_a_gpu_that_computes_is_used_unless_the_cpu_is_wished_for(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, Impostor())
    assert arrays.gpu_problem() is None
    assert arrays.select_device("auto") == arrays.select_device("gpu") == "gpu"
    assert arrays.select_device("cpu") == "cpu"


def test_the_cpu_needs_no_look_at_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arrays, "gpu_problem", lambda: pytest.fail("it looked"))
    assert arrays.select_device("cpu") == "cpu"


def test_an_unknown_device_is_refused() -> None:
    with pytest.raises(UserError, match="device 'tpu' is unknown: choose auto, cpu or gpu"):
        arrays.select_device("tpu")


@pytest.mark.parametrize(
    ("driver", "wheel"), [(11_080, "cupy-cuda12x"), (12_040, "cupy-cuda12x"), (13_000, "cupy-cuda13x")]
)
def test_the_wheel_follows_the_driver(monkeypatch: pytest.MonkeyPatch, driver: int, wheel: str) -> None:
    def version(result: Any) -> int:
        result._obj.value = driver
        return 0

    monkeypatch.setattr(ctypes, "CDLL", lambda name: SimpleNamespace(cuDriverGetVersion=version))
    install(monkeypatch, None)
    assert wheel in str(arrays.gpu_problem())


def test_without_a_driver_the_usual_wheel_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise OSError(name)

    monkeypatch.setattr(ctypes, "CDLL", missing)
    install(monkeypatch, None)
    assert "cupy-cuda12x" in str(arrays.gpu_problem())


def test_the_module_of_an_array_is_the_one_that_made_it(monkeypatch: pytest.MonkeyPatch) -> None:
    assert arrays.array_module(np.ones(2)) is np
    assert arrays.array_module(np.float32(1)) is np
    impostor = Impostor()
    install(monkeypatch, impostor)
    on_gpu = type("ndarray", (), {"__module__": "cupy._core.core"})()
    assert arrays.array_module(on_gpu) is impostor


def test_moving_to_where_an_array_is_already_costs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    x = np.ones(2)
    assert arrays.to_host(x) is arrays.to_device(x, "cpu") is arrays.like(x, x) is x
    install(monkeypatch, Impostor())
    assert arrays.to_device(x, "gpu") == ("on the GPU", x)
    on_gpu = type("ndarray", (), {"__module__": "cupy", "get": lambda self: x})()
    assert arrays.to_host(on_gpu) is x
    assert arrays.like(on_gpu, x) == ("on the GPU", x)
