"""Which parts of a decoder are quantised, with which scheme, and how many bytes the result takes.

The matrices of the experts and of the attention are quantised: nearly all parameters of a large mixture. Shared experts
and dense layers have the scheme of the experts. The router, the norms, the embedding and the output layer stay in
floating point. They are small, and a router with large errors sends tokens to other experts. Experts and attention may
have different schemes, because attention is a small part of the weights and suffers more.

    int8                8 bits, one maximum for each output      8 + 32/inputs bits a weight
    nf4                 4 bits, blocks of 64, their maxima in 8 bits             4.13
    rtn4, hqq4          4 bits, groups of 64, step and offset in float16         4.5
    rtn3, hqq3          3 bits, groups of 64, ten codes in an int32              3.7
    rtn2, hqq2          2 bits, groups of 32                                     3
    hqq4m, hqq3m        as hqq4 and hqq3, step and offset in 8 bits              4.26, 3.46
    hqq2m               2 bits, groups of 16, step and offset in 8 bits          3.03
    float               as they are

Every matrix is quantised by itself, each expert too. In a file, the name of an array is the name of its matrix followed
by the name of its field, such as ``blocks[0].moe.experts.w_up.codes``; the arrays of all experts are stacked.
"""

from __future__ import annotations

import math
from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from minimoe.compression import hqq, hqq_meta, int8, nf4, rtn
from minimoe.core import tree
from minimoe.core.arrays import placeholder
from minimoe.core.config import ModelConfig
from minimoe.core.errors import UserError, suggestion
from minimoe.core.files import Tensors
from minimoe.layers import decoder
from minimoe.layers.decoder import Decoder

FORMAT = 1
"""The version of what ``compress`` makes; a change of a group size or of a layout needs a new version."""

FLOAT = "float"
"""The scheme of what stays as it is."""


class Scheme(NamedTuple):
    """A quantiser with its settings."""

    module: Any
    settings: dict[str, int]


SCHEMES = {
    "int8": Scheme(int8, {}),
    "nf4": Scheme(nf4, {}),
    "hqq4": Scheme(hqq, {"bits": 4, "group": 64}),
    "hqq3": Scheme(hqq, {"bits": 3, "group": 64}),
    "hqq2": Scheme(hqq, {"bits": 2, "group": 32}),
    "hqq4m": Scheme(hqq_meta, {"bits": 4, "group": 64}),
    "hqq3m": Scheme(hqq_meta, {"bits": 3, "group": 64}),
    "hqq2m": Scheme(hqq_meta, {"bits": 2, "group": 16}),
    "rtn4": Scheme(rtn, {"bits": 4, "group": 64}),
    "rtn3": Scheme(rtn, {"bits": 3, "group": 64}),
    "rtn2": Scheme(rtn, {"bits": 2, "group": 32}),
}


class Plan(NamedTuple):
    """The scheme of each part that may be quantised."""

    experts: str
    attention: str


class Size(NamedTuple):
    """The size of a part of a model."""

    part: str
    scheme: str
    parameters: int
    bytes: int


def plan(experts: str, attention: str | None = None) -> Plan:
    """The plan with these schemes; the scheme of the attention is that of the experts unless one is given.

    Raises:
        UserError: there is no such scheme, or nothing would be quantised.
    """
    made = Plan(experts, experts if attention is None else attention)
    for name in made:
        if name not in SCHEMES and name != FLOAT:
            raise UserError(
                f"there is no scheme {name!r:.40}{suggestion(str(name), SCHEMES)}: choose one of "
                f"{', '.join(SCHEMES)}, or {FLOAT} for a part that stays as it is."
            )
    if set(made) == {FLOAT}:
        raise UserError("experts and attention are both to stay in floating point: quantise one of them at least.")
    return made


def to_dict(of: Plan) -> dict[str, Any]:
    """The plan as it stands in a config.json."""
    return {"format": FORMAT, **of._asdict()}


