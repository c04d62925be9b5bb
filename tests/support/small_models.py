"""Decoders, batches and mixtures so small that each of their gradients can be compared with one taken another way."""

from typing import Any

import numpy as np
from hypothesis import strategies as st

from minimoe.core import tree
from minimoe.core.config import ModelConfig
from minimoe.layers import decoder, moe
from minimoe.layers.decoder import Decoder
from minimoe.layers.exchange import LocalExchange
from minimoe.layers.moe import MoE
from minimoe.losses.balance import Coefficients
from minimoe.losses.objective import Objective, Shard, Totals, loss_and_gradient
from minimoe.parallel import exchange
from minimoe.parallel.group import Group
from minimoe.parallel.launch import launch

EVERY_LOSS = Coefficients(balance=0.5, importance=0.3, load=0.4, z=0.2, sequence=0.6)
SEQUENCES = 6


def drawn(rng: np.random.Generator, config: ModelConfig) -> Decoder:
    """A float64 decoder away from the zeros and ones that it starts at."""
    return tree.map(lambda leaf: leaf + 0.3 * rng.standard_normal(leaf.shape), decoder.init(rng, config, np.float64))


def mixture(experts: int = 5, active: int = 2, renormalize: bool = True, noisy: bool = True) -> ModelConfig:
    """D 4, F 3; one active expert of several has no use for renormalised weights."""
    return ModelConfig(
        width=4,
        experts=experts,
        active_experts=active,
        expert_width=3,
        renormalize=renormalize and (active > 1 or experts == 1),
        noisy_gating=noisy,
    )


def drawn_mixture(rng: np.random.Generator, config: ModelConfig) -> MoE:
    """A float64 mixture away from the zeros that its noise starts at."""
    params = moe.init(rng, config, dtype=np.float64)
    return tree.map(lambda leaf: leaf + 0.5 * rng.standard_normal(leaf.shape), params)


mixtures = st.fixed_dictionaries(
    {
        "batch": st.integers(1, 2),
        "time": st.integers(1, 5),
        "experts": st.integers(1, 5),
        "active": st.integers(1, 5),
        "noisy": st.booleans(),
        "renormalize": st.booleans(),
        "capacity_factor": st.none() | st.sampled_from([0.01, 0.5, 1.0, 2.0]),
        "seed": st.integers(0, 999),
    }
)


def batch_of(rng: np.random.Generator, config: ModelConfig, masked: bool = True, noisy: bool = True) -> Shard:
    """A batch of ``SEQUENCES``; ``masked``, they have lengths of their own, from none to all of the context."""
    tokens, targets = rng.integers(config.vocab_size, size=(2, SEQUENCES, config.context))
    noise = rng.standard_normal((config.layers, SEQUENCES, config.context, config.experts)) if noisy else None
    lengths = rng.integers(config.context + 1, size=SEQUENCES)
    mask = (np.arange(config.context) < lengths[:, None]).astype(float) if masked else None
    return Shard(tokens, targets, noise, mask)


def split(batch: Shard, sizes: list[int]) -> list[Shard]:
    """The sequences of a batch in shards of these sizes."""
    shards, start = [], 0
    for size in sizes:
        rows = slice(start, start := start + size)
        shards.append(
            Shard(
                batch.tokens[rows],
                batch.targets[rows],
                None if batch.noise is None else batch.noise[:, rows],
                None if batch.mask is None else batch.mask[rows],
                None if batch.loss_mask is None else batch.loss_mask[rows],
            )
        )
    return shards


def gradient_in_a_group(
    size: int,
    params: Decoder,
    shards: list[Shard],
    config: ModelConfig,
    goal: Objective,
    recompute: bool = False,
    processes: bool | None = None,
    owners: bool = False,
) -> tuple[Totals, Decoder]:
    """``loss_and_gradient`` by ``size`` workers, whose parts are put together again.

    With ``owners``, each worker owns some of the experts, and rows travel between them.
    """
    by_expert = set(tree.marked(params, "by_expert")) if owners else set()

    def work(group: Group, mine: list[Shard]) -> tuple[Totals, Decoder]:
        totals, part = loss_and_gradient(
            params,
            mine,
            config,
            goal,
            recompute=recompute,
            group=group,
            exchange=exchange.between(group) if owners else LocalExchange,
        )
        own, to_add_up = exchange.split(dict(tree.named_leaves(part)), by_expert)
        owned = group.reduce_scatter(to_add_up, group.share(to_add_up))
        named = {name: leaf for one in group.all_gather(owned) for name, leaf in one.items()}
        everyones = group.all_gather(own)
        named |= {name: np.concatenate([one[name] for one in everyones]) for name in own}
        return totals, tree.rebuild(params, [named[name] for name, _ in tree.named_leaves(params)])

    row_bytes = 8 * config.active_experts * config.width * sum(shard.tokens.size for shard in shards)
    with launch(size, work, dict(tree.named_leaves(params)), processes, row_bytes) as run:
        result: tuple[Totals, Decoder] = run([shards[rank::size] for rank in range(size)])
    return result


def assert_close(ours: Any, theirs: Any, atol: float = 1e-12) -> None:
    """Two trees of arrays, leaf by leaf."""
    for (name, a), b in zip(tree.named_leaves(ours), tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=atol, err_msg=name)


def assert_same(ours: tuple[Any, Decoder], theirs: tuple[Any, Decoder]) -> None:
    """Two results of ``loss_and_gradient``, to rounding."""
    np.testing.assert_allclose(ours[0].total, theirs[0].total, rtol=1e-13)
    assert ours[0].dropped == theirs[0].dropped
    assert_close(ours[1], theirs[1], atol=1e-13)


def identical(ours: Any, theirs: Any) -> bool:
    """Whether two trees of arrays are equal to the bit."""
    return all((a == b).all() for a, b in zip(tree.leaves(ours), tree.leaves(theirs), strict=True))
