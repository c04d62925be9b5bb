"""Wrong answers to the exercises of lesson 05, each with words that its hint must hold."""

import numpy as np

from minimoe.exercises import lesson_05 as check


def softmax(S):
    A = np.exp(S - S.max(1, keepdims=True))
    return A / A.sum(1, keepdims=True)


def without_window(T, window):
    return T * (T + 1) // 2


def without_beginning(T, window):
    return T * window


def one_too_wide(T, window):
    return sum(min(i, window) + 1 for i in range(T))


def others_only(T, window):
    return sum(min(i, window - 1) for i in range(T))


def two_triangles(T, window):
    return T * window - window * (window - 1) // 2


def temperature(to_scores=True, mean=True, power=2, sign=-1):
    """The right gradients but for one thing."""

    def temperature_backward(S, temperature, dA):
        A = softmax(S / temperature)
        dZ = A * (dA - mean * (A * dA).sum(1, keepdims=True))
        return (dZ / temperature if to_scores else dZ), sign * (dZ * S).sum() / temperature**power

    return temperature_backward


def down_the_columns(S, temperature, dA):
    A = softmax(S / temperature)
    return A * (dA - (A * dA).sum(0)) / temperature, ...


def shared(as_key=True, as_value=True, mean=True, scale=True):
    """The right gradients but for one thing."""

    def keys_as_values_backward(A, q, k, do):
        dA = do @ k.T
        dS = A * (dA - mean * (A * dA).sum(1, keepdims=True))
        dS = dS / np.sqrt(q.shape[1]) if scale else dS
        return dS @ k, as_value * (A.T @ do) + as_key * (dS.T @ q)

    return keys_as_values_backward


def without_transpose(A, q, k, do):
    dA = do @ k.T
    dS = A * (dA - (A * dA).sum(1, keepdims=True)) / np.sqrt(q.shape[1])
    return dS @ k, A.T @ do + dS @ q


def sink(weight=lambda spent: 1 - spent, sign=-1, mean=True, normalised=False):
    """The right gradients but for one thing."""

    def sink_backward(A, dA):
        gathered, spent = (A * dA).sum(1, keepdims=True), A.sum(1, keepdims=True)
        dS = A * (dA - mean * gathered / (spent if normalised else 1))
        return dS, sign * (weight(spent) * gathered).sum()

    return sink_backward


WRONG = {
    check.visible_pairs: [
        (without_window, "ignores the window"),
        (without_beginning, "first tokens have fewer"),
        (one_too_wide, "off by one"),
        (two_triangles, "longer than the text"),
        (others_only, "sees itself too"),
    ],
    check.temperature_backward: [
        (temperature(to_scores=False), "one step is left"),
        (temperature(mean=False), "lacks the mean"),
        (temperature(power=1), "power of τ"),
        (temperature(sign=1), "sign is wrong"),
        (down_the_columns, "wrong axis"),
    ],
    check.keys_as_values_backward: [
        (shared(as_key=False), "the path as values only"),
        (shared(as_value=False), "the path as keys only"),
        (shared(mean=False), "lacks the mean"),
        (shared(scale=False), "√C"),
        (without_transpose, "lacks a transpose"),
    ],
    check.sink_backward: [
        (sink(mean=False), "lacks the mean"),
        (sink(normalised=True), "made to sum to one"),
        (sink(weight=np.ones_like), "every row has its own sink weight"),
        (sink(weight=lambda spent: spent), "spent weight"),
        (sink(sign=1), "look at the sign"),
        (sink(weight=np.zeros_like), "does reach the result"),
    ],
}