def from_dict(values: Any) -> Plan:
    """The plan in a config.json; raises ``UserError`` unless ``to_dict`` made it."""
    if not isinstance(values, dict) or values.get("format") != FORMAT or values.keys() != {"format", *Plan._fields}:
        raise UserError(
            f"the quantisation {values!r:.120} is not of format {FORMAT}, the only one that this version reads: "
            "quantise the model again."
        )
    if not all(isinstance(values[part], str) for part in Plan._fields):
        raise UserError(f"the quantisation {values!r:.120} does not name its schemes: quantise the model again.")
    return plan(values["experts"], values["attention"])


def parts(params: Decoder) -> dict[str, str]:
    """For the name of every matrix of the blocks, the part it belongs to: experts, attention or router."""
    matrices, training_only = (set(tree.marked(params, mark)) for mark in ("matrices", "training_only"))
    found = {}
    for i, block in enumerate(params.blocks):
        inside = {"attention": block.attention, "moe.experts": block.moe.experts, "moe.router": block.moe.router}
        for where, branch in {**inside, "moe.shared": block.moe.shared}.items():
            part = where.rpartition(".")[2]
            part = "experts" if part == "shared" else part  # and the SwiGLU of a dense layer, which stands there
            for name, leaf in tree.named_leaves(branch, f"blocks[{i}].{where}"):
                if leaf.ndim >= 2 and name not in training_only and (part == "router" or name in matrices):
                    found[name] = part
    return found


def compress(params: Decoder, by: Plan) -> Tensors:
    """The tensors of a decoder on the host: the arrays of each quantised matrix, and all others as they are.

    Raises:
        UserError: a weight is not of float16 or float32, not finite, or too large; the matrix is named.
    """
    schemes = schemes_of(params, by._asdict())
    tensors: Tensors = {}
    for name, leaf in tree.named_leaves(params):
        if name in schemes:
            tensors |= {f"{name}.{field}": values for field, values in quantize_leaf(name, leaf, schemes[name]).items()}
        else:
            tensors[name] = leaf
    return tensors


def restore(tensors: Tensors, shapes: Decoder, by: Plan, source: Path) -> Decoder:
    """The decoder in float32 that the tensors of ``compress`` describe, in the shapes of ``shapes``.

    The tensors come from the file ``source``, and are removed from the dictionary.

    Raises:
        UserError: a tensor is missing, of another shape or type, or surplus.
    """
    schemes = schemes_of(shapes, by._asdict())
    leaves = []
    for name, leaf in tree.named_leaves(shapes):
        if name in schemes:
            scheme, lead = schemes[name], leaf.shape[:-2]
            empty = scheme.module.blank(leaf.shape[-2:], **scheme.settings)
            refuse_older(name, tensors, source)
            stored = {
                field: _take(tensors, f"{name}.{field}", lead + values.shape, values.dtype, source)
                for field, values in arrays_of(empty).items()
            }
            leaves.append(_dequantize(stored, empty, lead, scheme))
        else:
            leaves.append(_take(tensors, name, leaf.shape, np.dtype(np.float32), source))
    if tensors:
        raise UserError(f"{source} holds the tensor {min(tensors)}, which its model does not have: use another copy.")
    return tree.rebuild(shapes, leaves)


def approximate(params: Decoder, schemes: Mapping[str, str]) -> Decoder:
    """``params`` after quantising and dequantising the parts that ``schemes`` names; the router may be one of them.

    A router is never saved in quantised form; this function shows the effect that quantising it would have.
    """
    chosen = schemes_of(params, schemes)
    leaves = []
    for name, leaf in tree.named_leaves(params):
        if name in chosen:
            empty = chosen[name].module.blank(leaf.shape[-2:], **chosen[name].settings)
            leaf = _dequantize(quantize_leaf(name, leaf, chosen[name]), empty, leaf.shape[:-2], chosen[name])
        leaves.append(leaf)
    return tree.rebuild(params, leaves)


