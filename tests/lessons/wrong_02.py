"""Wrong answers to the exercises of lesson 02, each with words that its hint must hold."""

import numpy as np

from minimoe.exercises import lesson_02 as check


def bias_not_summed(x, W, dy):
    return dy @ W.T, x.T @ dy, dy


def bias_summed_over_columns(x, W, dy):
    return dy @ W.T, x.T @ dy, dy.sum(1)


def bias_averaged(x, W, dy):
    return dy @ W.T, x.T @ dy, dy.mean(0)


def weight_of_the_last_token(x, W, dy):
    for t in range(len(x)):
        dW = np.outer(x[t], dy[t])
    return dy @ W.T, dW, dy.sum(0)


def weight_transposed(x, W, dy):
    return dy @ W.T, dy.T @ x, dy.sum(0)


def weight_averaged(x, W, dy):
    return dy @ W.T, x.T @ dy / len(x), dy.sum(0)


def weight_of_the_first_token(x, W, dy):
    return dy @ W.T, np.outer(x[0], dy[0]), dy.sum(0)


def weight_and_input_swapped(x, W, dy):
    return x.T @ dy, dy @ W.T, dy.sum(0)


def bias_first(x, W, dy):
    return dy.sum(0), dy @ W.T, x.T @ dy


def bias_keeps_its_axis(x, W, dy):
    return dy @ W.T, x.T @ dy, dy.sum(0, keepdims=True)


def bias_forgotten(x, W, dy):
    return dy @ W.T, x.T @ dy


def linear_without_return(x, W, dy):
    dy @ W.T, x.T @ dy, dy.sum(0)


def linear_by_einsum(x, W, dy):
    return np.einsum("nf,df->nd", dy, W), np.einsum("nd,nf->df", x, dy), np.einsum("nf->f", dy)


def linear_by_a_longer_matrix(x, W, dy):
    dWb = np.column_stack([x, np.ones(len(x))]).T @ dy  # the bias is a row of W that meets a constant input of 1
    return [(W @ dy.T).T, dWb[:-1], dWb[-1]]


def softmax_diagonal(p, dp):
    return p * (1 - p) * dp


def softmax_wrong_axis(p, dp):
    return p * (dp - (p * dp).sum(0))


def softmax_numerator(p, dp):
    return p * dp


def softmax_turned_around(p, dp):
    return p * ((p * dp).sum(-1, keepdims=True) - dp)


def softmax_without_p(p, dp):
    return dp - (p * dp).sum(-1, keepdims=True)


def softmax_plain_sum(p, dp):
    return p * (dp - dp.sum(-1, keepdims=True))


def softmax_plain_mean(p, dp):
    return p * (dp - dp.mean(-1, keepdims=True))


def softmax_whole_matrix(p, dp):
    return p * (dp - (p * dp).sum())


def softmax_adds(p, dp):
    return p * (dp + (p * dp).sum(-1, keepdims=True))


def softmax_with_cross_entropy(p, dp):
    return p - dp


def softmax_in_place(p, dp):
    dp -= (p * dp).sum(-1, keepdims=True)
    return p * dp


def softmax_without_return(p, dp):
    p * (dp - (p * dp).sum(-1, keepdims=True))


def softmax_by_jacobian(p, dp):
    return np.array([(np.diag(row) - np.outer(row, row)) @ d for row, d in zip(p, dp, strict=True)])


def softmax_by_two_products(p, dp):
    product = p * dp
    return product - p * np.einsum("nv->n", product)[:, None]


def softmax_by_differences_of_pairs(p, dp):
    return np.einsum("nu,nv,nuv->nu", p, p, dp[:, :, None] - dp[:, None, :])


def tied_first_use(x, W, dy):
    return dy @ W @ W.T, x.T @ (dy @ W)


def tied_second_use(x, W, dy):
    return dy @ W @ W.T, dy.T @ (x @ W)


def tied_stops_half_way(x, W, dy):
    return dy @ W, x.T @ (dy @ W) + dy.T @ (x @ W)


def tied_averaged(x, W, dy):
    return dy @ W @ W.T, (x.T @ (dy @ W) + dy.T @ (x @ W)) / 2


