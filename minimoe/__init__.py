"""minimoe: a sparse mixture-of-experts language model written from scratch, with hand-written gradients.

    import minimoe

    trained = minimoe.train("tiny", out="runs/tiny")           writes a run folder, returns the model
    model = minimoe.load("runs/tiny")
    print(minimoe.generate(model, "Once", tokens=200))
    print(minimoe.gradcheck.table(minimoe.gradcheck.run()))    checks every gradient

Each layer is a module, such as ``minimoe.layers.attention``, with the functions ``init``, ``forward`` and ``backward``.
"""

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from minimoe.core.config import ModelConfig, TrainConfig
from minimoe.core.errors import UserError
from minimoe.core.presets import PRESETS as presets  # noqa: N811 - a name for the reader, not a constant to import
from minimoe.version import __version__

if TYPE_CHECKING:
    from minimoe import layers as layers
    from minimoe.inference.generation import write as generate
    from minimoe.proof import gradcheck as gradcheck
    from minimoe.storage.open_model import load
    from minimoe.training.trainer import train
    from minimoe.tuning.resume import resume

__all__ = [
    "ModelConfig",
    "TrainConfig",
    "UserError",
    "__version__",
    "generate",
    "gradcheck",
    "layers",
    "load",
    "presets",
    "resume",
    "train",
]

# Names that need NumPy are imported on first use, so that `minimoe --help` does not wait for it.
_ELSEWHERE = {
    "generate": "inference.generation.write",
    "gradcheck": "proof.gradcheck",
    "load": "storage.open_model.load",
    "resume": "tuning.resume.resume",
    "train": "training.trainer.train",
}


if not TYPE_CHECKING:  # a type checker would accept every attribute name

    def __getattr__(name: str) -> Any:
        if name in _ELSEWHERE:
            module, _, attribute = _ELSEWHERE[name].rpartition(".")
            value = getattr(import_module(f"minimoe.{module}"), attribute, None)
            if value is None:  # the name is a module that its room has not imported yet
                value = import_module(f"minimoe.{_ELSEWHERE[name]}")
            globals()[name] = value
            return value
        if "." in name or find_spec(f"minimoe.{name}") is None:
            raise AttributeError(f"module 'minimoe' has no attribute {name!r}")
        return import_module(f"minimoe.{name}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
