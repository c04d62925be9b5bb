"""What a run with a bound of memory did: hits, bytes read per token, what took the time, and what a Mixtral would need.

The chance level of the hit rate is what a router that draws its experts evenly and independently for each token would
give: the share of a layer's experts that stay in memory until the layer's next turn.
"""

from __future__ import annotations

from minimoe.core import resources
from minimoe.core.presets import PRESETS
from minimoe.cost import offloading
from minimoe.cost.offloading import shown
from minimoe.storage.bounded import Bounded
from minimoe.storage.expert_cache import READING, WRITING, Statistics

EXAMPLE = "mixtral-8x7b"


def report(model: Bounded) -> str:
    """The report in lines; it ends the current phase of the model's cache."""
    model.cache.end()
    phases = {name: phase for name in (READING, WRITING) if (phase := model.cache.phases.get(name)) is not None}
    lines = memory_lines(model)
    for name, phase in phases.items():
        lines += phase_lines(name, phase, chance(model))
    if phases:
        lines += example_lines(list(phases.values())[-1], bits_of_expert(model), model.budget.slots, model)
    return "\n".join(lines)


def chance(model: Bounded) -> float:
    """The share of uses that would be hits if experts were drawn evenly, for one token after the other."""
    own = model.cache.shares
    return 1.0 if model.budget.slots == model.budget.experts else sum(own) / len(own) / model.config.experts


def memory_lines(model: Bounded) -> list[str]:
    """What the bound was spent on, and the peak that was measured."""
    budget, peak = model.budget, resources.peak_memory_bytes()
    held = f"{budget.slots} of {budget.experts} experts {shown(budget.slots * budget.expert)}"
    lines = [
        f"memory   bound {shown(budget.bound)}: always {shown(budget.resident)}, {held}, for computing "
        f"{shown(budget.matrix + budget.work + budget.keys)}"
    ]
    if peak is not None and model.before:
        above = peak - model.before
        lines.append(
            f"         peak {shown(above)} above the {shown(model.before)} of Python and its libraries: "
            f"{above / budget.bound:.0%} of the bound"
        )
    return lines


def phase_lines(name: str, phase: Statistics, chance: float) -> list[str]:
    """Hits and bytes of a phase, and what took its time."""
    each = f"{phase.seconds / phase.tokens:.3g} s a token" if phase.tokens else "no token"
    bandwidth = f"; files came at {shown(phase.bytes / phase.reading)}/s" if phase.reading else ""
    rest = max(0.0, phase.seconds - phase.reading - phase.unpacking)
    shares = {"files": phase.reading, "unpacking": phase.unpacking, "products and all else": rest}
    longest = max(shares, key=lambda part: shares[part])
    whole = max(sum(shares.values()), 1e-9)
    return [
        f"{name:<8} {phase.tokens:,} tokens, {each}: {phase.hits:,} of {phase.uses:,} uses of an expert were hits "
        f"({phase.hit_rate:.1%}, by chance {chance:.1%}), {shown(phase.bytes_per_token)} read per token",
        f"         {', '.join(f'{part} {of / whole:.0%}' for part, of in shares.items())}: most of the time goes to "
        f"{longest}{bandwidth}",
    ]


def bits_of_expert(model: Bounded) -> float:
    """Bits for each weight of an expert in the files."""
    return 8 * model.budget.expert / offloading.expert_weights(model.config)


def example_lines(phase: Statistics, bits: float, slots: int, model: Bounded) -> list[str]:
    """By calculation: a Mixtral 8x7B with these bits, this hit rate and this bandwidth."""
    config = PRESETS[EXAMPLE].config
    per_token = model.config.mixture_layers * model.config.active_experts
    uses = phase.uses / max(phase.tokens, 1) / per_token  # 1 token by token
    size = offloading.bytes_per_token(config, bits, phase.hit_rate) * uses
    every = offloading.bytes_per_token(config, bits)
    if not phase.reading:
        return [f"{EXAMPLE} at {bits:.3g} bits: {shown(every)} of experts per token without a cache, 0 read here"]
    seconds = size / (phase.bytes / phase.reading)
    share = slots / model.budget.experts
    memory = share * config.layers * config.experts * offloading.expert_weights(config) * bits / 8
    return [
        f"{EXAMPLE} by calculation, at {bits:.3g} bits a weight, this hit rate and this bandwidth: {shown(size)} and "
        f"{seconds:.3g} s of reading per token ({shown(every)} without a cache), with {shown(memory)} of experts held"
    ]
