"""Quantised folders, of runs and in Hugging Face's layout: written, opened by every way in, refused where they must."""

import json
import shutil
from pathlib import Path
from typing import Any

import measured
import mixtral_folders
import numpy as np
import pytest
from small_runs import finished, resume, train

from minimoe.compression import quantize
from minimoe.core import files, tree
from minimoe.core.config import ModelConfig
from minimoe.core.errors import UserError
from minimoe.layers import decoder
from minimoe.storage import checkpoint, huggingface, open_model, quantized
from minimoe.training import run_report

MIXTRAL = Path(__file__).parent.parent / "golden" / "mixtral"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.fsync", lambda _: None)
    finished()  # with its figures, which no other run here needs
    monkeypatch.setattr(run_report, "write", lambda *_: None)


@pytest.fixture(params=["run", "mixtral"])
def source(request: pytest.FixtureRequest) -> Path:
    return finished() if request.param == "run" else MIXTRAL


def same(ours: Any, theirs: Any) -> bool:
    return all((a == b).all() for a, b in zip(tree.leaves(ours), tree.leaves(theirs), strict=True))


@pytest.mark.parametrize("scheme", quantize.SCHEMES)
def test_what_is_opened_is_the_model_after_quantising(source: Path, tmp_path: Path, scheme: str) -> None:
    rows = quantized.write(source, tmp_path / "out", scheme)
    before, after = open_model.load(source), open_model.load(tmp_path / "out")
    expected = quantize.approximate(before.params, {"experts": scheme, "attention": scheme})
    assert same(after.params, expected)
    assert not same(after.params, before.params)
    assert open_model.shape(tmp_path / "out") == after.config == before.config
    (path,) = (tmp_path / "out").glob("*.safetensors")
    held, _ = files.read_tensors(path)
    assert sum(row.bytes for row in rows) == sum(values.nbytes for values in held.values())


def test_experts_and_attention_may_differ(source: Path, tmp_path: Path) -> None:
    quantized.write(source, tmp_path / "out", "rtn2", "int8")
    expected = quantize.approximate(open_model.load(source).params, {"experts": "rtn2", "attention": "int8"})
    assert same(open_model.load(tmp_path / "out").params, expected)


def test_a_quantised_run_says_so_and_keeps_the_rest_of_its_config(tmp_path: Path) -> None:
    quantized.write(finished(), tmp_path / "out", "nf4", "float")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"config.json", "model.safetensors"}
    values = json.loads((tmp_path / "out" / "config.json").read_text())
    assert values["quantization"] == {"format": 1, "experts": "nf4", "attention": "float"}
    before, after = checkpoint.load_model(finished()), checkpoint.load_model(tmp_path / "out")
    assert after.run._replace(quantization=None) == before.run
    assert after.step == before.step
    assert "quantization" not in json.loads((finished() / "config.json").read_text())


def test_a_quantised_mixtral_has_no_file_that_transformers_would_take_for_its_own(tmp_path: Path) -> None:
    """It ignores a quantisation that it does not know, and would fill a model with random weights."""
    quantized.write(MIXTRAL, tmp_path / "out", "hqq3")
    assert [path.name for path in (tmp_path / "out").glob("*.safetensors*")] == ["quantized.safetensors"]
    values = json.loads((tmp_path / "out" / "config.json").read_text())
    assert values["quantization_config"]["quant_method"] == "minimoe"
    assert huggingface.load(tmp_path / "out").end_tokens == huggingface.load(MIXTRAL).end_tokens


def test_a_quantised_run_cannot_be_trained(tmp_path: Path) -> None:
    quantized.write(finished(), tmp_path / "out", "nf4")
    with pytest.raises(UserError, match=r"out is quantised \(nf4 experts, nf4 attention\) and cannot be trained"):
        resume(tmp_path / "out", corpus=None)


def test_nothing_is_quantised_twice(source: Path, tmp_path: Path) -> None:
    quantized.write(source, tmp_path / "out", "nf4")
    with pytest.raises(UserError, match="quantised.* already: quantise the .* that it came from"):
        quantized.write(tmp_path / "out", tmp_path / "again", "int8")
    assert not (tmp_path / "again").exists()


