"""Folders in the Hugging Face layout: read what transformers wrote, write what it reads, refuse everything else.

tests/golden holds a tiny Mixtral as transformers saved it, and what PyTorch computed with it; tests/golden/make.py made
it, and make_families.py the same for the other families. So parity is tested here without either.
tests/peers/test_transformers.py compares many more shapes with the real thing.
"""

import dataclasses
import json
import os
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from minimoe.compression import quantize
from minimoe.core import resources, tree
from minimoe.core.config import ModelConfig
from minimoe.core.errors import UserError
from minimoe.inference import generation
from minimoe.layers import decoder
from minimoe.layers.decoder import Decoder
from minimoe.layers.mode import Mode
from minimoe.layers.routers import noisy_top_k
from minimoe.losses import balance, cross_entropy
from minimoe.storage import huggingface, safetensors_file
from minimoe.text.tokenizer import build

GOLDEN = Path(__file__).parent.parent / "golden"
EXPECTED = load_file(GOLDEN / "expected.safetensors")
AUXILIARY = 0.1  # as in golden/make.py

SHAPES: dict[str, dict[str, Any]] = {
    "as it is": {},
    "sliding window": {"window": 3},
    "tied embeddings": {"tied_embeddings": True},
    "one expert": {"experts": 1, "active_experts": 1},
    "every expert": {"active_experts": 5},
    "one active expert, which cannot be trained": {"active_experts": 1},
    "one key head": {"kv_heads": 1, "rope_theta": 123.5, "norm_eps": 0.01},
    "an OLMoE": {"width": 32, "qk_norm": "whole", "renormalize": False},
    "an OLMoE with one expert": {"width": 32, "qk_norm": "whole", "experts": 1, "active_experts": 1},
    "a Qwen3-MoE": {"qk_norm": "per_head", "layers": 3, "dense_layers": 2, "dense_width": 4, "window": 3},
    "a DeepSeekMoE": {"width": 32, "shared_experts": 2, "layers": 3, "dense_layers": 1, "dense_width": 4},
    "a DeepSeekMoE without either": {"width": 32, "renormalize": False, "tied_embeddings": True},
}
FAMILIES = ("olmoe", "qwen3_moe", "deepseek")


def model(small: ModelConfig, **changes: Any) -> tuple[Decoder, ModelConfig]:
    """A small model without noise, whose gains are not all one."""
    config = dataclasses.replace(small, noisy_gating=False, **changes)
    rng = np.random.default_rng(1)
    params = decoder.init(rng, config)
    params = tree.map(lambda leaf: leaf * rng.uniform(0.5, 2, leaf.shape).astype(np.float32), params)
    if config.experts == 1 and config.qk_norm == "none":  # a router that has no choice is not saved
        for block in params.blocks:
            block.moe.router.w_gate[...] = 0
    return params, config


def folder_of(path: Path, small: ModelConfig, **changes: Any) -> Path:
    params, config = model(small, **changes)
    huggingface.save(path, params, config)
    return path


def reconfigure(folder: Path, **changes: Any) -> None:
    """Changes fields of config.json; ... leaves one out."""
    values = json.loads((folder / "config.json").read_text()) | changes
    kept = {name: value for name, value in values.items() if value is not ...}
    (folder / "config.json").write_text(json.dumps(kept))


def retensor(folder: Path, changes: dict[str, Any]) -> None:
    """Changes tensors of the model; ... leaves one out."""
    tensors = load_file(folder / "model.safetensors") | changes
    save_file({name: t for name, t in tensors.items() if t is not ...}, folder / "model.safetensors")


def assert_same(ours: Decoder, other: Decoder) -> None:
    for (name, a), b in zip(tree.named_leaves(ours), tree.leaves(other), strict=True):
        assert a.dtype == b.dtype == np.float32
        np.testing.assert_array_equal(a, b, err_msg=name)


def close(ours: Any, theirs: Any) -> bool:
    """Within 1e-5 of the largest value: the rounding of float32, in another order of sums."""
    return bool(np.abs(ours - theirs).max() < 1e-5 * np.abs(theirs).max())


# Against the library


