"""The whole of minimoe in one plain file: a sparse mixture-of-experts language model, every gradient written by hand.

``python -m minimoe.reference`` trains a small Mixtral on the texts of data/ for about a minute, then writes a text.
The layers in minimoe/layers compute the same numbers faster, and tests compare them with this file.

A layer is a function. It returns its result and a second function, its backward, which takes the gradient of the
result and returns the gradients of the input and of the weights. dx is short for ∂loss/∂x and has the shape of x.
One rule is used everywhere: y = x W means y_tj = Σ_i x_ti W_ij for every token t, so dx = dy Wᵀ and dW = xᵀ dy.
"""

import math
from collections.abc import Callable
from pathlib import Path
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import DTypeLike, NDArray

Array = NDArray[Any]
Rng = np.random.Generator
Weights = dict[str, Array]  # by name; their gradients have the same names and shapes
Sums = tuple[Any, ...]  # what a router adds up over the tokens; or the gradients of a loss with respect to these sums
Backward = Callable[..., Any]  # from the gradient of a result to the gradients of what it was made from


class Config(NamedTuple):
    """Sizes, named by the letters in which all shapes are written. A batch has N = B·T tokens, one row for each."""

    V: int  # vocabulary
    B: int = 16  # batch: sequences in a training step
    T: int = 64  # time: tokens in a sequence
    D: int = 64  # width of the residual stream
    L: int = 2  # layers
    H: int = 4  # query heads
    G: int = 2  # key/value heads, each shared by H/G query heads
    C: int = 16  # width of a head
    E: int = 8  # experts in a layer
    K: int = 2  # active experts: each token goes to K of the E, with 1 < K < E
    F: int = 64  # width of an expert
    alpha: tuple[float, float, float] = (0.01, 0.01, 0.001)  # coefficients of the balance loss, load loss and z-loss


def init(config: Config, rng: Rng, dtype: DTypeLike = np.float32) -> list[Weights]:
    """The weights of the two ends of the model, then those of each layer. Entries from N(0, 1/inputs) keep the size of
    x. The 2L matrices that write to the residual stream are smaller by √(2L), because their results add up."""
    V, _, _, D, L, H, G, C, E, _, F, _ = config
    normal = rng.standard_normal
    ends = {"embedding": normal((V, D)) / 2, "norm": np.ones(D), "head": normal((D, V)) / 50}
    layers = [
        {
            "attention_norm": np.ones(D),
            "query": normal((D, H * C)) / D**0.5,
            "key": normal((D, G * C)) / D**0.5,
            "value": normal((D, G * C)) / D**0.5,
            "output": normal((H * C, D)) / (2 * L * H * C) ** 0.5,
            "moe_norm": np.ones(D),
            "router": normal((D, E)) / 50,  # small: no expert is preferred yet
            "noise_scale": np.zeros((D, E)),  # zero: every expert gets the same amount of noise
            "gate": normal((E, D, F)) / D**0.5,
            "up": normal((E, D, F)) / D**0.5,
            "down": normal((E, F, D)) / (2 * L * F) ** 0.5,
        }
        for _ in range(L)
    ]
    return [{name: w.astype(dtype) for name, w in part.items()} for part in [ends, *layers]]


def softmax(z: Array) -> tuple[Array, Array, Backward]:
    """z (..., n) → p = exp(z) / Σ exp(z), the same shape, and lse = log Σ exp(z) (..., 1), whose derivative is p.
    ∂p_i/∂z_j = p_i (1[i = j] − p_j), so the backward of p is dz_j = p_j (dp_j − Σ_i p_i dp_i)."""
    peak = z.max(-1, keepdims=True)  # taken out first, so that exp cannot overflow
    lse = peak + np.log(np.exp(z - peak).sum(-1, keepdims=True))
    p = np.exp(z - lse)
    return p, lse, lambda dp: p * (dp - (p * dp).sum(-1, keepdims=True))


