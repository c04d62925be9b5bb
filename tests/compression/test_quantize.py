"""Which parts are quantised, what a decoder becomes in a file and comes back as, and how many bytes it takes."""

import dataclasses
import math
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minimoe.compression import quantize
from minimoe.compression.quantize import FLOAT, SCHEMES, Plan
from minimoe.core import presets, tree
from minimoe.core.arrays import placeholder
from minimoe.core.config import ModelConfig
from minimoe.core.errors import UserError
from minimoe.cost import parameters
from minimoe.layers import decoder
from minimoe.layers.decoder import Decoder

SOURCE = Path("model.safetensors")
CONFIG = ModelConfig(
    vocab_size=13, width=6, layers=2, heads=4, kv_heads=2, head_width=8, context=7, experts=5, expert_width=3
)


def drawn(config: ModelConfig = CONFIG, seed: int = 0) -> Decoder:
    rng = np.random.default_rng(seed)
    return tree.map(
        lambda leaf: (leaf + 0.1 * rng.standard_normal(leaf.shape)).astype(np.float32), decoder.init(rng, config)
    )


def shapes(config: ModelConfig = CONFIG) -> Decoder:
    return decoder.blank(config, placeholder)


@given(experts=st.sampled_from([*SCHEMES, FLOAT]), attention=st.sampled_from([*SCHEMES, FLOAT]))
def test_a_decoder_comes_back_with_every_matrix_as_its_scheme_gives_it(experts: str, attention: str) -> None:
    by = Plan(experts, attention)
    params = drawn()
    tensors = quantize.compress(params, by)
    again = quantize.restore(dict(tensors), shapes(), by, SOURCE)
    for (name, leaf), restored in zip(tree.named_leaves(params), tree.leaves(again), strict=True):
        part = "experts" if ".experts." in name else "attention" if ".attention." in name else "others"
        scheme = SCHEMES.get({"experts": experts, "attention": attention}.get(part, FLOAT))
        expected = leaf
        if scheme is not None:
            matrices = leaf.reshape(-1, *leaf.shape[-2:])
            expected = np.stack(
                [scheme.module.dequantize(scheme.module.quantize(w, **scheme.settings)) for w in matrices]
            ).reshape(leaf.shape)
            assert name not in tensors
            assert (restored != leaf).any()
        np.testing.assert_array_equal(restored, expected, err_msg=name)
        assert restored.dtype == np.float32


def test_router_norms_embedding_and_head_stay_as_they_are() -> None:
    params = drawn()
    tensors = quantize.compress(params, quantize.plan("rtn2"))
    same = {name for name, leaf in tree.named_leaves(params) if name in tensors and tensors[name] is leaf}
    assert {"embedding.table", "norm.gain", "head.weight", "blocks[1].moe.router.w_gate"} <= same
    assert {"blocks[0].attention_norm.gain", "blocks[0].moe_norm.gain", "blocks[0].moe.router.w_noise"} <= same
    quantised = {name.rpartition(".")[0] for name in tensors if name.endswith(".codes")}
    assert quantised == {
        f"blocks[{i}].{matrix}"
        for i in range(2)
        for matrix in (
            *(f"attention.{one}.weight" for one in ("query", "key", "value", "output")),
            *(f"moe.experts.{one}" for one in ("w_gate", "w_up", "w_down")),
        )
    }


def test_every_expert_is_quantised_by_itself() -> None:
    """The codes of an expert do not change when another expert does."""
    params = drawn()
    before = quantize.compress(params, quantize.plan("nf4"))
    params.blocks[0].moe.experts.w_up[1] *= 100
    after = quantize.compress(params, quantize.plan("nf4"))
    for field in ("codes", "absmax", "nested_absmax", "offset"):
        name = f"blocks[0].moe.experts.w_up.{field}"
        assert len(after[name]) == 5
        np.testing.assert_array_equal(np.delete(before[name], 1, 0), np.delete(after[name], 1, 0))


