"""The README's table of components: lesson, test and measured gradient error. Run this file to bring it up to date.

python tests/tools/readme_table.py
"""

from __future__ import annotations

import math
import re
from pathlib import Path

from minimoe.layers import moe
from minimoe.proof import gradcheck

ROOT = Path(__file__).resolve().parent.parent.parent
BEGIN, END = "<!-- components: written by tests/tools/readme_table.py -->", "<!-- end of components -->"


def components() -> list[str]:
    """Places below minimoe/, in the order in which data flows through them."""
    return [
        *(f"layers/{name}" for name in ("embedding", "linear", "rmsnorm", "rope", "attention")),
        *(f"layers/routers/{name}" for name in moe.ROUTERS),
        *(f"layers/experts/{name}" for name in moe.EXPERTS),
        *(f"layers/{name}" for name in ("moe", "dense", "soft_moe", "block", "decoder")),
        *(f"losses/{name}" for name in ("cross_entropy", "balance", "distillation")),
    ]


def table() -> str:
    """The table as Markdown, with every gradient measured now."""
    rows = gradcheck.run()
    lines = ["| component | lesson | test | gradient error below |", "|---|---|---|---|"]
    for place in components():
        room, _, name = place.rpartition("/")
        found = re.search(r"lessons/(\w+)\.ipynb", (ROOT / "minimoe" / f"{place}.py").read_text(encoding="utf-8"))
        lesson = f"[{found[1].replace('_', ' ')}](lessons/{found[1]}.ipynb)" if found else "–"
        worst = max(row.error for row in rows if re.split(r"[ ,]", row.component.replace("-", "_"))[0] == name)
        lines.append(
            f"| [{name}](minimoe/{place}.py) | {lesson} "
            f"| [test_{name}.py](tests/{room}/test_{name}.py) | 1e{math.ceil(math.log10(worst))} |"
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
