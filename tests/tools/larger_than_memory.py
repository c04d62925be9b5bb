"""Runs a Mixtral that is larger than the memory that it may use, and measures the memory of the process.

    python tests/tools/larger_than_memory.py [--folder DIR] [--memory 1.5GB] [--tokens 8]

It writes a folder of 6.8 GB with random weights, in bfloat16 and with Mixtral's proportions: half of its width, 9
layers, 8 experts of which 2 are active. Then a process of its own generates with the bound, once while the system
forgets what was read, so that every miss comes from the disk, and once while the system may keep files in the memory
that is free. Both must write the same tokens. The folder is removed at the end.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "support"))

import measured  # noqa: E402
import mixtral_folders  # noqa: E402

SIZES = {
    "vocab_size": 32_000,
    "hidden_size": 2048,
    "intermediate_size": 7168,
    "num_hidden_layers": 9,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "num_local_experts": 8,
    "max_position_embeddings": 4096,
}
IMPORTS = """
import tokenizers
from minimoe.cost.offloading import parse_bytes
from minimoe.inference import fast_decode, generation, sampling
from minimoe.storage import offload_report
"""
WORK = """
opened = bounded.open_folder({folder!r})
prompt = opened.tokenizer.encode("the bread")
model = opened.load(parse_bytes({memory!r}), len(prompt), len(prompt) + {tokens}, forget={forget})
before = model.before
print(list(generation.generate(model.params, model.config, prompt, tokens={tokens}, temperature=0)))
print(offload_report.report(model))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, help="where the model is written, and removed from (a temporary folder)")
    parser.add_argument("--memory", default="1.5GB")
    parser.add_argument("--tokens", type=int, default=8)
    chosen = parser.parse_args()
    parent = Path(tempfile.mkdtemp(dir=chosen.folder))
    try:
        free = shutil.disk_usage(parent).free
        if free < 10 * 10**9:
            sys.exit(f"{parent} has {free / 1e9:.1f} GB free, expected 10 GB: give another --folder.")
        folder = mixtral_folders.write(parent / "mixtral", shards=4, **SIZES)
        size = sum(path.stat().st_size for path in folder.iterdir())
        print(f"{folder}: {size / 1e9:.2f} GB", flush=True)
        written = []
        for forget in (True, False):
            start = time.perf_counter()
            work = WORK.format(folder=str(folder), memory=chosen.memory, tokens=chosen.tokens, forget=forget)
            peak, printed = measured.peak_of(IMPORTS, work)
            print(f"\n{'from the disk' if forget else 'from the disk, or from memory that is free'}:")
            print(printed.strip())
            print(f"peak {peak / 1e9:.3f} GB; {time.perf_counter() - start:.0f} s in all", flush=True)
            written.append(printed.splitlines()[0])
        print("\nthe same tokens both times" if len(set(written)) == 1 else "\nDIFFERENT TOKENS")
    finally:
        shutil.rmtree(parent)


if __name__ == "__main__":
    main()