def test_quantising_in_memory_is_what_a_file_gives() -> None:
    params = drawn()
    by = Plan("hqq3", "int8")
    stored = quantize.restore(quantize.compress(params, by), shapes(), by, SOURCE)
    for a, b in zip(tree.leaves(quantize.approximate(params, by._asdict())), tree.leaves(stored), strict=True):
        np.testing.assert_array_equal(a, b)


def test_the_router_is_quantised_only_where_it_is_asked_for() -> None:
    params = drawn()
    changed = quantize.approximate(params, {"router": "rtn2"})
    differing = {
        name
        for (name, a), b in zip(tree.named_leaves(params), tree.leaves(changed), strict=True)
        if (np.asarray(a) != b).any()
    }
    assert differing == {"blocks[0].moe.router.w_gate", "blocks[1].moe.router.w_gate"}  # not the noise of training


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_table_says_what_the_arrays_take(scheme: str) -> None:
    by = quantize.plan(scheme)
    tensors = quantize.compress(drawn(), by)
    rows = quantize.sizes(CONFIG, by)
    assert sum(row.bytes for row in rows) == sum(values.nbytes for values in tensors.values())
    counts = parameters.count(CONFIG)
    assert {row.part: row.parameters for row in rows} == {
        "experts": counts.experts,
        "attention": counts.attention,
        "router": counts.router + counts.noise,
        "norms, embedding, head": counts.norms + counts.embedding + counts.head,
    }
    assert [row.bytes for row in rows] == sorted((row.bytes for row in rows), reverse=True)
    of_experts = sum(values.nbytes for name, values in tensors.items() if ".experts." in name)
    assert next(row.bytes for row in rows if row.part == "experts") == of_experts


def test_shared_experts_and_dense_layers_have_the_scheme_of_the_experts() -> None:
    config = dataclasses.replace(CONFIG, layers=3, shared_experts=2, dense_layers=1, dense_width=9, qk_norm="whole")
    by, params = Plan("nf4", "int8"), drawn(config)
    tensors = quantize.compress(params, by)
    expected = quantize.approximate(params, by._asdict())
    again = quantize.restore(dict(tensors), shapes(config), by, SOURCE)
    for (name, leaf), restored in zip(tree.named_leaves(expected), tree.leaves(again), strict=True):
        np.testing.assert_array_equal(restored, leaf, err_msg=name)
    quantised = {name.rpartition(".")[0] for name in tensors if name.endswith(".codes")}
    shared = {f"blocks[{i}].moe.shared.{matrix}" for i in range(3) for matrix in ("w_gate", "w_up", "w_down")}
    assert shared == {name for name in quantised if ".shared." in name}
    assert (tensors["blocks[0].moe.shared.w_up.codes"].nbytes - 1) // 4 == (6 * 9 - 1) // 8, "4 bits each"
    counts = parameters.count(config)
    rows = {row.part: row for row in quantize.sizes(config, by)}
    assert rows["experts"].parameters == counts.experts + counts.shared_experts + counts.dense_layers
    assert rows["attention"].parameters == counts.attention, "the gains of its norms stay as they are"
    assert sum(row.bytes for row in rows.values()) == sum(values.nbytes for values in tensors.values())


@pytest.mark.parametrize(
    ("scheme", "gigabytes", "bits"),
    [("nf4", 24.48, 4.127), ("int8", 47.00, 8.0), ("hqq4", 26.6, 4.5), ("hqq3", 22.0, 3.7), ("hqq2", 18.0, 3.0)],
)
def test_the_size_of_mixtral(scheme: str, gigabytes: float, bits: float) -> None:
    """With router, norms, embedding and head in 16 bits, as published."""
    rows = quantize.sizes(presets.PRESETS["mixtral-8x7b"].config, quantize.plan(scheme))
    total = sum(row.bytes if row.scheme != FLOAT else 2 * row.parameters for row in rows)
    assert total / 1e9 == pytest.approx(gigabytes, rel=5e-3)
    experts = next(row for row in rows if row.part == "experts")
    assert 8 * experts.bytes / experts.parameters == pytest.approx(bits, rel=2e-3)


