"""Wrong answers to the exercises of lesson 21, each with words that its hint must hold, and unusual right ones."""

import numpy as np

from minimoe.exercises import lesson_21 as check


def lengths(v):
    return np.sqrt((v**2).sum(1, keepdims=True))


def cosine(
    along_u=True, along_m=True, divided_u=True, divided_m=True, s_u=True, plain_m=False, with_s=False, by_u=False
):
    """The right gradients but for one thing."""

    def cosine_backward(u, m, s, dz):
        unit_u, unit_m = u / lengths(u), m / lengths(m)
        du, dm = (s if s_u else 1) * dz @ (m if plain_m else unit_m), s * dz.T @ unit_u
        if along_u:
            measure = u if by_u else unit_u
            du = du - measure * (measure * du).sum(1, keepdims=True)
        if along_m:
            dm = dm - unit_m * (unit_m * dm).sum(1, keepdims=True)
        du = du / lengths(u) if divided_u else du
        dm = dm / lengths(m) if divided_m else dm
        return du, dm, (dz * (unit_u @ unit_m.T)).sum() * (s if with_s else 1)

    return cosine_backward


def cosine_by_jacobian(u, m, s, dz):
    """One vector at a time, with the matrix I − û ûᵀ over the length."""

    def through(v, dunit):
        length = np.sqrt(v @ v)
        return (np.eye(len(v)) - np.outer(v, v) / length**2) @ dunit / length

    unit_u, unit_m = u / lengths(u), m / lengths(m)
    du = np.stack([through(u[t], s * sum(dz[t, e] * unit_m[e] for e in range(len(m)))) for t in range(len(u))])
    dm = np.stack([through(m[e], s * sum(dz[t, e] * unit_u[t] for t in range(len(u)))) for e in range(len(m))])
    return du, dm, np.einsum("te,tw,ew->", dz, unit_u, unit_m)


def cosine_by_quotient(u, m, s, dz):
    """From z = s u·m / (‖u‖ ‖m‖) by the quotient rule."""
    a, b = lengths(u), lengths(m).T
    cos = u @ m.T / (a * b)
    du = s * ((dz / (a * b)) @ m - (dz * cos).sum(1, keepdims=True) * u / a**2)
    dm = s * ((dz / (a * b)).T @ u - (dz * cos).sum(0)[:, None] * m / b.T**2)
    return [du, dm, (dz * cos).sum()]


def more_than(counts, N, K):
    return counts.sum((1, 2)) - counts.shape[1] * N * K


def moved(direction):
    return lambda penalty, counts, N, K: penalty * 1.2 ** np.cumsum(np.sign(direction(counts, N, K)))


def four_fifths(penalty, counts, N, K):
    more = more_than(counts, N, K)
    return penalty * np.cumprod(np.where(more > 0, 1.2, np.where(more < 0, 0.8, 1)))


def one_late(penalty, counts, N, K):
    steps = 1.2 ** np.sign(more_than(counts, N, K)[:-1])
    return penalty * np.cumprod([1, *steps])


def by_cases(penalty, counts, N, K):
    result = []
    for step in counts:
        awake, aim = sum(int(n) for layer in step for n in layer), len(step) * N * K
        penalty = penalty if awake == aim else penalty * 1.2 if awake > aim else penalty / 1.2
        result.append(penalty)
    return result


def by_the_share_of_zeros(penalty, counts, N, K):
    S, L, E = counts.shape
    share = 1 - counts.reshape(S, -1).sum(1) / (L * N * E)
    return penalty * np.exp(np.log(1.2) * np.cumsum(np.sign(np.round(1 - K / E - share, 9))))