def rmsnorm(gain: Array, x: Array) -> tuple[Array, Backward]:
    """x (N, D) → gain ⊙ x̂ (N, D), with x̂ = r x and r = 1 / √(mean(x²) + ε)."""
    r = 1 / np.sqrt((x * x).mean(1, keepdims=True) + 1e-5)  # (N, 1)
    x_hat = r * x

    def backward(dy: Array) -> tuple[Array, Array]:
        """x acts on x̂ directly, and through r: ∂r/∂x_j = −r³ x_j / D. So dx_j = r dx̂_j − r (r x_j) mean(dx̂ ⊙ r x)."""
        dx_hat = gain * dy
        return r * (dx_hat - x_hat * (dx_hat * x_hat).mean(1, keepdims=True)), (dy * x_hat).sum(0)

    return gain * x_hat, backward


def rope(x: Array, direction: int = 1) -> Array:
    """x (..., T, C) → the same shape: at time t, the point (x_j, x_{j+C/2}) is rotated by the angle t · 10000^(−2j/C).
    A query at i times a key at j then depends on i − j only. Backward rotates by −angle, which is the transpose."""
    T, C = x.shape[-2:]
    angle = direction * np.arange(T)[:, None] * 10_000.0 ** (-2 * np.arange(C // 2) / C)  # (T, C/2)
    cos, sin = np.cos(angle).astype(x.dtype), np.sin(angle).astype(x.dtype)
    a, b = np.split(x, 2, axis=-1)
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def attention(w: Weights, x: Array, T: int, config: Config) -> tuple[Array, Backward]:
    """x (N, D) → x + o W_output (N, D), with A = softmax(q kᵀ / √C) and o = A v, where q, k, v come from the normed x.
    H/G query heads share one key/value head: k and v have length 1 on the axis of these heads and are broadcast."""
    H, G, C = config.H, config.G, config.C
    split, merge = (0, 2, 3, 1, 4), (0, 3, 1, 2, 4)  # transpose (B, T, G, H/G, C) to (B, G, H/G, T, C), and back
    u, norm_backward = rmsnorm(w["attention_norm"], x)
    q = rope((u @ w["query"]).reshape(-1, T, G, H // G, C).transpose(split))  # (B, G, H/G, T, C)
    k = rope((u @ w["key"]).reshape(-1, T, G, 1, C).transpose(split))  # (B, G, 1, T, C)
    v = (u @ w["value"]).reshape(-1, T, G, 1, C).transpose(split)
    scores = np.where(np.tri(T, dtype=bool), q @ k.mT / math.sqrt(C), -np.inf)  # causal: query i sees keys j ≤ i
    A, _, softmax_backward = softmax(scores)  # (B, G, H/G, T, T)
    o = (A @ v).transpose(merge).reshape(-1, H * C)

    def backward(dy: Array) -> tuple[Array, Weights]:
        """o = A v gives dA = do vᵀ and dv = Aᵀ do; scores S = q kᵀ / √C give dq = dS k / √C and dk = dSᵀ q / √C.
        A key/value head adds up what comes back from the H/G query heads that share it."""
        do = (dy @ w["output"].T).reshape(-1, T, G, H // G, C).transpose(split)
        dscores = softmax_backward(do @ v.mT) / math.sqrt(C)  # 0 where A is 0: nothing reaches a later key
        dq = rope(dscores @ k, -1).transpose(merge).reshape(-1, H * C)
        dk = rope((dscores.mT @ q).sum(2, keepdims=True), -1).transpose(merge).reshape(-1, G * C)
        dv = (A.mT @ do).sum(2, keepdims=True).transpose(merge).reshape(-1, G * C)
        dx, dgain = norm_backward(dq @ w["query"].T + dk @ w["key"].T + dv @ w["value"].T)
        dw = {"query": u.T @ dq, "key": u.T @ dk, "value": u.T @ dv, "output": o.T @ dy, "attention_norm": dgain}
        return dy + dx, dw  # dy itself, because x is added to the result

    return x + o @ w["output"], backward


def router(w: Weights, x: Array, noise: Array, K: int) -> tuple[Array, Array, Sums, Backward]:
    """x (N, D), noise ξ (N, E) → share (N, E), the weight of each expert; chosen (N, E) bool; sums. Noisy top-k gating.
    A choice has no gradient, but its probability has. If only expert i drew its noise again, it would be chosen with
    probability P_i = Φ((c_i − τ_i) / σ_i), where the threshold τ_i is the K-th largest h of the other experts."""
    c, r = x @ w["router"], x @ w["noise_scale"]  # (N, E), the shape of all that follows
    sigma = np.logaddexp(0, r) + 0.01  # softplus(r) = log(1 + exp(r)); so the scale of the noise is learned
    h = c + noise * sigma  # ξ comes from N(0, 1) in training, and is 0 otherwise
    rank = np.argsort(np.argsort(-h, axis=1, kind="stable"), axis=1)  # 0 for the largest; the first of equals wins
    chosen = rank < K
    share, _, share_backward = softmax(np.where(chosen, h, -np.inf))  # 0 for an expert that is not chosen
    # Among the others, the K-th largest h has rank K if expert i is itself one of the first K; otherwise rank K − 1.
    tau = np.where(chosen, h[rank == K][:, None], h[rank == K - 1][:, None])  # h[rank == K] has one entry per token
    z = (c - tau) / sigma
    P = np.vectorize(NormalDist().cdf, otypes=[x.dtype])(z)
    p, lse, p_backward = softmax(c)
    sums = chosen.sum(0, dtype=x.dtype), p.sum(0), P.sum(0), (lse * lse).sum()

    def backward(dshare: Array, dsums: Sums) -> tuple[Array, Weights]:
        """The gradient of a sum is that of each term. Φ' is the density φ, so P gives dc = q, dσ = −q z and dτ = −q,
        with q = dP φ(z) / σ. τ is the h of another expert, so dτ goes to that h: this is the threshold path."""
        dp, dP, dsquared_lse = dsums
        q = dP * np.exp(-0.5 * z * z) / math.sqrt(2 * math.pi) / sigma
        dh = share_backward(dshare)  # path 1, from the shares
        dh[rank == K] -= (q * chosen).sum(1)  # path 2, from the thresholds: here of the chosen experts,
        dh[rank == K - 1] -= (q * ~chosen).sum(1)  # and here of the others
        # h = c + ξ ⊙ σ passes dh on to c, and dh ⊙ ξ to σ. The derivative of softplus is the sigmoid.
        dc = dh + q + p_backward(dp) + 2 * lse * dsquared_lse * p  # path 3, from P; path 4, from the sums of p and lse²
        dr = (dh * noise - q * z) * (0.5 + 0.5 * np.tanh(0.5 * r))
        return dc @ w["router"].T + dr @ w["noise_scale"].T, {"router": x.T @ dc, "noise_scale": x.T @ dr}

    return share, chosen, sums, backward


def expert(w: Weights, e: int, x: Array) -> tuple[Array, Backward]:
    """x (n, D), the tokens of expert e → h W_down (n, D), with h = silu(a) ⊙ b, a = x W_gate, b = x W_up."""
    a, b = x @ w["gate"][e], x @ w["up"][e]  # (n, F)
    s = 0.5 + 0.5 * np.tanh(0.5 * a)  # sigmoid(a) = 1 / (1 + exp(−a)), without its overflow
    h = a * s * b  # silu(a) ⊙ b, with silu(a) = a sigmoid(a): SwiGLU

    def backward(dy: Array) -> tuple[Array, Array, Array, Array]:
        """s' = s (1 − s), so the derivative of a s is s + a s (1 − s)."""
        dh = dy @ w["down"][e].T
        da, db = dh * b * (s + a * s * (1 - s)), dh * a * s
        return da @ w["gate"][e].T + db @ w["up"][e].T, x.T @ da, x.T @ db, h.T @ dy

    return h @ w["down"][e], backward


def moe(w: Weights, x: Array, noise: Array, config: Config) -> tuple[Array, Sums, Backward]:
    """x (N, D) → x + Σ_e share_e ⊙ Expert_e(u) (N, D), where u is the normed x, and the sums of the router."""
    u, norm_backward = rmsnorm(w["moe_norm"], x)
    share, chosen, sums, router_backward = router(w, u, noise, config.K)
    y, tape = x.copy(), []
    for e in range(config.E):
        rows = np.flatnonzero(chosen[:, e])  # (n,) the tokens that chose expert e; there may be none
        y_e, expert_backward = expert(w, e, u[rows])
        y[rows] += share[rows, e, None] * y_e
        tape.append((rows, y_e, expert_backward))

    def backward(dy: Array, dsums: Sums) -> tuple[Array, Weights]:
        """In share_te Expert_e(u_t), the share gets dshare_te = dy_t · Expert_e(u_t), the expert gets share_te dy_t."""
        du, dshare = np.zeros_like(x), np.zeros_like(share)
        dw = {name: np.zeros_like(w[name]) for name in ("gate", "up", "down")}
        for e, (rows, y_e, expert_backward) in enumerate(tape):
            dshare[rows, e] = (dy[rows] * y_e).sum(1)
            du_e, dw["gate"][e], dw["up"][e], dw["down"][e] = expert_backward(share[rows, e, None] * dy[rows])
            du[rows] += du_e
        du_router, dw_router = router_backward(dshare, dsums)
        dx, dgain = norm_backward(du + du_router)
        return dy + dx, {**dw, **dw_router, "moe_norm": dgain}

    return y, sums, backward


def model(params: list[Weights], tokens: Array, noise: Array, config: Config) -> tuple[Array, list[Sums], Backward]:
    """tokens (B, T), noise (L, N, E) → logits (N, V), the scores of each next token, and the sums of each router."""
    ends, *layers = params
    sums, tape = [], []
    one_hot = np.eye(config.V, dtype=ends["head"].dtype)[tokens.reshape(-1)]  # (N, V)
    x = one_hot @ ends["embedding"]  # (N, D), the row of the embedding that belongs to each token
    for w, layer_noise in zip(layers, noise, strict=True):
        x, attention_backward = attention(w, x, tokens.shape[1], config)
        x, layer_sums, moe_backward = moe(w, x, layer_noise, config)
        sums.append(layer_sums)
        tape.append((attention_backward, moe_backward))
    y, norm_backward = rmsnorm(ends["norm"], x)

    def backward(dlogits: Array, dsums: list[Sums]) -> list[Weights]:
        """The same way back: every backward takes the gradient of its result, and passes on that of its input."""
        dx, dgain = norm_backward(dlogits @ ends["head"].T)
        dlayers: list[Weights] = []
        for (attention_backward, moe_backward), layer_dsums in zip(reversed(tape), reversed(dsums), strict=True):
            dx, dmoe = moe_backward(dx, layer_dsums)
            dx, dattention = attention_backward(dx)
            dlayers.insert(0, dattention | dmoe)
        return [{"embedding": one_hot.T @ dx, "norm": dgain, "head": y.T @ dlogits}, *dlayers]

    return y @ ends["head"], sums, backward


def auxiliary_loss(sums: Sums, N: int, balance: float, load: float, z: float) -> tuple[Any, Sums]:
    """A router's sums over N tokens → its three losses, weighted and added, and the gradient with respect to the sums.
    balance  E Σ_e f_e p̄_e      p̄ = Σ_t p_t / N; f_e, the fraction of choices that fell on e, is a count: no gradient
    load     var(v) / mean(v)²   v = Σ_t P_t, with mean m: ∂/∂v_i = 2 (v_i − m) / (E m²) − 2 var(v) / (E m³)
    z        Σ_t lse_t² / N      keeps the logits small"""
    counts, p, v, squared_lse = sums
    E, f, m = len(counts), counts / counts.sum(), v.mean()
    total = balance * E * (f * p).sum() / N + load * v.var() / m**2 + z * squared_lse / N
    return total, (balance * E * f / N, load * 2 * ((v - m) / m**2 - v.var() / m**3) / E, z / N)


def loss(params: list[Weights], tokens: Array, targets: Array, noise: Array, config: Config) -> tuple[Any, ...]:
    """tokens, targets (B, T), noise (L, N, E) → cross-entropy, total loss, and the gradients of the total.
    Cross-entropy is the mean of lse − z_target over the tokens, z being the logits: dz = (softmax(z) − one-hot) / N."""
    z, sums, backward = model(params, tokens, noise, config)
    p, lse, _ = softmax(z)
    one_hot = np.eye(config.V, dtype=z.dtype)[targets.reshape(-1)]  # (N, V)
    cross_entropy = np.mean(lse - (one_hot * z).sum(1, keepdims=True))
    auxiliary = [auxiliary_loss(layer_sums, len(z), *config.alpha) for layer_sums in sums]
    total = cross_entropy + sum(value for value, _ in auxiliary)
    return cross_entropy, total, backward((p - one_hot) / len(z), [dsums for _, dsums in auxiliary])


def adamw(params: list[Weights], gradients: list[Weights], moments: list[Any], step: int, steps: int) -> None:
    """Changes the weights, in step number ``step`` (from 0) of ``steps``: w ← w − rate · (m̂ / (√ŝ + ε) + decay · w).
    First the gradients are clipped: all together, to a norm of at most 1. m and s are running means of d and d².
    They start at 0, so after n steps they are too small by 1 − βⁿ: m̂ = m / (1 − βⁿ). Matrices decay, gains do not."""
    n, warmup, decay, beta1, beta2 = step + 1, steps / 20, 0.1, 0.9, 0.99
    cosine = 0.5 + 0.5 * math.cos(math.pi * max(0, step - warmup) / (steps - warmup))
    rate = 0.01 * min(n / warmup, cosine)  # up in a line, then down along half a cosine
    norm = math.sqrt(sum((d * d).sum() for part in gradients for d in part.values()))
    for part, dpart, mpart in zip(params, gradients, moments, strict=True):
        for name, w in part.items():
            d, (m, s) = dpart[name] / max(norm, 1.0), mpart[name]
            m += (1 - beta1) * (d - m)
            s += (1 - beta2) * (d * d - s)
            direction = m / (1 - beta1**n) / (np.sqrt(s / (1 - beta2**n)) + 1e-8)
            w -= rate * (direction + (decay * w if w.ndim > 1 else 0))


def train(params: list[Weights], text: Array, config: Config, steps: int, rng: Rng) -> None:
    """Trains the weights, in place, on text (characters,) of integers below V: B random sequences in each step."""
    moments = [{name: (np.zeros_like(w), np.zeros_like(w)) for name, w in part.items()} for part in params]
    for step in range(steps):
        places = rng.integers(len(text) - config.T, size=(config.B, 1)) + np.arange(config.T)  # (B, T)
        noise = rng.standard_normal((config.L, places.size, config.E), np.float32)
        cross_entropy, _, gradients = loss(params, text[places], text[places + 1], noise, config)
        adamw(params, gradients, moments, step, steps)
        if step % 100 == 0 or step == steps - 1:
            print(f"step {step:4}   cross-entropy {cross_entropy:.3f}", flush=True)


def generate(params: list[Weights], text: Array, count: int, temperature: float, config: Config, rng: Rng) -> Array:
    """text (characters,) → the text and ``count`` new characters, each drawn from softmax(logits / temperature)."""
    for _ in range(count):
        seen = text[None, -config.T :]  # (1, T), or shorter
        logits, _, _ = model(params, seen, np.zeros((config.L, seen.size, config.E), np.float32), config)
        p, _, _ = softmax(logits[-1] / temperature)  # a temperature below 1 makes likely characters likelier
        text = np.append(text, rng.choice(config.V, p=p))
    return text


if __name__ == "__main__":  # on a busy machine, set OMP_NUM_THREADS=1: products this small gain nothing from threads
    package = Path(__file__).parent
    folder = package / "_data" if (package / "_data").is_dir() else package.parent / "data"  # installed, or a checkout
    corpus = "".join(path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.txt")))
    characters = sorted(set(corpus))
    rng, config = np.random.default_rng(0), Config(V=len(characters))
    params = init(config, rng)
    train(params, np.array([characters.index(c) for c in corpus]), config, 2000, rng)
    written = generate(params, np.array([characters.index(c) for c in "The "]), 300, 0.5, config, rng)
    print("".join(characters[i] for i in written))