def tied_doubles_the_first(x, W, dy):
    return dy @ W @ W.T, 2 * x.T @ (dy @ W)


def tied_doubles_the_second(x, W, dy):
    return dy @ W @ W.T, 2 * dy.T @ (x @ W)


def tied_swapped(x, W, dy):
    return tied_by_square(x, W, dy)[::-1]


def tied_transposed(x, W, dy):
    dx, dW = tied_by_square(x, W, dy)
    return dx, dW.T


def tied_without_return(x, W, dy):
    dy @ W @ W.T, x.T @ dy @ W + dy.T @ x @ W


def tied_by_square(x, W, dy):
    dM = x.T @ dy  # (D, D)  of M = W Wᵀ
    return dy @ (W @ W.T), (dM + dM.T) @ W


def tied_by_tokens(x, W, dy):
    dx, dW = np.zeros_like(x), np.zeros_like(W)
    for t in range(len(x)):
        dW += np.outer(x[t], dy[t] @ W) + np.outer(dy[t], x[t] @ W)
        dx[t] = W @ (W.T @ dy[t])
    return dx, dW


def masked(p, targets, mask):
    return (p - np.eye(p.shape[1])[targets]) * mask[:, None] / mask.sum()


def padding_counts(p, targets, mask):
    return (p - np.eye(p.shape[1])[targets]) / mask.sum()


def mean_over_all(p, targets, mask):
    return masked(p, targets, mask) * mask.sum() / len(mask)


def without_target(p, targets, mask):
    return p * mask[:, None] / mask.sum()


def sum_instead_of_mean(p, targets, mask):
    return masked(p, targets, mask) * mask.sum()


def in_place(p, targets, mask):
    p[np.arange(len(targets)), targets] -= 1
    return p * mask[:, None] / mask.sum()


def divided_by_padding(p, targets, mask):
    return masked(p, targets, mask) * mask.sum() / max((1 - mask).sum(), 1)


def step_of_ascent(p, targets, mask):
    return -masked(p, targets, mask)


def padding_in_the_mean(p, targets, mask):
    return (p - np.eye(p.shape[1])[targets]) / len(mask)


def target_only(p, targets, mask):
    return masked(p, targets, mask) * np.eye(p.shape[1])[targets]


def gradient_of_p(p, targets, mask):
    return -np.eye(p.shape[1])[targets] / p * mask[:, None] / mask.sum()


def padding_dropped(p, targets, mask):
    return masked(p, targets, mask)[mask > 0]


def masked_without_return(p, targets, mask):
    masked(p, targets, mask)


def masked_by_loops(p, targets, mask):
    dz = np.zeros_like(p)
    for t in np.flatnonzero(mask):
        dz[t] = p[t] / np.count_nonzero(mask)
        dz[t, targets[t]] -= 1 / np.count_nonzero(mask)
    return dz


def masked_by_choice(p, targets, mask):
    one_hot = targets[:, None] == np.arange(p.shape[1])
    return np.where(mask[:, None] == 1, p - one_hot, 0) / mask.sum()


def step_without_factor(value, curvature, epsilon):
    return np.sqrt(epsilon * abs(value / curvature))


def step_of_epsilon(value, curvature, epsilon):
    return epsilon


def step_swapped(value, curvature, epsilon):
    return 2 * np.sqrt(epsilon * abs(curvature / value))


def step_multiplied(value, curvature, epsilon):
    return 2 * np.sqrt(epsilon * abs(value * curvature))


def step_of_one_rounding(value, curvature, epsilon):
    return np.sqrt(2 * epsilon * abs(value / curvature))


def step_without_root(value, curvature, epsilon):
    return epsilon * abs(value / curvature)


def step_squared(value, curvature, epsilon):
    return 4 * epsilon * abs(value / curvature)


def step_with_signs(value, curvature, epsilon):
    with np.errstate(invalid="ignore"):
        return 2 * np.sqrt(epsilon * value / curvature)


def step_backwards(value, curvature, epsilon):
    return -2 * np.sqrt(epsilon * abs(value / curvature))