def test_nothing_is_overwritten(source: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="is not empty, and nothing in it is overwritten"):
        quantized.write(source, tmp_path, "nf4")
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    with pytest.raises(UserError, match="notes.txt"):
        quantized.write(source, tmp_path / "notes.txt", "nf4")


def test_a_wrong_scheme_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no scheme 'gptq'"):
        quantized.write(tmp_path / "nowhere", tmp_path / "out", "gptq")
    assert not (tmp_path / "out").exists()


def test_a_run_in_float64_is_refused(tmp_path: Path) -> None:
    train(tmp_path / "run", dtype="float64", steps=1)
    with pytest.raises(UserError, match="has weights of float64, but float32 is expected: train with --dtype float32"):
        quantized.write(tmp_path / "run", tmp_path / "out", "nf4")
    assert not (tmp_path / "out").exists()


def test_a_config_and_a_model_of_different_schemes_are_refused(tmp_path: Path) -> None:
    for scheme in ("rtn2", "hqq2"):  # the same arrays in the same shapes
        quantized.write(finished(), tmp_path / scheme, scheme)
    shutil.copy(tmp_path / "rtn2" / "model.safetensors", tmp_path / "hqq2" / "model.safetensors")
    with pytest.raises(UserError, match="was made with another quantization than config.json says"):
        checkpoint.load_model(tmp_path / "hqq2")
    shutil.copy(finished() / "model.safetensors", tmp_path / "hqq2" / "model.safetensors")
    with pytest.raises(UserError, match="lacks the tensor"):
        checkpoint.load_model(tmp_path / "hqq2")


def test_a_damaged_file_is_refused(source: Path, tmp_path: Path) -> None:
    quantized.write(source, tmp_path / "out", "nf4")
    (path,) = (tmp_path / "out").glob("*.safetensors")
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match="is damaged"):
        open_model.load(tmp_path / "out")


@pytest.mark.parametrize("entry", [None, {"format": 9}, {"format": 1, "experts": "odd", "attention": "nf4"}, 7])
def test_a_strange_entry_is_refused_with_the_name_of_the_file(tmp_path: Path, entry: Any) -> None:
    quantized.write(finished(), tmp_path / "run", "nf4")
    quantized.write(MIXTRAL, tmp_path / "mixtral", "nf4")
    for folder, name in (("run", "quantization"), ("mixtral", "quantization_config")):
        path = tmp_path / folder / "config.json"
        values = json.loads(path.read_text())
        values.pop("sha256", None)
        values[name] = entry
        if folder == "mixtral" and isinstance(entry, dict):
            values[name] = {"quant_method": "minimoe", **entry}
        path.write_text(json.dumps(values))
        with pytest.raises(UserError, match=str(tmp_path / folder)):
            open_model.load(tmp_path / folder)


