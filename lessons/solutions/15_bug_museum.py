"""Solutions of lesson 15."""

import numpy as np


def library_form(E, K):
    """Balanced: E terms of (K/E)(1/E), times E. Collapsed: K terms of 1 · 1/K, times E."""
    return K, E


def balance_of_parts(assignments, probability, tokens):
    """assignments (M, E), probability (M, E), tokens (M,) → a number: add the sums first, then compute the loss."""
    f = assignments.sum(0) / assignments.sum()  # (E,)
    p_mean = probability.sum(0) / tokens.sum()  # (E,)
    return len(f) * (f * p_mean).sum()


def leaks_the_future(model, tokens, vocabulary):
    """Change each token in turn, and compare all logits before it."""
    before = model(tokens)
    for t in range(1, len(tokens)):
        changed = tokens.copy()
        changed[t] = (changed[t] + 1) % vocabulary
        if not np.allclose(model(changed)[:t], before[:t], rtol=0, atol=1e-9):
            return True
    return False


def double_softmax_backward(z, dp):
    """z (N, E), dp (N, E) → dz (N, E): back through the outer softmax first, then through the inner one."""

    def softmax(z):
        p = np.exp(z - z.max(1, keepdims=True))
        return p / p.sum(1, keepdims=True)

    inner = softmax(z)
    outer = softmax(inner)
    d_inner = outer * (dp - (outer * dp).sum(1, keepdims=True))
    return inner * (d_inner - (inner * d_inner).sum(1, keepdims=True))
