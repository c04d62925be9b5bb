"""Runs a model that does not fit into memory: experts stay on the disk, and a memory bound limits how many are held.

    always in memory    embedding, attention, norms, routers, output layer
    in memory in turn   experts: read when a router asks for them, the last used ones are held (``expert_cache``)

The weights keep the form of their file, 16 bits or the codes of a quantised matrix, and become float32 when they are
used, one matrix at a time. The layers need no change for this: the tree of parameters contains objects that behave like
arrays where the layers use them. A product gets the same float32 numbers in the same order as in a model that is loaded
whole, so the results of both are the same to the bit.

The bound is for all that a model adds to its process: weights, one matrix in float32, what a pass computes, keys and
values. The memory of Python and of its libraries is not included.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from minimoe.compression import portions, quantize
from minimoe.core import files, resources, tree
from minimoe.core.arrays import Device
from minimoe.core.config import ModelConfig
from minimoe.core.errors import UserError
from minimoe.core.summary import brief
from minimoe.cost import offloading
from minimoe.cost.offloading import shown
from minimoe.inference import fast_decode, generation
from minimoe.layers.decoder import Decoder
from minimoe.storage import checkpoint, encoded, huggingface, huggingface_config
from minimoe.storage.checkpoint import RunConfig
from minimoe.storage.encoded import Encoded, Located
from minimoe.storage.expert_cache import Content, ExpertCache, Key
from minimoe.storage.file_reader import FileReader
from minimoe.storage.packed_weights import Matrix, Stack, Table

TABLE = "embedding.table"

OBJECTS = 5 * 10**6
"""Bytes for what is not counted one by one: Python's objects, and small arrays whose memory the allocator keeps."""

LENGTH = 1024
"""Tokens of a text that a bound has room for, unless another length is given."""


class Budget(NamedTuple):
    """What a bound in bytes is spent on."""

    bound: int
    resident: int  # what is always in memory
    matrix: int  # one matrix in float32, and the intermediate results of making it
    work: int  # what a pass computes, and ``OBJECTS``
    keys: int  # keys and values, and what writing prepares
    expert: int  # one expert
    slots: int  # experts in memory
    experts: int  # experts in all

    @property
    def least(self) -> int:
        """The bytes of all parts but the experts."""
        return self.resident + self.matrix + self.work + self.keys


@brief
class Bounded(NamedTuple):
    """A model whose experts are on the disk. It can evaluate and generate, but not be trained or saved."""

    params: Decoder
    config: ModelConfig
    tokenizer: Any
    end_tokens: tuple[int, ...]
    run: RunConfig | None
    cache: ExpertCache
    budget: Budget
    before: int  # bytes that the process held before the model was loaded

    def to(self, device: Device) -> Bounded:
        """The model itself; raises ``UserError`` for a GPU."""
        if device != "cpu":
            raise UserError("a model with a bound of memory runs on the CPU: leave the bound out, or use --device cpu.")
        return self

    @property
    def on_gpu(self) -> bool:
        return False


@brief
class Opened(NamedTuple):
    """A model of which no weights have been read yet, only their descriptions."""

    located: Located
    config: ModelConfig
    tokenizer: Any
    end_tokens: tuple[int, ...]
    run: RunConfig | None

    def load(self, memory: int, tokens: int = generation.PIECE, length: int = LENGTH, forget: bool = False) -> Bounded:
        """Reads what is always in memory, and prepares the cache for the experts.

        ``memory`` is the bound in bytes. At most ``tokens`` tokens are read at once, and a text has at most ``length``
        tokens; in a longer text, keys and values may need more memory than the bound allows. ``forget`` is passed on to
        ``FileReader``.

        Raises:
            UserError: the bound is too small, or a file cannot be read.
        """
        budget = plan(self.located, memory, tokens, length)
        _warm_up()
        before = resources.memory_in_use()
        params, cache = _fill(self.located, budget, FileReader(forget))
        if self.run is not None:
            checkpoint.refuse_broken_state(params, self.located.folder / checkpoint.MODEL)
        return Bounded(params, self.config, self.tokenizer, self.end_tokens, self.run, cache, budget, before)


def open_folder(folder: str | Path) -> Opened:
    """The model in ``folder``: a Mixtral, a folder that ``minimoe quantize`` wrote, or a run.

    Raises:
        UserError: as for ``encoded.locate``; or the model has experts of a kind that is not read one by one.
    """
    folder = files.user_path(folder)
    located = encoded.locate(folder)
    if located.config.expert_kind != "swiglu":
        raise UserError(
            f"a model with expert_kind {located.config.expert_kind!r} cannot run with a bound of memory, only 'swiglu' "
            "can: leave the bound out."
        )
    if not huggingface.is_folder(folder):
        run = checkpoint.load_config(folder)
        return Opened(located, located.config, run.tokenizer, (), run)
    described = huggingface_config.read(folder)
    tokenizer = huggingface.find_tokenizer(folder, described)
    return Opened(located, located.config, tokenizer, described.end_tokens, None)


