"""A stopwatch on every layer: where the time of a real step goes, forward and backward.

    with watch(wait) as seconds:
        ...                               training steps
    seconds["attention", "forward"]       spent there

A layer calls another layer through its module, as ``linear.forward``. While the stopwatch runs, the two functions of
each module are replaced by timed ones. A layer's time is its own: the time that it spends in another layer is counted
for the other layer. If several workers share a step, only the worker that opened the stopwatch is timed; the time to
exchange rows with other workers counts as ``moe``.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import pkgutil
import threading
import time
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

from minimoe import layers
from minimoe.losses import cross_entropy

TOOLS = (("clip", "optim.clipping", "clip"), ("update", "optim.optimizer", "update_some"))

Seconds = dict[tuple[str, str], float]
"""(component, ``forward`` or ``backward``) → seconds; for ``clip`` and ``update``, the second word is ``after``."""


def components() -> dict[str, ModuleType]:
    """Every component by name: the modules of the layers that have a forward and a backward, and the cross-entropy."""
    names = (found.name for found in pkgutil.walk_packages(layers.__path__, f"{layers.__name__}."))
    modules = [*map(importlib.import_module, names), cross_entropy]
    timed = (module for module in modules if hasattr(module, "forward") and hasattr(module, "backward"))
    return {module.__name__.rpartition(".")[2]: module for module in timed}


@contextlib.contextmanager
def watch(wait: Callable[[], Any]) -> Iterator[Seconds]:
    """Times every layer and the optimiser while the block runs; ``wait`` returns when the device has nothing to do."""
    seconds: Seconds = {}
    thread = threading.get_ident()
    around: list[float] = []  # for each call in progress, the seconds that it spent in other timed calls

    def timed(key: tuple[str, str], function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def run(*arguments: Any, **options: Any) -> Any:
            if threading.get_ident() != thread:
                return function(*arguments, **options)
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
                seconds[key] = seconds.get(key, 0.0) + own

        return run

    places = [
        ((title, name), module, name) for title, module in components().items() for name in ("forward", "backward")
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
