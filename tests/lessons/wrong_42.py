"""Wrong answers to the exercises of lesson 42, each with words that its hint must hold, and unusual right ones."""

import numpy as np

from minimoe.exercises import lesson_42 as check


def right(x, W, A, B, s, dy):
    return dy @ (W + s * A @ B).T, s * x.T @ dy @ B.T, s * A.T @ x.T @ dy


def with_dx(wrong):
    return lambda x, W, A, B, s, dy: (wrong(W, A, B, s, dy), *right(x, W, A, B, s, dy)[1:])


def with_da(wrong):
    def lora_backward(x, W, A, B, s, dy):
        dx, _, dB = right(x, W, A, B, s, dy)
        return dx, wrong(x, B, s, dy), dB

    return lora_backward


def with_db(wrong):
    def lora_backward(x, W, A, B, s, dy):
        dx, dA, _ = right(x, W, A, B, s, dy)
        return dx, dA, wrong(x, A, s, dy)

    return lora_backward


def token_by_token(x, W, A, B, s, dy):
    dx, dA, dB = np.zeros_like(x), np.zeros_like(A), np.zeros_like(B)
    for t in range(len(x)):
        dA += s * np.outer(x[t], B @ dy[t])
        dB += s * np.outer(x[t] @ A, dy[t])
        dx[t] = W @ dy[t] + s * A @ (B @ dy[t])
    return dx, dA, dB


def by_projection(x, W, A, B, s, dy):
    whole = x.T @ dy
    return dy @ (W + s * A @ B).T, s * whole @ B.T, s * A.T @ whole


def size(heads=None, experts=None, matrices=3, router=False, r=None, attention=1, of_experts=1):
    def adapter_size(D, H, G, C, E, F, rank):
        R = rank if r is None else r
        found = attention * 2 * (D + H * C + D + (G if heads is None else H) * C)
        found += of_experts * matrices * (E if experts is None else experts) * (D + F)
        return R * (found + router * (D + E))

    return adapter_size


def one_after_the_other(D, H, G, C, E, F, r):
    total = 0
    for inputs, outputs, count in ((D, H * C, 1), (D, G * C, 2), (H * C, D, 1), (D, F, 2 * E), (F, D, E)):
        total += count * (inputs * r + r * outputs)
    return total


def as_a_polynomial(D, H, G, C, E, F, r):
    return r * ((4 + 3 * E) * D + 2 * C * (H + G) + 3 * E * F)


def fused(a="eri", b="ore", scaled=True, out="eio"):
    def fused_correction(lora_A, lora_B, s, E):
        r = len(lora_A) // E
        sizes = {"e": E, "r": r, "i": lora_A.shape[1], "o": len(lora_B)}
        A, B = lora_A.reshape([sizes[c] for c in a]), lora_B.reshape([sizes[c] for c in b])
        return (s if scaled else 1) * np.einsum(f"{a},{b}->{out}", A, B)

    return fused_correction


def each_expert(lora_A, lora_B, s, E):
    r = len(lora_A) // E
    return np.stack([s * (lora_B[:, e::E] @ lora_A[e * r : (e + 1) * r]).T for e in range(E)])


WRONG = {
    check.lora_backward: [
        (with_dx(lambda W, A, B, s, dy: dy @ W.T), "through A and B"),
        (with_dx(lambda W, A, B, s, dy: s * dy @ B.T @ A.T), "through W"),
        (with_dx(lambda W, A, B, s, dy: dy @ (W + A @ B).T), "s is missing on the path"),
        (with_dx(lambda W, A, B, s, dy: s * dy @ (W + A @ B).T), "adapter only"),
        (with_dx(lambda W, A, B, s, dy: dy @ (W + s * s * A @ B).T), "there twice"),
        (with_da(lambda x, B, s, dy: x.T @ dy @ B.T), "s is missing"),
        (with_da(lambda x, B, s, dy: s * s * x.T @ dy @ B.T), "s is there twice"),
        (with_da(lambda x, B, s, dy: x.T @ dy), "B carries dy to A"),
        (with_db(lambda x, A, s, dy: A.T @ x.T @ dy), "s is missing"),
        (with_db(lambda x, A, s, dy: s * s * A.T @ x.T @ dy), "s is there twice"),
        (with_db(lambda x, A, s, dy: x.T @ dy), "A carries x to B"),
    ],
    check.adapter_size: [
        (size(heads="H"), "G heads"),
        (size(experts=1), "adapters of its own"),
        (size(matrices=1), "three matrices."),
        (size(matrices=2), "two are counted"),
        (size(router=True), "router has no adapter"),
        (size(r=1), "rank 1"),
        (size(attention=0), "attention is missing"),
        (lambda D, H, G, C, E, F, r: r * (D * 3 + H * C + E * (2 * D + F)), "A alone"),
        (lambda D, H, G, C, E, F, r: r * (D + H * C + 2 * G * C + E * (2 * F + D)), "B alone"),
        (lambda D, H, G, C, E, F, r: r * (4 * D + 2 * H + 2 * G + 3 * E * (D + F)), "has width C"),
        (lambda D, H, G, C, E, F, r: r * D * (2 * C * (H + G) + 3 * E * F), "not r D F"),
        (size(of_experts=0), "experts are missing"),
        (lambda D, H, G, C, E, F, r: 2 * D * C * (H + G) + 3 * E * D * F, "not their adapters"),
    ],
    check.fused_correction: [
        (fused(b="oer"), "expert changes fastest"),
        (fused(a="rei"), "expert changes slowest"),
        (fused(a="rei", b="oer"), "both are read the wrong way"),
        (fused(scaled=False), "s is missing"),
        (lambda a, b, s, E: s * fused()(a, b, s, E), "there twice"),
        (fused(out="eoi"), "orientation of the file"),
        (fused(out="io"), "adds up the experts"),
    ],
}

RIGHT = {
    check.lora_backward: [token_by_token, by_projection],
    check.adapter_size: [one_after_the_other, as_a_polynomial],
    check.fused_correction: [each_expert, fused()],
}