def plan(located: Located, memory: int, tokens: int, length: int) -> Budget:
    """How a bound of ``memory`` bytes is spent.

    Raises:
        UserError: the bound is too small; the message names the least possible bound.
    """
    config = located.config
    on_demand = _used_packed(located)
    resident, largest = 0, 0
    for name, of in located.leaves.items():
        for one in of if isinstance(of, list) else [of]:
            weights = int(np.prod(one.shape))
            if isinstance(of, list) or name in on_demand:
                unpacking = 0 if one.empty is None else 32 * min(portions.WEIGHTS, weights)
                largest = max(largest, 4 * weights + unpacking)
            else:
                largest = max(largest, one.size)  # its bytes, while it becomes float32
            if not isinstance(of, list):
                resident += one.size if name in on_demand or _stays_packed(name, located) else 4 * weights
    expert = max(places[-1].stop for places in _places(located).values())
    work, keys = OBJECTS + offloading.pass_bytes(config, tokens, length), offloading.cache_bytes(config, length)
    keys += fast_decode.prepared_bytes(config, arrays=not any("attention.query" in name for name in on_demand))
    total = config.mixture_layers * config.experts
    budget = Budget(memory, resident, largest, work, keys, expert, 0, total)
    least = budget.least + config.active_experts * expert
    if memory < least:
        raise UserError(
            f"a bound of {shown(memory)} is too small for this model: {shown(resident)} are always in memory, "
            f"{shown(largest + work + keys)} are for computing and {config.active_experts} experts take "
            f"{shown(config.active_experts * expert)}, so give at least --memory {_rounded_up(least)}."
        )
    return budget._replace(slots=min(total, (memory - budget.least) // expert))


def _fill(located: Located, budget: Budget, reader: FileReader) -> tuple[Decoder, ExpertCache]:
    """The parameters with everything but the experts in memory, and the cache that reads the experts."""
    named, stacks, places = _stack_names(located), _stacks(located), _places(located)

    def read(key: Key, content: Content) -> None:
        layer, e = key
        for stack, place in zip(stacks[layer].values(), places[key], strict=True):
            reader.read(stack[e], content[place])

    cache = ExpertCache(budget.expert, budget.slots, read, located.config.mixture_layers, located.config.active_experts)
    packed, leaves = _used_packed(located), list[Any]()
    for name, blank in tree.named_leaves(located.shapes):
        found = located.leaves.get(name)
        if isinstance(found, list):
            layer, field = named[name]
            number = list(stacks[layer]).index(field)
            leaves.append(Stack(layer, field, found, cache, [places[layer, e][number] for e in range(len(found))]))
        elif found is None:  # the router of a Mistral, which is in no file
            leaves.append(np.zeros(blank.shape, np.float32))
        else:
            content: Content = np.empty(found.size, np.uint8)
            reader.read(found, content)
            if name in packed:
                leaves.append(Matrix(found, content, cache))
            elif name != TABLE:
                leaves.append(encoded.decode(found, content))
            elif _stays_packed(name, located):
                leaves.append(Table(found, content, None, cache))
            else:
                leaves.append(Table(found, None, encoded.decode(found, content), cache))
    return tree.rebuild(located.shapes, leaves), cache


def _rounded_up(size: int) -> str:
    """A number of bytes, rounded up to whole MB, or to whole kB if it is small."""
    return f"{-(-size // 10**6)}MB" if size >= 10**7 else f"{-(-size // 1000)}KB"


def _stacks(located: Located) -> dict[int, dict[str, list[Encoded]]]:
    """The stacks of experts, by layer and by field."""
    stacks: dict[int, dict[str, list[Encoded]]] = {}
    for name, (layer, field) in _stack_names(located).items():
        of = located.leaves[name]
        assert isinstance(of, list)
        stacks.setdefault(layer, {})[field] = of
    return stacks


def _places(located: Located) -> dict[Key, list[slice]]:
    """Where each matrix of an expert is within its bytes. The experts of one folder may be of several types."""
    places: dict[Key, list[slice]] = {}
    for layer, stacks in _stacks(located).items():
        for e in range(located.config.experts):
            stops = np.cumsum([stack[e].size for stack in stacks.values()]).tolist()
            places[layer, e] = [slice(start, stop) for start, stop in pairwise([0, *stops])]
    return places


def _stack_names(located: Located) -> dict[str, tuple[int, str]]:
    """The names of the stacks of experts, each with its layer (dense ones are not counted) and its field."""
    first = located.config.dense_layers
    return {
        f"blocks[{first + layer}].moe.experts.{field}": (layer, field)
        for layer, block in enumerate(located.shapes.blocks[first:])
        for field in block.moe.experts._fields
    }


def _used_packed(located: Located) -> set[str]:
    """The names of the matrices outside the experts that stay in the form of their file: attention in 16 bits or less.

    In float32 they would take at least twice as much memory. The output layer is kept in float32: it is the largest
    matrix, and a product with a packed one would have to make a float32 copy of that size.
    """
    attention = [name for name, part in quantize.parts(located.shapes).items() if part == "attention"]
    return {name for name in attention if _is_small(located.leaves[name])}


def _stays_packed(name: str, located: Located) -> bool:
    """Whether this is an embedding table in 16 bits that is not also the output layer."""
    return name == TABLE and not located.config.tied_embeddings and _is_small(located.leaves[name])


def _is_small(of: Encoded | list[Encoded]) -> bool:
    return isinstance(of, Encoded) and (of.empty is not None or of.arrays[""].dtype != "F32")


def _warm_up() -> None:
    """Lets the libraries take the memory that they need for themselves, before memory is counted."""
    resources.return_freed_memory()
    ones = np.ones((256, 256), np.float32)
    _ = ones @ ones, ones[0] @ ones
