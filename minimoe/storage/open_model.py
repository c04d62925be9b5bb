"""Opens a model from its folder, whether it was trained here or elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, overload

from minimoe.compression.quantize import Plan
from minimoe.core import files
from minimoe.core.config import ModelConfig
from minimoe.cost import offloading
from minimoe.storage import checkpoint, huggingface, huggingface_config
from minimoe.storage.checkpoint import Model
from minimoe.storage.huggingface import Pretrained

if TYPE_CHECKING:
    from minimoe.storage.bounded import Bounded


@overload
def load(folder: str | Path, memory: None = None) -> Model | Pretrained: ...
@overload
def load(folder: str | Path, memory: str | int) -> Bounded: ...


def load(folder: str | Path, memory: str | int | None = None) -> Model | Pretrained | Bounded:
    """The model in ``folder``, on the host: a run, or a model of ``huggingface_families`` in Hugging Face's layout.

    If ``storage.quantized`` wrote the folder, the weights become float32 again. With a bound of ``memory``, such as
    "8GB" or a number of bytes, the experts stay on the disk: see ``storage.bounded``. The bound then has room for texts
    of 1024 tokens; ``bounded.open_folder`` allows other lengths.

    Raises:
        UserError: the folder holds no model, or its files are damaged or do not belong together; or the bound is too
            small.
    """
    folder = files.user_path(folder)
    if memory is not None:
        from minimoe.storage import bounded  # which few need

        return bounded.open_folder(folder).load(memory if isinstance(memory, int) else offloading.parse_bytes(memory))
    return huggingface.load(folder) if huggingface.is_folder(folder) else checkpoint.load_model(folder)


def shape(folder: str | Path) -> ModelConfig:
    """The config of the model in ``folder``, without reading its weights; raises ``UserError`` like ``load``."""
    folder = files.user_path(folder)
    if huggingface.is_folder(folder):
        return huggingface_config.read(folder).config
    return checkpoint.load_config(folder).config


def quantization(folder: str | Path) -> Plan | None:
    """The schemes by which the model in ``folder`` is quantised, if it is; raises ``UserError`` like ``shape``."""
    folder = files.user_path(folder)
    if huggingface.is_folder(folder):
        return huggingface_config.read(folder).plan
    return checkpoint.load_config(folder).quantization
