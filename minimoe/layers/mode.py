"""How a pass through the layers is run: what training adds, what padding hides, and who owns which experts.

The settings travel together from the decoder to the router in one tuple. The default is evaluation: no noise, nothing
dropped, every expert on this worker.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from minimoe.core.arrays import Array
from minimoe.layers.exchange import Exchange, LocalExchange


class Mode(NamedTuple):
    training: bool = False  # routers may behave differently in training, as Switch's capacity does
    noise: Array | None = None  # (L, B, T, ·) for the decoder, (B, T, ·) for a layer: what the router's draw_noise drew
    capacity_factor: float | None = None  # entries per expert over the fair share; None leaves it to the router
    estimate_load: bool = True  # False saves the work for the probability of being chosen where no loss uses it
    mask: Array | None = None  # (B, T)  1 for a token, 0 for padding
    exchange: Callable[[list[int]], Exchange] = LocalExchange  # made from the counts of a routing

    def at_layer(self, layer: int) -> Mode:
        """The same mode for one layer, with that layer's noise (B, T, ·)."""
        return self if self.noise is None else self._replace(noise=self.noise[layer])


EVALUATION = Mode()
