"""A run that trains adapters: its checkpoint holds the frozen bases and the adapters, its model.safetensors the sums.

A reader of model.safetensors needs to know nothing of adapters, because they are merged in it. Only a run that
continues reads resume.safetensors, where each adapted weight has these arrays in the place of one:

    blocks[0].moe.experts.w_up.base      or .base.codes, .base.absmax, … if the base is quantised
    blocks[0].moe.experts.w_up.a, .b, .scale

The names of the tensors say which weights are adapted, and their shapes say the rank.
"""

from __future__ import annotations

from typing import Any

from minimoe.compression import frozen
from minimoe.core import tree
from minimoe.core.arrays import Array, placeholder
from minimoe.core.files import Tensors
from minimoe.layers import lora
from minimoe.layers.decoder import Decoder
from minimoe.layers.lora import Adapted


def are_in(tensors: Tensors) -> bool:
    """Whether the tensors are those of a decoder with adapters."""
    return any(name.endswith(".scale") and name.removesuffix("scale") + "a" in tensors for name in tensors)


def blank(plain: Decoder, tensors: Tensors) -> Decoder:
    """A decoder without memory, in the shapes of ``plain``, with adapters where ``tensors`` has them.

    Tensors that do not fit are found later, when they are put into their places.
    """

    def place(name: str, leaf: Array) -> Any:
        a = tensors.get(f"{name}.a")
        if a is None or a.ndim != leaf.ndim:
            return leaf
        *stack, inputs, outputs = leaf.shape
        shapes = (*stack, inputs, a.shape[-1]), (*stack, a.shape[-1], outputs), (*stack, a.shape[-1])
        scheme = next((s for s, kind in frozen.SCHEMES.items() if _fields(tensors, name) == set(kind._fields)), None)
        base = leaf if scheme is None else frozen.blank(leaf.shape, scheme)
        return Adapted(base, *(placeholder(shape, leaf.dtype) for shape in shapes))

    return tree.rebuild(plain, [place(name, leaf) for name, leaf in tree.named_leaves(plain)])


def merged(params: Decoder) -> Decoder:
    """An ordinary decoder that computes the same; ``params`` itself if it has no adapters."""
    plain: Decoder = lora.replace(params, lora.merged)
    return plain


def _fields(tensors: Tensors, name: str) -> set[str]:
    """The names of the arrays of a quantised base."""
    return {one.removeprefix(f"{name}.base.") for one in tensors if one.startswith(f"{name}.base.")}
