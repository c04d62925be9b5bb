"""What a notebook shows of a large value: a few lines."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_runs

from minimoe.analysis import microscope
from minimoe.core import summary
from minimoe.evaluate import suite, text_loss
from minimoe.layers import decoder
from minimoe.optim import optimizer
from minimoe.proof import gradcheck
from minimoe.storage import checkpoint, metrics, open_model
from minimoe.text import batches, corpus
from minimoe.text.tokenizer import CharTokenizer


@pytest.fixture(scope="module")
def values() -> dict[str, Any]:
    """What calls of the package return, by name."""
    folder = small_runs.finished()
    model = open_model.load(folder)
    ids = model.tokenizer.encode(small_runs.PYRAMID[:200])
    assert isinstance(model, checkpoint.Model)
    done = decoder.forward(model.params, ids[None, :8], model.config)
    return {
        "model": model,
        "params": model.params,
        "block": model.params.blocks[0],
        "moe": model.params.blocks[0].moe,
        "forward": done,
        "routed": done.routed,
        "cache": done.cache,
        "cache of a block": done.cache.blocks[0],
        "metrics": metrics.read(folder),
        "run": model.run,
        "texts": batches.reload(model.run.source, model.tokenizer, 8),
        "corpus": corpus.load("data"),
        "tokenizer": CharTokenizer("".join(map(chr, range(32, 5000)))),
        "evaluation": text_loss.evaluate(model.params, model.config, [ids]),
        "pieces": text_loss.by_piece(model.params, model.config, ids)[0],
        "seen": microscope.look(model, {"text": ids}),
        "suite": suite.run(folder, settings=suite.Settings(2, 2, 20)),
        "moments": optimizer.init(model.params, model.run.recipe),
        "rows": gradcheck.Rows(gradcheck.Row("a", "b", (1,), 1.0, None) for _ in range(200)),
        "preset": small_runs.SMALL,
    }


def test_no_value_that_a_call_returns_floods_a_notebook(values: dict[str, Any]) -> None:
    for name, value in values.items():
        if name != "moments":  # a plain dictionary
            assert len(repr(value)) < 2500 and repr(value).count("\n") < 25, f"{name}: {repr(value)[:300]}"


def test_a_summary_names_every_field_and_what_it_holds(values: dict[str, Any]) -> None:
    assert repr(values["moe"]) == (
        "MoE(\n  router   Router of 2 arrays, 64 numbers\n  experts  Experts of 3 arrays, 768 numbers\n"
        "  shared   None\n)"
    )
    lines = repr(values["model"]).splitlines()
    assert [line.split()[0] for line in lines[1:-1]] == list(checkpoint.Model._fields)
    assert repr(values["metrics"]) == "<6 rows of metrics, one dictionary per step>"
    assert repr(values["corpus"]).startswith("Corpus('data': fables (")


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (np.zeros((2, 3), np.float32), "float32 (2, 3)"),
        (np.float64(2), repr(np.float64(2))),
        (None, "None"),
        ("a\x1b[2Jb", "'a\\x1b[2Jb'"),
        ([1, 2], "[1, 2]"),
        (list(range(100)), "list of 100"),
        ({"a": 1}, "dict of 1: a"),
        ("x" * 500, "'" + "x" * 98 + "…"),
        (Path("a"), repr(Path("a"))),
        (decoder.Routed([], []), "Routed"),
    ],
)
def test_every_value_fits_into_a_line(value: Any, shown: str) -> None:
    assert summary.line(value) == shown
