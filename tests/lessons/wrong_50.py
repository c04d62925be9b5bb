"""Wrong answers to the exercises of lesson 50, each with words that its hint must hold, and unusual right ones."""

from statistics import NormalDist

import numpy as np

from minimoe.exercises import lesson_50 as check


def codes(top=127, round_=np.rint, axis=0, guard=True, largest=lambda w, c: c):
    """The right codes but for one thing."""

    def absmax_codes(w):
        c = np.abs(w).max(axis, keepdims=True)
        with np.errstate(divide="ignore", invalid="ignore"):
            q = round_(top * w / (np.where(c > 0, c, 1) if guard else c))
        return q, largest(w, np.abs(w).max(0))

    return absmax_codes


def codes_in_loops(w):
    q, c = [[0] * w.shape[1] for _ in w], []
    for f in range(w.shape[1]):
        largest = max(abs(w[:, f]))
        c.append(largest)
        for d in range(len(w)):
            if largest:
                q[d][f] = round(float(w[d, f] * 127 / largest))
    return q, c


def codes_by_step(w):
    step = np.abs(w).max(0) / 127
    return np.floor(np.divide(w, step, out=np.zeros_like(w), where=step > 0) + 0.5), step * 127


def levels(edges=(True, True), swapped=False, scaled=True, zero=True, down=False, more=0):
    """The right levels but for one thing."""

    def normal_levels(bits):
        n = 2**bits
        fractions = [1 - 1 / (2 * n), 1 - 1 / (2 * (n - 1))]
        edge = np.mean([f for f, used in zip(fractions, edges, strict=True) if used])
        above = [NormalDist().inv_cdf(p) for p in np.linspace(edge, 0.5, n // 2 + 1)[:-1]]
        below = [-NormalDist().inv_cdf(p) for p in np.linspace(edge, 0.5, n // 2 + more)[:-1]]
        found = np.array(sorted([*below, *([0] if zero else []), *above])) / (max(above) if scaled else 1)
        found = -found[::-1] if swapped else found
        return found[::-1] if down else found

    return normal_levels


def levels_by_bisection(bits):
    """The quantile is where Φ reaches p."""
    n = 2**bits

    def quantile(p):
        low, high = -10.0, 10.0
        for _ in range(80):
            middle = (low + high) / 2
            low, high = (middle, high) if NormalDist().cdf(middle) < p else (low, middle)
        return low

    edge = 1 - (1 / n + 1 / (n - 1)) / 4
    top = quantile(edge)
    above = [quantile(edge + (0.5 - edge) * i / (n // 2)) / top for i in range(n // 2)]
    below = [-quantile(edge + (0.5 - edge) * i / (n // 2 - 1)) / top for i in range(n // 2 - 1)]
    return [*below, 0.0, *above[::-1]]


def levels_from_below(bits):
    """All quantiles in the lower half, where they are negative."""
    n = 2**bits
    edge = ((2 * n - 1) / (2 * n) + (2 * n - 3) / (2 * n - 2)) / 2
    quantile = NormalDist().inv_cdf
    low = [quantile(p) for p in np.linspace(1 - edge, 0.5, n // 2)]
    high = [-quantile(p) for p in np.linspace(1 - edge, 0.5, n // 2 + 1)]
    return np.array([*low, *high[::-1][1:]]) / high[0]


def round_of(
    clipped=True, rounded=np.rint, outlier=lambda r, s: np.sign(r) * np.maximum(s - s**-0.3 / 10, 0), after=None,
    z_of=lambda q, w, e, step: (q - (w - e) / step).mean(),
):  # fmt: skip
    """The right round but for one thing."""

    def hqq_round(w, step, z, bits):
        q = rounded(w / step + z)
        q = np.clip(q, 0, 2**bits - 1) if clipped else q
        r = w - (q - z) * step
        new = z_of(q, w, outlier(r, np.maximum(np.abs(r), 1e-12)), step)
        return after(new, z, step) if after else new

    return hqq_round


def round_in_a_loop(w, step, z, bits):
    total = 0.0
    for value in w:
        q = min(max(round(float(value / step + z)), 0), 2**bits - 1)
        r = value - (q - z) * step
        e = 0.0
        if abs(r) > 0.1 ** (1 / 1.3):  # below it nothing is left
            e = r - np.sign(r) * abs(r) ** -0.3 / 10
        total += q - (value - e) / step
    return total / len(w)


def round_as_a_move(w, step, z, bits):
    """The new z is the old one minus the mean of what is left of the errors, in steps."""
    q = np.clip(np.rint(w / step + z), 0, 2**bits - 1)
    r = w - (q - z) * step
    left = np.sign(r) * np.minimum(np.abs(r), np.maximum(np.abs(r), 1e-12) ** -0.3 / 10)
    return z - left.mean() / step


def bits_of(code=lambda b: 3.2 if b == 3 else b, numbers=2, shared=2, group_of_meta=True, meta=None, of_codes=True):
    """The right count but for one thing."""

    def bits_per_weight(bits, group, meta_bits, meta_group):
        share = 16 * shared / meta_group
        each = (meta_bits if meta is None else meta) / group + share / (group if group_of_meta else 1)
        return of_codes * code(bits) + numbers * each

    return bits_per_weight


def bits_of_a_block(bits, group, meta_bits, meta_group):
    """Whole numbers: the bits of ten times meta_group groups."""
    weights = 10 * group * meta_group
    codes = 32 * (weights // 10) if bits == 3 else bits * weights
    return (codes + 10 * meta_group * 2 * meta_bits + 10 * 2 * 2 * 16) / weights


def bits_term_by_term(bits, group, meta_bits, meta_group):
    total = {2: 2, 3: 32 / 10, 4: 4}[bits]
    for _ in ("step", "zero point"):
        total += meta_bits / group
        for _ in ("its step", "its offset"):
            total += 16 / (group * meta_group)
    return total


WRONG = {
    check.absmax_codes: [
        (codes(round_=np.trunc), "cuts off"),
        (codes(round_=np.floor), "rounds down"),
        (codes(round_=lambda q: q), "a whole number: round it"),
        (codes(top=128), "not 128"),
        (codes(axis=None), "one for the whole matrix"),
        (codes(axis=1), "each row"),
        (codes(guard=False), "not finite"),
        (codes(largest=lambda w, c: w.max(0)), "a negative weight"),
        (codes(largest=lambda w, c: c / 127), "the step; return c"),
    ],
    check.normal_levels: [
        (levels(scaled=False), "divide by the largest"),
        (levels(swapped=True), "the other way round"),
        (lambda bits: np.linspace(-1, 1, 2**bits), "equal distances"),
        (levels(more=1), "one level too many"),
        (levels(zero=False), "level 0 is missing"),
        (levels(edges=(True, False)), "the mean of 1 − 1/(2n)"),
        (levels(edges=(False, True)), "not the second alone"),
        (levels(down=True), "must ascend"),
    ],
    check.hqq_round: [
        (round_of(clipped=False), "clip it"),
        (round_of(rounded=lambda q: q), "round the codes"),
        (round_of(z_of=lambda q, w, e, step: (q - (w + e) / step).mean()), "not added"),
        (round_of(outlier=lambda r, s: 0), "no error for an outlier"),
        (round_of(outlier=lambda r, s: r), "stays where it is"),
        (round_of(outlier=lambda r, s: np.sign(r) * np.maximum(s - s**0.7 / 10, 0)), "p − 1"),
        (round_of(z_of=lambda q, w, e, step: (q - (w - e)).mean()), "divided by the step"),
        (round_of(z_of=lambda q, w, e, step: (q - (w - e) / step).sum()), "z is the mean"),
        (round_of(after=lambda new, z, step: -new * step), "value of code 0"),
        (round_of(after=lambda new, z, step: new - z), "how far z moves"),
    ],
    check.bits_per_weight: [
        (bits_of(code=lambda b: b), "ten codes of 3 bits"),
        (bits_of(numbers=1), "this counts one"),
        (bits_of(shared=0), "are missing"),
        (bits_of(shared=1), "two numbers of 16 bits"),
        (bits_of(group_of_meta=False), "belongs to meta_group groups"),
        (bits_of(meta=16, shared=0), "of 16 bits; here"),
        (bits_of(numbers=0), "only the codes"),
        (bits_of(of_codes=False), "without the codes"),
        (lambda b, g, m, mg: (3.2 if b == 3 else b) + 2 * (m + 32 / mg), "shared by the weights"),
    ],
}

RIGHT = {
    check.absmax_codes: [codes_in_loops, codes_by_step],
    check.normal_levels: [levels_by_bisection, levels_from_below],
    check.hqq_round: [round_in_a_loop, round_as_a_move],
    check.bits_per_weight: [bits_of_a_block, bits_term_by_term],
}
