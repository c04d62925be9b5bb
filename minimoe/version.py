"""The version, alone in a file so that every part of the package can import it."""

__version__ = "0.1.0"
