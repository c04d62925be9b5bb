"""Where else do mixtures of experts work? Their history from 1991 to 2017, and uses that are not language.

Each module is one model with ``init``, ``forward`` and ``backward`` written by hand, and a small experiment that shows
it at work. None of them is part of the decoder.
"""
