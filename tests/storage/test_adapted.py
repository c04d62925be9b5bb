"""Runs that train adapters: every reader finds the merged model, and a run that continues finds all its leaves."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from minimoe.core import files, tree
from minimoe.core.config import ModelConfig, TrainConfig
from minimoe.core.errors import UserError
from minimoe.layers import decoder, lora
from minimoe.layers.decoder import Decoder
from minimoe.optim import optimizer
from minimoe.storage import adapted, checkpoint
from minimoe.storage.checkpoint import Progress, RunConfig, Tuning
from minimoe.text import tokenizer
from minimoe.text.corpus import Source

CODEC = tokenizer.build("char", "abcdefghij")
CONFIG = ModelConfig(
    vocab_size=CODEC.vocab_size,
    width=16,
    layers=2,
    heads=4,
    kv_heads=2,
    head_width=4,
    context=6,
    experts=3,
    expert_width=8,
)
PLACES = (
    "attention.query.weight",
    "attention.output.weight",
    "moe.experts.w_gate",
    "moe.experts.w_up",
    "moe.experts.w_down",
)


def with_adapters(rng: np.random.Generator, scheme: str | None = None) -> Decoder:
    """Adapters on some of the weights, with a rank of their own for each, and B away from zero."""
    from minimoe.compression import frozen

    plain = decoder.init(rng, CONFIG)

    def place(name: str, leaf: Any) -> Any:
        if not name.endswith(PLACES):
            return leaf
        weight = lora.init(rng, leaf, 1 + len(name) % 3, 0.5)
        weight = weight._replace(b=rng.standard_normal(weight.b.shape).astype(np.float32))
        return weight if scheme is None else weight._replace(base=frozen.freeze(leaf, scheme))

    return tree.rebuild(plain, [place(name, leaf) for name, leaf in tree.named_leaves(plain)])


def saved(folder: Path, params: Decoder) -> RunConfig:
    fixed = tuple(name for name, _ in tree.named_leaves(params) if not name.endswith((".a", ".b")))
    run = RunConfig(CONFIG, TrainConfig(), CODEC, Source("some", [], "0" * 64), tuning=Tuning("sft", {}, fixed))
    folder.mkdir()
    checkpoint.save_config(folder, run)
    state = optimizer.init(params, run.recipe, run.frozen)
    progress = Progress(3, 1.0, dict(np.random.default_rng(0).bit_generator.state))
    checkpoint.save(folder, run, params, state, progress)
    return run


@pytest.mark.parametrize("scheme", [None, "nf4", "int8"])
def test_the_model_of_a_folder_is_merged_and_computes_the_same(
    rng: np.random.Generator, tmp_path: Path, scheme: str | None
) -> None:
    params = with_adapters(rng, scheme)
    saved(tmp_path / "run", params)
    loaded = checkpoint.load_model(tmp_path / "run").params
    plain = decoder.blank(CONFIG, np.zeros)
    assert [name for name, _ in tree.named_leaves(loaded)] == [name for name, _ in tree.named_leaves(plain)]
    tokens = rng.integers(0, CONFIG.vocab_size, (2, 6))
    expected = decoder.forward(params, tokens, CONFIG).logits
    np.testing.assert_allclose(decoder.forward(loaded, tokens, CONFIG).logits, expected, atol=1e-5)


@pytest.mark.parametrize("scheme", [None, "nf4", "int8"])
def test_a_run_that_continues_finds_every_leaf_and_moments_only_for_the_adapters(
    rng: np.random.Generator, tmp_path: Path, scheme: str | None
) -> None:
    params = with_adapters(rng, scheme)
    run = saved(tmp_path / "run", params)
    found = checkpoint.load_progress(tmp_path / "run", run)
    assert found is not None
    for (name, mine), theirs in zip(tree.named_leaves(found[0]), tree.leaves(params), strict=True):
        np.testing.assert_array_equal(mine, theirs, err_msg=name)
        assert mine.dtype == theirs.dtype
    assert found[1].keys() == {name for name, _ in tree.named_leaves(params) if name.endswith((".a", ".b"))}
    assert type(found[0].blocks[0].moe.experts.w_up.base) is type(params.blocks[0].moe.experts.w_up.base)


def test_adapters_are_known_by_the_names_of_their_tensors(rng: np.random.Generator) -> None:
    plain = decoder.init(rng, CONFIG)
    assert not adapted.are_in(dict(tree.named_leaves(plain)))
    assert adapted.are_in(dict(tree.named_leaves(with_adapters(rng))))
    assert not adapted.are_in({"blocks[0].moe.router.scale": np.ones(1)}), "a router may have a scale of its own"
    assert all(a is b for a, b in zip(tree.leaves(adapted.merged(plain)), tree.leaves(plain), strict=True))


def test_a_blank_takes_no_memory(rng: np.random.Generator) -> None:
    params = with_adapters(rng, "nf4")
    shapes = adapted.blank(decoder.blank(CONFIG, np.zeros), dict(tree.named_leaves(params)))
    for (name, blank), leaf in zip(tree.named_leaves(shapes), tree.leaves(params), strict=True):
        assert (blank.shape, blank.dtype) == (leaf.shape, leaf.dtype) or "float" in str(leaf.dtype), name
        assert blank.shape == leaf.shape, name
    assert shapes.blocks[0].moe.experts.w_up.base.codes.strides == (0, 0)


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("blocks[0].moe.experts.w_up.b", lambda b: None, r"lacks the tensor blocks\[0\].moe.experts.w_up.b"),
        ("blocks[0].moe.experts.w_up.b", lambda b: b[:, :, 1:], r"holds blocks\[0\].moe.experts.w_up.b as float32"),
        ("blocks[0].moe.experts.w_up.a", lambda a: a[0], r"lacks the tensor blocks\[0\].moe.experts.w_up:"),
        (
            "blocks[0].moe.experts.w_up.base.codes",
            lambda c: None,
            r"lacks the tensor blocks\[0\].moe.experts.w_up.base",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_named(
    rng: np.random.Generator, tmp_path: Path, name: str, change: Any, words: str
) -> None:
    run = saved(tmp_path / "run", with_adapters(rng, "nf4"))
    path = tmp_path / "run" / checkpoint.RESUME
    tensors, metadata = files.read_tensors(path)
    tensors[name] = change(tensors[name])
    files.write_tensors(path, {n: v for n, v in tensors.items() if v is not None}, metadata)
    with pytest.raises(UserError, match=words):
        checkpoint.load_progress(tmp_path / "run", run)


def test_the_file_of_the_model_has_only_the_names_of_a_plain_model(rng: np.random.Generator, tmp_path: Path) -> None:
    saved(tmp_path / "run", with_adapters(rng))
    names = load_file(tmp_path / "run" / checkpoint.MODEL).keys()
    assert not any(name.endswith((".a", ".b", ".base")) for name in names)
