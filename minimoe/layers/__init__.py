"""What is the model, mathematically? One component per file, each with ``init``, ``forward`` and ``backward``.

Shapes are written in one set of letters throughout the project:

    B batch · T time · N = B·T tokens · D width · H query heads · G key/value heads · C head width
    E experts · K active experts · F expert width · V vocabulary · L layers

A layer follows the dtype and the device of its input, keeps nothing between calls, and never touches a file or a clock.
Only ``init`` draws random numbers, from the generator that it is given. ``forward`` returns its result, anything else
that it reports, and a cache. ``backward`` takes that cache and the gradient of the result. It returns the gradient of
the input, if the input has one, and the gradient of the parameters, if there are any, in the same tuple type as the
parameters. (The rotation of ``rope`` is its own cache.)
"""
