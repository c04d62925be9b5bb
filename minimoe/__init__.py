"""minimoe: a sparse mixture-of-experts language model written from scratch, every gradient by hand."""

__version__ = "0.1.0"
