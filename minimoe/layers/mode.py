"""How a pass through the layers is run: what training adds, which tokens are padding, and who owns which experts.

One tuple carries these settings from the decoder to the router. The default is evaluation: no noise, no dropped tokens,
every expert on this worker.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from minimoe.core.arrays import Array
from minimoe.layers.exchange import Exchange, LocalExchange


class Mode(NamedTuple):
    training: bool = False  # routers may behave differently in training, as Switch's capacity does
    noise: Array | None = None  # (L, B, T, ·) for the decoder, (B, T, ·) for a layer: from the router's draw_noise
    capacity_factor: float | None = None  # capacity divided by an expert's fair share; None leaves it to the router
    estimate_load: bool = True  # False skips the probability of being chosen, for when no loss uses it
    balance_by_sequence: bool = False  # True also sums up the balance within each sequence, for when a loss uses it
    mask: Array | None = None  # (B, T)  1 for a token, 0 for padding
    starts: Array | None = None  # (B, T) integers: the first position that each query may see, if documents are packed
    labels: Array | None = None  # (B, T) integers that routers may use beside x; the decoder gives the tokens
    exchange: Callable[[list[int]], Exchange] = LocalExchange  # called with the counts of a routing
    skip_below: Sequence[float] | None = None  # β of each layer, see routing.skip_second; in evaluation only

    def at_layer(self, layer: int) -> Mode:
        """The same mode for one layer, with that layer's noise (B, T, ·) and its own β."""
        one = self if self.noise is None else self._replace(noise=self.noise[layer])
        return one if self.skip_below is None else one._replace(skip_below=[self.skip_below[layer]])


EVALUATION = Mode()
