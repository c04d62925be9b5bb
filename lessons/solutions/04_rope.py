"""Solutions of lesson 04: RoPE."""

import numpy as np


def slow_pairs(head_width, theta, context):
    """→ int: the number of pairs that do not complete a full turn within the context."""
    speed = theta ** (-2 * np.arange(head_width // 2) / head_width)  # (C/2,)
    return int((context * speed < 2 * np.pi).sum())


def interleaved(cos, sin, x):
    """cos, sin (T, C/2), x (T, C) with pairs (0, 1), (2, 3), … → y (T, C)."""
    even, odd = x[:, 0::2], x[:, 1::2]
    y = np.empty_like(x)
    y[:, 0::2] = even * cos - odd * sin
    y[:, 1::2] = odd * cos + even * sin
    return y


def to_halves(W, heads):
    """W (D, H·C), pairs interleaved within each head → (D, H·C), pairs split by halves."""
    pairs = W.reshape(W.shape[0], heads, -1, 2)  # (D, H, C/2, 2)
    return pairs.swapaxes(2, 3).reshape(W.shape)


def learned_speeds_backward(speed, x, dy):
    """speed (C/2,), x (T, C) in halves, dy (T, C) → dx (T, C), dspeed (C/2,)."""
    half = len(speed)
    t = np.arange(len(x))[:, None]
    cos, sin = np.cos(t * speed), np.sin(t * speed)
    x1, x2, dy1, dy2 = x[:, :half], x[:, half:], dy[:, :half], dy[:, half:]
    dx = np.concatenate([dy1 * cos + dy2 * sin, dy2 * cos - dy1 * sin], axis=1)
    # a small change of the angle moves y along the circle, at right angles to y: y₁ by −y₂, y₂ by y₁
    y1, y2 = x1 * cos - x2 * sin, x2 * cos + x1 * sin
    dangle = dy2 * y1 - dy1 * y2  # (T, C/2)
    return dx, (t * dangle).sum(0)
