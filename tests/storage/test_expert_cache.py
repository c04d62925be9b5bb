"""The cache of experts: who stays, who goes, what is counted."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minimoe.core.errors import UserError
from minimoe.storage import expert_cache
from minimoe.storage.expert_cache import ExpertCache, Key, Statistics


def mark(key: Key) -> int:
    """What stands in every byte of an expert."""
    return 10 * key[0] + key[1]


def reader(log: list[Key]) -> Callable[[Key, Any], None]:
    def read(key: Key, content: Any) -> None:
        log.append(key)
        content[:] = mark(key)

    return read


@given(uses=st.lists(st.integers(0, 6), max_size=60), slots=st.integers(1, 8))
def test_the_last_used_experts_stay(uses: list[int], slots: int) -> None:
    """Against the definition: an expert is held if fewer than ``slots`` others were used since."""
    log: list[Key] = []
    cache = ExpertCache(3, slots, reader(log))
    misses = []
    for at, expert in enumerate(uses):
        key = (0, expert)
        before = [i for i, one in enumerate(uses[:at]) if one == expert]
        if not before or len(set(uses[before[-1] + 1 : at])) >= slots:
            misses.append(key)
        with cache.use(key) as content:
            assert (content == mark(key)).all()
            assert len(content) == 3
        assert len(cache.held) <= slots
        assert cache.bytes_held == 3 * len(cache.held)
    assert log == misses
    counted = cache.phases.get("", Statistics())
    assert (counted.uses, counted.misses, counted.bytes) == (len(uses), len(misses), 3 * len(misses))
    assert counted.hits == len(uses) - len(misses)


def passes(layers: int, experts: int, together: int, tokens: int, seed: int) -> list[list[Key]]:
    """What evenly drawn experts are used for each token in each layer, in order."""
    rng = np.random.default_rng(seed)
    chosen = [(layer, rng.permutation(experts)[:together]) for _ in range(tokens) for layer in range(layers)]
    return [[(layer, int(e)) for e in of] for layer, of in chosen]


@given(
    layers=st.integers(1, 4), experts=st.integers(2, 6), together=st.integers(1, 2), more=st.integers(0, 20),
    seed=st.integers(0, 999),
)  # fmt: skip
def test_layers_that_take_turns_keep_what_they_used_last_within_their_shares(
    layers: int, experts: int, together: int, more: int, seed: int
) -> None:
    """Each layer behaves like a cache of its own: the experts used last, as many as its share, are there next time."""
    slots = together + more
    cache = ExpertCache(2, slots, reader([]), layers, together)
    assert sum(cache.shares) == more
    assert max(cache.shares) - min(cache.shares) <= 1
    recent: dict[int, list[int]] = {layer: [] for layer in range(layers)}
    for of_pass in passes(layers, experts, together, 8, seed):
        layer = of_pass[0][0]
        must_be_there = recent[layer][-cache.shares[layer] :] if cache.shares[layer] else []
        assert all((layer, e) in cache.held for e in must_be_there)
        for key in of_pass:
            with cache.use(key) as content:
                assert (content == mark(key)).all()
            recent[layer] = [e for e in recent[layer] if e != key[1]] + [key[1]]
        assert all(key in cache.held for key in of_pass)  # what a token needs together is there together
        assert len(cache.held) <= slots
        assert cache.count == [sum(one == layer for one, _ in cache.held) for layer in range(layers)]


def test_with_less_room_than_a_token_needs_layers_still_have_hits() -> None:
    """As many as by chance: the share of a layer's experts that is in memory. One queue for all has fewer."""
    layers, experts, together, slots = 6, 8, 2, 10
    cache = ExpertCache(1, slots, reader([]), layers, together)
    queue: list[Key] = []
    hits = uses = 0
    for of_pass in passes(layers, experts, together, 2000, 0):
        for key in of_pass:
            with cache.use(key):
                pass
            hits, uses = hits + (key in queue), uses + 1
            queue = [*(one for one in queue if one != key), key][-slots:]
    by_chance = sum(cache.shares) / layers / experts
    assert cache.phases[""].hit_rate == pytest.approx(by_chance, abs=0.02)
    assert hits / uses < by_chance / 2