def relu(awake_dw=True, awake_price=True, price=True, own=True, mean=True, f="E n / (K N)", sign=1):
    """The right gradient but for one thing."""

    def remoe_backward(z, dw, penalty, K):
        N, E = z.shape
        n = (z > 0).sum(0)
        of = {"E n / (K N)": E * n / (K * N), "1": 1, "n / N": n / N, "E n / N": E * n / N}
        of["rows"] = E * (z > 0).sum(1, keepdims=True) / (K * N)
        of["weights"] = E * np.maximum(z, 0).sum(0) / (K * N)
        cost = sign * penalty * of[f] / (N if mean else 1) * np.ones(z.shape)
        return (z > 0 if awake_dw else 1) * dw * price + own * (z > 0 if awake_price else 1) * cost

    return remoe_backward


def relu_by_loop(z, dw, penalty, K):
    N, E = z.shape
    dz = np.zeros_like(z)
    for e in range(E):
        awake = np.flatnonzero(z[:, e] > 0)
        for t in awake:
            dz[t, e] = dw[t, e] + penalty * E * len(awake) / (K * N) / N
    return dz


def relu_by_where(z, dw, penalty, K):
    f = z.shape[1] * np.mean(np.sign(z) > 0, axis=0) / K
    return np.where(z > 0, dw + penalty * f / len(z), 0.0)


def ranked_sums(p):
    ranked = np.sort(p, axis=1)[:, ::-1]
    return np.cumsum(ranked, axis=1)


def top_p_by_loop(p, P):
    counts = []
    for row in p:
        total, used = 0.0, 0
        for one in sorted(row, reverse=True):
            if total >= P:
                break
            total, used = total + one, used + 1
        counts.append(used)
    return counts


def entropy(p, log_and=None, softmax=True, mean=True, sign=-1):
    H = -(p * np.log(p)).sum(1, keepdims=True)
    inner = np.log(p) + (H if log_and is None else log_and(p, H))
    return sign * (p if softmax else 1) * inner / (len(p) if mean else 1)


def entropy_by_jacobian(p):
    dp = -(np.log(p) + 1) / len(p)
    return np.stack([(np.diag(row) - np.outer(row, row)) @ d for row, d in zip(p, dp, strict=True)])


def entropy_through_softmax(p):
    dp = -np.log(p) / len(p)
    return p * (dp - np.einsum("te,te->t", p, dp)[:, None])


