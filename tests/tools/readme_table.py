"""The README's table of components: lesson, test and measured gradient error. Run this file to bring it up to date.

    python tests/readme_table.py
"""

from __future__ import annotations

import math
import re
from pathlib import Path

from minimoe.proof import gradcheck

ROOT = Path(__file__).resolve().parent.parent.parent
BEGIN, END = "<!-- components: written by tests/readme_table.py -->", "<!-- end of components -->"
# in the order in which data flows through them
LAYERS = ["linear", "embedding", "rmsnorm", "rope", "attention", "swiglu", "router", "balance", "moe", "block"]
LAYERS += ["decoder", "cross_entropy"]


def table() -> str:
    """The table as Markdown, with every gradient measured now."""
    rows = gradcheck.run()
    lines = ["| component | lesson | test | gradient error below |", "|---|---|---|---|"]
    for name in LAYERS:
        source = ROOT / "minimoe" / "layers" / f"{name}.py"
        lesson = re.search(r"lessons/(\w+)\.ipynb", source.read_text(encoding="utf-8"))
        assert lesson, f"{source} names no lesson"
        worst = max(row.error for row in rows if re.split(r"[ ,]", row.component.replace("-", "_"))[0] == name)
        lines.append(
            f"| [{name}](minimoe/layers/{name}.py) | [{lesson[1].replace('_', ' ')}](lessons/{lesson[1]}.ipynb) "
            f"| [test_{name}.py](tests/layers/test_{name}.py) | 1e{math.ceil(math.log10(worst))} |"
        )
    return "\n".join(lines)


def stated() -> str:
    """The table as it stands in the README."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    return text.partition(BEGIN)[2].partition(END)[0].strip()


def write() -> None:
    """Puts the measured table into the README."""
    path = ROOT / "README.md"
    text = path.read_text(encoding="utf-8")
    head, _, rest = text.partition(BEGIN)
    path.write_text(f"{head}{BEGIN}\n{table()}\n{END}{rest.partition(END)[2]}", encoding="utf-8")


if __name__ == "__main__":
    write()