def test_the_table_has_a_line_for_each_part_and_one_for_all() -> None:
    lines = quantize.table(quantize.sizes(CONFIG, Plan("nf4", FLOAT))).splitlines()
    assert len(lines) == 6
    assert [line.split()[0] for line in lines] == ["part", "attention", "norms,", "experts", "router", "all"]
    assert lines[1].split()[-2:] == ["32.00", "100.0%"]
    assert {len(line) for line in lines} == {len(lines[0])}


def test_a_plan_names_schemes_that_exist() -> None:
    assert quantize.plan("nf4") == Plan("nf4", "nf4")
    assert quantize.plan("hqq2", "float") == Plan("hqq2", "float")
    with pytest.raises(UserError, match=r"no scheme 'nf5' \(did you mean 'nf4'\?\): choose one of int8, .*or float"):
        quantize.plan("nf5")
    with pytest.raises(UserError, match="no scheme 'int16'"):
        quantize.plan("nf4", "int16")
    with pytest.raises(UserError, match="both to stay in floating point"):
        quantize.plan("float")


def test_a_plan_comes_back_from_a_config_and_a_strange_one_is_refused() -> None:
    by = Plan("hqq2", "nf4")
    values = quantize.to_dict(by)
    assert quantize.from_dict(values) == by
    for strange in (None, [], "nf4", {**values, "format": 2}, {**values, "more": 1}, {"format": 1}):
        with pytest.raises(UserError, match="is not of format 1"):
            quantize.from_dict(strange)
    with pytest.raises(UserError, match="does not name its schemes"):
        quantize.from_dict({**values, "experts": ["nf4"]})
    with pytest.raises(UserError, match="no scheme 'other'"):
        quantize.from_dict({**values, "experts": "other"})


def test_a_file_that_does_not_fit_is_refused() -> None:
    by = quantize.plan("nf4")
    whole = quantize.compress(drawn(), by)
    name = "blocks[0].moe.experts.w_up.absmax"
    for spoiled, message in [
        ({key: values for key, values in whole.items() if key != name}, f"lacks the tensor {re.escape(name)}"),
        ({**whole, name: whole[name][:, :0]}, r"as uint8 \(5, 0\), but the config.json .* asks for uint8 \(5, 1\)"),
        ({**whole, name: whole[name].astype(np.float32)}, r"as float32 \(5, 1\).* asks for uint8"),
        ({**whole, "norm.gain": np.ones(5, np.float32)}, r"norm.gain as float32 \(5,\).* asks for float32 \(6,\)"),
        ({**whole, "more": np.ones(1, np.float32)}, "holds the tensor more, which its model does not have"),
    ]:
        with pytest.raises(UserError, match=message):
            quantize.restore(spoiled, shapes(), by, SOURCE)
    with pytest.raises(UserError, match=r"codes as uint8 \(96,\), but .* asks for uint8 \(2, 64\)"):
        quantize.restore(dict(whole), shapes(), quantize.plan("rtn4"), SOURCE)
    with pytest.raises(UserError, match="lacks the tensor"):
        quantize.restore(dict(whole), shapes(dataclasses.replace(CONFIG, layers=3)), by, SOURCE)


def test_a_matrix_that_cannot_be_quantised_is_named() -> None:
    params = drawn()
    params.blocks[1].attention.key.weight[0, 0] = math.nan
    with pytest.raises(UserError, match=r"blocks\[1\].attention.key.weight: a weight is nan"):
        quantize.compress(params, quantize.plan("int8"))
    with pytest.raises(UserError, match=r"blocks\[0\].attention.query.weight: weights of type float64"):
        quantize.compress(tree.map(lambda leaf: leaf.astype(np.float64), drawn()), quantize.plan("int8"))


def test_two_matrices_of_one_decoder_have_settings_of_their_own() -> None:
    tensors = quantize.compress(drawn(), Plan("hqq2", "rtn4"))
    assert tensors["blocks[0].moe.experts.w_up.codes"].shape[-1] == 32
    assert tensors["blocks[0].attention.query.weight.codes"].shape[-1] == 64
