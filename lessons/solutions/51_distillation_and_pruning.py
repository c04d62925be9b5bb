"""Solutions of lesson 51: distillation and pruning."""

from itertools import combinations

import numpy as np


def soft_backward(z, told, tau):
    """z and told (N, V) logits → dz (N, V) of the mean over tokens of τ² KL(p_t‖p_s)."""

    def softmax(logits):
        p = np.exp(logits - logits.max(1, keepdims=True))
        return p / p.sum(1, keepdims=True)

    return tau * (softmax(z / tau) - softmax(told / tau)) / len(z)


def reverse_backward(z, told):
    """z and told (N, V) logits → dz (N, V) of the mean over tokens of KL(p_s‖p_t), at τ = 1."""

    def log_softmax(logits):
        shifted = logits - logits.max(1, keepdims=True)
        return shifted - np.log(np.exp(shifted).sum(1, keepdims=True))

    ratio = log_softmax(z) - log_softmax(told)
    p = np.exp(log_softmax(z))
    kl = (p * ratio).sum(1, keepdims=True)
    return p * (ratio - kl) / len(z)


def best_experts(logits, outputs, r):
    """logits (N, E), outputs (E, N, D) → the r experts with the least ‖F'(x) − F(x)‖, in ascending order."""

    def layer(kept):
        z = logits[:, kept]
        best = np.argsort(-z, axis=1)[:, :2]
        w = np.exp(np.take_along_axis(z, best, axis=1))
        w /= w.sum(1, keepdims=True)
        chosen = outputs[np.array(kept)[best], np.arange(len(z))[:, None]]  # (N, 2, D)
        return (w[..., None] * chosen).sum(1)

    whole = layer(list(range(len(outputs))))
    return min(
        (list(kept) for kept in combinations(range(len(outputs)), r)),
        key=lambda kept: np.linalg.norm(layer(kept) - whole),
    )


def skip_second(w):
    """w (N, 2) → the weights (N, 2) after skipping, with β the median of w₂/w₁."""
    ratio = w[:, 1] / w[:, 0]
    skipped = ratio < np.median(ratio)
    return np.where(skipped[:, None], np.stack([w.sum(1), np.zeros(len(w))], axis=1), w)
