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


def both_directions(T, window):
    return sum(abs(i - j) < window for i in range(T) for j in range(T))


def temperature(scores_power=1, mean=True, power=2, sign=-1, cold=True):
    """The right gradients but for one thing."""

    def temperature_backward(S, temperature, dA):
        A = softmax(S / temperature if cold else S)
        dZ = A * (dA - mean * (A * dA).sum(1, keepdims=True))
        return dZ / temperature**scores_power, sign * (dZ * S).sum() / temperature**power

    return temperature_backward


def down_the_columns(S, temperature, dA):
    A = softmax(S / temperature)
    return A * (dA - (A * dA).sum(0)) / temperature, ...


def unweighted(S, temperature, dA):
    A = softmax(S / temperature)
    return A * (dA - dA.mean(1, keepdims=True)) / temperature, ...


def without_softmax(S, temperature, dA):
    A = softmax(S / temperature)
    dS = A * (dA - (A * dA).sum(1, keepdims=True)) / temperature
    return dS, -(dA * S).sum() / temperature**2


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


def values_without_transpose(A, q, k, do):
    dA = do @ k.T
    dS = A * (dA - (A * dA).sum(1, keepdims=True)) / np.sqrt(q.shape[1])
    return dS @ k, A @ do + dS.T @ q


def transposed_queries(A, q, k, do):
    dA = do @ k.T
    dS = A * (dA - (A * dA).sum(1, keepdims=True)) / np.sqrt(q.shape[1])
    return dS.T @ k, A.T @ do + dS.T @ q


def weights_for_scores(A, q, k, do):
    dA = do @ k.T / np.sqrt(q.shape[1])
    return dA @ k, A.T @ do + dA.T @ q


def sink_over_columns(A, dA):
    return A * (dA - (A * dA).sum(0)), ...


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
        (both_directions, "later keys"),
        (lambda T, window: sum(min(i, window) for i in range(T)), "i + 1 keys, not i"),
        (lambda T, window: T * (T - 1) // 2, "ignores the window, and"),
        (lambda T, window: T * T, "ignores the causal mask"),
    ],
    check.temperature_backward: [
        (temperature(scores_power=0), "one step is left"),
        (temperature(scores_power=2), "once too often"),
        (temperature(scores_power=-1), "not by τ"),
        (temperature(power=3), "one power of τ is too many"),
        (temperature(power=0, sign=1), "derivative of 1/τ"),
        (temperature(cold=False), "not of S"),
        (unweighted, "weighted with A"),
        (lambda S, temperature, dA: (dA / temperature, ...), "back through the softmax"),
        (without_softmax, "through the softmax first"),
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
        (without_transpose, "path as keys lacks a transpose"),
        (values_without_transpose, "path as values lacks a transpose"),
        (transposed_queries, "belongs to dk"),
        (weights_for_scores, "back through the softmax"),
    ],
    check.sink_backward: [
        (sink(mean=False), "lacks the mean"),
        (sink(normalised=True), "made to sum to one"),
        (sink(weight=np.ones_like), "every row has its own sink weight"),
        (sink(weight=lambda spent: spent), "spent weight"),
        (sink(sign=1), "look at the sign"),
        (sink(weight=np.zeros_like), "does reach the result"),
        (sink_over_columns, "wrong axis"),
    ],
}


def one_by_one(T, window):
    return sum(1 for i in range(T) for j in range(T) if 0 <= i - j < window)


def closed_form(T, window):
    w = min(T, window)
    return w * T - w * (w - 1) / 2


def temperature_by_the_jacobian(S, temperature, dA):
    dZ = []
    for row, d in zip(softmax(S / temperature), dA, strict=True):
        dZ.append((np.diag(row) - np.outer(row, row)) @ d)
    return np.array(dZ) / temperature, -np.sum(np.array(dZ) * S) / temperature**2


def temperature_by_its_product(S, temperature, dA):
    A = softmax(S / temperature)
    dS = A * (dA - np.einsum("ij,ij->i", A, dA)[:, None]) / temperature
    return dS, -np.vdot(dS, S) / temperature


def by_outputs(A, q, k, do):
    dS = A * (do @ k.T - (do * (A @ k)).sum(1, keepdims=True)) * q.shape[1] ** -0.5
    return dS @ k, A.T @ do + dS.T @ q


def query_by_query(A, q, k, do):
    dq, dk = np.zeros_like(q), np.zeros_like(k)
    for i in range(len(q)):
        dA = k @ do[i]
        dS = A[i] * (dA - A[i] @ dA) / q.shape[1] ** 0.5
        dq[i] = dS @ k
        dk += np.outer(A[i], do[i]) + np.outer(dS, q[i])
    return dq, dk


def sink_from_the_other_scores(A, dA):
    dS = A * (dA - (A * dA).sum(1, keepdims=True))
    return dS, -dS.sum()  # all scores of a row, the sink's included, have gradients that sum to zero


def sink_as_a_column(A, dA):
    whole = np.hstack([A, 1 - A.sum(1, keepdims=True)])
    upstream = np.hstack([dA, np.zeros((len(A), 1))])
    dS = whole * (upstream - (whole * upstream).sum(1, keepdims=True))
    return dS[:, :-1], dS[:, -1].sum()


RIGHT = {
    check.visible_pairs: [one_by_one, closed_form],
    check.temperature_backward: [temperature_by_the_jacobian, temperature_by_its_product],
    check.keys_as_values_backward: [by_outputs, query_by_query],
    check.sink_backward: [sink_from_the_other_scores, sink_as_a_column],
}
