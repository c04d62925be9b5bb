"""Keeps in memory the experts that were used last, in the form that they have on the disk, and reads others
when they are used.

A router names the experts of a token only when the token has come to their layer. An expert that is in memory (a hit)
costs nothing more; one that is not (a miss) is read from its file and replaces the expert whose last use is longest
ago. All experts of a model have the same size, so memory is cut into slots of this size. A slot is never returned to
the system, so the memory of the cache neither grows beyond its slots nor becomes fragmented.

    uses   a b a c b        2 slots, 1 layer
    held   a ab ab ac bc    LRU: c takes the place of b, whose last use is longer ago than that of a
                    ^ a miss again

Layers take turns, so the expert whose last use is longest ago often belongs to the layer that comes next.
With a single queue for all layers, and fewer slots than one token needs in all layers together, the other
layers would have replaced the experts of a layer before its next turn, and hits would be rare. So each
layer has a share of the slots that the others cannot take. Some slots belong to no layer, as many
as a token has experts in a layer; the layer that is being computed uses them.

Eliseev and Mazur 2023, arXiv 2312.17238, keep experts in this way.  Lesson: lessons/53_mixtral_on_a_laptop.ipynb
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from minimoe.core.errors import UserError

Key = tuple[int, int]
"""A layer and an expert."""

Content = NDArray[np.uint8]


READING, WRITING = "reading", "writing"
"""The phases of a run: passes of many tokens, and passes of one."""


class Statistics(NamedTuple):
    """What a phase of a run needed: reading many tokens at once, or writing one after the other."""

    tokens: int = 0
    uses: int = 0  # of experts: once for each expert and pass, however many tokens it gets
    hits: int = 0  # uses of an expert that was in memory
    bytes: int = 0  # read from files
    reading: float = 0.0  # seconds
    unpacking: float = 0.0  # seconds in which the numbers of files became float32
    seconds: float = 0.0  # in all

    @property
    def misses(self) -> int:
        return self.uses - self.hits

    @property
    def hit_rate(self) -> float:
        """The share of uses that found their expert in memory; 0 without any use."""
        return self.hits / self.uses if self.uses else 0.0

    @property
    def bytes_per_token(self) -> float:
        return self.bytes / self.tokens if self.tokens else 0.0


def shares(slots: int, layers: int, together: int) -> list[int]:
    """How many slots each layer has for itself; ``together`` of them belong to no layer."""
    own = slots - together
    return [own // layers + (layer < own % layers) for layer in range(layers)]


class ExpertCache:
    """The experts that were used last, at most ``slots`` of ``size`` bytes each, for ``layers`` that take turns.

    ``read`` fills the bytes of an expert. A layer uses ``together`` experts for one token, and all of these are in
    memory at the same time. Uses are counted in the phase that ``begin`` has set. Threads may use one cache: while an
    expert is in use, nothing takes its place.
    """

    def __init__(
        self, size: int, slots: int, read: Callable[[Key, Content], None], layers: int = 1, together: int = 1
    ) -> None:
        if slots < together:
            raise UserError(f"slots {slots} leave no room for the experts of a token: give at least {together}.")
        self.size, self.slots, self.read = size, slots, read
        self.shares = shares(slots, layers, together)
        self.count = [0] * layers  # experts in memory
        self.held: OrderedDict[Key, Content] = OrderedDict()  # the one used last is at the end
        self.phases: dict[str, Statistics] = {}
        self.phase = ""
        self.since = 0.0
        self.lock = threading.RLock()

    @property
    def bytes_held(self) -> int:
        """Bytes of the slots that are in use."""
        return self.size * len(self.held)

    @contextmanager
    def use(self, key: Key, counted: bool = True) -> Iterator[Content]:
        """The bytes of an expert, valid within the block. Without ``counted``, the call belongs to the latest use."""
        with self.lock:
            if counted:
                self._add(uses=1, hits=int(key in self.held))
            if key not in self.held:
                self._fetch(key)
            self.held.move_to_end(key)
            yield self.held[key]

    def _fetch(self, key: Key) -> None:
        """Reads an expert into a new slot, or into that of the expert whose last use is longest ago."""
        content = self._leave() if len(self.held) >= self.slots else np.empty(self.size, np.uint8)
        start = time.perf_counter()
        self.read(key, content)
        self._add(bytes=self.size, reading=time.perf_counter() - start)
        self.held[key] = content
        self.count[key[0]] += 1

    def _leave(self) -> Content:
        """The slot of the expert whose last use is longest ago, among the layers that hold more than their share."""
        key = next(key for key in self.held if self.count[key[0]] > self.shares[key[0]])
        self.count[key[0]] -= 1
        return self.held.pop(key)

    def begin(self, phase: str, tokens: int) -> None:
        """A pass of ``tokens`` tokens begins; the time since the last pass began belongs to the phase of that pass."""
        self.end()
        self.phase = phase
        self._add(tokens=tokens)

    def end(self) -> None:
        """Ends the current phase: the time until now belongs to it, and later time to no phase."""
        now = time.perf_counter()
        if self.phase:
            self._add(seconds=now - self.since)
        self.phase, self.since = "", now

    def unpacked(self, seconds: float) -> None:
        """Adds the time that it took to convert the numbers in files to float32."""
        self._add(unpacking=seconds)

    def _add(self, **more: float) -> None:
        with self.lock:
            before = self.phases.get(self.phase, Statistics())
            self.phases[self.phase] = before._replace(
                **{name: getattr(before, name) + value for name, value in more.items()}
            )