WRONG = {
    check.cosine_backward: [
        (cosine(along_u=False), "the part of the gradient along u must go"),
        (cosine(along_m=False), "the part of the gradient along m must go"),
        (cosine(along_u=False, divided_u=False), "with respect to û"),
        (cosine(along_m=False, divided_m=False), "with respect to m̂"),
        (cosine(divided_u=False), "divided by the length of u"),
        (cosine(divided_m=False), "divided by the length of m"),
        (cosine(s_u=False), "the factor s is missing"),
        (cosine(plain_m=True), "the normalised m̂"),
        (cosine(by_u=True), "measured with û"),
        (cosine(with_s=True), "with respect to log s"),
    ],
    check.penalties: [
        (moved(lambda counts, N, K: -more_than(counts, N, K)), "wrong way"),
        (moved(lambda counts, N, K: counts[:, 0].sum(1) - N * K), "first layer only"),
        (moved(lambda counts, N, K: counts[:, -1].sum(1) - N * K), "last layer only"),
        (moved(lambda counts, N, K: np.sign(counts.sum(2) - N * K).sum(1)), "each layer moves λ"),
        (moved(lambda counts, N, K: counts.sum((1, 2)) - N * K), "target of one layer"),
        (moved(lambda counts, N, K: more_than(counts, N, K) - 0.5), "here it falls"),
        (moved(lambda counts, N, K: more_than(counts, N, K) + 0.5), "here it grows"),
        (four_fifths, "not multiplying by 0.8"),
        (lambda penalty, counts, N, K: penalty + 0.2 * np.cumsum(np.sign(more_than(counts, N, K))), "0.2 is added"),
        (lambda penalty, counts, N, K: penalty * 1.2 ** np.sign(more_than(counts, N, K)), "each begins with the first"),
        (one_late, "before each step"),
        (moved(lambda counts, N, K: K / counts.shape[2] - 1 + counts.mean((1, 2)) / N), "K/E is the share"),
        (lambda penalty, counts, N, K: penalty * (1 + 0.2 * np.cumsum(np.sign(more_than(counts, N, K)))), "its own"),
        (moved(lambda counts, N, K: np.cumsum(more_than(counts, N, K))), "its own counts"),
        (lambda penalty, counts, N, K: penalty * 1.2 ** np.cumsum(more_than(counts, N, K)), "only the direction"),
    ],
    check.remoe_backward: [
        (relu(awake_dw=False, awake_price=False), "asleep learns nothing"),
        (relu(awake_price=False), "the price belongs to experts that are awake"),
        (relu(own=False), "own loss is missing"),
        (relu(price=False), "dw is missing"),
        (relu(mean=False), "1/N from the mean"),
        (relu(f="1"), "same price"),
        (relu(f="n / N"), "factor E/K is missing"),
        (relu(f="E n / N"), "division by K is missing"),
        (relu(f="weights"), "sum of their weights"),
        (relu(sign=-1), "its gradient is too"),
        (lambda z, dw, penalty, K: relu()(z, dw, 1, K), "the penalty λ is missing"),
        (lambda z, dw, penalty, K: relu()(z, dw, penalty / z.shape[1], K), "not over experts"),
        (relu(f="rows"), "n counts tokens"),
        (lambda z, dw, penalty, K: z * relu()(z, dw, penalty, K), "the slope of relu"),
        (relu(awake_dw=False), "as the price is"),
        (lambda z, dw, penalty, K: (z > 0) * dw * (1 + relu(dw=False)(z, dw, penalty, K)), "does not multiply"),
    ],
    check.experts_of_top_p: [
        (lambda p, P: (ranked_sums(p) < P).sum(1), "left out"),
        (lambda p, P: (ranked_sums(p) - np.sort(p, axis=1)[:, ::-1] <= P).sum(1), "one expert more"),
        (lambda p, P: (p >= P).sum(1), "own probability"),
        (lambda p, P: (np.cumsum(p, axis=1) - p < P).sum(1), "from the largest to the smallest"),
        (lambda p, P: (np.cumsum(np.sort(p, axis=1), axis=1) - np.sort(p, axis=1) < P).sum(1), "the most probable"),
        (lambda p, P: (ranked_sums(p) >= P).sum(1), "count up to it"),
    ],
    check.entropy_backward: [
        (lambda p: entropy(p, sign=1), "wrong way"),
        (lambda p: entropy(p, lambda p, H: 1, softmax=False), "the softmax is left"),
        (lambda p: entropy(p, lambda p, H: 1), "mean term of the softmax"),
        (lambda p: entropy(p, lambda p, H: -np.log(p).mean(1, keepdims=True)), "weighted with p"),
        (lambda p: entropy(p, mean=False), "1/N"),
        (lambda p: entropy(p, lambda p, H: H.mean()), "each has its own H"),
        (lambda p: entropy(p, lambda p, H: -H), "so H is added"),
        (lambda p: entropy(p, lambda p, H: H / p), "p multiplies both"),
        (lambda p: entropy(p) / p, "the factor p"),
        (lambda p: entropy(p, lambda p, H: 1 + H), "cancels in the softmax"),
        (lambda p: entropy(p, lambda p, H: 0), "mean term of the softmax"),
        (lambda p: entropy(p) / np.log(2), "in bits"),
        (lambda p: entropy(p, lambda p, H: 1) * (1 - p), "between its entries"),
    ],
}

RIGHT = {
    check.cosine_backward: [cosine_by_jacobian, cosine_by_quotient],
    check.penalties: [by_cases, by_the_share_of_zeros],
    check.remoe_backward: [relu_by_loop, relu_by_where],
    check.experts_of_top_p: [top_p_by_loop, lambda p, P: 1 + (ranked_sums(p) < P).sum(1)],
    check.entropy_backward: [entropy_by_jacobian, entropy_through_softmax],
}
