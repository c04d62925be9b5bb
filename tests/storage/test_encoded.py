"""Every tensor is found in its file, and becomes the numbers that loading the whole model gives."""

import json
from pathlib import Path
from typing import Any

import mixtral_folders
import numpy as np
import pytest
from small_runs import finished, train

from minimoe.core import files, tree
from minimoe.core.errors import UserError
from minimoe.storage import encoded, huggingface, open_model, quantized
from minimoe.storage.encoded import Encoded
from minimoe.training import run_report

GOLDEN = Path(__file__).parent.parent / "golden" / "mixtral"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.fsync", lambda _: None)
    finished()
    monkeypatch.setattr(run_report, "write", lambda *_: None)


def assert_all_found(folder: Path) -> None:
    """Every leaf, read by itself, is that of the whole model, in rows; and no two share a byte of a file."""
    located, whole = encoded.locate(folder), open_model.load(folder)
    assert located.config == whole.config
    spans = []
    for name, leaf in tree.named_leaves(whole.params):
        of = located.leaves[name]
        parts = of if isinstance(of, list) else [of]
        read = [encoded.read(one) for one in parts]
        np.testing.assert_array_equal(np.stack(read) if isinstance(of, list) else read[0], leaf, err_msg=name)
        assert isinstance(of, list) == (".experts." in name)
        assert all(values.flags.c_contiguous and values.dtype == np.float32 for values in read)
        for one in parts:
            assert one.size % encoded.ALIGNMENT == 0
            spans += [(stored.path, stored.start, place.stop - place.start) for _, stored, place in one.places]
    for (path, start, size), (other, after, _) in zip(sorted(spans), sorted(spans)[1:], strict=False):
        assert path != other or start + size <= after


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("fused", [False, True])
def test_a_mixtral(tmp_path: Path, dtype: str, fused: bool) -> None:
    assert_all_found(mixtral_folders.write(tmp_path / "m", dtype, shards=3, fused=fused))


def test_the_golden_mixtral_a_run_and_square_matrices(tmp_path: Path) -> None:
    assert_all_found(GOLDEN)
    assert_all_found(finished())
    assert_all_found(mixtral_folders.write(tmp_path / "m", intermediate_size=32, num_key_value_heads=4))


@pytest.mark.parametrize("scheme", ["nf4", "int8", "hqq3", "rtn2"])
def test_what_was_quantised(tmp_path: Path, scheme: str) -> None:
    quantized.write(mixtral_folders.write(tmp_path / "m"), tmp_path / "out", scheme, "float")
    assert_all_found(tmp_path / "out")
    quantized.write(finished(), tmp_path / "run", scheme)
    assert_all_found(tmp_path / "run")


def test_a_tied_table_and_a_mistral(tmp_path: Path) -> None:
    assert_all_found(mixtral_folders.write(tmp_path / "tied", tie_word_embeddings=True))
    params, config = huggingface.load_params(
        mixtral_folders.write(tmp_path / "one", num_local_experts=1, num_experts_per_tok=1)
    )
    huggingface.save(tmp_path / "dense", params, config)
    located = encoded.locate(tmp_path / "dense")
    assert [name for name in dict(tree.named_leaves(located.shapes)) if name not in located.leaves] == [
        f"blocks[{i}].moe.router.w_gate" for i in range(3)
    ]
    (only,) = located.leaves["blocks[1].moe.experts.w_down"]
    assert isinstance(only, Encoded)
    np.testing.assert_array_equal(encoded.read(only), params.blocks[1].moe.experts.w_down[0])


def test_a_surplus_tensor_must_repeat_what_it_should(tmp_path: Path) -> None:
    folder = mixtral_folders.write(tmp_path / "m", dtype="F32")
    changed = tmp_path / "tied"
    mixtral_folders.write(changed, dtype="F32")
    values = json.loads((changed / "config.json").read_text()) | {"tie_word_embeddings": True}
    (changed / "config.json").write_text(json.dumps(values))
    assert encoded.locate(folder)
    with pytest.raises(UserError, match=r"lm_head.weight that differs from model.embed_tokens.weight"):
        encoded.locate(changed)


def test_files_that_do_not_belong_together_are_refused(tmp_path: Path) -> None:
    quantized.write(GOLDEN, tmp_path / "nf4", "nf4")
    quantized.write(GOLDEN, tmp_path / "int8", "int8")
    (tmp_path / "nf4" / "quantized.safetensors").write_bytes((tmp_path / "int8" / "quantized.safetensors").read_bytes())
    with pytest.raises(UserError, match=r"quantized.safetensors (holds|lacks)"):
        encoded.locate(tmp_path / "nf4")
    config = tmp_path / "int8" / "config.json"
    config.write_text(config.read_text().replace('"num_hidden_layers": 2', '"num_hidden_layers": 1'))
    with pytest.raises(UserError, match=r"holds the tensor blocks\[1\].*, which its model does not have"):
        encoded.locate(tmp_path / "int8")


def test_a_type_that_is_not_the_expected_one_is_refused(tmp_path: Path) -> None:
    train(tmp_path / "run", dtype="float64", steps=1)
    with pytest.raises(UserError, match="has weights of float64, .* leave the bound of memory out"):
        encoded.locate(tmp_path / "run")
    with pytest.raises(UserError, match="is not a run"):
        encoded.locate(tmp_path)


def test_shared_experts_that_an_earlier_version_left_in_floating_point(tmp_path: Path) -> None:
    train(tmp_path / "run", shared_experts=1, steps=1)
    quantized.write(tmp_path / "run", tmp_path / "small", "nf4")
    plain, _ = files.read_tensors(tmp_path / "run" / "model.safetensors")
    tensors, about = files.read_tensors(tmp_path / "small" / "model.safetensors")
    mixed = {name: values for name, values in tensors.items() if ".shared." not in name}
    mixed |= {name: values for name, values in plain.items() if ".shared." in name}
    files.write_tensors(tmp_path / "small" / "model.safetensors", mixed, about)
    for opened in (encoded.locate, open_model.load):
        with pytest.raises(UserError, match="as an earlier version left shared experts: quantise again"):
            opened(tmp_path / "small")


def test_a_file_that_was_cut_short_after_it_was_described(tmp_path: Path) -> None:
    folder = mixtral_folders.write(tmp_path / "m")
    located = encoded.locate(folder)
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    last: Any = located.leaves["head.weight"]
    with pytest.raises(UserError, match="cut short in the tensor lm_head.weight"):
        encoded.read(last)
