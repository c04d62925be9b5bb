"""Two mixtures of experts, one on top of the other: the deep mixture of experts of 2013.

    z¹ = Σ_i g¹_i f¹_i(x),    z² = Σ_j g²_j f²_j(z¹),    logits = z² W + b
    f_i(x) = max(0, x W_i + b_i)                              an expert: one linear map with rectification
    g(x)   = softmax(max(0, x A + a) B + b)                   a gate: a small network

Every expert runs on every input: the mixtures are dense. With 4 experts in each layer, there are 16 ways through both.

**The constraint.** Without a constraint, the experts that improve first get all the weight. Therefore a running total
of each gate is kept in training, and an expert whose total exceeds the mean of its layer by a margin is barred: its
weight is 0, and the softmax is taken over the others. ``open_experts`` says who is not barred, and ``count`` adds a
batch to the totals. The totals belong to the caller, who passes them in and gets new ones back. Late in training the
constraint is lifted.

Eigen, Ranzato and Sutskever 2013, arXiv 1312.4314, who bar experts image by image; here it is batch by batch.
Lesson: lessons/62_where_then_what.ipynb
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import DTypeLike

from minimoe.beyond import digits
from minimoe.beyond.digits import Digits
from minimoe.core import tree
from minimoe.core.arrays import Array, array_module, underflow_is_right
from minimoe.core.config import TrainConfig
from minimoe.core.errors import UserError
from minimoe.core.summary import brief
from minimoe.losses import cross_entropy
from minimoe.optim import clipping, optimizer

CANVAS = 16
"""Pixels along each side of the canvas on which a digit is placed."""

PLACES = CANVAS - digits.SIZE + 1
"""Rows, and columns, at which the corner of a digit can be."""


class Gate(NamedTuple):
    w_hidden: Array  # (D, U)
    b_hidden: Array  # (U,)
    w_out: Array  # (U, E)
    b_out: Array  # (E,)


class Mixture(NamedTuple):
    """One layer: a gate, and experts of F outputs each."""

    gate: Gate
    w: Array  # (E, D, F)
    b: Array  # (E, F)


class Stack(NamedTuple):
    first: Mixture
    second: Mixture
    w_class: Array  # (F, V)
    b_class: Array  # (V,)


class PerLayer(NamedTuple):
    """One array for each of the two layers: running totals, or which experts are open."""

    first: Array  # (E¹,)
    second: Array  # (E²,)


class MixtureCache(NamedTuple):
    x: Array  # (N, D)
    hidden: Array  # (N, U)  of the gate, after rectification
    gate: Array  # (N, E)  the weights, 0 for a barred expert
    outputs: Array  # (E, N, F)  of the experts


@brief
class Cache(NamedTuple):
    first: MixtureCache
    second: MixtureCache
    z: Array  # (N, F)  what the class is read from


def init(
    rng: np.random.Generator,
    pixels: int = CANVAS * CANVAS,
    classes: int = 10,
    experts: tuple[int, int] = (4, 4),
    widths: tuple[int, int] = (20, 20),
    hidden: int = 50,
    dtype: DTypeLike = np.float32,
) -> Stack:
    """Weights drawn from N(0, 1/(3 · inputs)), biases 0.

    ``widths`` are the outputs F of an expert in each layer, ``hidden`` the units U of a gate. The weights are smaller
    than those of variance 2/inputs, which would keep the size of the outputs the same from layer to layer. With those
    larger weights, the gates of the experiment below learn less: 0.11 to 0.13 bits about the place and 0.46 to 0.56
    about the class, instead of 0.18 to 0.30 and 0.60 to 0.69. The classification is
    then a little better, 80 to 83 % instead of 76 to 80 %.
    """

    def drawn(*shape: int) -> Array:
        return ((3 * shape[-2]) ** -0.5 * rng.standard_normal(shape)).astype(dtype)

    def mixture(inputs: int, count: int, outputs: int) -> Mixture:
        gate = Gate(drawn(inputs, hidden), np.zeros(hidden, dtype), drawn(hidden, count), np.zeros(count, dtype))
        return Mixture(gate, drawn(count, inputs, outputs), np.zeros((count, outputs), dtype))

    first = mixture(pixels, experts[0], widths[0])
    second = mixture(widths[0], experts[1], widths[1])
    return Stack(first, second, drawn(widths[1], classes), np.zeros(classes, dtype))


def forward(params: Stack, x: Array, opened: PerLayer | None = None) -> tuple[Array, Cache]:
    """x (N, D) → logits (N, V). ``opened`` (E,) bools per layer bar the experts with False; None opens all of them."""
    z1, first = mixture_forward(params.first, x, None if opened is None else opened.first)
    z2, second = mixture_forward(params.second, z1, None if opened is None else opened.second)
    return z2 @ params.w_class + params.b_class, Cache(first, second, z2)


def backward(params: Stack, cache: Cache, dlogits: Array) -> tuple[Array, Stack]:
    """dlogits (N, V) → dx (N, D) and the gradient of every parameter: the layers in reverse order."""
    dz1, dsecond = mixture_backward(params.second, cache.second, dlogits @ params.w_class.T)
    dx, dfirst = mixture_backward(params.first, cache.first, dz1)
    return dx, Stack(dfirst, dsecond, cache.z.T @ dlogits, dlogits.sum(0))


@underflow_is_right
def mixture_forward(params: Mixture, x: Array, opened: Array | None = None) -> tuple[Array, MixtureCache]:
    """x (N, D) → y (N, F), the experts' outputs weighted by the gate; ``opened`` (E,) bars experts.

    Raises:
        UserError: every expert is barred.
    """
    xp = array_module(x)
    hidden = xp.maximum(x @ params.gate.w_hidden + params.gate.b_hidden, 0)  # (N, U)
    logits = hidden @ params.gate.w_out + params.gate.b_out  # (N, E)
    if opened is not None:
        if not opened.any():
            raise UserError(f"all {len(opened)} experts of a layer are barred: leave at least one of them open.")
        logits = xp.where(opened, logits, -np.inf)  # not 0, which may be larger than the logits of the others
    gate = xp.exp(logits - logits.max(1, keepdims=True))
    gate /= gate.sum(1, keepdims=True)
    outputs = xp.maximum(xp.matmul(x, params.w) + params.b[:, None], 0)  # (E, N, F)
    y = xp.einsum("ne,enf->nf", gate, outputs)
    return y, MixtureCache(x, hidden, gate, outputs)


@underflow_is_right
def mixture_backward(params: Mixture, cache: MixtureCache, dy: Array) -> tuple[Array, Mixture]:
    """dy (N, F) → dx (N, D) and the gradient of a layer's parameters.

    y = Σ_e g_e f_e depends on x through every expert and through the gate:

        df_e = g_e dy,    dg_e = dy · f_e,    dlogits = g ⊙ (dg − Σ_e g_e dg_e)

    A barred expert has g_e = 0. So neither its logit nor its weights get a gradient, and the sum is over the others.
    """
    xp = array_module(dy)
    dgate = xp.einsum("nf,enf->ne", dy, cache.outputs)
    dlogits = cache.gate * (dgate - (cache.gate * dgate).sum(1, keepdims=True))  # the softmax of the open experts
    dhidden = (dlogits @ params.gate.w_out.T) * (cache.hidden > 0)
    gate = Gate(cache.x.T @ dhidden, dhidden.sum(0), cache.hidden.T @ dlogits, dlogits.sum(0))

    douter = cache.gate.T[:, :, None] * dy * (cache.outputs > 0)  # (E, N, F)  before the experts' rectification
    dx = dhidden @ params.gate.w_hidden.T  # x reaches y through the gate ...
    dx += xp.matmul(douter, params.w.transpose(0, 2, 1)).sum(0)  # ... and through every expert
    return dx, Mixture(gate, xp.matmul(cache.x.T, douter), douter.sum(1))


def no_totals(params: Stack) -> PerLayer:
    """The running totals before the first batch: all 0."""
    return PerLayer(*(array_module(layer.b).zeros(len(layer.b)) for layer in (params.first, params.second)))


def open_experts(totals: PerLayer, margin: float) -> PerLayer:
    """Bools (E,) per layer: False where a running total exceeds the mean of its layer by more than ``margin``.

    Totals and margin are in images. At least one expert of a layer is open, because not all can be above their mean.

    Raises:
        UserError: the margin is negative or not a number.
    """
    if not margin >= 0:
        raise UserError(f"margin {margin} is not a number of images: choose 0 or more.")
    # The mean itself may be rounded to just below equal totals; the least of them is never barred.
    return tree.map(lambda total: (total - total.mean() <= margin) | (total == total.min()), totals)


def count(totals: PerLayer, cache: Cache) -> PerLayer:
    """The totals after a batch: each expert's gate is summed over the images and added."""
    return PerLayer(totals.first + cache.first.gate.sum(0), totals.second + cache.second.gate.sum(0))


