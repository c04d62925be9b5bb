"""Measures a process of its own: how much memory a piece of work adds to what Python and its libraries hold.

The work is Python code. What it imports at its beginning, and the memory that BLAS takes for itself at its first
product, are there before the measurement begins; the peak is the largest resident size that the system saw after it.
"""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent

BEGIN = """
import numpy as np
from minimoe.core import resources
from minimoe.storage import bounded
bounded._warm_up()
before = resources.memory_in_use()
"""
END = """
print("\\npeak", resources.peak_memory_bytes() - before)
"""


def peak_of(imports: str, work: str) -> tuple[int, str]:
    """The bytes that the peak is above the beginning, and what the work printed."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", imports + BEGIN + work + END], env=environment, capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    printed, _, peak = done.stdout.rpartition("\npeak ")
    return int(peak), printed
