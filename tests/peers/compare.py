"""minimoe beside the PyTorch that people would write: proves that both compute the same, then measures.

    python tests/peers/compare.py                  all rows, a quarter of an hour; writes tests/peers/RESULTS.md
    python tests/peers/compare.py --only toy       one row, or several; prints, writes nothing
    python tests/peers/compare.py --device gpu     training on the GPU, CuPy against PyTorch; writes RESULTS_GPU.md
    python tests/peers/compare.py --quick          all rows in tiny sizes, to see that everything works; writes nothing

Needs torch and transformers. All compute in float32 with the same number of threads; ``rows`` says what is compared.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import importlib.metadata
import importlib.util
import os
import platform
import shlex
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent.parent)]

import rows  # noqa: E402
from rows import Plan, Row  # noqa: E402

from minimoe.core import resources  # noqa: E402
from minimoe.core.arrays import gpu_problem  # noqa: E402
from minimoe.core.config import ModelConfig  # noqa: E402

FORCED = ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE")
"""Variables that keep NumPy's BLAS from its own kernels; PyTorch brings another BLAS, which they do not reach."""

TOY = ModelConfig()
"""The shape of these rows since the first table, so that tables of different days can be compared."""
LARGER = ModelConfig(width=384, layers=6, heads=6, kv_heads=2, head_width=64, context=256, expert_width=768)
LARGER_ON_GPU = ModelConfig(width=1024, layers=8, heads=16, kv_heads=4, head_width=64, context=512, expert_width=2048)
QUICK = ModelConfig(vocab_size=32, width=16, layers=1, heads=2, head_width=8, context=16, experts=4, expert_width=16)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument("--quick", action="store_true", help="tiny sizes and few rounds")
    parser.add_argument("--only", nargs="+", metavar="ROW", choices=rows.ROWS, help=f"of {', '.join(rows.ROWS)}")
    parser.add_argument("--threads", type=int, default=resources.cores(), help="of every contender (all cores)")
    parser.add_argument("--rounds", type=int, default=7, help="in each, every contender has a turn (7)")
    parser.add_argument("--keep", type=Path, metavar="FILE", help="keep each row there, and measure none twice")
    chosen = parser.parse_args(arguments)
    problem = missing(chosen.device)
    if problem:
        print(f"compare: {problem}", file=sys.stderr)
        return 2
    for name in FORCED:
        os.environ.pop(name, None)  # for the processes of the contenders

    plan = plan_of(chosen)
    everything = rows.ON_GPU if chosen.device == "gpu" else tuple(rows.ROWS)
    known = rows.load(chosen.keep) if chosen.keep else {}
    for name in chosen.only or everything:
        if name not in known:
            known[name] = rows.ROWS[name](plan)
            print("\n".join(map(text_of, known[name])), flush=True)
            if chosen.keep:
                rows.save(chosen.keep, known)
    if not chosen.quick and not chosen.only:
        found = [row for name in everything for row in known[name]]
        path = HERE / ("RESULTS_GPU.md" if chosen.device == "gpu" else "RESULTS.md")
        path.write_text(page(found, plan))
        print(f"{path} is written.")
    return 0


def missing(device: str) -> str | None:
    """What keeps the comparison from running, in a sentence."""
    if not Path("/proc/self/statm").exists():
        return "this system does not tell the memory of a process in /proc, as Linux does: compare there."
    for name in ("torch", "transformers"):
        if importlib.util.find_spec(name) is None:
            return f'{name} is not installed: run `pip install "minimoe[peers]"`.'
    if device == "gpu":
        problem = gpu_problem()
        if problem:
            return problem
        import torch

        if not torch.cuda.is_available():
            return f"PyTorch {torch.__version__} finds no GPU, though CuPy does: install a build of it with CUDA."
    return None


