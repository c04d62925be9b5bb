"""minimoe: a sparse mixture-of-experts language model written from scratch, every gradient by hand.

    import minimoe

    trained = minimoe.train("tiny", out="runs/tiny")           a run folder, and the model
    model = minimoe.load("runs/tiny")
    print(minimoe.generate(model, "Once", tokens=200))
    print(minimoe.gradcheck.table(minimoe.gradcheck.run()))    every gradient against finite differences

The layers are modules, ``minimoe.layers.attention`` and so on, each with ``init``, ``forward`` and ``backward``.
"""

from minimoe import gradcheck as gradcheck
from minimoe import layers as layers
from minimoe.config import PRESETS as presets  # noqa: N811 - a name for the reader, not a constant to import
from minimoe.config import ModelConfig, TrainConfig
from minimoe.errors import UserError
from minimoe.generation import write as generate
from minimoe.models import load
from minimoe.trainer import resume, train
from minimoe.version import __version__

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
