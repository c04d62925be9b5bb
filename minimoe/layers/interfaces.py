"""What a module must offer to serve as a router or as experts. The tables in ``moe`` list the modules that exist.

Besides its mathematics, a module states facts about itself, so a new module needs only one file and one line in a
table. These facts are the shapes of its parameters, how many of them are active for one token, and the marks on their
tuple (``tree.marks``), which say which parameters are matrices for Muon and which serve only training.

Other names are optional: minimoe uses them if a module defines them. In any module:

    decode            a faster form of ``forward`` for a single token
    mixtral_tensors   the names of the parameters in Mixtral's layout; a model without it cannot be saved in this layout

In a router:

    check_forward     the check of a model that is only run, if ``check`` refuses some settings only for training
    decode_label      ``decode`` for a router that needs the token's label: it is the last argument
    LOOKS_AHEAD       True if a later token can change the routing of an earlier one: no language model may use it
    BY_TABLE          True if a fixed table chooses the experts: none of them can be removed from the model
    VARIES            True if a token may have any number of experts up to E; otherwise it has at most K
    BALANCE_LOSS      the coefficient of the balance loss if the recipe names none; 0 for a router that needs no loss
    regulariser       ``(params, stats, config)`` → a loss of its own, from the sums of a layer, and the gradient with
                      respect to the sums
    next_state        ``(params, stats, config, recipe)``, both lists over the layers → the parameters with their new
                      state: what the router learns without a gradient. The fields are marked ``state``; the optimiser
                      leaves them alone, and their gradient is zero

In experts:

    check             raises ``UserError`` if they cannot work with these settings
    balance_weights   ``config`` → E numbers η: the balance loss becomes E Σ η f p̄, so that a small η makes an expert's
                      work cheap
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
    """Decides which token goes to which expert, and with what weight."""

    def check(self, config: ModelConfig) -> None:
        """Raises ``UserError`` if the router cannot work with these settings."""

    def init(self, rng: np.random.Generator, config: ModelConfig, dtype: DTypeLike = np.float32) -> Any:
        """Fresh parameters."""

    def blank(self, config: ModelConfig, array: Callable[[tuple[int, ...]], Array]) -> Any:
        """The parameters, each made by calling ``array`` with its shape: for counting, and for filling from a file."""

    def draw_noise(
        self, rng: np.random.Generator, config: ModelConfig, shape: tuple[int, ...], dtype: DTypeLike
    ) -> Array | None:
        """The training noise for tokens of a ``shape`` such as (L, B, T): that shape and one more axis, or None."""

    def forward(self, params: Any, x: Array, config: ModelConfig, mode: Mode) -> tuple[Routing, RouterStats, Any]:
        """x (B, T, D) → the routing of the N tokens, the sums over these tokens, and a cache."""

    def backward(self, params: Any, cache: Any, dweight: Array, dstats: RouterStats | None) -> tuple[Array, Any]:
        """dweight (M,), and the gradient with respect to each sum → dx (B, T, D) and the gradient of the parameters."""

    def compared(self, params: Any, cache: Any) -> list[tuple[Array, int]]:
        """Pairs (scores, k): the k largest scores of each row were chosen. A gradient check must not change the choice.

        It therefore skips points where these scores have another order.
        """


class ExpertModule(Protocol):
    """Experts, each of which processes the rows that were sent to it."""

    def init(
        self,
        rng: np.random.Generator,
        config: ModelConfig,
        output_std: float | None = None,
        dtype: DTypeLike = np.float32,
    ) -> Any:
        """Fresh parameters; ``output_std`` is the standard deviation of weights that write to the residual stream."""

    def blank(self, config: ModelConfig, array: Callable[[tuple[int, ...]], Array]) -> Any:
        """The parameters, each made by calling ``array`` with its shape."""

    def active_parameters(self, config: ModelConfig) -> int:
        """How many parameters of one layer are active for one token."""

    def forward(self, params: Any, x: Array, counts: list[int]) -> tuple[Array, Any]:
        """x (M, D), sorted by expert, with ``counts[e]`` rows for expert e → y (M, D) and a cache."""

    def backward(self, params: Any, cache: Any, dy: Array) -> tuple[Array, Any]:
        """dy (M, D) → dx (M, D) and the gradient of every expert."""
