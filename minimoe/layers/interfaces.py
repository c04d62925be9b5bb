"""What a module must offer to serve as a router or as experts; ``moe`` has the tables of those there are.

Beside its mathematics a module states its own facts, so that a new one is one file and one line in a table: the shapes
of its parameters, what of them is at work for one token, and marks on their tuple (``tree.marks``): which are matrices
for Muon, which serve training only.

Optional, found by name: ``decode``, a faster form for a single token; ``mixtral_tensors``, the places of its parameters
in a folder of Mixtral's layout, without which a model cannot be written in that layout.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
from numpy.typing import DTypeLike

from minimoe.core.arrays import Array
from minimoe.core.config import ModelConfig
from minimoe.layers.mode import Mode
from minimoe.layers.routing import RouterStats, Routing


class RouterModule(Protocol):
    """Decides who goes where, with what weight."""

    def check(self, config: ModelConfig) -> None:
        """Raises ``UserError`` if the router cannot work with these settings."""

    def init(self, rng: np.random.Generator, config: ModelConfig, dtype: DTypeLike = np.float32) -> Any:
        """Fresh parameters."""

    def blank(self, config: ModelConfig, array: Callable[[tuple[int, ...]], Array]) -> Any:
        """The parameters, each made by ``array`` from its shape: for counting, and for filling from a file."""

    def draw_noise(
        self, rng: np.random.Generator, config: ModelConfig, shape: tuple[int, ...], dtype: DTypeLike
    ) -> Array | None:
        """The noise of training for tokens of a ``shape`` such as (L, B, T): that shape and one more axis, or None."""

    def forward(self, params: Any, x: Array, config: ModelConfig, mode: Mode) -> tuple[Routing, RouterStats, Any]:
        """x (B, T, D) → the routing of the N tokens, the sums over them, and a cache."""

    def backward(self, params: Any, cache: Any, dweight: Array, dstats: RouterStats | None) -> tuple[Array, Any]:
        """dweight (M,), and the gradient with respect to each sum → dx (B, T, D) and the gradient of the parameters."""

    def compared(self, params: Any, cache: Any) -> list[tuple[Array, int]]:
        """Each (scores, k) whose k largest per row were chosen, for proofs that must not cross a change of choice."""


class ExpertModule(Protocol):
    """Do the work, each for the rows that were sent to it."""

    def init(
        self,
        rng: np.random.Generator,
        config: ModelConfig,
        output_std: float | None = None,
        dtype: DTypeLike = np.float32,
    ) -> Any:
        """Fresh parameters; ``output_std`` sets the spread of what writes to the residual stream."""

    def blank(self, config: ModelConfig, array: Callable[[tuple[int, ...]], Array]) -> Any:
        """The parameters, each made by ``array`` from its shape."""

    def active_parameters(self, config: ModelConfig) -> int:
        """How many parameters of one layer work for one token."""

    def forward(self, params: Any, x: Array, counts: list[int]) -> tuple[Array, Any]:
        """x (M, D), sorted by expert → y (M, D) and a cache."""

    def backward(self, params: Any, cache: Any, dy: Array) -> tuple[Array, Any]:
        """dy (M, D) → dx (M, D) and the gradient of every expert."""
