"""A stopwatch on every layer: where the time of a step goes, forward and backward, in the run itself.

    with watch(wait) as seconds:
        ...                               training steps, on any number of threads
    seconds["attention", "forward"]       spent there, over all threads

A layer reaches another by its module, ``linear.forward``, so while the stopwatch runs each module's two functions are
replaced by timed ones. A layer's time is its own: what it spends in another layer is counted there.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

LAYERS = (
    "embedding",
    "linear",
    "rope",
    "attention",
    "rmsnorm",
    "router",
    "swiglu",
    "moe",
    "block",
    "decoder",
    "cross_entropy",
)
TOOLS = (("clip", "optimizer", "clip"), ("update", "optimizer", "update"))

Seconds = dict[tuple[str, str], float]
"""(component, ``forward`` or ``backward``) → seconds, summed over threads; ``clip`` and ``update`` come after both."""


@contextlib.contextmanager
def watch(wait: Callable[[], Any]) -> Iterator[Seconds]:
    """Times every layer and the optimiser while the block runs; ``wait`` returns when the device has nothing to do."""
    seconds: Seconds = {}
    lock, local = threading.Lock(), threading.local()

    def timed(key: tuple[str, str], function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def run(*arguments: Any, **options: Any) -> Any:
            around: list[float] = local.__dict__.setdefault("inner", [])  # of each call under way, seconds in others
            wait()
            start = time.perf_counter()
            around.append(0.0)
            try:
                return function(*arguments, **options)
            finally:
                wait()
                whole = time.perf_counter() - start
                own = whole - around.pop()
                if around:
                    around[-1] += whole
                with lock:
                    seconds[key] = seconds.get(key, 0.0) + own

        return run

    places = [
        ((layer, name), importlib.import_module(f"minimoe.layers.{layer}"), name)
        for layer in LAYERS
        for name in ("forward", "backward")
    ]
    places += [((title, "after"), importlib.import_module(f"minimoe.{module}"), name) for title, module, name in TOOLS]
    originals = [(module, name, getattr(module, name)) for _, module, name in places]
    try:
        for key, module, name in places:
            setattr(module, name, timed(key, getattr(module, name)))
        yield seconds
    finally:
        for module, name, function in originals:
            setattr(module, name, function)