def place(images: Array, rows: Array, columns: Array, canvas: int = CANVAS) -> Array:
    """images (N, S, S), put on empty canvases with their corners at rows (N,) and columns (N,) → (N, canvas²).

    Raises:
        UserError: an image would not be wholly on its canvas.
    """
    size = images.shape[-1]
    low, high = min(rows.min(), columns.min()), max(rows.max(), columns.max())
    if low < 0 or high > canvas - size:
        raise UserError(
            f"a corner at {low if low < 0 else high} puts an image of {size} pixels beyond a canvas of {canvas}: "
            f"choose 0 to {canvas - size}."
        )
    result = np.zeros((len(images), canvas, canvas), images.dtype)
    pixel = np.arange(size)
    down, right = rows[:, None] + pixel, columns[:, None] + pixel  # (N, S)
    result[np.arange(len(images))[:, None, None], down[:, :, None], right[:, None, :]] = images
    return result.reshape(len(images), -1)


def information(gate: Array, labels: Array) -> float:
    """How many bits the choice of an expert tells about a label: gate (N, E) of weights, labels (N,) of integers.

    An expert is thought of as drawn with the probability that the gate gives it. With p(e, l) the share of the images
    that have label l and draw e, the mutual information is Σ p(e, l) log₂ (p(e, l) / (p(e) p(l))): 0 if the gate does
    not depend on the label, and at most log₂ E.
    """
    kinds, place_of = np.unique(labels, return_inverse=True)
    joint = np.zeros((gate.shape[1], len(kinds)))
    np.add.at(joint.T, place_of, gate.astype(np.float64))
    joint /= joint.sum()
    independent = joint.sum(1, keepdims=True) * joint.sum(0)
    seen = joint > 0  # a term with p(e, l) = 0 is 0
    return float((joint[seen] * np.log2(joint[seen] / independent[seen])).sum())


