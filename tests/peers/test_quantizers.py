"""Parity with bitsandbytes and hqq: the bytes of int8, NF4, HQQ and plain rounding, and what they become again."""

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from weights import drawn

torch = pytest.importorskip("torch")
theirs = pytest.importorskip("bitsandbytes.functional")
Quantizer = pytest.importorskip("hqq.core.quantize").Quantizer

from minimoe.compression import hqq, hqq_meta, int8, layout, nf4, rtn  # noqa: E402

pytestmark = pytest.mark.torch

SHAPES = [(64, 24), (130, 128), (96, 260)]
"""(inputs, outputs): a block of 64 is one output; blocks lie across outputs, and need two maxima of maxima."""

KINDS = ["normal", "heavy", "shifted", "zero column"]


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def outputs_first(w: NDArray[Any]) -> Any:
    """The matrix as (outputs, inputs), which is their order."""
    return torch.from_numpy(np.ascontiguousarray(w.T))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_int8(kind: str, shape: tuple[int, int]) -> None:
    """They compute in float32, which may move a tie to one side; no other code differs."""
    w = drawn(kind, shape, np.float16)
    codes, absmax, _ = theirs.int8_vectorwise_quant(outputs_first(w))
    ours = int8.quantize(w)
    np.testing.assert_array_equal(ours.absmax, absmax.numpy())
    differ = ours.codes != codes.numpy().T
    scaled = 127 * w.astype(np.float64) / np.where(ours.absmax > 0, ours.absmax, 1)
    assert np.allclose(np.abs(scaled - np.floor(scaled) - 0.5)[differ], 0, atol=1e-5)
    assert differ.mean() < 2e-4


@pytest.mark.parametrize("block", [64, 128, 256, 512, 1024, 2048, 4096])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_nf4(kind: str, shape: tuple[int, int], block: int) -> None:
    w = drawn(kind, shape)
    codes, state = theirs.quantize_4bit(outputs_first(w), blocksize=block, quant_type="nf4")
    ours = nf4.quantize(w, block, double=False)
    np.testing.assert_array_equal(ours.codes, codes.numpy()[:, 0])
    np.testing.assert_array_equal(ours.absmax, state.absmax.numpy())


@pytest.mark.parametrize("block", [64, 128])
@pytest.mark.parametrize("double", [False, True])
def test_what_nf4_becomes_again(double: bool, block: int) -> None:
    """Their kernel for the CPU needs blocks that lie in one output: where they do not, it takes the wrong maximum."""
    w = drawn("normal", (256, 24))
    codes, state = theirs.quantize_4bit(outputs_first(w), blocksize=block, quant_type="nf4", compress_statistics=double)
    again = nf4.dequantize(nf4.quantize(w, block, double))
    np.testing.assert_allclose(again.T, theirs.dequantize_4bit(codes, state).numpy(), atol=1e-6 * abs(w).max())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_double_quantisation(kind: str, shape: tuple[int, int]) -> None:
    """Their kernel finds the nearest of 256 values up to 2e-5: a maximum that is nearly a tie may have either code."""
    w = drawn(kind, shape)
    codes, state = theirs.quantize_4bit(outputs_first(w), blocksize=64, quant_type="nf4", compress_statistics=True)
    ours = nf4.quantize(w)
    assert ours.offset is not None
    assert ours.nested_absmax is not None
    np.testing.assert_array_equal(ours.codes, codes.numpy()[:, 0])
    np.testing.assert_allclose(ours.offset, state.offset.numpy(), rtol=1e-6)
    np.testing.assert_allclose(ours.nested_absmax, state.state2.absmax.numpy(), rtol=1e-6)
    differ = ours.absmax != state.absmax.numpy()
    largest = np.repeat(ours.nested_absmax, nf4.NESTED_BLOCK)[: differ.size]
    scaled = (nf4.quantize(w, double=False).absmax - ours.offset) / largest
    midpoints = (nf4.DYNAMIC_MAP[:-1] + nf4.DYNAMIC_MAP[1:]) / 2
    assert (abs(scaled[differ, None] - midpoints).min(1, initial=1) < 2e-5).all()
    assert differ.sum() <= 1


@pytest.mark.parametrize("group", [16, 32, 64])
@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("optimize", [False, True], ids=["rtn", "hqq"])
@pytest.mark.parametrize("kind", KINDS)
def test_hqq_and_plain_rounding(kind: str, optimize: bool, bits: int, group: int) -> None:
    """They compute in float32, which may move a tie to one side, and with it the mean of its group: in one at most."""
    w = drawn(kind, (64, 84))
    packed, meta = Quantizer.quantize(
        outputs_first(w),
        nbits=bits,
        group_size=group,
        axis=1,
        optimize=optimize,
        round_zero=optimize and bits == 4,  # as in their preset
        device="cpu",
    )
    ours = (hqq if optimize else rtn).quantize(w, bits, group, np.float32)
    step, zero = (meta[name].numpy()[:, 0] for name in ("scale", "zero"))
    np.testing.assert_allclose(ours.step, step, rtol=1e-6)

    count, tolerance = len(step), 1e-5 * abs(w).max()
    mine, other = (layout.unpack(codes, bits, count).astype(int) for codes in (ours.codes, packed.numpy()))
    same = (mine == other).all(1) & (abs(ours.offset + zero * step) < tolerance)
    assert (~same).sum() <= 1
    assert abs(mine - other).max() <= 1
    assert not same.all() or (ours.codes == packed.numpy()).all()  # the rows that fill up an int32 too

    again = Quantizer.dequantize(packed, meta | {"compute_dtype": torch.float32}).numpy()
    apart = abs(rtn.dequantize(ours).T - again).reshape(-1, group)
    assert apart[same].max() < tolerance


@pytest.mark.parametrize(("bits", "group"), [(2, 16), (3, 64), (4, 64)])
@pytest.mark.parametrize("kind", ["normal", "heavy", "shifted"])
def test_steps_and_offsets_in_8_bits_lose_at_most_one_percent_against_theirs(kind: str, bits: int, group: int) -> None:
    """Their codes belong to the steps before these are rounded, and zero points are rounded, not offsets."""
    w = drawn(kind, (128, 256))
    packed, meta = Quantizer.quantize(
        outputs_first(w), nbits=bits, group_size=group, axis=1, round_zero=bits == 4, device="cpu"
    )
    for name in ("scale", "zero"):
        codes, of_it = Quantizer.quantize(meta[name], nbits=8, group_size=128, optimize=False, device="cpu")
        meta[name] = Quantizer.dequantize(codes, of_it | {"compute_dtype": torch.float32})
    theirs_again = Quantizer.dequantize(packed, meta | {"compute_dtype": torch.float32}).numpy().T
    ours_again = hqq_meta.dequantize(hqq_meta.quantize(w, bits, group))
    ours, other = (np.linalg.norm(again - w) for again in (ours_again, theirs_again))
    assert ours < 1.01 * other
