"""Wrong answers to the exercises of lesson 63, each with words that its hint must hold, and unusual right ones."""

import math
from fractions import Fraction

import numpy as np

from minimoe.exercises import lesson_63 as check


def sigmoid(z):
    return 1 / (1 + np.exp(-z))


def step(cell=None, show=None, bias=True, order="ifou", woven=False, u_of=np.tanh, gate_of=sigmoid, with_h=True):
    """The right step but for one thing."""

    def answer(x, h, c, w_x, w_h, b):
        a = x @ w_x + (h @ w_h if with_h else 0) + (b if bias else 0)
        blocks = a.reshape(len(a), -1, 4).transpose(2, 0, 1) if woven else np.split(a, 4, axis=1)
        part = dict(zip(order, blocks, strict=True))
        i, f, o, u = gate_of(part["i"]), gate_of(part["f"]), gate_of(part["o"]), u_of(part["u"])
        new = f * c + i * u if cell is None else cell(i, f, u, c)
        return (o * np.tanh(new) if show is None else show(o, new, c)), new

    return answer


def right_h(cell):
    """The right output with another cell."""

    def answer(x, h, c, w_x, w_h, b):
        i, f, o, u = np.split(x @ w_x + h @ w_h + b, 4, axis=1)
        right = sigmoid(f) * c + sigmoid(i) * np.tanh(u)
        return sigmoid(o) * np.tanh(right), cell(sigmoid(i), sigmoid(f), np.tanh(u), c)

    return answer


def forgets_the_output(x, h, c, w_x, w_h, b):
    return step(cell=lambda i, f, u, c: f * h + i * u)(x, h, c, w_x, w_h, b)


def row_by_row(x, h, c, w_x, w_h, b):
    B, D = h.shape
    new_h, new_c = [[0.0] * D for _ in range(B)], [[0.0] * D for _ in range(B)]
    for n in range(B):
        for d in range(D):
            i, f, o, u = (float(x[n] @ w_x[:, k * D + d] + h[n] @ w_h[:, k * D + d] + b[k * D + d]) for k in range(4))
            i, f, o = (1 / (1 + math.exp(-z)) for z in (i, f, o))
            new_c[n][d] = f * float(c[n, d]) + i * math.tanh(u)
            new_h[n][d] = o * math.tanh(new_c[n][d])
    return new_h, new_c


def one_product(x, h, c, w_x, w_h, b):
    a = np.hstack([x, h, np.ones((len(x), 1))]) @ np.vstack([w_x, w_h, b])
    D = h.shape[1]
    gates = 0.5 + 0.5 * np.tanh(a[:, : 3 * D] / 2)
    c = gates[:, D : 2 * D] * c + gates[:, :D] * np.tanh(a[:, 3 * D :])
    return gates[:, 2 * D :] * np.tanh(c), c


def back(through_h=1, through_c=1, slope=1, o_in=1, new_cell=False, shown_is_c=False, kind="", on=None):
    """The right backward pass of a step but for one thing."""

    def answer(i, f, o, u, c_before, dh, dc):
        c = f * c_before + i * u
        shown = np.tanh(c)
        total = through_c * dc + through_h * dh * (o if o_in else 1) * (1 - shown**2 if slope else 1)
        right = dc + dh * o * (1 - shown**2)
        before = c if new_cell else c_before
        of_o = dh * (c if shown_is_c else shown)
        parts = [total * u, total * before, of_o, total * i]
        if kind != "bare":
            slopes = [i, f, o, 1] if kind == "half" else [i * (1 - i), f * (1 - f), o * (1 - o), 1 - u**2]
            slopes[3] = u * (1 - u) if kind == "sigmoid" else slopes[3]
            parts = [part * s for part, s in zip(parts, slopes, strict=True)]
        return np.concatenate(parts, axis=1), right * f if on is None else on(right, dc, i, f)

    return answer


def back_from(
    order=(0, 1, 2, 3),
    slope=lambda c, before: 1 - np.tanh(c) ** 2,
    shown=np.tanh,
    u_slope=lambda u: 1 - u**2,
    gates=lambda z: z,
):
    """The right backward pass but for a slope, a factor or the order of the blocks."""

    def answer(i, f, o, u, c_before, dh, dc):
        c = f * c_before + i * u
        of_c = dc + dh * o * slope(c, c_before)
        i2, f2, o2 = gates(i), gates(f), gates(o)
        blocks = [of_c * u * i2 * (1 - i2), of_c * c_before * f2 * (1 - f2), dh * shown(c) * o2 * (1 - o2)]
        blocks.append(of_c * i * u_slope(u))
        return np.concatenate([blocks[k] for k in order], axis=1), of_c * f

    return answer


def squashed_again(also_u):
    return back_from(gates=sigmoid, u_slope=lambda u: 1 - (np.tanh(u) if also_u else u) ** 2)


def back_by_jacobians(i, f, o, u, c_before, dh, dc):
    """Each number on its own, by the chain rule in the order of the forward pass."""
    B, D = i.shape
    da, dbefore = np.zeros((B, 4 * D)), np.zeros((B, D))
    for n, d in np.ndindex(B, D):
        c = f[n, d] * c_before[n, d] + i[n, d] * u[n, d]
        of_c = dc[n, d] + dh[n, d] * o[n, d] / math.cosh(c) ** 2
        da[n, d] = of_c * u[n, d] * i[n, d] * (1 - i[n, d])
        da[n, D + d] = of_c * c_before[n, d] * f[n, d] * (1 - f[n, d])
        da[n, 2 * D + d] = dh[n, d] * math.tanh(c) * o[n, d] * (1 - o[n, d])
        da[n, 3 * D + d] = of_c * i[n, d] * (1 - u[n, d]) * (1 + u[n, d])
        dbefore[n, d] = of_c * f[n, d]
    return da, dbefore


def back_in_one_product(i, f, o, u, c_before, dh, dc):
    c = f * c_before + i * u
    of_c = dc + dh * (o - o * np.tanh(c) * np.tanh(c))
    inner = np.stack([of_c * u, of_c * c_before, dh * np.tanh(c), of_c * i], axis=1)
    slopes = np.stack([i - i * i, f - f * f, o - o * o, 1 - u * u], axis=1)
    return (inner * slopes).reshape(len(i), -1), f * of_c


def counted(lstms=2, matrices=2, blocks=4, router=2, of_expert=2, used=lambda E, K: K, stored=lambda E, K: E):
    """The right counts but for one thing."""

    def answer(D, F, E, K):
        rest = lstms * matrices * blocks * D * D + router * D * E
        return rest + used(E, K) * of_expert * D * F, rest + stored(E, K) * of_expert * D * F

    return answer


def with_biases(D, F, E, K):
    products, parameters = counted()(D, F, E, K)
    return products + 8 * D + K * (F + D), parameters + 8 * D + E * (F + D)