def step_without_return(value, curvature, epsilon):
    2 * np.sqrt(epsilon * abs(value / curvature))


def step_by_logarithms(value, curvature, epsilon):
    return np.exp((np.log(4) + np.log(epsilon) + np.log(abs(value)) - np.log(abs(curvature))) / 2)


def step_by_search(value, curvature, epsilon):
    low, high = -40.0, 10.0  # the logarithm of h, between which the slope of the bound changes its sign
    for _ in range(60):
        middle = (low + high) / 2
        h = np.exp(middle)
        if abs(curvature) / 2 > 2 * epsilon * abs(value) / h**2:
            high = middle
        else:
            low = middle
    return np.array(np.exp(low))


WRONG = {
    check.linear_with_bias_backward: [
        (bias_not_summed, "add them up"),
        (bias_summed_over_columns, "wrong axis"),
        (bias_averaged, "a mean over tokens"),
        (weight_of_the_last_token, "only the last token"),
        (weight_transposed, "transposed"),
        (weight_averaged, "W acts in full"),
        (weight_of_the_first_token, "the first token's part"),
        (weight_and_input_swapped, "in the wrong order"),
        (bias_first, "in the wrong order"),
        (bias_keeps_its_axis, "keepdims"),
        (bias_forgotten, "returns 2 values, expected 3"),
        (linear_without_return, "`return` missing"),
    ],
    check.softmax_backward: [
        (softmax_diagonal, "diagonal only"),
        (softmax_wrong_axis, "wrong axis"),
        (softmax_numerator, "numerator only"),
        (softmax_turned_around, "wrong sign"),
        (softmax_without_p, "the factor p"),
        (softmax_plain_sum, "the plain sum"),
        (softmax_plain_mean, "the plain mean"),
        (softmax_whole_matrix, "the whole matrix"),
        (softmax_adds, "here it is added"),
        (softmax_with_cross_entropy, "not a target"),
        (softmax_in_place, "in place"),
        (softmax_without_return, "`return` missing"),
    ],
    check.tied_backward: [
        (tied_first_use, "first W only"),
        (tied_second_use, "Wᵀ only"),
        (tied_stops_half_way, "stops half-way"),
        (tied_averaged, "they are averaged"),
        (tied_doubles_the_first, "doubled the path through the first W"),
        (tied_doubles_the_second, "doubled the path through Wᵀ"),
        (tied_transposed, "transposed"),
        (tied_swapped, "in the wrong order"),
        (tied_without_return, "`return` missing"),
    ],
    check.masked_cross_entropy_backward: [
        (padding_counts, "the padding still has a gradient"),
        (mean_over_all, "those that count"),
        (without_target, "−1"),
        (sum_instead_of_mean, "the number of tokens that count"),
        (in_place, "in place"),
        (padding_in_the_mean, "counted in the mean"),
        (divided_by_padding, "the number of padding tokens"),
        (step_of_ascent, "the sign is wrong"),
        (target_only, "only the entry of the target"),
        (gradient_of_p, "the gradient with respect to p"),
        (padding_dropped, "shape (4, 5)"),
        (masked_without_return, "`return` missing"),
    ],
    check.best_step: [
        (step_without_factor, "only a constant factor is missing"),
        (step_of_epsilon, "machine epsilon itself"),
        (step_swapped, "swapped"),
        (step_multiplied, "multiplied under the root"),
        (step_of_one_rounding, "√2 is missing"),
        (step_without_root, "the root is missing"),
        (step_squared, "this is h²"),
        (step_with_signs, "not finite"),
        (step_backwards, "wrong sign"),
        (step_without_return, "`return` missing"),
    ],
}

RIGHT = {
    check.linear_with_bias_backward: [linear_by_einsum, linear_by_a_longer_matrix],
    check.softmax_backward: [softmax_by_jacobian, softmax_by_two_products, softmax_by_differences_of_pairs],
    check.tied_backward: [tied_by_square, tied_by_tokens],
    check.masked_cross_entropy_backward: [masked_by_loops, masked_by_choice],
    check.best_step: [step_by_logarithms, step_by_search],
}