def test_one_pass_of_many_tokens_keeps_the_shares_of_the_other_layers() -> None:
    cache = ExpertCache(1, 6, reader([]), 2, 2)
    for key in [(0, 0), (0, 1), *((1, e) for e in range(8))]:
        with cache.use(key):
            pass
    assert list(cache.held) == [(0, 0), (0, 1), (1, 4), (1, 5), (1, 6), (1, 7)]


def test_by_hand() -> None:
    log: list[Key] = []
    cache = ExpertCache(1, 2, reader(log))
    for expert in (0, 1, 0, 2, 1):  # a b a c b
        with cache.use((0, expert)):
            pass
    assert log == [(0, 0), (0, 1), (0, 2), (0, 1)]
    assert list(cache.held) == [(0, 2), (0, 1)]
    assert cache.phases[""].hit_rate == 1 / 5


def test_the_same_number_in_another_layer_is_another_expert() -> None:
    cache = ExpertCache(2, 4, reader([]), layers=2)
    for layer in (0, 1):
        with cache.use((layer, 3)) as content:
            assert (content == 10 * layer + 3).all()
    assert cache.phases[""].hits == 0


def test_memory_is_taken_only_as_it_is_needed_and_then_used_again() -> None:
    cache = ExpertCache(5, 2, reader([]))
    places = set()
    for expert in range(7):
        with cache.use((0, expert)) as content:
            places.add(content.__array_interface__["data"][0])
    assert len(places) == 2


def test_a_part_of_the_latest_use_is_not_counted_again() -> None:
    cache = ExpertCache(1, 1, reader([]))
    for counted in (True, False, False):
        with cache.use((0, 0), counted):
            pass
    assert (cache.phases[""].uses, cache.phases[""].hits) == (1, 0)


def test_the_phases_have_their_own_tokens_uses_bytes_and_time(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(np.arange(100.0))
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    cache = ExpertCache(4, 2, reader([]))
    cache.begin("reading", 6)  # clock 0
    with cache.use((0, 0)):  # 1 and 2
        pass
    cache.begin("writing", 1)  # 3
    with cache.use((0, 0)):
        pass
    cache.unpacked(0.25)
    cache.begin("writing", 1)  # 4
    cache.end()  # 5
    cache.end()  # 6: belongs to no phase
    assert cache.phases == {
        "reading": Statistics(tokens=6, uses=1, hits=0, bytes=4, reading=1.0, seconds=3.0),
        "writing": Statistics(tokens=2, uses=1, hits=1, unpacking=0.25, seconds=2.0),
    }
    assert cache.phases["reading"].bytes_per_token == 4 / 6
    assert Statistics().bytes_per_token == Statistics().hit_rate == 0


def test_an_expert_that_cannot_be_read_is_not_held() -> None:
    fails = [True]

    def read(key: Key, content: Any) -> None:
        content[:] = 77
        if fails[0] and key == (0, 1):
            raise UserError("cut short")
        content[:] = mark(key)

    cache = ExpertCache(2, 1, read)
    with cache.use((0, 0)):
        pass
    with pytest.raises(UserError, match="cut short"), cache.use((0, 1)):
        pass
    assert list(cache.held) == []
    fails[0] = False
    with cache.use((0, 1)) as content:
        assert (content == 1).all()


def test_threads_do_not_take_an_expert_from_each_other() -> None:
    cache = ExpertCache(1000, 1, reader([]), layers=3)
    wrong = []

    def work(layer: int) -> None:
        for expert in range(200):
            with cache.use((layer, expert % 5)) as content:
                if not (content == mark((layer, expert % 5))).all():
                    wrong.append(expert)

    threads = [threading.Thread(target=work, args=(layer,)) for layer in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert cache.phases[""].uses == 600


def test_a_cache_without_a_slot_is_refused() -> None:
    with pytest.raises(UserError, match="slots 0"):
        ExpertCache(1, 0, reader([]))
    with pytest.raises(UserError, match="slots 1 .* at least 2"):
        ExpertCache(1, 1, reader([]), together=2)


def test_the_docstring_shows_what_happens() -> None:
    assert Path(expert_cache.__file__).read_text(encoding="utf-8").count("a ab ab ac bc") == 1