def test_golden_folder_is_read_as_it_was_made() -> None:
    params, config = huggingface.load_params(GOLDEN / "mixtral")
    assert config == ModelConfig(
        vocab_size=13,
        width=6,
        layers=2,
        heads=2,
        kv_heads=1,
        head_width=4,
        context=32,
        window=3,
        experts=3,
        active_experts=2,
        expert_width=4,
        noisy_gating=False,
        rope_theta=100.0,
    )
    assert all(leaf.dtype == np.float32 and leaf.flags.c_contiguous for leaf in tree.leaves(params))


def test_logits_and_router_logits_are_those_of_the_library() -> None:
    params, config = huggingface.load_params(GOLDEN / "mixtral")
    logits, _, cache = decoder.forward(params, EXPECTED["tokens"], config, Mode(mask=EXPECTED["mask"]))
    counted = EXPECTED["mask"] > 0
    assert close(logits[counted], EXPECTED["logits"][counted])
    for block, done, theirs in zip(params.blocks, cache.blocks, EXPECTED["router_logits"], strict=True):
        [(ours, _)] = noisy_top_k.compared(block.moe.router, done.moe.router)
        assert close(ours[counted.reshape(-1)], theirs[counted.reshape(-1)])


def test_losses_and_every_gradient_are_those_of_the_library() -> None:
    params, config = huggingface.load_params(GOLDEN / "mixtral")
    theirs, _ = huggingface.load_params(GOLDEN / "gradients")
    tokens, mask = EXPECTED["tokens"], EXPECTED["mask"]
    logits, routed, cache = decoder.forward(params, tokens, config, Mode(mask=mask))
    predicted = np.zeros_like(mask)
    predicted[:, :-1] = mask[:, 1:]
    loss, loss_cache = cross_entropy.forward(logits, np.roll(tokens, -1, axis=1), predicted)
    auxiliary, dstats = balance.pooled(routed.stats, AUXILIARY)
    assert loss.total / loss.tokens == pytest.approx(EXPECTED["cross_entropy"], rel=1e-6)
    assert auxiliary == pytest.approx(EXPECTED["auxiliary"], rel=1e-6)

    dlogits = cross_entropy.backward(loss_cache, 1 / loss.tokens)
    ours = decoder.backward(params, cache, dlogits, [dstats] * config.layers)
    wrong = [
        name
        for (name, a), b in zip(tree.named_leaves(ours), tree.leaves(theirs), strict=True)
        if not (b.any() and close(a, b))
    ]
    assert wrong == []


def test_greedy_text_is_that_of_the_library_with_and_without_a_cache() -> None:
    params, config = huggingface.load_params(GOLDEN / "mixtral")
    theirs = EXPECTED["greedy"].tolist()
    ids = theirs[:3]
    while len(ids) < len(theirs):
        logits, _, _ = decoder.forward(params, np.array([ids]), config)
        ids.append(int(logits[0, -1].argmax()))
    assert ids == theirs
    assert [*theirs[:3], *generation.generate(params, config, theirs[:3], tokens=9, temperature=0)] == theirs
    assert len(set(ids)) > 6, "a text that repeats itself would prove little"


def test_the_names_and_shapes_on_disk_are_those_that_the_library_writes(tmp_path: Path) -> None:
    params, config = huggingface.load_params(GOLDEN / "mixtral")
    huggingface.save(tmp_path / "saved", params, config)
    ours, theirs = load_file(tmp_path / "saved/model.safetensors"), load_file(GOLDEN / "gradients/model.safetensors")
    assert {n: t.shape for n, t in ours.items()} == {n: t.shape for n, t in theirs.items()}
    index = json.loads((GOLDEN / "mixtral/model.safetensors.index.json").read_text())
    assert ours.keys() == index["weight_map"].keys()


