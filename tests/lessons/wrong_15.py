"""Wrong answers to the exercises of lesson 15, each with words that its hint must hold, and unusual right ones."""

import numpy as np

from minimoe.exercises import lesson_15 as check


def divided_by_k(E, K):
    return 1, E / K


def collapse_divided_by_k(E, K):
    return K, E / K


def collapse_as_k(E, K):
    return K, K


def without_e(E, K):
    return K / E, 1


def collapse_without_e(E, K):
    return K, 1


def one_term(E, K):
    return K, E / K**2


def with_arrays(E, K):
    f, p = np.full(E, K / E), np.full(E, 1 / E)
    all_to_k = np.arange(E) < K
    return E * f @ p, E * (all_to_k * all_to_k / K).sum()


def as_whole_numbers(E, K):
    return [int(K), int(E)]


def losses_of_parts(assignments, probability, tokens):
    f = assignments / assignments.sum(1, keepdims=True)
    return assignments.shape[1] * (f * probability).sum(1) / tokens


def mean_of_losses(assignments, probability, tokens):
    return losses_of_parts(assignments, probability, tokens).mean()


def sum_of_losses(assignments, probability, tokens):
    return losses_of_parts(assignments, probability, tokens).sum()


def weighted_losses(assignments, probability, tokens):
    return (losses_of_parts(assignments, probability, tokens) * tokens).sum() / tokens.sum()


def shares_of_tokens(assignments, probability, tokens):
    f, p_mean = assignments.sum(0) / tokens.sum(), probability.sum(0) / tokens.sum()
    return len(f) * (f * p_mean).sum()


def without_experts(assignments, probability, tokens):
    return (assignments.sum(0) / assignments.sum() * probability.sum(0) / tokens.sum()).sum()


def mean_of_means(assignments, probability, tokens):
    f = (assignments / assignments.sum(1, keepdims=True)).mean(0)
    return len(f) * (f * (probability / tokens[:, None]).mean(0)).sum()


def mean_of_shares(assignments, probability, tokens):
    f = (assignments / assignments.sum(1, keepdims=True)).mean(0)
    return len(f) * (f * probability.sum(0) / tokens.sum()).sum()


def mean_of_mean_probabilities(assignments, probability, tokens):
    f = assignments.sum(0) / assignments.sum()
    return len(f) * (f * (probability / tokens[:, None]).mean(0)).sum()


def sum_of_probabilities(assignments, probability, tokens):
    return assignments.shape[1] * (assignments.sum(0) / assignments.sum()) @ probability.sum(0)


def by_product(assignments, probability, tokens):
    experts = assignments.shape[-1]
    return experts * np.dot(assignments.sum(0), probability.sum(0)) / (assignments.sum() * probability.sum())


def weighted_means(assignments, probability, tokens):
    f = np.average(assignments / assignments.sum(1, keepdims=True), axis=0, weights=tokens)
    p = np.average(probability / tokens[:, None], axis=0, weights=tokens)
    return sum(len(tokens) * len(f) / len(tokens) * f * p)


def another(tokens, t, vocabulary):
    changed = tokens.copy()
    changed[t] = (changed[t] + 1) % vocabulary
    return changed


def last_token_only(model, tokens, vocabulary):
    return not np.allclose(model(another(tokens, -1, vocabulary))[:-1], model(tokens)[:-1])


def first_position_only(model, tokens, vocabulary):
    changed = [model(another(tokens, t, vocabulary))[0] for t in range(1, len(tokens))]
    return not np.allclose(changed, model(tokens)[0])


def place_before_only(model, tokens, vocabulary):
    pairs = [(model(another(tokens, t, vocabulary)), t) for t in range(1, len(tokens))]
    return any(not np.allclose(after[t - 1], model(tokens)[t - 1]) for after, t in pairs)


def sums_of_logits(model, tokens, vocabulary):
    pairs = [(model(another(tokens, t, vocabulary)).sum(1), t) for t in range(1, len(tokens))]
    return any(not np.allclose(after[:t], model(tokens).sum(1)[:t]) for after, t in pairs)


def likeliest_token(model, tokens, vocabulary):
    pairs = [(model(another(tokens, t, vocabulary)).argmax(1), t) for t in range(1, len(tokens))]
    return any((after[:t] != model(tokens).argmax(1)[:t]).any() for after, t in pairs)


def out_of_the_vocabulary(model, tokens, vocabulary):
    for t in range(1, len(tokens)):
        changed = tokens.copy()
        changed[t] += 1
        if not np.allclose(model(changed)[:t], model(tokens)[:t]):
            return True
    return False


def below_the_vocabulary(model, tokens, vocabulary):
    changed = [np.where(np.arange(len(tokens)) == t, tokens - 1, tokens) for t in range(1, len(tokens))]
    return any(not np.allclose(model(c)[: t + 1], model(tokens)[: t + 1]) for t, c in enumerate(changed))


