"""Every gradient of the package is checked, at points that are what their names say, and the table shows it."""

import json
from typing import Any

import numpy as np
import pytest

from minimoe.core import tree
from minimoe.layers import decoder, moe
from minimoe.layers.routers import noisy_top_k
from minimoe.proof import gradcheck, of_tuning
from minimoe.proof.gradcheck import Row, failed


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    return gradcheck.run()


def test_every_gradient_of_the_package_is_right_by_far(rows: list[Row]) -> None:
    assert failed(rows) == []
    assert max(row.error for row in rows) < 3e-8
    assert sum(row.refused for row in rows) < 0.05 * sum(row.checked for row in rows)


def test_no_gradient_is_zero_by_accident(rows: list[Row]) -> None:
    small = {(row.component.split(",")[0], row.tensor) for row in rows if row.largest < 1e-3}
    blank = {name: router.blank(gradcheck.CONFIG, np.zeros) for name, router in moe.ROUTERS.items()}
    assert small <= {(name, field) for name, params in blank.items() for field in tree.marked(params, "state")}


def test_every_component_and_every_parameter_of_the_decoder_has_its_row(rows: list[Row]) -> None:
    components = {row.component.split(",")[0] for row in rows}
    assert components >= {"linear", "embedding", "rmsnorm", "rope", "attention", "balance", "moe"}
    assert components >= {"block", "cross-entropy", "decoder", "attention after a past"}
    assert components >= {*moe.ROUTERS, *moe.EXPERTS}, "every router and every kind of expert"
    model = decoder.init(np.random.default_rng(0), gradcheck.CONFIG)
    names = [name for name, _ in tree.named_leaves(model)]
    assert [row.tensor for row in rows if row.component == "decoder"] == names


def test_margins_are_given_where_something_can_flip_and_only_there(rows: list[Row]) -> None:
    routed = {row.component for row in rows if row.margin is not None}
    expected = {*moe.ROUTERS, "moe", "block", "decoder", "lstm_moe", *of_tuning.PREFERENCES} - {"token_hash"}
    assert {name.split(",")[0] for name in routed} == expected
    assert "noisy_top_k, every expert" not in routed


def test_the_same_seed_gives_the_same_rows(rows: list[Row]) -> None:
    def some(seed: int) -> list[Row]:
        return gradcheck.check_decoder("decoder", gradcheck.CONFIG, np.random.default_rng(seed), entries=0)

    assert some(3) == some(3)
    assert some(3) != some(4)


def test_a_fault_in_one_layer_is_seen_through_the_whole_decoder(monkeypatch: pytest.MonkeyPatch) -> None:
    """The path back through the threshold of the load estimate, the one that is easily forgotten."""
    right = noisy_top_k.gate_backward

    def forgetful(params: Any, cache: Any, dweights: Any, dstats: Any) -> Any:
        load = cache.load
        if load is not None:
            load = load._replace(first_out=cache.ranking[:, 0])
        return right(params, cache._replace(load=load), dweights, dstats)

    monkeypatch.setattr(noisy_top_k, "gate_backward", forgetful)
    wrong = gradcheck.check_decoder("decoder", gradcheck.CONFIG, np.random.default_rng(0), entries=1)
    assert {row.tensor for row in failed(wrong)} >= {"embedding.table", "blocks[0].moe.router.w_gate"}
    assert {row.tensor: row.passed for row in wrong}["head.weight"], "no router lies between it and the loss"


def test_the_table_is_aligned_and_ends_with_a_summary(rows: list[Row]) -> None:
    header, *lines, summary = gradcheck.table(rows).splitlines()
    assert len(lines) == len(rows)
    start = header.index("verdict")
    assert all(line[start - 2 : start] == "  " and line[start:].startswith("ok") for line in lines)
    assert [name in header for name in ("component", "tensor", "worst relative error", "flip")] == [True] * 4
    assert summary.startswith(f"{len(rows)} tensors checked, none failed; worst relative error ")


def test_the_table_says_what_failed_and_what_was_refused() -> None:
    bad = Row("moe", "w", (2,), 1e-7, 0.001, checked=1, refused=3, error=0.5, problem="it is wrong")
    good = bad._replace(problem="", refused=1, checked=5)
    lines = gradcheck.table([bad, good]).splitlines()
    assert lines[1].endswith("1.0e-03  FAILED: it is wrong")
    assert lines[2].endswith("1.0e-03  ok (1 of 6 probes refused: too near a flip)")
    assert lines[3] == "2 tensors checked, 1 failed; worst relative error 5.0e-01"


def test_json_holds_every_field_and_is_strict(rows: list[Row]) -> None:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    infinite = Row("x", "y", (), 1e-7, None, largest=float("nan"), problem="no number at all")
    objects = json.loads(gradcheck.to_json([*rows[:2], infinite]), parse_constant=refuse)
    assert set(objects[0]) == {*Row._fields, "passed"}
    assert [o["passed"] for o in objects] == [True, True, False]
    assert objects[0]["shape"] == list(rows[0].shape)
    assert objects[2]["error"] is objects[2]["largest"] is None


def test_every_case_is_what_its_name_says(monkeypatch: pytest.MonkeyPatch) -> None:
    cases: dict[str, tuple[Any, Any]] = {}

    def look(name: str, forward: Any, backward: Any, params: Any, x: Any, **options: Any) -> list[Row]:
        cases[name] = (params, forward(params, x)[1])
        return []

    monkeypatch.setattr(gradcheck, "check", look)
    gradcheck.run()
    decoders = {name: case for name, case in cases.items() if name.startswith("decoder")}
    assert len(decoders) >= 3
    for name, (params, forwards) in decoders.items():
        tokens = sum(int(forward.sums.stats[0].tokens) for forward in forwards)
        dropped = sum(int(count) for forward in forwards for count in forward.sums.dropped)
        block = forwards[0].caches[1].blocks[0]
        assert (tokens < 12) == ("padding" in name), name
        assert (dropped > 0) == ("dropping" in name), name
        assert (len(forwards) == 2) == ("two shards" in name), name
        assert (block.attention.attended.window is not None) == ("window" in name), name
        assert (params.head is None) == ("tied" in name), name
    for name, (_, cache) in cases.items():
        if name.startswith("moe"):
            routing = cache[0].routing
            assert (len(routing.token) < routing.place.size) == ("dropped" in name), name
