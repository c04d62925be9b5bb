"""The mathematics: one component a file, each with ``init``, ``forward`` and ``backward``.

Only the losses differ: ``cross_entropy`` has no parameters to init, and ``balance`` is a ``loss`` with its gradient.

Shapes are written in one set of letters throughout the project:

    B batch · T time · N = B·T tokens · D width · H query heads · G key/value heads · C head width
    E experts · K active experts · F expert width · V vocabulary · L layers

A layer follows the dtype and the device of what it is given, keeps nothing between calls, and never touches a file or
a clock; only ``init`` draws, from the generator that it is given. ``forward`` returns its result, what else there is to
report, and a cache; ``backward`` takes that cache and the gradient of the result, and returns the gradient of the
input, where that has one, and of the parameters, where there are any, in the parameters' own tuple. (The rotation of
``rope`` is its own cache.)
"""