def always_zero(model, tokens, vocabulary):
    changed = [np.where(np.arange(len(tokens)) == t, 0, tokens) for t in range(1, len(tokens))]
    return any(not np.allclose(model(c)[: t + 1], model(tokens)[: t + 1]) for t, c in enumerate(changed))


def every_later_token(model, tokens, vocabulary):
    """Right too: all tokens after a position are changed together."""
    later = [np.where(np.arange(len(tokens)) > t, (tokens + 2) % vocabulary, tokens) for t in range(len(tokens))]
    return max(abs(model(changed) - model(tokens))[: t + 1].max() for t, changed in enumerate(later)) > 1e-9


def changed_place_included(model, tokens, vocabulary):
    pairs = [(model(another(tokens, t, vocabulary)), t) for t in range(1, len(tokens))]
    return any(not np.allclose(after[: t + 1], model(tokens)[: t + 1]) for after, t in pairs)


def without_tolerance(model, tokens, vocabulary):
    pairs = [(model(another(tokens, t, vocabulary)), t) for t in range(1, len(tokens))]
    return any((after[:t] != model(tokens)[:t]).any() for after, t in pairs)


def best_token_only(model, tokens, vocabulary):
    pairs = [(model(another(tokens, t, vocabulary)), t) for t in range(1, len(tokens))]
    return any((abs(after - model(tokens))[:t, 0] > 1e-9).any() for after, t in pairs)


def never(model, tokens, vocabulary):
    return False


def by_prefixes(model, tokens, vocabulary):
    """Right too: what is said of a beginning must not depend on whether anything follows."""
    whole = model(tokens)
    return not all(np.allclose(model(tokens[:t]), whole[:t], atol=1e-9) for t in range(1, len(tokens)))


def softmax(z):
    p = np.exp(z)
    return p / p.sum(1, keepdims=True)


def back(p, dp):
    return p * (dp - (p * dp).sum(1, keepdims=True))


def one_softmax(z, dp):
    return back(softmax(z), dp)


def outer_only(z, dp):
    return back(softmax(softmax(z)), dp)


def swapped(z, dp):
    return back(softmax(softmax(z)), back(softmax(z), dp))


def outer_twice(z, dp):
    p = softmax(softmax(z))
    return back(p, back(p, dp))


def inner_twice(z, dp):
    return back(softmax(z), back(softmax(z), dp))


def by_matrices(z, dp):
    """Right too: the Jacobian of each softmax, row by row."""
    dz = np.empty_like(z)
    for i, row in enumerate(z):
        inner = np.exp(row) / np.exp(row).sum()
        outer = np.exp(inner) / np.exp(inner).sum()
        dz[i] = (np.diag(inner) - np.outer(inner, inner)) @ (np.diag(outer) - np.outer(outer, outer)) @ dp[i]
    return dz


def with_einsum(z, dp):
    inner = softmax(z)
    outer = softmax(inner)
    d = outer * dp - outer * np.einsum("ne,ne->n", outer, dp)[:, None]
    return inner * d - inner * np.einsum("ne,ne->n", inner, d)[:, None]


RIGHT = {
    check.library_form: [with_arrays, as_whole_numbers],
    check.balance_of_parts: [by_product, weighted_means],
    check.leaks_the_future: [by_prefixes, every_later_token],
    check.double_softmax_backward: [by_matrices, with_einsum],
}
WRONG = {
    check.library_form: [
        (divided_by_k, "f sums to K"),
        (collapse_divided_by_k, "f sums to K"),
        (collapse_as_k, "every chosen expert has f = 1"),
        (without_e, "multiply the sum by E"),
        (collapse_without_e, "multiply the sum by E"),
        (one_term, "not one"),
    ],
    check.balance_of_parts: [
        (mean_of_losses, "mean of the parts' losses"),
        (sum_of_losses, "the bug itself"),
        (weighted_losses, "weights the parts' losses"),
        (shares_of_tokens, "f must sum to 1"),
        (without_experts, "E is missing"),
        (mean_of_means, "f and p̄ are means"),
        (mean_of_shares, "add the assignments first"),
        (mean_of_mean_probabilities, "add the probabilities first"),
        (sum_of_probabilities, "by the number of tokens"),
    ],
    check.leaks_the_future: [
        (never, "every position sees every token"),
        (last_token_only, "second-to-last token"),
        (first_position_only, "from token 3 to position 2"),
        (best_token_only, "one of the logits"),
        (place_before_only, "not only the one before"),
        (sums_of_logits, "not their sum"),
        (likeliest_token, "most likely token"),
        (out_of_the_vocabulary, "% vocabulary"),
        (below_the_vocabulary, "% vocabulary"),
        (always_zero, "differs from the old one"),
        (changed_place_included, "accuses a causal model"),
        (without_tolerance, "rounding error for a leak"),
    ],
    check.double_softmax_backward: [
        (one_softmax, "there are two"),
        (outer_only, "outer softmax only"),
        (swapped, "the order is swapped"),
        (outer_twice, "inner softmax has its own"),
        (inner_twice, "outer softmax has its own"),
    ],
}
