"""The mathematics: one component a file, each with ``init``, ``forward`` and ``backward``.

Shapes are written in one set of letters throughout the project:

    B batch · T time · N = B·T tokens · D width · H query heads · G key/value heads · C head width
    E experts · K active experts · F expert width · V vocabulary · L layers

A layer follows the dtype and the device of what it is given, keeps nothing between calls, and never touches a file,
a clock or a random generator. ``forward`` returns its result and a cache; ``backward`` takes that cache and the
gradient of the result, and returns the gradient of the input and of the parameters, in the parameters' own tuple.
"""
