"""Solutions of lesson 03."""


def gradient_at_scaled_input(dx, c):
    """In dx = r · (…), everything in the brackets stays the same, and r = 1/rms(c·x) is c times smaller."""
    return dx / c


def l2_normalize_backward(x, dy):
    """x (N, D), dy (N, D) → dx (N, D)."""
    inv_norm = 1 / (x * x).sum(-1, keepdims=True) ** 0.5  # (N, 1)
    y = x * inv_norm
    return inv_norm * (dy - y * (y * dy).sum(-1, keepdims=True))


def layernorm_backward(x_hat, inv_std, dy):
    """x_hat (N, D), inv_std (N, 1), dy (N, D) → dx (N, D)."""
    through_mean = dy.mean(-1, keepdims=True)
    through_std = x_hat * (x_hat * dy).mean(-1, keepdims=True)
    return inv_std * (dy - through_mean - through_std)


def rmsnorm_backward_from_output(gain, y, inv_rms, dy):
    """gain (D,), y (N, D), inv_rms (N, 1), dy (N, D) → dx (N, D), dgain (D,)."""
    x_hat = y / gain
    dx_hat = gain * dy
    dx = inv_rms * (dx_hat - x_hat * (x_hat * dx_hat).mean(-1, keepdims=True))
    return dx, (x_hat * dy).sum(0)