def by_place(gate: Array, rows: Array, columns: Array) -> Array:
    """gate (N, E) of images with their corners at rows and columns (N,) → (E, 9, 9), the mean gate at every place."""
    return by_label(gate, rows * PLACES + columns, PLACES * PLACES).reshape(-1, PLACES, PLACES)


def by_label(gate: Array, labels: Array, kinds: int = 10) -> Array:
    """gate (N, E) of images with labels (N,) → (E, kinds), the mean gate for the images of each label; NaN for none."""
    total = np.zeros((kinds, gate.shape[1]))
    np.add.at(total, labels, gate.astype(np.float64))
    images = np.bincount(labels, minlength=kinds)[:, None]
    return np.divide(total, images, out=np.full_like(total, np.nan), where=images > 0).T


def chance(rng: np.random.Generator, gate: Array, labels: Array, copies: int = 1, times: int = 20) -> float:
    """The mean ``information`` about labels in random order: the value for a gate that knows nothing.

    If each group of ``copies`` consecutive rows shows one image, labels are shuffled between groups, not rows: ten
    views of an image are not ten independent images.
    """
    orders = (rng.permutation(labels[::copies]) for _ in range(times))
    return float(np.mean([information(gate, np.repeat(order, copies)) for order in orders]))


class Seen(NamedTuple):
    """Held-out images on canvases, and what the two gates do with them."""

    rows: Array  # (N,)  where the corner is
    columns: Array  # (N,)
    labels: Array  # (N,)
    gates: PerLayer  # (N, E) per layer
    correct: float  # share of the images

    @property
    def places(self) -> Array:
        """(N,) which of nine regions of the canvas each image is in: 0 at the top left, 8 at the bottom right."""
        third = PLACES / 3
        region: Array = (self.rows // third * 3 + self.columns // third).astype(np.int64)
        return region


@brief
class Run(NamedTuple):
    """A trained stack, and how its gates shared the images during training."""

    params: Stack
    shares: PerLayer  # (steps, E) per layer: mean gate over the batch of a step
    opened: PerLayer  # (steps, E) per layer: who was not barred
    excess: PerLayer  # (steps, E) per layer: running total minus the mean of the layer, after the step
    seen: Seen  # of the held-out images, all experts open


def train(
    train_on: Digits,
    held_out: Digits,
    seed: int = 0,
    margin: float | None = 100.0,
    steps: int = 2500,
    lifted: float = 0.2,
    batch: int = 64,
    rate: float = 3e-3,
) -> Run:
    """Trains a stack to name digits that are somewhere on a canvas.

    Each image of each batch is at a new random place. ``margin`` None trains without the constraint; otherwise it is
    lifted for the last share ``lifted`` of the steps. ``rate`` is the peak learning rate of AdamW.

    Raises:
        UserError: the margin is negative.
    """
    rng = np.random.default_rng(seed)
    params = init(rng)
    recipe = TrainConfig(steps=steps, warmup=0, optimizer="adamw", learning_rate=rate, weight_decay=0.0)
    state = optimizer.init(params, recipe)
    totals = no_totals(params)
    history: list[list[PerLayer]] = [[], [], []]
    for step in range(steps):
        rows, columns = rng.integers(PLACES, size=(2, batch))
        chosen = rng.integers(len(train_on.images), size=batch)
        constrained = margin is not None and step < (1 - lifted) * steps
        opened = open_experts(totals, margin if margin is not None and constrained else np.inf)
        logits, cache = forward(params, place(train_on.images[chosen], rows, columns), opened)
        _, loss_cache = cross_entropy.forward(logits, train_on.labels[chosen])
        _, gradient = backward(params, cache, cross_entropy.backward(loss_cache, 1 / batch))
        clipping.clip(gradient, recipe.clip)
        optimizer.update(params, gradient, state, recipe, step)
        totals = count(totals, cache)
        share = PerLayer(cache.first.gate.mean(0), cache.second.gate.mean(0))
        for kept, value in zip(history, (share, opened, _excess(totals)), strict=True):
            kept.append(value)
    shares, opens, excess = (PerLayer(*map(np.stack, zip(*kept, strict=True))) for kept in history)
    return Run(params, shares, opens, excess, look(np.random.default_rng(seed), params, held_out))


def look(rng: np.random.Generator, params: Stack, held_out: Digits, times: int = 10) -> Seen:
    """Shows every held-out image at ``times`` random places, with all experts open."""
    images, labels = np.repeat(held_out.images, times, axis=0), np.repeat(held_out.labels, times)
    rows, columns = rng.integers(PLACES, size=(2, len(images)))
    logits, cache = forward(params, place(images, rows, columns))
    gates = PerLayer(cache.first.gate, cache.second.gate)
    return Seen(rows, columns, labels, gates, float((logits.argmax(1) == labels).mean()))


def _excess(totals: PerLayer) -> PerLayer:
    return tree.map(lambda total: total - total.mean(), totals)
