"""A mixture of experts between two LSTMs: the language model of 2017 that made mixtures of experts sparse and large.

    e = embedding of the tokens
    y = e + LSTM(e)
    z = y + sigmoid(MoE(y))          K of E experts for each position; called once on the rows of all positions
    h = z + LSTM(z)
    logits = h W                     of the next token

The mixture is applied *convolutionally*: the same layer at every position in time, as a convolution of width 1. Unlike
an LSTM it looks at no other position, so nothing has to wait, and all B·T rows go through it in one call. Called step
by step, the mixture would give the same numbers, but each expert would get 1/T of the rows at a time.

The mixture is ``layers/moe.py`` with noisy top-k gating, and the losses that balance it are those of
``losses/balance.py``: the mixture, its gating and its losses are from the paper of 2017. The experts are SwiGLU; those
of the paper have one hidden layer with ReLU. The dropout of the paper is left out, because these models see every text
only once or twice.

Shazeer et al. 2017, arXiv 1701.06538.  Lesson: lessons/63_between_two_lstms.ipynb
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import DTypeLike

from minimoe.beyond import lstm
from minimoe.beyond.lstm import LSTM
from minimoe.core import tree
from minimoe.core.arrays import Array, array_module
from minimoe.core.config import ModelConfig, TrainConfig
from minimoe.core.errors import UserError
from minimoe.core.summary import brief
from minimoe.layers import embedding, linear, moe
from minimoe.layers.embedding import Embedding
from minimoe.layers.linear import Linear
from minimoe.layers.mode import EVALUATION, Mode
from minimoe.layers.moe import MoE
from minimoe.layers.routing import RouterStats, by_token, experts_by_token
from minimoe.losses import balance, cross_entropy
from minimoe.losses.balance import Coefficients
from minimoe.optim import clipping, optimizer
from minimoe.text import batches
from minimoe.text.batches import Texts
from minimoe.text.tokenizer import Tokenizer


@brief
class LstmMoe(NamedTuple):
    embedding: Embedding
    first: LSTM
    moe: MoE | None  # None for two LSTMs with nothing between them
    second: LSTM
    output: Linear


@brief
class Cache(NamedTuple):
    embedding: embedding.Cache
    first: lstm.Cache
    moe: moe.Cache | None
    squashed: Array | None  # (B, T, D)  sigmoid of what the mixture returns
    second: lstm.Cache
    output: linear.Cache


@brief
class Result(NamedTuple):
    logits: Array  # (B, T, V)
    stats: RouterStats | None  # the router's sums; None without a mixture
    cache: Cache


def init(rng: np.random.Generator, config: ModelConfig, mixture: bool = True, dtype: DTypeLike = np.float32) -> LstmMoe:
    """Fresh parameters. Of ``config``, the vocabulary, the width and the settings of the mixture are used.

    Raises:
        UserError: the router does not allow these settings.
    """
    if mixture:
        moe.check(config)
    D = config.width
    return LstmMoe(
        embedding.init(rng, config.vocab_size, D, std=0.1, dtype=dtype),
        lstm.init(rng, D, D, dtype),
        moe.init(rng, config, dtype=dtype) if mixture else None,
        lstm.init(rng, D, D, dtype),
        linear.init(rng, D, config.vocab_size, dtype=dtype),
    )


def forward(params: LstmMoe, tokens: Array, config: ModelConfig, mode: Mode = EVALUATION) -> Result:
    """tokens (B, T) of integers → logits (B, T, V) of the next token, and the router's sums."""
    e, embedding_cache = embedding.forward(params.embedding, tokens)
    y, first_cache = lstm.forward(params.first, e)
    y += e
    stats = moe_cache = squashed = None
    z = y
    if params.moe is not None:
        mixed, stats, _, moe_cache = moe.forward(params.moe, y, config, mode)  # all B·T rows at once
        squashed = _sigmoid(mixed)
        z = y + squashed
    h, second_cache = lstm.forward(params.second, z)
    h += z
    logits, output_cache = linear.forward(params.output, h)
    cache = Cache(embedding_cache, first_cache, moe_cache, squashed, second_cache, output_cache)
    return Result(logits, stats, cache)


def backward(params: LstmMoe, cache: Cache, dlogits: Array, dstats: RouterStats | None) -> LstmMoe:
    """dlogits (B, T, V), and the gradient with respect to the router's sums → the gradient of every parameter.

    Around each layer runs a residual connection, y = x + f(x), so every gradient arrives twice:

        dx = dy + (dy through f)

    and s = sigmoid(m) gives dm = ds ⊙ s (1 − s). Tokens are integers and have no gradient.
    """
    dh, doutput = linear.backward(params.output, cache.output, dlogits)
    dz, dsecond = lstm.backward(params.second, cache.second, dh)
    dz += dh
    dy, dmoe = dz, None
    if params.moe is not None and cache.moe is not None and cache.squashed is not None:
        dmixed = dz * cache.squashed * (1 - cache.squashed)
        through, dmoe = moe.backward(params.moe, cache.moe, dmixed, dstats)
        dy = dz + through
    de, dfirst = lstm.backward(params.first, cache.first, dy)
    de += dy
    return LstmMoe(embedding.backward(params.embedding, cache.embedding, de), dfirst, dmoe, dsecond, doutput)


