"""The one guard for token ids, and everything through which ids come in."""

from typing import Any

import numpy as np
import pytest

from minimoe.analysis import microscope, routing_trace
from minimoe.core import ids
from minimoe.core.config import ModelConfig
from minimoe.core.errors import UserError
from minimoe.evaluate import text_loss
from minimoe.inference import generation, kv_cache
from minimoe.layers import decoder
from minimoe.losses import cross_entropy
from minimoe.storage.checkpoint import Model
from minimoe.text.tokenizer import ByteTokenizer, CharTokenizer

WRONG: dict[str, Any] = {
    "below": [1, -1, 2],
    "V": np.array([0, 13]),
    "far above": np.array([2**63], np.uint64),
    "floats": [1.0, 2.0],
    "booleans": [True, False],
    "texts": ["a", "b"],
    "nothing": None,
    "ragged": [[1, 2], [3]],
    "objects": [object(), object()],
    "a set": {1, 2},
    "three axes": np.zeros((2, 2, 2), int),
    "too large for any integer": [2**70, 1],
}


@pytest.mark.parametrize("case", WRONG)
def test_ids_that_are_none_are_refused_wherever_ids_come_in(small: ModelConfig, case: str) -> None:
    params = decoder.init(np.random.default_rng(0), small)
    model = Model(params, small, CharTokenizer("abcdefghijklm"), None)  # type: ignore[arg-type]
    uses: list[Any] = [
        lambda wrong: ids.checked(wrong, 13, axes=(1, 2)),
        lambda wrong: text_loss.evaluate(params, small, [wrong]),
        lambda wrong: text_loss.by_piece(params, small, wrong),
        lambda wrong: routing_trace.trace(params, small, wrong),
        lambda wrong: microscope.look(model, {"text": wrong}),
        lambda wrong: generation.generate(params, small, wrong, tokens=1),
        lambda wrong: generation.extend(params, kv_cache.init(params, small), wrong),
        lambda wrong: CharTokenizer("abcdefghijklm").decode(wrong),
    ]
    for use in uses:
        with pytest.raises(UserError):
            use(WRONG[case])


def test_layers_and_losses_read_no_other_token_than_was_meant(small: ModelConfig) -> None:
    params = decoder.init(np.random.default_rng(0), small)
    for token in (-1, 13):
        with pytest.raises(UserError, match=f"Token id {token} is not in a vocabulary of 13"):
            decoder.forward(params, np.array([[token]]), small)
        with pytest.raises(UserError, match=f"Token id {token} is not in a vocabulary of 13"):
            cross_entropy.forward(np.zeros((1, 13)), np.array([token]))
    with pytest.raises(UserError, match="must be integers, got float64"):
        decoder.forward(params, np.array([[1.0]]), small)


def test_ids_of_a_text_in_a_text_of_two_dimensions_are_refused(small: ModelConfig) -> None:
    params = decoder.init(np.random.default_rng(0), small)
    with pytest.raises(UserError, match=r"must be one row, got shape \(2, 3\)"):
        text_loss.evaluate(params, small, [np.ones((2, 3), int)])
    with pytest.raises(UserError, match="one row"):
        text_loss.evaluate(params, small, np.ones(3, int))  # type: ignore[arg-type]


def test_right_ids_come_back_as_they_are() -> None:
    given = np.array([[0, 12]], np.uint8)
    assert ids.checked(given, 13) is given
    assert ids.checked([], 13).dtype.kind == "i"
    assert ids.checked((3, 4), 13).tolist() == [3, 4]
    assert ByteTokenizer().decode([72, 105]) == "Hi"
