"""Makes quantized.safetensors: small matrices, and the bytes that bitsandbytes and hqq make of them on the CPU.

    python tests/golden/make_quantized.py        needs torch, bitsandbytes and hqq

    w.normal, w.heavy       (inputs, outputs): normal; Student's t with 3 degrees of freedom, whose outliers are clipped
    int8.codes, .absmax     int8_vectorwise_quant of each output of w.normal
    nf4.{64,128}.*          quantize_4bit without double quantisation: codes, absmax, and what dequantize_4bit gives
    nested.*                quantize_4bit with it, for w.long, whose 260 blocks need two nested maxima; of what
                            dequantize_4bit gives, the last eight outputs
    {hqq,rtn}{2,3,4}.*      Quantizer.quantize along the inputs, with and without optimisation, for w.heavy
    levels, dynamic_map     the 16 and 256 values

The weights are in float16, and are quantised in float32 but for int8, which takes float16.
"""

from pathlib import Path

import bitsandbytes.functional as bnb
import torch
from hqq.core.quantize import Quantizer
from safetensors.torch import save_file

HERE = Path(__file__).parent


def main() -> None:
    generator = torch.Generator().manual_seed(5)
    torch.manual_seed(5)
    normal = (0.3 * torch.randn(128, 24, generator=generator)).half()
    heavy = (0.5 * torch.distributions.StudentT(3.0).sample((64, 84))).half()
    long = (0.02 * torch.randn(130, 128, generator=generator)).half()
    made = {"w.normal": normal, "w.heavy": heavy, "w.long": long}

    codes, absmax, _ = bnb.int8_vectorwise_quant(normal.T.contiguous())
    made |= {"int8.codes": codes, "int8.absmax": absmax}

    for block in (64, 128):
        codes, state = bnb.quantize_4bit(normal.float().T.contiguous(), blocksize=block, quant_type="nf4")
        made |= {f"nf4.{block}.codes": codes[:, 0], f"nf4.{block}.absmax": state.absmax}
        made[f"nf4.{block}.w"] = bnb.dequantize_4bit(codes, state)
    made["levels"] = state.code
    codes, state = bnb.quantize_4bit(
        long.float().T.contiguous(), blocksize=64, quant_type="nf4", compress_statistics=True
    )
    made |= {"nested.codes": codes[:, 0], "nested.absmax": state.absmax, "nested.offset": state.offset}
    made |= {"nested.nested_absmax": state.state2.absmax, "dynamic_map": state.state2.code}
    made["nested.w"] = bnb.dequantize_4bit(codes, state)[-8:]

    for bits in (2, 3, 4):
        for name, optimize in (("hqq", True), ("rtn", False)):
            codes, meta = Quantizer.quantize(
                heavy.float().T.contiguous(),
                nbits=bits,
                group_size=32,
                axis=1,
                optimize=optimize,
                round_zero=optimize and bits == 4,
                device="cpu",
            )
            made[f"{name}{bits}.codes"] = codes
            made |= {f"{name}{bits}.step": meta["scale"][:, 0], f"{name}{bits}.zero": meta["zero"][:, 0]}
    save_file({name: values.contiguous().clone() for name, values in made.items()}, HERE / "quantized.safetensors")


if __name__ == "__main__":
    main()
