"""Wrong answers to the exercises of lesson 15, each with words that its hint must hold."""

import numpy as np

from minimoe.exercises import lesson_15 as check


def divided_by_k(E, K):
    return 1, E / K


def collapse_divided_by_k(E, K):
    return K, E / K


def collapse_as_k(E, K):
    return K, K


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


def another(tokens, t, vocabulary):
    changed = tokens.copy()
    changed[t] = (changed[t] + 1) % vocabulary
    return changed


def last_token_only(model, tokens, vocabulary):
    return not np.allclose(model(another(tokens, -1, vocabulary))[:-1], model(tokens)[:-1])


def first_position_only(model, tokens, vocabulary):
    changed = [model(another(tokens, t, vocabulary))[0] for t in range(1, len(tokens))]
    return not np.allclose(changed, model(tokens)[0])


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


RIGHT = {check.leaks_the_future: [by_prefixes]}
WRONG = {
    check.library_form: [
        (divided_by_k, "f sums to K"),
        (collapse_divided_by_k, "f sums to K"),
        (collapse_as_k, "every chosen expert has f = 1"),
    ],
    check.balance_of_parts: [
        (mean_of_losses, "mean of the parts' losses"),
        (sum_of_losses, "the bug itself"),
        (weighted_losses, "weights the parts' losses"),
        (shares_of_tokens, "f must sum to 1"),
    ],
    check.leaks_the_future: [
        (never, "every position sees every token"),
        (last_token_only, "second-to-last token"),
        (first_position_only, "from token 3 to position 2"),
        (best_token_only, "one of the logits"),
        (changed_place_included, "accuses a causal model"),
        (without_tolerance, "rounding error for a leak"),
    ],
    check.double_softmax_backward: [
        (one_softmax, "there are two"),
        (outer_only, "outer softmax only"),
        (swapped, "the order is swapped"),
        (outer_twice, "inner softmax has its own"),
    ],
}