def plan_of(chosen: argparse.Namespace) -> Plan:
    if chosen.quick:
        larger = dataclasses.replace(QUICK, layers=2)
        eager, decoders = ("loop", "sorted"), ("cached",)  # compiling takes minutes
        return Plan(QUICK, 8, larger, 2, chosen.threads, 1, 0.01, chosen.device, eager, decoders)
    if chosen.device == "gpu":
        return Plan(TOY, 16, LARGER_ON_GPU, 32, chosen.threads, chosen.rounds, 2.0, "gpu")
    return Plan(TOY, 16, LARGER, 8, chosen.threads, chosen.rounds, 1.5)


# Words


def text_of(row: Row) -> str:
    lines = [f"{row.work}: {row.found}   target {row.target}, {verdict(row)}"]
    lines += [f"    {values_of(one.values)} {one.unit:9} {one.name}" for one in row.details]
    lines += [f"    proved beforehand   {proof}" for proof in row.proofs]
    return "\n".join(lines)


def verdict(row: Row) -> str:
    return "reached" if row.reached else "**missed**"


def values_of(values: Sequence[float]) -> str:
    """Median, smallest and largest."""
    digits = 0 if statistics.median(values) >= 100 else 1 if statistics.median(values) >= 10 else 3
    return "  ".join(f"{value:10,.{digits}f}" for value in (statistics.median(values), min(values), max(values)))


def page(found: Sequence[Row], plan: Plan) -> str:
    """RESULTS.md: the machine, the targets, every contender, and what was proved."""
    lines = [
        "# minimoe and its twins in PyTorch, measured",
        "",
        *(f"- {line}" for line in machine(plan)),
        "",
        f"Medians of {plan.rounds} rounds in which the contenders take turns, each in a process of its own; in",
        "brackets the least and the most of a round. A ratio of speeds is that of minimoe to the other.",
        "",
        "| work | target | measured | |",
        "|---|---|---|---|",
        *(f"| {row.work} | {row.target} | {row.found} | {verdict(row)} |" for row in found),
        "",
        "## Every contender",
        "",
        "| work | contender | median | least | most | |",
        "|---|---|--:|--:|--:|---|",
    ]
    for row in found:
        for one in row.details:
            cells = values_of(one.values).split()
            lines.append(f"| {row.work} | {one.name} | {' | '.join(cells)} | {one.unit} |")
    lines += [
        "",
        "## Proved before any time was taken",
        "",
        "Same weights, same batch, same noise, auxiliary losses included; the largest difference from minimoe,",
        "relative to the largest entry of the same array.",
        "",
        *(f"- {row.work}: {proof}" for row in found for proof in row.proofs),
    ]
    return "\n".join(lines) + "\n"


def command(words: list[str]) -> str:
    """How to measure the same; where someone kept the rows is of no interest to others."""
    if "--keep" in words:
        kept = words.index("--keep")
        words = words[:kept] + words[kept + 2 :]
    return shlex.join(["python", "tests/peers/compare.py", *words])


def machine(plan: Plan) -> list[str]:
    """Where, with what and when."""
    from threadpoolctl import threadpool_info

    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("numpy", "torch", "transformers"))
    blas = [library for library in threadpool_info() if library["user_api"] == "blas"]
    lines = [
        f"{processor()}, {resources.cores()} cores, {(resources.memory_bytes() or 0) / 2**30:.0f} GB; "
        f"{platform.system()} {platform.machine()}",
        f"Python {platform.python_version()}, {versions}",
        *(f"BLAS of NumPy: {one['internal_api']} {one['version']}, {one.get('architecture')} kernels" for one in blas),
        f"float32, {plan.threads} threads each",
        f"`{command(sys.argv[1:])}` on {datetime.date.today()}",
    ]
    if plan.device == "gpu":
        import cupy

        name = cupy.cuda.runtime.getDeviceProperties(0)["name"].decode()
        lines.insert(1, f"{name}, CuPy {cupy.__version__}, CUDA {cupy.cuda.runtime.runtimeGetVersion()}")
    return lines


def processor() -> str:
    """Its name, as Linux tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor()


if __name__ == "__main__":
    sys.exit(main())