def sizes(config: ModelConfig, by: Plan) -> list[Size]:
    """The size of each part of a model of this shape, computed without making the model; the largest part is first."""
    params = decoder.blank(config, placeholder)
    schemes = schemes_of(params, by._asdict())
    part_of = dict.fromkeys((name for name, _ in tree.named_leaves(params)), "norms, embedding, head")
    for i, block in enumerate(params.blocks):
        part_of |= {name: "router" for name, _ in tree.named_leaves(block.moe.router, f"blocks[{i}].moe.router")}
    part_of |= parts(params)
    found: dict[str, Size] = {}
    for name, leaf in tree.named_leaves(params):
        if name in schemes:
            empty = schemes[name].module.blank(leaf.shape[-2:], **schemes[name].settings)
            count = math.prod(leaf.shape[:-2]) * sum(values.nbytes for values in arrays_of(empty).values())
        else:
            count = leaf.nbytes
        part = part_of[name]
        scheme = getattr(by, part, FLOAT)
        before = found.get(part, Size(part, scheme, 0, 0))
        found[part] = before._replace(parameters=before.parameters + leaf.size, bytes=before.bytes + count)
    return sorted(found.values(), key=lambda size: -size.bytes)


def table(rows: list[Size]) -> str:
    """The sizes as a table, with the bits that a parameter takes, and with float32 for comparison."""
    total = Size("all", "", sum(row.parameters for row in rows), sum(row.bytes for row in rows))
    lines = [f"{'part':<24}{'scheme':<8}{'parameters':>16}{'bytes':>16}{'bits each':>11}{'of float32':>12}"]
    for part, scheme, parameters, size in [*rows, total]:
        bits = 8 * size / parameters
        lines.append(f"{part:<24}{scheme:<8}{parameters:>16,}{size:>16,}{bits:>11.2f}{bits / 32:>12.1%}")
    return "\n".join(lines)


def schemes_of(params: Decoder, by: Mapping[str, str]) -> dict[str, Scheme]:
    """The scheme of each matrix that has one, by its name."""
    return {name: SCHEMES[by[part]] for name, part in parts(params).items() if by.get(part, FLOAT) != FLOAT}


def arrays_of(q: Any) -> dict[str, NDArray[Any]]:
    """The arrays of a quantised matrix; its other fields follow from its shape and its scheme."""
    return {field: values for field, values in q._asdict().items() if isinstance(values, np.ndarray)}


def quantize_leaf(name: str, leaf: NDArray[Any], scheme: Scheme) -> dict[str, NDArray[Any]]:
    """The arrays of one matrix, or of a stack of matrices, stacked in the same way."""
    matrices = leaf.reshape(-1, *leaf.shape[-2:])
    try:
        done = [arrays_of(scheme.module.quantize(w, **scheme.settings)) for w in matrices]
    except UserError as error:
        raise UserError(f"{name}: {error}") from None
    return {
        field: np.stack([one[field] for one in done]).reshape(leaf.shape[:-2] + first.shape)
        for field, first in done[0].items()
    }


def refuse_older(name: str, names: Container[str], source: Path) -> None:
    """Raises ``UserError`` if a matrix of shared experts is not quantised, as in folders of earlier versions."""
    if ".shared." in name and name in names:
        raise UserError(
            f"{source} holds {name} in floating point, as an earlier version left shared experts: quantise again the "
            "model that it came from."
        )


def _dequantize(
    stored: Mapping[str, NDArray[Any]], empty: Any, lead: tuple[int, ...], scheme: Scheme
) -> NDArray[np.float32]:
    """The matrix, or the stack of matrices, whose arrays these are; ``empty`` has the fields that are not arrays."""
    flat = {field: values.reshape(-1, *values.shape[len(lead) :]) for field, values in stored.items()}
    made = [
        scheme.module.dequantize(empty._replace(**{field: values[i] for field, values in flat.items()}))
        for i in range(math.prod(lead))
    ]
    return np.stack(made).reshape(*lead, *made[0].shape)


def _take(tensors: Tensors, name: str, shape: tuple[int, ...], dtype: np.dtype[Any], source: Path) -> NDArray[Any]:
    if name not in tensors:
        raise UserError(f"{source} lacks the tensor {name}: it does not belong to the config.json beside it.")
    values = tensors.pop(name)
    if values.shape != shape or values.dtype != dtype:
        raise UserError(
            f"{source} holds {name} as {values.dtype} {values.shape}, but the config.json beside it asks for {dtype} "
            f"{shape}: the two do not belong together."
        )
    return values
