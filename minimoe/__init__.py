"""minimoe: a sparse mixture-of-experts language model written from scratch, every gradient by hand.

    import minimoe

    trained = minimoe.train("tiny")                            a run folder, and the model
    model = minimoe.load("runs/tiny")
    print(minimoe.generate(model, "Once upon a time", tokens=200))
    rows = minimoe.gradcheck()                                 every gradient against finite differences

The layers are modules, ``minimoe.layers.attention`` and so on, each with ``init``, ``forward`` and ``backward``.
"""

__version__ = "0.1.0"
