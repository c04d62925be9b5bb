"""Parity with peft: adapters of a random Mixtral are made there or here, saved, loaded on the other side, and compute
the same.

The numbers of experts, ranks and widths differ from each other, because an axis that is read in the wrong place has the
right size otherwise. Both compute in float32 and add up in different orders, so numbers agree to 1e-5 of the largest.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

from minimoe.core import tree  # noqa: E402
from minimoe.core.config import ModelConfig  # noqa: E402
from minimoe.layers import decoder, lora  # noqa: E402
from minimoe.layers.decoder import Decoder  # noqa: E402
from minimoe.layers.experts import swiglu  # noqa: E402
from minimoe.losses import cross_entropy  # noqa: E402
from minimoe.storage import huggingface  # noqa: E402
from minimoe.tuning import adapter_files, adapters  # noqa: E402

pytestmark = pytest.mark.torch

SIZES: dict[str, Any] = {
    "vocab_size": 37,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 6,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 64,
    "sliding_window": None,
    "initializer_range": 0.2,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
EAGER = {"attn_implementation": "eager", "experts_implementation": "eager"}
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj"]
FUSED = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]

WIDTHS = {"experts": {}, "experts narrower than the rank": {"intermediate_size": 2}, "D = F": {"intermediate_size": 32}}

SETTINGS: dict[str, dict[str, Any]] = {
    "everything": {"target_modules": PROJECTIONS, "target_parameters": FUSED},
    "attention": {"target_modules": PROJECTIONS},
    "some projections": {"target_modules": ["q_proj", "v_proj"]},
    "experts": {"target_modules": [], "target_parameters": FUSED},
    "one tensor of the experts": {"target_modules": ["o_proj"], "target_parameters": FUSED[1:]},
    "the other tensor of the experts": {"target_modules": [], "target_parameters": FUSED[:1]},
    "rsLoRA": {"target_modules": ["k_proj"], "target_parameters": FUSED, "use_rslora": True},
    "ranks by name": {
        "target_modules": PROJECTIONS,
        "target_parameters": FUSED,
        "rank_pattern": {"gate_up_proj": 5, "q_proj": 2},
        "alpha_pattern": {"down_proj": 3, "self_attn.q_proj": 7},
    },
}


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


def base_of(folder: Path, **changes: Any) -> tuple[Any, Decoder, ModelConfig]:
    model = transformers.MixtralForCausalLM(transformers.MixtralConfig(**SIZES | EAGER | changes)).eval()
    model.save_pretrained(folder)
    return model, *huggingface.load_params(folder)


def adapted_there(model: Any, rank: int = 4, **settings: Any) -> Any:
    """The model with adapters of the library, whose A and B are both random."""
    config = peft.LoraConfig(r=rank, lora_alpha=6, init_lora_weights=False, **settings)
    adapted = peft.get_peft_model(model, config).eval()
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.data.uniform_(-0.3, 0.3)
    return adapted


TOKENS = np.random.default_rng(3).integers(0, SIZES["vocab_size"], (2, 17))


def theirs_of(model: Any) -> Any:
    with torch.no_grad():
        return model(torch.tensor(TOKENS)).logits.numpy()


def ours_of(params: Decoder, config: ModelConfig) -> Any:
    return decoder.forward(params, TOKENS, config).logits


def assert_close(ours: Any, theirs: Any, name: str = "") -> None:
    assert np.abs(theirs).max() > 0, f"{name} is zero, which proves nothing"
    assert np.abs(ours - theirs).max() < 1e-5 * np.abs(theirs).max(), name


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("width", WIDTHS)
def test_adapters_of_theirs_compute_the_same_here(tmp_path: Path, settings: str, width: str) -> None:
    model, params, config = base_of(tmp_path / "base", **WIDTHS[width])
    plain = theirs_of(model)
    theirs = adapted_there(model, **SETTINGS[settings])
    theirs.save_pretrained(tmp_path / "adapter")
    ours = adapter_files.load(tmp_path / "adapter", params, config)
    assert_close(ours_of(ours, config), theirs_of(theirs))
    assert_close(ours_of(adapters.merge(ours), config), theirs_of(theirs))
    assert np.abs(theirs_of(theirs) - plain).max() > 0.05 * np.abs(plain).max(), "the adapter changes too little"


def test_corrections_of_every_matrix_agree(tmp_path: Path) -> None:
    model, params, config = base_of(tmp_path / "base")
    theirs = adapted_there(model, **SETTINGS["everything"])
    theirs.save_pretrained(tmp_path / "adapter")
    ours = adapter_files.load(tmp_path / "adapter", params, config)
    compared = 0
    for name, module in theirs.named_modules():
        if not isinstance(module, peft.tuners.lora.LoraLayer):
            continue
        block = ours.blocks[int(name.split("layers.")[1].partition(".")[0])]
        delta = module.get_delta_weight("default").detach().numpy()
        if "self_attn" in name:
            place = PROJECTIONS.index(name.rpartition(".")[2])
            mine = lora.delta(block.attention[place].weight).T  # type: ignore[arg-type]
        else:
            gate, up, down = (lora.delta(stack).swapaxes(1, 2) for stack in block.moe.experts)
            mine = down if module.parameter_name == "down_proj" else np.concatenate([gate, up], axis=1)
        assert_close(mine, delta, name)
        compared += 1
    assert compared == 2 * 6


@pytest.mark.parametrize("parts", [("attention", "experts"), ("attention",), ("experts",)])
@pytest.mark.parametrize("experts", [6, 1])
def test_adapters_of_ours_compute_the_same_there(tmp_path: Path, parts: tuple[str, ...], experts: int) -> None:
    rng = np.random.default_rng(1)
    config = ModelConfig(
        vocab_size=37,
        width=32,
        layers=2,
        heads=4,
        kv_heads=2,
        head_width=8,
        context=64,
        experts=experts,
        active_experts=min(2, experts),
        expert_width=24,
        window=None,
    )
    params = tree.map(lambda leaf: leaf + rng.uniform(-0.1, 0.1, leaf.shape).astype("f"), decoder.init(rng, config))
    ours = adapters.add(params, 4, rng=rng, alpha=3, stabilized=True, parts=parts)
    ours = lora.replace(ours, lambda weight: weight._replace(b=rng.uniform(-0.3, 0.3, weight.b.shape).astype("f")))
    huggingface.save(tmp_path / "base", params, config)
    adapter_files.save(tmp_path / "adapter", ours, config)
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", **EAGER).eval()
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    assert_close(ours_of(ours, config), theirs_of(theirs))
    theirs.merge_and_unload().save_pretrained(tmp_path / "merged")
    merged, _ = huggingface.load_params(tmp_path / "merged")
    mine = dict(tree.named_leaves(adapters.merge(ours)))
    for name, leaf in tree.named_leaves(merged):
        if experts > 1 or "router" not in name:  # a Mistral has no router
            assert_close(mine[name], leaf, name)


def test_gradients_of_every_adapter_agree(tmp_path: Path) -> None:
    model, params, config = base_of(tmp_path / "base")
    theirs = adapted_there(model, **SETTINGS["everything"])
    theirs.save_pretrained(tmp_path / "adapter")
    ours = adapter_files.load(tmp_path / "adapter", params, config)
    targets = np.roll(TOKENS, -1, axis=1)
    logits = theirs(torch.tensor(TOKENS)).logits
    torch.nn.functional.cross_entropy(logits.reshape(-1, 37), torch.tensor(targets.reshape(-1))).backward()
    for name, parameter in theirs.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.grad
    theirs.save_pretrained(tmp_path / "gradient")  # read as if it were an adapter
    expected = adapter_files.load(tmp_path / "gradient", params, config)

    logits, _, cache = decoder.forward(ours, TOKENS, config)
    nats, nats_cache = cross_entropy.forward(logits, targets, None)
    gradient = decoder.backward(ours, cache, cross_entropy.backward(nats_cache, 1 / nats.tokens), None)
    for block, other in zip(gradient.blocks, expected.blocks, strict=True):
        for name, mine, theirs_ in zip("qkvo", block.attention[:4], other.attention[:4], strict=True):
            assert_close(mine.weight.a, theirs_.weight.a, f"{name} A")  # type: ignore[attr-defined]
            assert_close(mine.weight.b, theirs_.weight.b, f"{name} B")  # type: ignore[attr-defined]
        gate, up, down = swiglu.Experts(*block.moe.experts)
        there = other.moe.experts
        assert_close(gate.a + up.a, there.w_gate.a, "A of gate_up_proj, which both matrices use")  # type: ignore[attr-defined]
        for stack, their_stack in zip((gate, up, down), there, strict=True):
            assert_close(stack.b, their_stack.b, "B of the experts")  # type: ignore[attr-defined]
        assert_close(down.a, there.w_down.a, "A of down_proj")  # type: ignore[attr-defined]


def test_two_adapters_side_by_side_are_their_weighted_sum(tmp_path: Path) -> None:
    """The library concatenates adapters of linear layers; its adapters of fused experts cannot be combined there."""
    model, params, config = base_of(tmp_path / "base")
    first = adapted_there(model, rank=3, target_modules=PROJECTIONS)
    first.add_adapter("second", peft.LoraConfig(r=2, lora_alpha=5, target_modules=PROJECTIONS, init_lora_weights=False))
    first.save_pretrained(tmp_path / "two")
    first.add_weighted_adapter(["default", "second"], [0.75, -1.5], "both", combination_type="cat")
    first.set_adapter("both")
    one, two = (adapter_files.load(tmp_path / "two" / name, params, config) for name in ("", "second"))
    ours = adapters.concatenate([one, two], [0.75, -1.5])
    assert_close(ours_of(ours, config), theirs_of(first))