@pytest.mark.parametrize("family", FAMILIES)
def test_every_number_of_another_family_is_that_of_pytorch(family: str) -> None:
    """Logits, router logits, loss and every gradient: of an OLMoE, a Qwen3-MoE and a DeepSeekMoE."""
    params, config = huggingface.load_params(GOLDEN / family)
    expected = load_file(GOLDEN / family / "expected.safetensors")
    tokens, mask = expected["tokens"], expected["mask"]
    logits, routed, cache = decoder.forward(params, tokens, config, Mode(mask=mask))
    counted = mask > 0
    assert close(logits[counted], expected["logits"][counted])
    first = config.dense_layers
    assert len(routed.stats) == len(expected["router_logits"]) == config.layers - first
    for layer, done, theirs in zip(
        decoder.mixtures(params), cache.blocks[first:], expected["router_logits"], strict=True
    ):
        [(ours, _)] = noisy_top_k.compared(layer.router, done.moe.router)
        assert close(ours[counted.reshape(-1)], theirs[counted.reshape(-1)])

    predicted = np.zeros_like(mask)
    predicted[:, :-1] = mask[:, 1:]
    loss, loss_cache = cross_entropy.forward(logits, np.roll(tokens, -1, axis=1), predicted)
    assert loss.total / loss.tokens == pytest.approx(expected["cross_entropy"], rel=1e-6)
    gradient = decoder.backward(params, cache, cross_entropy.backward(loss_cache, 1 / loss.tokens))
    ours_by_name = dict(huggingface.layout(gradient, config, family))
    assert {f"gradient.{name}" for name in ours_by_name} == {n for n in expected if n.startswith("gradient.")}
    wrong = [
        name
        for name, ours in ours_by_name.items()
        if not (expected[f"gradient.{name}"].any() and close(ours, expected[f"gradient.{name}"]))
    ]
    assert wrong == []


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_text_of_another_family_is_that_of_pytorch(family: str) -> None:
    params, config = huggingface.load_params(GOLDEN / family)
    theirs = load_file(GOLDEN / family / "expected.safetensors")["greedy"].tolist()
    assert [*theirs[:3], *generation.generate(params, config, theirs[:3], tokens=9, temperature=0)] == theirs
    assert len(set(theirs)) > 6, "a text that repeats itself would prove little"


@pytest.mark.parametrize("family", FAMILIES)
def test_another_family_is_read_as_what_it_is_and_written_under_the_same_names(tmp_path: Path, family: str) -> None:
    params, config = huggingface.load_params(GOLDEN / family)
    own: dict[str, dict[str, Any]] = {
        "olmoe": {"qk_norm": "whole", "head_width": 4, "layers": 2, "expert_width": 6, "norm_eps": 1e-5},
        "qwen3_moe": {"qk_norm": "per_head", "head_width": 6, "renormalize": True, "dense_layers": 1, "dense_width": 6},
        "deepseek": {"head_width": 4, "dense_layers": 1, "dense_width": 6, "shared_experts": 2},
    }
    common = {"vocab_size": 13, "width": 8, "layers": 3, "heads": 2, "kv_heads": 1, "context": 32, "experts": 3}
    usual = {"expert_width": 4, "renormalize": False, "noisy_gating": False, "rope_theta": 100.0, "norm_eps": 1e-6}
    assert config == ModelConfig(**common | usual | own[family])
    huggingface.save(tmp_path / "saved", params, config)
    ours, theirs = load_file(tmp_path / "saved/model.safetensors"), _widened(GOLDEN / family / "model.safetensors")
    assert ours.keys() == theirs.keys()
    for name, values in theirs.items():
        np.testing.assert_array_equal(ours[name], values, err_msg=name)
    assert json.loads((tmp_path / "saved/config.json").read_text())["model_type"] == family


def _widened(path: Path) -> dict[str, Any]:
    """The tensors of a file, in float32."""
    found = {}
    for name, stored in safetensors_file.describe(path).items():
        found[name] = np.zeros(stored.shape, np.float32)
        safetensors_file.copy(stored, found[name])
    return found


# There and back


@pytest.mark.parametrize("shape", SHAPES)
def test_save_and_load_give_the_same_bits(tmp_path: Path, small: ModelConfig, shape: str) -> None:
    params, config = model(small, **SHAPES[shape])
    huggingface.save(tmp_path / "a", params, config)
    loaded, its_config = huggingface.load_params(tmp_path / "a")
    assert its_config == config
    assert_same(loaded, params)
    huggingface.save(tmp_path / "b", loaded, its_config)
    for file in ("config.json", "model.safetensors"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_trainable_noise_stays_behind_and_the_logits_are_the_same(tmp_path: Path, small: ModelConfig) -> None:
    params = decoder.init(np.random.default_rng(0), small, np.float64)
    huggingface.save(tmp_path / "saved", params, small)
    loaded, config = huggingface.load_params(tmp_path / "saved")
    assert loaded.blocks[0].moe.router.w_noise is None
    tokens = np.arange(7)[None]
    assert close(decoder.forward(loaded, tokens, config)[0], decoder.forward(params, tokens, small)[0])


def test_the_gate_of_a_mistral_is_its_gate(small: ModelConfig) -> None:
    params, config = model(small, experts=1, active_experts=1)
    tensors = dict(huggingface.layout(params, config, "mistral"))
    for name, matrix in zip(("gate", "up", "down"), params.blocks[0].moe.experts, strict=True):
        np.testing.assert_array_equal(tensors[f"model.layers.0.mlp.{name}_proj.weight"], matrix[0].T)


@pytest.mark.parametrize("end", [2, None])
def test_the_settings_of_generation_are_saved_with_all_tokens_that_end_a_text(
    tmp_path: Path, small: ModelConfig, end: int | None
) -> None:
    folder = folder_of(tmp_path / "saved", small)
    reconfigure(folder, eos_token_id=end)
    (folder / "generation_config.json").write_text(json.dumps({"temperature": 0.6, "eos_token_id": 5}))
    read = huggingface.load(folder)
    huggingface.save(tmp_path / "again", read.params, read.config, read.tokenizer, read.end_tokens)
    ids = 5 if end is None else [2, 5]
    written = json.loads((tmp_path / "again/generation_config.json").read_text())
    assert written == {"temperature": 0.6, "eos_token_id": ids}
    assert huggingface.load(tmp_path / "again").end_tokens == read.end_tokens == ((5,) if end is None else (2, 5))


def test_half_precision_is_widened(tmp_path: Path, small: ModelConfig) -> None:
    folder = folder_of(tmp_path / "saved", small)
    halves = {name: t.astype(np.float16) for name, t in load_file(folder / "model.safetensors").items()}
    retensor(folder, halves)
    params, _ = huggingface.load_params(folder)
    table = halves["model.embed_tokens.weight"].astype(np.float32)
    np.testing.assert_array_equal(params.embedding.table, table)


def fuse(tensors: dict[str, Any], layer: int, experts: int) -> dict[str, Any]:
    """The tensors of a layer as newer versions of the library hold them in memory."""
    old, new = f"model.layers.{layer}.block_sparse_moe.", f"model.layers.{layer}.mlp."
    matrix = {w: [tensors[f"{old}experts.{e}.{w}.weight"] for e in range(experts)] for w in ("w1", "w2", "w3")}
    removed = {name: ... for name in tensors if name.startswith(old)}
    gate_up = [np.concatenate(pair) for pair in zip(matrix["w1"], matrix["w3"], strict=True)]
    return removed | {
        new + "gate.weight": tensors[old + "gate.weight"],
        new + "experts.gate_up_proj": np.stack(gate_up),
        new + "experts.down_proj": np.stack(matrix["w2"]),
    }


@pytest.mark.parametrize("repeated", [False, True])
def test_fused_experts_of_another_family_are_read_like_separate_ones(tmp_path: Path, repeated: bool) -> None:
    """Also where a folder has both forms, which must then agree."""
    params, config = huggingface.load_params(GOLDEN / "qwen3_moe")
    huggingface.save(tmp_path / "saved", params, config)
    tensors = load_file(tmp_path / "saved/model.safetensors")
    prefix = "model.layers.1.mlp.experts."
    of = {m: np.stack([tensors[f"{prefix}{e}.{m}_proj.weight"] for e in range(3)]) for m in ("gate", "up", "down")}
    fused = {f"{prefix}gate_up_proj": np.concatenate([of["gate"], of["up"]], 1), f"{prefix}down_proj": of["down"]}
    single = {} if repeated else {name: ... for name in tensors if name.startswith(prefix)}
    retensor(tmp_path / "saved", single | fused)
    assert_same(huggingface.load_params(tmp_path / "saved")[0], params)
    if repeated:
        retensor(tmp_path / "saved", {f"{prefix}down_proj": of["down"] * 1.01})
        with pytest.raises(UserError, match="down_proj that differs from"):
            huggingface.load_params(tmp_path / "saved")


def test_fused_experts_are_read_like_separate_ones(tmp_path: Path, small: ModelConfig) -> None:
    folder = folder_of(tmp_path / "saved", small)
    before, _ = huggingface.load_params(folder)
    retensor(folder, fuse(load_file(folder / "model.safetensors"), 1, small.experts))
    after, _ = huggingface.load_params(folder)
    assert_same(after, before)


def test_a_folder_is_told_from_a_run(tmp_path: Path, small: ModelConfig) -> None:
    assert huggingface.is_folder(folder_of(tmp_path / "saved", small))
    assert huggingface.is_folder(str(GOLDEN / "mixtral"))
    run = tmp_path / "run"
    run.mkdir()
    assert not huggingface.is_folder(run)
    for content in ('{"format": 1, "model": {}}', "[]", "{", "[" * 100_000):
        (run / "config.json").write_text(content)
        assert not huggingface.is_folder(run)
    assert not huggingface.is_folder(tmp_path / "nowhere")


# What is refused

GATE = "model.layers.0.block_sparse_moe.gate.weight"
W1 = "model.layers.1.block_sparse_moe.experts.4.w1.weight"
MISMATCHES: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "a missing tensor": ({GATE: ...}, {}, f"lacks the tensor {GATE}"),
    "a missing expert": ({W1: ...}, {}, f"lacks the tensor {W1}"),
    "a missing head": ({"lm_head.weight": ...}, {}, "lacks the tensor lm_head.weight"),
    "a surplus tensor": ({"model.layers.0.bias": np.ones(3, np.float32)}, {}, "tensor model.layers.0.bias"),
    "a surplus layer": ({}, {"num_hidden_layers": 1}, r"tensor model.layers.1\."),
    "a surplus expert": ({}, {"num_local_experts": 4}, r"gate.weight with shape \(5, 6\).*\(4, 6\)"),
    "a head that is tied": ({}, {"tie_word_embeddings": True}, "tensor lm_head.weight"),
    "another width": ({W1: np.ones((3, 5), np.float32)}, {}, rf"{W1} with shape \(3, 5\).*\(3, 6\)"),
    "a transposed matrix": ({W1: np.ones((6, 3), np.float32)}, {}, W1),
    "whole numbers": ({GATE: np.ones((5, 6), np.int64)}, {}, f"{GATE} as I64"),
    "both forms of experts": (
        {"model.layers.0.mlp.experts.down_proj": np.ones((5, 6, 3), np.float32)},
        {},
        "tensor model.layers.0.mlp.experts.down_proj",
    ),
}