def gates(cache: Cache) -> Array:
    """(B·T, E): the weight that every position gives to every expert, 0 for an expert that was not chosen.

    Raises:
        UserError: the model has no mixture.
    """
    if cache.moe is None:
        raise UserError("this model has no mixture between its LSTMs, so there are no weights: train one that has.")
    routing = cache.moe.routing
    weights = np.zeros((len(routing.place), len(routing.counts)))
    np.put_along_axis(weights, experts_by_token(routing), by_token(routing.weight, routing.place), axis=1)
    return weights


class Setting(NamedTuple):
    """One model of the experiment: what is between the LSTMs, and how strongly its load is balanced."""

    name: str
    experts: int  # 0 for two LSTMs alone
    active: int = 4
    expert_width: int = 32
    coefficients: Coefficients = Coefficients(importance=0.1, load=0.1)  # as in the paper


@brief
class Run(NamedTuple):
    """A trained model: its perplexity on held-out text, and the load of its experts."""

    params: LstmMoe
    config: ModelConfig
    perplexity: float  # exp of the mean nats per character
    loads: Array  # (steps, E)  share of the assignments in each step; (steps, 0) without a mixture

    @property
    def busiest(self) -> float:
        """The load of the busiest expert over the mean load, averaged over the last tenth of the steps; 1 is even."""
        if not self.loads.shape[1]:
            return 1.0
        last = self.loads[-max(len(self.loads) // 10, 1) :]
        return float((last.max(1) / last.mean(1)).mean())


class Prepared(NamedTuple):
    """A corpus, read and encoded once for several runs."""

    texts: Texts
    tokenizer: Tokenizer
    context: int


def prepare(corpus: str = "data", context: int = 32) -> Prepared:
    """The characters of a corpus as tokens, in sequences of ``context``; see ``text.batches.prepare``."""
    texts, _, tokenizer = batches.prepare(corpus, TrainConfig(), context)
    return Prepared(texts, tokenizer, context)


def train(
    data: Prepared,
    setting: Setting,
    seed: int = 0,
    steps: int = 400,
    width: int = 48,
    batch: int = 16,
    rate: float = 2e-2,
) -> Run:
    """Trains one model with AdamW and measures its perplexity on the held-out tenth of the texts.

    Raises:
        UserError: the setting has more active experts than experts.
    """
    if 0 < setting.experts < setting.active:
        raise UserError(f"{setting.active} of {setting.experts} experts cannot be active: choose at most all of them.")
    mixture = setting.experts > 0
    config = ModelConfig(
        vocab_size=data.tokenizer.vocab_size,
        width=width,
        context=data.context,
        experts=max(setting.experts, 1),
        active_experts=setting.active if mixture else 1,
        expert_width=setting.expert_width,
        noisy_gating=setting.experts > setting.active,  # if every expert is chosen, there is nothing to explore
    )
    rng = np.random.default_rng(seed)
    params = init(rng, config, mixture)
    recipe = TrainConfig(
        steps=steps, batch=batch, warmup=min(20, steps), optimizer="adamw", learning_rate=rate, weight_decay=0.0
    )
    state = optimizer.init(params, recipe)
    loads = []
    source = data.texts.batches(batch, data.context, seed)
    for step in range(steps):
        tokens, targets = next(source)
        noise = None
        if mixture:
            noise = moe.router_of(config).draw_noise(rng, config, tokens.shape, np.float32)
        result = forward(params, tokens, config, Mode(training=True, noise=noise))
        _, loss_cache = cross_entropy.forward(result.logits, targets)
        dlogits = cross_entropy.backward(loss_cache, 1 / targets.size).reshape(result.logits.shape)
        dstats = None if result.stats is None else balance.loss(result.stats, setting.coefficients)[1]
        gradient = backward(params, result.cache, dlogits, dstats)
        clipping.clip(gradient, recipe.clip)
        optimizer.update(params, gradient, state, recipe, step)
        if result.stats is not None:
            loads.append(result.stats.assignments / result.stats.assignments.sum())
    return Run(params, config, perplexity(params, config, data), np.array(loads).reshape(steps, -1))


def perplexity(params: LstmMoe, config: ModelConfig, data: Prepared) -> float:
    """exp of the mean nats per character over the held-out text, cut into sequences of the context's length."""
    nats, tokens = 0.0, 0
    for document in data.texts.validation:
        count = (len(document) - 1) // data.context
        cut = document[: count * data.context + 1]
        inputs, targets = cut[:-1].reshape(count, -1), cut[1:].reshape(count, -1)
        loss, _ = cross_entropy.forward(forward(params, inputs, config).logits, targets)
        nats, tokens = nats + float(loss.total), tokens + targets.size
    return float(np.exp(nats / tokens))


def active_parameters(params: LstmMoe, config: ModelConfig) -> tuple[int, int]:
    """The parameters that one position uses, and all of them; embedding and output layer are not counted."""
    within = tree.size((params.first, params.second))
    if params.moe is None:
        return within, within
    router = params.moe.router.w_gate.size  # the noise serves only training
    active = moe.experts_of(config).active_parameters(config)
    return within + router + active, within + router + tree.size(params.moe.experts)


def _sigmoid(m: Array) -> Array:
    result: Array = 0.5 + 0.5 * array_module(m).tanh(0.5 * m)  # without overflow for any finite m
    return result
