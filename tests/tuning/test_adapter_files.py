"""Adapters in peft's layout, without the library: round trips, the order of the axes, and what is refused.

Parity with the library itself is in tests/peers/test_peft.py.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from minimoe.core import tree
from minimoe.core.config import ModelConfig
from minimoe.core.errors import UserError
from minimoe.layers import decoder, lora
from minimoe.layers.decoder import Decoder
from minimoe.tuning import adapter_files, adapters


def config_of(experts: int = 5, expert_width: int = 6, **changes: Any) -> ModelConfig:
    sizes = {"vocab_size": 11, "width": 8, "layers": 2, "heads": 4, "kv_heads": 2, "head_width": 4, "context": 6}
    active = min(2, experts)
    return ModelConfig(
        **{**sizes, "experts": experts, "active_experts": active, "expert_width": expert_width, **changes}
    )


CONFIG = config_of()


def plain(rng: np.random.Generator, config: ModelConfig = CONFIG) -> Decoder:
    return decoder.init(rng, config)


def trained(rng: np.random.Generator, params: Decoder, rank: int = 3, **settings: Any) -> Decoder:
    adapted = adapters.add(params, rank, rng=rng, **settings)
    moved: Decoder = lora.replace(adapted, lambda w: w._replace(b=rng.standard_normal(w.b.shape).astype(np.float32)))
    return moved


def assert_identical(ours: Decoder, theirs: Decoder) -> None:
    for (name, mine), other in zip(tree.named_leaves(ours), tree.leaves(theirs), strict=True):
        np.testing.assert_array_equal(mine, other, err_msg=name)
        assert mine.dtype == other.dtype, name


@given(
    experts=st.integers(1, 5),
    expert_width=st.integers(2, 9),
    rank=st.integers(1, 2),
    parts=st.sampled_from([adapters.PARTS, ("attention",), ("experts",)]),
    stabilized=st.booleans(),
    seed=st.integers(0, 9),
)
def test_what_is_written_is_read_to_the_bit(
    tmp_path_factory: pytest.TempPathFactory,
    experts: int,
    expert_width: int,
    rank: int,
    parts: Any,
    stabilized: bool,
    seed: int,
) -> None:
    rng, config = np.random.default_rng(seed), config_of(experts, expert_width)
    params = plain(rng, config)
    adapted = trained(rng, params, rank, alpha=3, stabilized=stabilized, parts=parts)
    folder = tmp_path_factory.mktemp("adapter") / "new"
    adapter_files.save(folder, adapted, config)
    assert_identical(adapter_files.load(folder, params, config), adapted)


def test_fresh_adapters_come_back_too(rng: np.random.Generator, tmp_path: Path) -> None:
    params = plain(rng)
    fresh = adapters.add(params, 4, rng=rng)
    adapter_files.save(tmp_path / "a", fresh, CONFIG)
    assert_identical(adapter_files.load(tmp_path / "a", params, CONFIG), fresh)


def test_the_expert_is_the_fastest_axis_of_b_and_the_slowest_of_a(rng: np.random.Generator, tmp_path: Path) -> None:
    adapted = trained(rng, plain(rng), rank=3, alpha=6)
    adapter_files.save(tmp_path / "a", adapted, CONFIG)
    tensors = load_file(tmp_path / "a" / adapter_files.MODEL)
    inside = "base_model.model.model.layers.1.mlp.experts"
    E, r, D, F = 5, 3, 8, 6
    down = adapted.blocks[1].moe.experts.w_down
    a, b = tensors[f"{inside}.lora_A.weight"], tensors[f"{inside}.lora_B.weight"]
    assert a.shape == (E * r, F) and b.shape == (D, r * E)
    for e in range(E):
        correction = 2.0 * b.reshape(D, r, E)[:, :, e] @ a.reshape(E, r, F)[e]  # (outputs, inputs)
        np.testing.assert_allclose(correction.T, lora.delta(lora.expert(down, e)), atol=1e-6)
    gate, up = adapted.blocks[1].moe.experts.w_gate, adapted.blocks[1].moe.experts.w_up
    a, b = tensors[f"{inside}.base_layer.lora_A.weight"], tensors[f"{inside}.base_layer.lora_B.weight"]
    assert a.shape == (E * 2 * r, D) and b.shape == (2 * F, 2 * r * E)
    for e in range(E):
        correction = (2.0 * b.reshape(2 * F, 2 * r, E)[:, :, e] @ a.reshape(E, 2 * r, D)[e]).T
        np.testing.assert_allclose(correction[:, :F], lora.delta(lora.expert(gate, e)), atol=1e-6)
        np.testing.assert_allclose(correction[:, F:], lora.delta(lora.expert(up, e)), atol=1e-6)
    q = adapted.blocks[1].attention.query.weight
    place = "base_model.model.model.layers.1.self_attn.q_proj"
    np.testing.assert_array_equal(tensors[f"{place}.lora_A.weight"], q.a.T)
    np.testing.assert_array_equal(tensors[f"{place}.lora_B.weight"], q.b.T)


def test_the_config_says_what_peft_needs(rng: np.random.Generator, tmp_path: Path) -> None:
    adapter_files.save(tmp_path / "a", trained(rng, plain(rng), rank=3, alpha=6), CONFIG, base="somewhere")
    values = json.loads((tmp_path / "a" / adapter_files.CONFIG).read_text())
    assert (values["peft_type"], values["r"], values["lora_alpha"], values["use_rslora"]) == ("LORA", 3, 6.0, False)
    assert values["target_modules"] == ["q_proj", "k_proj", "v_proj", "o_proj"]
    assert values["target_parameters"] == ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    assert values["rank_pattern"] == {"gate_up_proj": 6} and values["alpha_pattern"] == {"gate_up_proj": 12.0}
    assert values["base_model_name_or_path"] == "somewhere"


def test_one_a_for_gate_and_up_is_stored_once(rng: np.random.Generator, tmp_path: Path) -> None:
    """As the library trains them. The rank does not double each time that such an adapter is read and written."""
    params = plain(rng)
    adapted = trained(rng, params, rank=3)

    def common(name: str, part: str, weight: Any) -> Any:
        if not name.endswith("w_up"):
            return weight
        return weight._replace(a=adapters.adapted_weights(adapted)[name.replace("w_up", "w_gate")].a)

    shared = adapters.at_each_weight(adapted, common)
    adapter_files.save(tmp_path / "a", shared, CONFIG)
    assert json.loads((tmp_path / "a" / adapter_files.CONFIG).read_text())["rank_pattern"] == {}
    assert_identical(adapter_files.load(tmp_path / "a", params, CONFIG), shared)


@pytest.mark.parametrize("weights", [[1.0, 1.0], [0.5, -2.0], [0.0, 1.0]])
def test_adapters_side_by_side_keep_their_corrections(
    rng: np.random.Generator, tmp_path: Path, weights: list[float]
) -> None:
    params = plain(rng)
    both = adapters.concatenate([trained(rng, params, 2), trained(rng, params, 1, alpha=5)], weights)
    adapter_files.save(tmp_path / "a", both, CONFIG)
    back = adapters.adapted_weights(adapter_files.load(tmp_path / "a", params, CONFIG))
    for name, weight in adapters.adapted_weights(both).items():
        np.testing.assert_allclose(lora.delta(back[name]), lora.delta(weight), atol=1e-5, err_msg=name)


def changed(folder: Path, **values: Any) -> None:
    path = folder / adapter_files.CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize(
    ("values", "scale"),
    [
        ({"lora_alpha": 9}, 3.0),
        ({"lora_alpha": 6, "use_rslora": True}, 6 / 3**0.5),
        ({"alpha_pattern": {"q_proj": 12}}, 4.0),
        ({"alpha_pattern": {"self_attn.q_proj": 12, "proj": 1}}, 4.0),
        ({"alpha_pattern": {"^model.layers.0.self_attn.q_proj": 12}}, 4.0),
        ({"alpha_pattern": {"model.layers.1.self_attn.q_proj": 12}, "lora_alpha": 3}, 1.0),
    ],
)
def test_alpha_is_that_of_the_pattern_or_the_common_one(
    rng: np.random.Generator, tmp_path: Path, values: dict[str, Any], scale: float
) -> None:
    params = plain(rng)
    adapter_files.save(tmp_path / "a", trained(rng, params, rank=3), CONFIG)
    changed(tmp_path / "a", **values)
    found = adapter_files.load(tmp_path / "a", params, CONFIG).blocks[0].attention.query.weight.scale
    np.testing.assert_allclose(found, [scale] * 3, rtol=1e-6)


def test_an_adapter_of_one_matrix_of_the_experts_leaves_the_others_as_they_are(
    rng: np.random.Generator, tmp_path: Path
) -> None:
    params = plain(rng)
    adapted = trained(rng, params, parts=("experts",))
    adapter_files.save(tmp_path / "a", adapted, CONFIG)
    tensors = load_file(tmp_path / "a" / adapter_files.MODEL)
    save_file({n: v for n, v in tensors.items() if "base_layer" not in n}, tmp_path / "a" / adapter_files.MODEL)
    back = adapter_files.load(tmp_path / "a", params, CONFIG)
    tokens = rng.integers(0, 11, (2, 6))
    merged = adapters.merge(adapted)
    expected = params._replace(
        blocks=[
            b._replace(moe=b.moe._replace(experts=b.moe.experts._replace(w_down=m.moe.experts.w_down)))
            for b, m in zip(params.blocks, merged.blocks, strict=True)
        ]
    )
    np.testing.assert_allclose(
        decoder.forward(back, tokens, CONFIG).logits, decoder.forward(expected, tokens, CONFIG).logits, atol=1e-5
    )
    adapter_files.save(tmp_path / "again", back, CONFIG)
    assert_identical(adapter_files.load(tmp_path / "again", params, CONFIG), back)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"peft_type": "IA3"}, "adapters of type 'IA3', expected LORA"),
        ({"use_dora": True}, "made with use_dora, which is not supported"),
        ({"modules_to_save": ["gate"]}, "made with modules_to_save"),
        ({"bias": "all"}, "also has biases"),
        ({"lora_alpha": "eight"}, "the alpha 'eight', expected a number"),
        ({"lora_alpha": None}, "the alpha None, expected a number"),
    ],
)
def test_settings_that_would_compute_something_else_are_refused(
    rng: np.random.Generator, tmp_path: Path, values: dict[str, Any], words: str
) -> None:
    params = plain(rng)
    adapter_files.save(tmp_path / "a", trained(rng, params), CONFIG)
    changed(tmp_path / "a", **values)
    with pytest.raises(UserError, match=words):
        adapter_files.load(tmp_path / "a", params, CONFIG)


def test_an_adapter_of_another_model_or_of_none_is_refused(rng: np.random.Generator, tmp_path: Path) -> None:
    params = plain(rng)
    adapted = trained(rng, params)
    adapter_files.save(tmp_path / "a", adapted, CONFIG)
    with pytest.raises(UserError, match="is not an adapter: it has no adapter_config.json"):
        adapter_files.load(tmp_path, params, CONFIG)
    wider = config_of(expert_width=7)
    with pytest.raises(UserError, match="does not fit this model"):
        adapter_files.load(tmp_path / "a", plain(rng, wider), wider)
    fewer = config_of(experts=4)
    with pytest.raises(UserError, match="does not fit this model"):
        adapter_files.load(tmp_path / "a", plain(rng, fewer), fewer)
    shallow = config_of(layers=1)
    with pytest.raises(UserError, match=r"layers\.1.*, which this model lacks"):
        adapter_files.load(tmp_path / "a", plain(rng, shallow), shallow)
    with pytest.raises(UserError, match="has adapters already"):
        adapter_files.load(tmp_path / "a", adapted, CONFIG)
    tensors = load_file(tmp_path / "a" / adapter_files.MODEL)
    del tensors["base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"]
    save_file(tensors, tmp_path / "a" / adapter_files.MODEL)
    with pytest.raises(UserError, match="self_attn.q_proj that does not fit"):
        adapter_files.load(tmp_path / "a", params, CONFIG)


def test_nothing_is_written_where_it_cannot_be_right(
    rng: np.random.Generator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = plain(rng)
    adapted = trained(rng, params)
    with pytest.raises(UserError, match="has no adapters, so there is nothing to write"):
        adapter_files.save(tmp_path / "a", params, CONFIG)
    other = adapters.at_each_weight(
        adapted, lambda name, part, w: w._replace(scale=2 * w.scale) if name.startswith("blocks[1]") else w
    )
    with pytest.raises(UserError, match="differ in rank or scale between layers"):
        adapter_files.save(tmp_path / "a", other, CONFIG)
    assert not (tmp_path / "a").exists()
    shared = config_of(shared_experts=1)
    with monkeypatch.context() as patched:  # a family with shared experts
        patched.setattr("minimoe.storage.huggingface_config.to_dict", lambda *_: {})
        with pytest.raises(UserError, match=r"such as blocks\[0\].moe.shared.w_gate, have no place"):
            adapter_files.save(tmp_path / "a", trained(rng, plain(rng, shared)), shared)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "mine.txt").write_text("x")
    with pytest.raises(UserError):
        adapter_files.save(tmp_path / "b", adapted, CONFIG)


def test_adapters_without_a_place_are_refused_and_others_of_such_models_are_written(
    rng: np.random.Generator, tmp_path: Path
) -> None:
    """Those of shared experts and of dense layers; the attention of such a model has its usual names."""
    for changes in ({"shared_experts": 1}, {"dense_layers": 1, "dense_width": 5}):
        config = config_of(head_width=2, **changes)
        params = plain(rng, config)
        with pytest.raises(UserError, match=r"such as blocks\[0\]\.moe\.shared\.w_gate, have no place"):
            adapter_files.save(tmp_path / "refused", trained(rng, params), config)
        assert not (tmp_path / "refused").exists()
        adapted = trained(rng, params, parts=("attention",))
        folder = tmp_path / next(iter(changes))
        adapter_files.save(folder, adapted, config)
        assert_identical(adapter_files.load(folder, params, config), adapted)


@pytest.mark.parametrize("changes", [{"head_width": 2, "qk_norm": "whole"}, {"qk_norm": "per_head"}])
def test_models_with_normalised_queries_and_keys_have_the_usual_adapters(
    rng: np.random.Generator, tmp_path: Path, changes: dict[str, Any]
) -> None:
    config = config_of(**changes)
    params = plain(rng, config)
    adapted = trained(rng, params)
    adapter_files.save(tmp_path / "adapter", adapted, config)
    assert_identical(adapter_files.load(tmp_path / "adapter", params, config), adapted)
