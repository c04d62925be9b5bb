"""The colours of the experts, the same in every figure, on every page and in the terminal.

These are the eight colours of Okabe and Ito (2008), each of them changed a little, so that any two can be told apart by
readers who cannot see red, green or blue. Yellow is darkened until a yellow line is visible on white paper; black is
replaced by a grey that is also visible on a dark page. Expert 8 has the first colour again, with a mark such as an
underline.
"""

from __future__ import annotations

COLOURS = ("#1E61A6", "#E69F00", "#07976B", "#BE75C0", "#69C0FF", "#DD5800", "#E5D54A", "#4D4D4D")
TERMINAL = (25, 214, 36, 134, 81, 166, 228, 238)
"""The same eight colours as numbers of a 256-colour terminal, again chosen so that every reader can tell them apart."""


def colour(expert: int) -> str:
    """The colour of an expert, as ``#RRGGBB``."""
    return COLOURS[expert % len(COLOURS)]


def ink(background: str) -> str:
    """Black or white, whichever is easier to read on ``background``; the contrast is never below 4.58."""
    return max("#000000", "#FFFFFF", key=lambda candidate: contrast(candidate, background))


def contrast(one: str, other: str) -> float:
    """The contrast of two colours as WCAG 2 defines it, from 1 (equal) to 21 (black on white); text needs 4.5."""
    darker, lighter = sorted((luminance(one), luminance(other)))
    return (lighter + 0.05) / (darker + 0.05)


def luminance(colour: str) -> float:
    """How light a colour ``#RRGGBB`` is, from 0 (black) to 1 (white)."""

    def linear(channel: int) -> float:
        value = channel / 255
        return value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4

    red, green, blue = (linear(int(colour[i : i + 2], 16)) for i in (1, 3, 5))
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue
