"""Checks of lesson 63: between two LSTMs."""

from __future__ import annotations

import numpy as np

from minimoe.core.arrays import Array
from minimoe.exercises.engine import Answer, gradients, values
from minimoe.exercises.feedback import Report, first_failure


def lstm_step(answer: Answer) -> Report:
    """(x, h, c, w_x, w_h, b) → h and c after one step."""
    rng = np.random.default_rng(63)
    B, D_in, D = 3, 4, 2
    x, h, c = rng.standard_normal((B, D_in)), rng.standard_normal((B, D)), rng.standard_normal((B, D))
    w_x, w_h, b = rng.standard_normal((D_in, 4 * D)), rng.standard_normal((D, 4 * D)), rng.standard_normal(4 * D)
    a = x @ w_x + h @ w_h + b
    i, f, o = (_sigmoid(a[:, k * D : (k + 1) * D]) for k in range(3))
    u = np.tanh(a[:, 3 * D :])
    new_c = f * c + i * u
    without_bias = x @ w_x + h @ w_h
    j, g, p = (_sigmoid(without_bias[:, k * D : (k + 1) * D]) for k in range(3))
    unbiased_c = g * c + j * np.tanh(without_bias[:, 3 * D :])
    interleaved = a.reshape(B, D, 4)
    k, m, n, v = (interleaved[:, :, part] for part in range(4))
    woven_c = _sigmoid(m) * c + _sigmoid(k) * np.tanh(v)
    swapped_c = i * c + f * u
    loud_c = f * c + i * _sigmoid(a[:, 3 * D :])
    open_c = f * c + i * a[:, 3 * D :]
    raw_i, raw_f, raw_o, raw_u = np.split(a, 4, axis=1)
    bare_c = raw_f * c + raw_i * u
    turned_c = f * c + i * np.tanh(raw_o)
    alone_i, alone_f, alone_o, alone_u = np.split(x @ w_x + b, 4, axis=1)
    alone_c = _sigmoid(alone_f) * c + _sigmoid(alone_i) * np.tanh(alone_u)
    return values(
        answer,
        (x, h, c, w_x, w_h, b),
        {"h": o * np.tanh(new_c), "c": new_c},
        sizes={"B": B, "D_in": D_in, "D": D},
        mistakes={
            "h": {
                "the cell goes through a tanh before it is shown.": o * new_c,
                "the output shows the new cell, not the one before the step.": o * np.tanh(c),
                "the bias is missing.": p * np.tanh(unbiased_c),
                "the columns are four blocks of D, in the order i, f, o, u; here they are taken in turns.": (
                    _sigmoid(n) * np.tanh(woven_c)
                ),
                "the input gate and the forget gate have changed places: i comes first, then f.": (
                    o * np.tanh(swapped_c)
                ),
                "u is a tanh, not a sigmoid: what is added to the cell may be negative.": o * np.tanh(loud_c),
                "u goes through a tanh too.": o * np.tanh(open_c),
                "the gates i, f and o go through a sigmoid.": raw_o * np.tanh(bare_c),
                "the order of the blocks is i, f, o, u; here o and u have changed places.": (
                    _sigmoid(raw_u) * np.tanh(turned_c)
                ),
                "the part of the output before the step, h W_h, is missing.": _sigmoid(alone_o) * np.tanh(alone_c),
                "the forget gate multiplies the cell, not the output.": o * np.tanh(f * h + i * u),
                "the forget gate has its own block; it is not 1 − i.": o * np.tanh((1 - i) * c + i * u),
            },
            "c": {
                "the old cell must be multiplied by the forget gate.": c + i * u,
                "the new part u must be multiplied by the input gate.": f * c + u,
                "the cell is both: what is kept of the old one and what is added.": i * u,
                "the cell is kept as it is; only the output shows its tanh.": np.tanh(new_c),
            },
        },
    )


def lstm_step_backward(answer: Answer) -> Report:
    """(i, f, o, u, c_before, dh, dc) → da and dc_before of one step."""
    rng = np.random.default_rng(63)
    B, D = 3, 2
    a, c_before = rng.standard_normal((B, 4 * D)), rng.standard_normal((B, D))
    dh, dc = rng.standard_normal((2, B, D))

    def step(a: Array, c_before: Array) -> tuple[Array, ...]:
        i, f, o = (_sigmoid(a[:, k * D : (k + 1) * D]) for k in range(3))
        u = np.tanh(a[:, 3 * D :])
        c = f * c_before + i * u
        return i, f, o, u, c, o * np.tanh(c)

    def loss(a: Array, c_before: Array) -> Array:
        *_, c, h = step(a, c_before)
        return (h * dh).sum() + (c * dc).sum()

    i, f, o, u, c, _ = step(a, c_before)
    shown = np.tanh(c)

    def da_of(total: Array, of_o: Array | None = None, before: Array = c_before) -> Array:
        parts = [
            total * u * i * (1 - i),
            total * before * f * (1 - f),
            (dh * shown if of_o is None else of_o) * o * (1 - o),
            total * i * (1 - u**2),
        ]
        return np.concatenate(parts, axis=1)

    total = dc + dh * o * (1 - shown**2)
    sloping = np.concatenate([total * u * i, total * c_before * f, dh * shown * o, total * i], axis=1)
    bare = np.concatenate([total * u, total * c_before, dh * shown, total * i], axis=1)
    all_sigmoid = da_of(total)
    all_sigmoid[:, 3 * D :] = total * i * u * (1 - u)
    again = np.concatenate(
        [
            total * u * _sigmoid(i) * (1 - _sigmoid(i)),
            total * c_before * _sigmoid(f) * (1 - _sigmoid(f)),
            dh * shown * _sigmoid(o) * (1 - _sigmoid(o)),
            total * i * (1 - np.tanh(u) ** 2),
        ],
        axis=1,
    )
    sigmoids_again = again.copy()
    sigmoids_again[:, 3 * D :] = total * i * (1 - u**2)
    squeezed = da_of(total)
    squeezed[:, 3 * D :] = total * i * (1 - np.tanh(u) ** 2)
    part = np.split(da_of(total), 4, axis=1)
    return gradients(
        answer,
        (i, f, o, u, c_before, dh, dc),
        loss,
        {"a": a, "c_before": c_before},
        sizes={"B": B, "D": D},
        mistakes={
            "da": {
                "the cell is shown by this step's output too: add what comes back through h to dc.": da_of(dc),
                "the cell is kept for the next step too: add dc to what comes back through h.": da_of(total - dc),
                "the slope of the tanh that shows the cell is missing.": da_of(dc + dh * o),
                "the cell is shown through the output gate: o is missing.": da_of(dc + dh * (1 - shown**2)),
                "the forget gate multiplies the cell before the step, not the new one.": da_of(total, before=c),
                "the output gate multiplies tanh(c), not c.": da_of(total, dh * c),
                "the output gate multiplies tanh(c): this factor is missing.": da_of(total, dh),
                "the slope of the tanh is 1 − tanh²(c), not 1 − c².": da_of(dc + dh * o * (1 - c**2)),
                "the output shows the new cell, so the slope of its tanh is taken there.": (
                    da_of(dc + dh * o * (1 - np.tanh(c_before) ** 2))
                ),
                "i, f, o and u are given after their sigmoid or tanh; do not apply it again.": again,
                "i, f and o are given after their sigmoid; do not apply it again.": sigmoids_again,
                "u is given after its tanh, so the slope is 1 − u².": squeezed,
                "the order of the blocks is i, f, o, u; here o and u have changed places.": np.concatenate(
                    [part[0], part[1], part[3], part[2]], axis=1
                ),
                "the order of the blocks is i, f, o, u; here i and f have changed places.": np.concatenate(
                    [part[1], part[0], part[2], part[3]], axis=1
                ),
                "u is a tanh, so its slope is 1 − u², not u (1 − u).": all_sigmoid,
                "the slopes of the gates are missing.": bare,
                "the slope of a sigmoid is g (1 − g), not g.": sloping,
            },
            "dc_before": {
                "what flows on to the cell before is multiplied by the forget gate.": total,
                "all of dc flows on, including what came back through h.": dc * f,
                "it flows through the forget gate, not the input gate.": total * i,
                "the slope of the forget gate belongs to da; the cell itself is only multiplied by f.": (
                    total * f * (1 - f)
                ),
            },
        },
    )


def rows_per_expert(answer: Answer) -> Report:
    """(B, T, K, E) → the mean rows of an expert in one call for all positions, and in one call for each."""
    return first_failure(
        _rows_per_expert(answer, *case) for case in ((12, 30, 4, 32), (7, 5, 2, 8), (3, 1, 3, 3), (3, 40, 2, 16))
    )


def _rows_per_expert(answer: Answer, B: int, T: int, K: int, E: int) -> Report:
    once, stepwise = B * T * K / E, B * K / E
    case = f"B = {B}, T = {T}, K = {K}, E = {E}: "
    hints_once = {
        "every position goes to K experts, so K rows of work come from each.": B * T / E,
        "the B sequences go through together.": T * K / E,
        "the rows are shared among the E experts.": float(B * T * K),
        "this is rounded down, but a mean need not be a whole number.": float(B * T * K // E),
        "only K of the E experts work on a row; on average an expert gets K/E of the rows.": B * T / K,
        "the K experts of a row each get it: multiply with K, do not divide.": B * T / (K * E),
    }
    hints_stepwise = {
        "every position goes to K experts, so K rows of work come from each.": B / E,
        "in each call there are the rows of all B sequences.": K / E,
        "a call at one position has 1/T of the rows.": once,
        "this is rounded down, but a mean need not be a whole number.": float(B * K // E),
        "this is rounded up, but a mean need not be a whole number.": float(-(-B * K // E)),
        "a call at one position has the rows of the B sequences, not of the T positions.": T * K / E,
    }
    return values(
        answer,
        (B, T, K, E),
        {"one call": once, "each position": stepwise},
        mistakes={
            "one call": {case + hint: wrong for hint, wrong in hints_once.items() if wrong != once},
            "each position": {case + hint: wrong for hint, wrong in hints_stepwise.items() if wrong != stepwise},
        },
    )


def paper_counts(answer: Answer) -> Report:
    """(D, F, E, K) → the products per position and the parameters of the paper's three layers: LSTM, mixture, LSTM."""
    # small sizes first: in the paper's, which are powers of 2, several mistakes give the same number
    return first_failure(_paper_counts(answer, *sizes) for sizes in ((6, 5, 7, 3), (512, 1024, 256, 4)))


def _paper_counts(answer: Answer, D: int, F: int, E: int, K: int) -> Report:
    lstms, router, expert = 2 * 8 * D * D, 2 * D * E, 2 * D * F
    active, total = lstms + router + K * expert, lstms + router + E * expert
    case = f"D = {D}, F = {F}, E = {E}, K = {K}: "
    shared = {
        "there are two LSTMs, each with two matrices: one for x and one for h.": -lstms // 2,
        "an LSTM has four blocks: i, f, o and u.": -3 * lstms // 4,
        "the router is missing.": -router,
        "the router has two matrices: one for the logits, one for the noise.": -router // 2,
        "the LSTMs are missing.": -lstms,
        "biases do not count here, but those of the LSTMs are in.": 8 * D,
    }
    hints_active = {hint: active + change for hint, change in shared.items()} | {
        "every position uses K experts, not all of them.": total,
        "every position uses K experts, not one.": active - (K - 1) * expert,
        "an expert has two matrices.": active - K * expert // 2,
        "an expert of the paper has two matrices, not the three of SwiGLU.": active + K * expert // 2,
        "biases do not count here.": active + 8 * D + K * (F + D),
        "this counts a multiplication and an addition; count each product once.": 2 * active,
        "the router looks at all E experts, not only at the K that it chooses.": active - router + 2 * D * K,
    }
    hints_total = {hint: total + change for hint, change in shared.items()} | {
        "all E experts have parameters, also those that a position does not use.": active,
        "an expert has two matrices.": total - E * expert // 2,
        "an expert of the paper has two matrices, not the three of SwiGLU.": total + E * expert // 2,
    }
    return values(
        answer,
        (D, F, E, K),
        {"products": active, "parameters": total},
        mistakes={
            "products": {case + hint: wrong for hint, wrong in hints_active.items() if wrong != active},
            "parameters": {case + hint: wrong for hint, wrong in hints_total.items() if wrong != total},
        },
    )


def _sigmoid(z: Array) -> Array:
    result: Array = 1 / (1 + np.exp(-z))
    return result