WRONG = {
    check.lstm_step: [
        (step(show=lambda o, new, c: o * new), "goes through a tanh before it is shown"),
        (step(show=lambda o, new, c: o * np.tanh(c)), "not the one before the step"),
        (step(bias=False), "the bias is missing"),
        (step(woven=True), "four blocks of D"),
        (step(order="fiou"), "have changed places"),
        (step(u_of=sigmoid), "u is a tanh, not a sigmoid"),
        (step(u_of=lambda z: z), "u goes through a tanh too"),
        (right_h(lambda i, f, u, c: c + i * u), "multiplied by the forget gate"),
        (right_h(lambda i, f, u, c: f * c + u), "multiplied by the input gate"),
        (right_h(lambda i, f, u, c: i * u), "the cell is both"),
        (step(cell=lambda i, f, u, c: c + i * u), ""),
        (step(gate_of=lambda z: z), "go through a sigmoid"),
        (step(gate_of=np.tanh), ""),
        (step(order="ifuo"), "o and u have changed places"),
        (step(with_h=False), "h W_h, is missing"),
        (step(cell=lambda i, f, u, c: (1 - i) * c + i * u), "it is not 1 − i"),
        (forgets_the_output, "the cell, not the output"),
        (right_h(lambda i, f, u, c: np.tanh(f * c + i * u)), "only the output shows its tanh"),
        (lambda *given: step()(*given)[::-1], "wrong order"),
    ],
    check.lstm_step_backward: [
        (back(through_h=0), "shown by this step's output too"),
        (back(through_c=0), "kept for the next step too"),
        (back(slope=0), "the slope of the tanh that shows the cell"),
        (back(o_in=0), "o is missing"),
        (back(new_cell=True), "not the new one"),
        (back(shown_is_c=True), "multiplies tanh(c), not c"),
        (back(kind="sigmoid"), "1 − u²"),
        (back(kind="bare"), "the slopes of the gates are missing"),
        (back(kind="half"), "g (1 − g), not g"),
        (back(on=lambda right, dc, i, f: right), "multiplied by the forget gate"),
        (back(on=lambda right, dc, i, f: dc * f), "including what came back through h"),
        (back(on=lambda right, dc, i, f: right * i), "not the input gate"),
        (back(on=lambda right, dc, i, f: right * f * (1 - f)), "belongs to da"),
        (back_from(order=(0, 1, 3, 2)), "o and u have changed places"),
        (back_from(order=(1, 0, 2, 3)), "i and f have changed places"),
        (squashed_again(True), "sigmoid or tanh; do not apply it again"),
        (squashed_again(False), "after their sigmoid; do not apply it again"),
        (back_from(slope=lambda c, before: 1 - c**2), "not 1 − c²"),
        (back_from(slope=lambda c, before: 1 - np.tanh(before) ** 2), "the output shows the new cell"),
        (back_from(shown=lambda c: 1), "this factor is missing"),
        (back_from(u_slope=lambda u: 1 - np.tanh(u) ** 2), "u is given after its tanh"),
    ],
    check.rows_per_expert: [
        (lambda B, T, K, E: (B * T / E, B / E), "every position goes to K experts"),
        (lambda B, T, K, E: (T * K / E, B * K / E), "the B sequences go through together"),
        (lambda B, T, K, E: (B * T * K, B * K), "shared among the E experts"),
        (lambda B, T, K, E: (B * T * K / E, B * T * K / E), "1/T of the rows"),
        (lambda B, T, K, E: (B * T * K / E, K / E), "the rows of all B sequences"),
        (lambda B, T, K, E: (B * T * K // E, B * K // E), "rounded down"),
        (lambda B, T, K, E: (B * T * K / E, B * K // E), "rounded down"),
        (lambda B, T, K, E: (B * T / K, B / K), "K/E of the rows"),
        (lambda B, T, K, E: (B * T * K / E, T * K / E), "not of the T positions"),
        (lambda B, T, K, E: (B * T / (K * E), B / (K * E)), "do not divide"),
        (lambda B, T, K, E: (B * T * K / E, math.ceil(B * K / E)), "rounded up"),
        (lambda B, T, K, E: (B * T * K / E, max(1, B * K / E)), "rounded up"),
        (lambda B, T, K, E: (B * K / E, B * T * K / E), "wrong order"),
    ],
    check.paper_counts: [
        (counted(lstms=1), "there are two LSTMs"),
        (counted(matrices=1), "one for x and one for h"),
        (counted(lstms=0), "the LSTMs are missing"),
        (counted(blocks=1), "four blocks"),
        (counted(router=0), "the router is missing"),
        (counted(router=1), "the router has two matrices"),
        (counted(of_expert=1), "an expert has two matrices"),
        (counted(used=lambda E, K: E), "K experts, not all of them"),
        (counted(used=lambda E, K: 1), "K experts, not one"),
        (counted(stored=lambda E, K: K), "also those that a position does not use"),
        (counted(of_expert=3), "three of SwiGLU"),
        (with_biases, "biases do not count"),
        (lambda D, F, E, K: (2 * counted()(D, F, E, K)[0], counted()(D, F, E, K)[1]), "count each product once"),
        (
            lambda D, F, E, K: (16 * D**2 + 2 * D * K * (1 + F), 16 * D**2 + 2 * D * E * (1 + F)),
            "looks at all E experts",
        ),
        (lambda D, F, E, K: (counted()(D, F, E, K)[0] / 1e6, counted()(D, F, E, K)[1] / 1e6), ""),
    ],
}

RIGHT = {
    check.lstm_step: [row_by_row, one_product],
    check.lstm_step_backward: [back_by_jacobians, back_in_one_product],
    check.rows_per_expert: [
        lambda B, T, K, E: (Fraction(B * T * K, E), Fraction(B * K, E)),
        lambda B, T, K, E: [T * (B * (K / E)), B * (K / E)],
    ],
    check.paper_counts: [
        lambda D, F, E, K: (16 * D**2 + 2 * D * (E + K * F), 16 * D**2 + 2 * D * E * (1 + F)),
        lambda D, F, E, K: np.array([2 * D * (8 * D + E + K * F), 2 * D * (8 * D + E + E * F)]),
    ],
}