def test_weights_that_another_program_quantised_are_refused(tmp_path: Path) -> None:
    shutil.copytree(MIXTRAL, tmp_path / "theirs")
    path = tmp_path / "theirs" / "config.json"
    values = json.loads(path.read_text())
    values["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    path.write_text(json.dumps(values))
    with pytest.raises(UserError, match="another program quantised the weights"):
        open_model.load(tmp_path / "theirs")


def test_a_model_too_large_for_the_memory_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quantized.write(MIXTRAL, tmp_path / "out", "rtn2")
    monkeypatch.setattr("minimoe.core.resources.memory_bytes", lambda: 100)
    with pytest.raises(UserError, match="parameters take"):
        open_model.load(tmp_path / "out")


def test_tied_embeddings_and_a_single_expert_go_through(tmp_path: Path) -> None:
    config = ModelConfig(
        vocab_size=11, width=8, layers=1, heads=2, kv_heads=1, head_width=4, context=8, experts=1, active_experts=1,
        expert_width=8, noisy_gating=False, tied_embeddings=True,
    )  # fmt: skip
    huggingface.save(tmp_path / "dense", decoder.init(np.random.default_rng(0), config), config)
    quantized.write(tmp_path / "dense", tmp_path / "out", "nf4")
    before, after = (open_model.load(tmp_path / name).params for name in ("dense", "out"))
    assert after.head is None
    assert same(after, quantize.approximate(before, quantize.plan("nf4")._asdict()))


# Tensor by tensor


def parts_of(path: Path) -> tuple[Any, list[str], bytes]:
    """Header, order and data of a file; the safetensors library leaves the order of the metadata to chance."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    return header, [name for name in header if name != "__metadata__"], content[8 + length :]


@pytest.mark.parametrize("scheme", ["nf4", "int8", "hqq3", "rtn2"])
@pytest.mark.parametrize("made", ["golden", "fused", "tied"])
def test_the_files_are_those_of_a_model_that_was_loaded_whole(made: str, scheme: str, tmp_path: Path) -> None:
    source = MIXTRAL
    if made != "golden":
        source = mixtral_folders.write(
            tmp_path / "m", num_hidden_layers=11, fused=made == "fused", tie_word_embeddings=made == "tied"
        )
    quantized.write(source, tmp_path / "ours", scheme, "float" if made == "tied" else None)
    whole = huggingface.load(source)
    plan = quantize.plan(scheme, "float" if made == "tied" else None)
    huggingface.save(tmp_path / "theirs", whole.params, whole.config, whole.tokenizer, whole.end_tokens, plan)
    names = {path.name for path in (tmp_path / "theirs").iterdir()}
    assert {path.name for path in (tmp_path / "ours").iterdir()} == names >= {"config.json", "quantized.safetensors"}
    for name in names - {"quantized.safetensors"}:
        assert (tmp_path / "ours" / name).read_bytes() == (tmp_path / "theirs" / name).read_bytes()
    assert parts_of(tmp_path / "ours" / "quantized.safetensors") == parts_of(
        tmp_path / "theirs" / "quantized.safetensors"
    )


def test_each_tensor_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from minimoe.storage import encoded

    read: list[Any] = []
    original = encoded.read
    monkeypatch.setattr(encoded, "read", lambda of: read.append((of.name, of.arrays[""].start)) or original(of))
    quantized.write(mixtral_folders.write(tmp_path / "m"), tmp_path / "out", "int8")
    assert len(read) == len(set(read)) == 3 + 3 * (2 + 4 + 1 + 3 * 5)


def test_a_weight_that_cannot_be_quantised_leaves_no_folder(tmp_path: Path) -> None:
    source = mixtral_folders.write(tmp_path / "m", dtype="F32")
    with (source / "model.safetensors").open("r+b") as file:
        file.seek(-300 * 32 * 4 - 32 * 4 - 8, 2)  # in the last expert, before the last norm and the output layer
        file.write(np.array([np.nan], "<f4").tobytes())
    with pytest.raises(UserError, match=r"blocks\[2\].moe.experts.w_down: a weight is nan"):
        quantized.write(source, tmp_path / "out", "nf4")
    assert not (tmp_path / "out").exists()


def test_a_model_larger_than_the_memory_is_quantised_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("minimoe.core.resources.memory_bytes", lambda: 100)
    quantized.write(MIXTRAL, tmp_path / "out", "int8")
    assert (tmp_path / "out" / "config.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["int8", "nf4"])
def test_quantising_needs_less_memory_than_one_layer(scheme: str, tmp_path: Path) -> None:
    """Eight layers of 91 MB in float32, 45 MB in the file; the peak of a real process above its beginning."""
    folder = mixtral_folders.write(
        tmp_path / "m",
        hidden_size=512,
        intermediate_size=1792,
        num_hidden_layers=8,
        num_local_experts=8,
        num_attention_heads=8,
    )
    layer = 4 * (8 * 3 * 512 * 1792 + 2 * 512 * 512 + 2 * 512 * 128)
    work = f"quantized.write({str(folder)!r}, {str(tmp_path / 'out')!r}, {scheme!r})"
    peak, _ = measured.peak_of("from minimoe.storage import quantized, tensor_stream\nimport tokenizers\n", work)
    assert peak < 0.8 * layer