@pytest.mark.parametrize("case", MISMATCHES)
def test_tensors_that_do_not_fit_are_named(tmp_path: Path, small: ModelConfig, case: str) -> None:
    tensors, settings, words = MISMATCHES[case]
    folder = folder_of(tmp_path / "saved", small)
    retensor(folder, tensors)
    reconfigure(folder, **settings)
    with pytest.raises(UserError, match=words) as error:
        huggingface.load_params(folder)
    assert str(error.value).endswith(".") and "\n" not in str(error.value)


def frequencies(config: ModelConfig, dtype: Any = np.float32) -> Any:
    """As other programs round them: first the power, then its inverse."""
    power = np.float32(config.rope_theta) ** (np.arange(0, config.head_width, 2, dtype=np.float32) / config.head_width)
    return (np.float32(1) / power.astype(np.float32)).astype(dtype)


def repeating(small: ModelConfig, tensors: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Tensors that only repeat what a model of this config already has."""
    gate = "model.layers.1.block_sparse_moe.gate.weight"
    fused = {n: t for n, t in fuse(tensors, 1, small.experts).items() if t is not ... and "experts" in n}
    return {
        "the table as the head": {"lm_head.weight": tensors["model.embed_tokens.weight"]},
        "the frequencies of RoPE": {"model.layers.1.self_attn.rotary_emb.inv_freq": frequencies(small)},
        "the same in half precision": {"model.rotary_emb.inv_freq": frequencies(small, np.float16)},
        "a newer name": {gate.replace("block_sparse_moe", "mlp"): tensors[gate]},
        "both forms of experts": fused,
        "a bias of zero": {"model.layers.0.self_attn.q_proj.bias": np.zeros(32, np.float32)},
    }


@pytest.mark.parametrize(
    "case",
    ["the table as the head", "the frequencies of RoPE", "the same in half precision", "a newer name",
     "both forms of experts", "a bias of zero"],
)  # fmt: skip
def test_a_surplus_tensor_may_repeat_the_model_but_not_differ(tmp_path: Path, small: ModelConfig, case: str) -> None:
    params, config = model(small, tied_embeddings=True)
    huggingface.save(tmp_path / "saved", params, config)
    surplus = repeating(config, load_file(tmp_path / "saved/model.safetensors"))[case]
    retensor(tmp_path / "saved", surplus)
    assert_same(huggingface.load_params(tmp_path / "saved")[0], params)
    name, values = list(surplus.items())[-1]
    changed = values.copy()
    changed.reshape(-1)[-1] = changed.reshape(-1)[-1] * values.dtype.type(1.01) + values.dtype.type(1e-3)
    retensor(tmp_path / "saved", {name: changed})
    with pytest.raises(UserError, match=f"tensor {name} that differs from"):
        huggingface.load_params(tmp_path / "saved")
    retensor(tmp_path / "saved", {name: np.ones((2, 2), np.float32)})
    with pytest.raises(UserError, match=rf"{name} (that the model|with shape)"):
        huggingface.load_params(tmp_path / "saved")


def test_a_tied_table_may_be_stored_as_the_head_alone(tmp_path: Path, small: ModelConfig) -> None:
    params, config = model(small, tied_embeddings=True)
    huggingface.save(tmp_path / "saved", params, config)
    retensor(tmp_path / "saved", {"model.embed_tokens.weight": ..., "lm_head.weight": params.embedding.table})
    assert_same(huggingface.load_params(tmp_path / "saved")[0], params)


@pytest.mark.parametrize("shape", [(4, 6, 6), (6, 6, 6), (5, 7, 6), (5, 6, 7), (5, 6), (180,)])
def test_fused_experts_of_another_shape_are_refused(tmp_path: Path, small: ModelConfig, shape: tuple[int]) -> None:
    folder = folder_of(tmp_path / "saved", small)
    fused = fuse(load_file(folder / "model.safetensors"), 0, small.experts)
    retensor(folder, fused | {"model.layers.0.mlp.experts.gate_up_proj": np.ones(shape, np.float32)})
    with pytest.raises(UserError, match=r"gate_up_proj with shape .*\(5, 6, 6\)"):
        huggingface.load_params(folder)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no pipes among its files")
@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_what_may_have_no_end_is_not_read(tmp_path: Path, small: ModelConfig, name: str) -> None:
    folder = folder_of(tmp_path / "saved", small)
    (folder / name).unlink()
    os.mkfifo(folder / name)
    with pytest.raises(UserError, match="not a regular file"):
        huggingface.load_params(folder)


def test_a_description_without_measure_is_not_read(tmp_path: Path, small: ModelConfig) -> None:
    folder = folder_of(tmp_path / "saved", small)
    with (folder / "config.json").open("r+b") as file:
        file.truncate(10**9)  # a hole, which takes no room on the disk
    with pytest.raises(UserError, match="1,000,000,000 bytes, expected at most 100,000,000"):
        huggingface.load_params(folder)


def test_a_folder_without_weights_is_refused(tmp_path: Path, small: ModelConfig) -> None:
    folder = folder_of(tmp_path / "saved", small)
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"neither model\.safetensors nor"):
        huggingface.load_params(folder)
    with pytest.raises(UserError, match="does not exist"):
        huggingface.load_params(tmp_path / "nowhere")


def sharded(path: Path, small: ModelConfig, **moved: Any) -> Path:
    """A folder of three shards; ``moved`` renames a shard in the index."""
    folder = folder_of(path, small)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    shard_of = {name: f"part-{i % 3}.safetensors" for i, name in enumerate(tensors)}
    for shard in set(shard_of.values()):
        save_file({name: t for name, t in tensors.items() if shard_of[name] == shard}, folder / shard)
    index = {"metadata": {}, "weight_map": {n: moved.get(s[:6].replace("-", "_"), s) for n, s in shard_of.items()}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def test_shards_are_read_like_one_file(tmp_path: Path, small: ModelConfig) -> None:
    params, _ = huggingface.load_params(sharded(tmp_path / "saved", small))
    assert_same(params, model(small)[0])


def test_the_index_decides_which_tensor_of_a_shard_counts(tmp_path: Path, small: ModelConfig) -> None:
    folder = sharded(tmp_path / "saved", small)
    for part in range(3):
        shard = folder / f"part-{part}.safetensors"
        own = load_file(shard)
        others = [load_file(folder / f"part-{other}.safetensors") for other in range(3) if other != part]
        wrong = {name: values + 1 for tensors in others for name, values in tensors.items()}
        save_file(wrong | own | {"of no model": np.ones(3, np.int64)}, shard)
    params, _ = huggingface.load_params(folder)
    assert_same(params, model(small)[0])


@pytest.mark.parametrize(
    "shard",
    ["../part-0.safetensors", "/etc/passwd", "/tmp/x.safetensors", "a/part-0.safetensors", "a\\part-0.safetensors",
     "C:part-0.safetensors", "..", ".safetensors", "part-0.bin", "", 3, None, ["part-0.safetensors"]],
)  # fmt: skip
def test_an_index_cannot_lead_out_of_the_folder(tmp_path: Path, small: ModelConfig, shard: Any) -> None:
    folder = sharded(tmp_path / "saved", small, part_0=shard)
    # what it leads to is a whole shard, so that nothing but its name is wrong
    (tmp_path / "part-0.safetensors").write_bytes((folder / "part-0.safetensors").read_bytes())
    with pytest.raises(UserError, match="plain name of a .safetensors file"):
        huggingface.load_params(folder)


def test_shards_and_index_must_agree(tmp_path: Path, small: ModelConfig) -> None:
    folder = sharded(tmp_path / "saved", small)
    index = folder / "model.safetensors.index.json"
    whole = json.loads(index.read_text())["weight_map"]

    def refused(weight_map: Any, words: str) -> None:
        index.write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(UserError, match=words):
            huggingface.load_params(folder)

    refused(whole | {"model.norm.weight": "part-9.safetensors"}, r"part-9\.safetensors cannot be read|does not place")
    refused(whole | {"ghost": "part-1.safetensors"}, "tensor ghost in part-1")
    refused({n: s for n, s in whole.items() if n != "model.norm.weight"}, "lacks the tensor model.norm.weight")
    refused({n: s for n, s in whole.items() if s != "part-2.safetensors"}, "lacks the tensor")
    refused(["part-0.safetensors"], "no weight_map")
    index.write_text(json.dumps({"weight_map": whole}))
    shard = folder / "part-1.safetensors"
    shard.write_bytes(shard.read_bytes()[:-4])
    with pytest.raises(UserError, match=r"part-1\.safetensors is cut short"):
        huggingface.load_params(folder)


def test_sizes_are_compared_with_the_file_before_memory_is_taken(tmp_path: Path, small: ModelConfig) -> None:
    folder = folder_of(tmp_path / "saved", small)
    reconfigure(folder, hidden_size=2**20, intermediate_size=2**20, num_local_experts=2**16, vocab_size=2**20)
    tracemalloc.start()
    with pytest.raises(UserError, match="embed_tokens.weight with shape"):
        huggingface.load_params(folder)
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()


def test_a_model_larger_than_the_machine_is_refused(
    tmp_path: Path, small: ModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = folder_of(tmp_path / "saved", small)
    monkeypatch.setattr(resources, "memory_bytes", lambda: 5000)
    with pytest.raises(UserError, match="this machine has 0.0 GB"):
        huggingface.load_params(folder)


def test_nothing_is_ever_overwritten(tmp_path: Path, small: ModelConfig) -> None:
    params, config = model(small)
    (tmp_path / "notes.txt").write_text("dear")
    with pytest.raises(UserError, match="is not empty"):
        huggingface.save(tmp_path, params, config)
    with pytest.raises(UserError, match="cannot be written"):
        huggingface.save(tmp_path / "notes.txt", params, config)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_folder_that_was_not_written_to_the_end_is_no_model(
    tmp_path: Path, small: ModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each write fails in turn; what is forced to the disk before config.json is whole by then."""
    params, config = model(small)
    real, forced, failing = os.fsync, [], 0

    def fsync(descriptor: int) -> None:
        forced.append(os.readlink(f"/proc/self/fd/{descriptor}") if Path("/proc/self/fd").exists() else "")
        if len(forced) == failing:
            raise OSError(28, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    huggingface.save(tmp_path / "whole", params, config, build("byte", ""))
    files = [Path(name).name for name in forced if not Path(name).is_dir()]
    if forced[0]:
        assert files[0] == "model.safetensors" and "config.json" in files[-1] and len(files) == 4
    for failing in range(1, len(forced) + 1):  # noqa: B007 - fsync reads it
        forced.clear()
        folder = tmp_path / f"fails-{failing}"
        try:
            huggingface.save(folder, params, config, build("byte", ""))
        except UserError as error:
            assert "No space left" in str(error)
            assert not huggingface.is_folder(folder)
        else:  # that a folder itself is forced to the disk is only attempted
            assert_same(huggingface.load_params(folder)[0], params)


def test_a_model_that_is_no_mixtral_is_not_saved(tmp_path: Path, small: ModelConfig) -> None:
    for changes, sentence in (
        ({"router": "sigmoid_bias"}, "router 'sigmoid_bias' cannot be written as a Mixtral"),
        ({"shared_experts": 2}, "head_width 8 cannot be written as a DeepSeekMoE"),
        ({"shared_experts": 2, "qk_norm": "per_head"}, "shared_experts 2 cannot be written as a Qwen3-MoE"),
    ):
        params, config = model(small, **changes)
        with pytest.raises(UserError, match=sentence):
            huggingface.save(tmp_path / "saved", params, config)
        assert not (tmp_path / "saved").exists()


# Memory

PEAK = """
import sys
from minimoe.storage import huggingface

def status(field):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(field)) * 1024

before = status("VmRSS:")
huggingface.load_params(sys.argv[1])
print(status("VmHWM:") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="only Linux tells a process its peak")
def test_loading_needs_the_model_and_one_shard(tmp_path: Path) -> None:
    config = ModelConfig(
        vocab_size=512, width=256, layers=8, heads=4, head_width=32, experts=8, expert_width=256, noisy_gating=False
    )
    blank = decoder.init(np.random.default_rng(0), dataclasses.replace(config, layers=1))
    params = blank._replace(blocks=blank.blocks * 8)
    huggingface.save(tmp_path / "saved", params, config)
    tensors = load_file(tmp_path / "saved/model.safetensors")
    shard_of = {name: f"part-{name.split('.')[2] if 'layers' in name else 'x'}.safetensors" for name in tensors}
    for shard in set(shard_of.values()):
        save_file({name: t for name, t in tensors.items() if shard_of[name] == shard}, tmp_path / "saved" / shard)
    (tmp_path / "saved/model.safetensors").unlink()
    (tmp_path / "saved/model.safetensors.index.json").write_text(json.dumps({"weight_map": shard_of}))

    size = 4 * sum(t.size for t in tensors.values())
    largest = max(path.stat().st_size for path in (tmp_path / "saved").glob("part-*"))
    done = subprocess.run(
        [sys.executable, "-c", PEAK, str(tmp_path / "saved")], capture_output=True, text=True, check=True
    )
    assert size > 8 * largest > 50e6
    # above, what Python itself needs meanwhile; below, pages of Python that a busy machine has taken back
    assert size - 1e6 < int(done.stdout) < size + largest + 5e6


@pytest.mark.parametrize("changes", SHAPES.values(), ids=SHAPES)
def test_a_quantised_model_comes_back_as_quantising_leaves_it(
    tmp_path: Path, small: ModelConfig, changes: dict[str, Any]
) -> None:
    params, config = model(small, **changes)
    plan = quantize.plan("nf4", "int8")
    huggingface.save(tmp_path / "small", params, config, end_tokens=(3,), plan=plan)
    loaded = huggingface.load(tmp_path / "small")
    assert not (tmp_path / "small" / "model.safetensors").exists(), "transformers would look for its weights there"
    assert (loaded.config, loaded.end_tokens) == (config, (3,))
    for (name, a), b in zip(
        tree.named_leaves(quantize.approximate(params, plan._asdict())), tree.leaves(loaded.params), strict=True
    ):
        np.testing.assert_array_equal(a, b, err_msg=name)


def test_a_quantised_model_needs_the_memory_of_its_float32_weights(
    tmp_path: Path, small: ModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    params, config = model(small)
    huggingface.save(tmp_path / "small", params, config, plan=quantize.plan("rtn2"))
    monkeypatch.setattr(resources, "memory_bytes", lambda: 100)
    with pytest.raises(UserError, match="parameters take"):
        huggingface.load(tmp_path / "small")
