"""The microscope's numbers against loops over the tokens, its JSON, and a table that cannot steer a terminal."""

import dataclasses
import itertools
import json
import math
import re
from types import SimpleNamespace

import numpy as np
import pytest
import small_runs
from numpy.testing import assert_allclose

from minimoe.analysis import microscope, routing_trace
from minimoe.cli import main
from minimoe.core.errors import UserError
from minimoe.layers import decoder
from minimoe.parallel import thread_pool
from minimoe.storage import open_model
from minimoe.storage.checkpoint import Model
from minimoe.text import corpus, tokenizer

TEXTS = {"pyramid": small_runs.PYRAMID[:400], "seasons": small_runs.SEASONS[100:450]}
HOSTILE = "\x1b[31mred\x07 </script>\u202edrow\u2028 a\tb\n" * 8


def model_of(config, text, **changes):
    """A model of a char tokenizer for ``text``, far from the start of training."""
    codec = tokenizer.build("char", text)
    config = dataclasses.replace(config, vocab_size=codec.vocab_size, **changes)
    params = decoder.init(np.random.default_rng(1), config, np.float64)
    blocks = [
        block._replace(moe=block.moe._replace(router=block.moe.router._replace(w_gate=9 * block.moe.router.w_gate)))
        for block in params.blocks
    ]
    return Model(params._replace(blocks=blocks), config, codec, None)


def tokens_of(model, texts):
    return {name: model.tokenizer.encode(text) for name, text in texts.items()}


@pytest.fixture
def model(small):
    return model_of(small, "".join(TEXTS.values()))


@pytest.fixture
def seen(model):
    return microscope.look(model, tokens_of(model, TEXTS))


def experts_that_count(trace, layer, choice):
    """For each token the set of experts."""
    columns = {"first": [0], "second": [1], "either": [0, 1]}[choice]
    return [{int(row[k]) for k in columns} for row in trace.experts[layer]]


def each(seen):
    """Every layer, choice, and text with its place."""
    texts = enumerate(seen.traces.items())
    return itertools.product(range(len(seen.layers)), ("first", "second", "either"), list(texts))


def test_traces_are_those_of_each_text_alone(seen, model):
    assert list(seen.traces) == ["pyramid", "seasons"]
    for name, text in TEXTS.items():
        alone = routing_trace.trace(model.params, model.config, model.tokenizer.encode(text))
        for found, expected in zip(seen.traces[name], alone, strict=True):
            assert_allclose(found, expected)


def test_load_is_each_experts_share_of_each_text(seen):
    for layer, choice, (place, (_, trace)) in each(seen):
        chosen = experts_that_count(trace, layer, choice)
        counts = np.array([sum(expert in one for one in chosen) for expert in range(5)])
        assert_allclose(seen.layers[layer].choices[choice].load[place], counts / counts.sum())


def test_divergence_compares_all_texts_and_difference_each_pair(model):
    texts = {**TEXTS, "mixed": TEXTS["pyramid"][:100] + TEXTS["seasons"][:100]}
    seen = microscope.look(model, tokens_of(model, texts))

    def bits(p):
        return -sum(x * math.log2(x) for x in p if x > 0)

    def divergence(*loads):
        return bits(np.mean(loads, axis=0)) - np.mean([bits(p) for p in loads])

    for layer, choice in itertools.product(seen.layers, ("first", "second", "either")):
        found = layer.choices[choice]
        assert_allclose(found.divergence, divergence(*found.load), atol=1e-12)
        for i, j in itertools.product(range(3), range(3)):
            assert_allclose(found.difference[i, j], divergence(found.load[i], found.load[j]), atol=1e-12)
    assert seen.layers[0].choices["first"].divergence > 0.001


@pytest.mark.parametrize("awake", [5, 1, 0])
def test_the_tokens_of_one_text_may_have_more_experts_than_those_of_another(small, awake):
    """With a router that lets the number vary: in a short text, no token may have a second expert, or even a first."""
    text = "".join(TEXTS.values())
    model = model_of(small, text, router="remoe")
    for block in model.params.blocks:
        block.moe.router.w_gate[:, awake:] = 0  # a score of 0 sleeps
    texts = tokens_of(model, TEXTS)
    alone = {name: routing_trace.trace(model.params, model.config, ids) for name, ids in texts.items()}
    ids = texts["pyramid"]
    short = next(
        ids[start : start + 2]
        for start in range(len(ids))
        if routing_trace.trace(model.params, model.config, ids[start : start + 2]).experts.shape[2] < max(awake, 2)
    )
    seen = microscope.look(model, {**texts, "short": short})
    assert {trace.experts.shape[2] for trace in seen.traces.values()} == {max(awake, 1)}
    one = routing_trace.trace(model.params, model.config, short)
    for name, expected in {**alone, "short": one}.items():
        found = seen.traces[name]
        columns = expected.experts.shape[2]
        assert_allclose(found.experts[..., :columns], expected.experts)
        assert_allclose(found.weights[..., :columns], expected.weights)
        assert (found.experts[..., columns:] == -1).all()
        assert not found.weights[..., columns:].any()
    for layer in seen.layers:
        for found in layer.choices.values():
            empty = ~found.load.any(1)
            assert not found.difference[empty].any()
            assert not found.difference[:, empty].any()
            there = found.load[~empty]
            expected = float(routing_trace.jensen_shannon(*there)) if len(there) > 1 else 0
            assert_allclose(found.divergence, expected)
    json.loads(microscope.to_json(seen))
    assert "LAYER 1" in microscope.table(seen)


def test_repetition_counts_neighbours_of_one_window(seen):
    for layer, choice, (place, (_, trace)) in each(seen):
        chosen = experts_that_count(trace, layer, choice)
        pairs = [(t, t + 1) for t in range(len(chosen) - 1) if trace.window[t] == trace.window[t + 1]]
        observed, uniform, load, shuffled = seen.layers[layer].choices[choice].repetition[place]
        assert_allclose(observed, np.mean([bool(chosen[a] & chosen[b]) for a, b in pairs]))
        assert_allclose(uniform, 1 - 3 / 10 if choice == "either" else 1 / 5)  # C(3, 2) of C(5, 2) pairs do not meet
        assert_allclose(load, np.mean([bool(a & b) for a in chosen for b in chosen]))
        assert shuffled == routing_trace.repetition(trace, choice).shuffled[layer]


def test_entropy_is_a_mean_and_margin_a_median(seen):
    for layer, _, (place, (_, trace)) in each(seen):
        ranked = np.sort(trace.logits[layer])[:, ::-1]
        p = np.exp(ranked) / np.exp(ranked).sum(1, keepdims=True)
        assert_allclose(seen.layers[layer].entropy[place], -(p * np.log(p)).sum(1).mean())
        assert_allclose(seen.layers[layer].margin[place], np.median(ranked[:, 1] - ranked[:, 2]))


def test_co_activation_is_that_of_all_texts_together(seen):
    for number, layer in enumerate(seen.layers):
        chosen = [one for trace in seen.traces.values() for one in experts_that_count(trace, number, "either")]
        for i, j in itertools.product(range(5), range(5)):
            assert_allclose(layer.co_activation[i, j], np.mean([{i, j} <= one for one in chosen]))
    assert_allclose(microscope.shared(np.array([[0.5, 0.1], [0.1, 0.2]])), [[1, 0.2], [0.5, 1]])
    assert_allclose(microscope.shared(np.zeros((2, 2))), 0)


def test_favourites_are_those_of_all_texts_by_choice(seen, model):
    tokens = np.concatenate([trace.tokens for trace in seen.traces.values()])
    for number, choice in itertools.product(range(2), ("first", "second", "either")):
        chosen = [one for trace in seen.traces.values() for one in experts_that_count(trace, number, choice)]
        for expert, favourites in enumerate(seen.layers[number].choices[choice].favourites):
            goes = np.array([expert in one for one in chosen])
            lifts = {}
            for token in set(tokens.tolist()):
                here = tokens == token
                lifts[token] = (goes[here].sum() + 10 * goes.mean()) / (here.sum() + 10) / max(goes.mean(), 1e-9)
            best = sorted((lift for lift in lifts.values() if lift > 1), reverse=True)[: microscope.FAVOURITES]
            assert_allclose([favourite.lift for favourite in favourites], best)
            for favourite in favourites:
                here = tokens == favourite.token
                assert favourite.seen == here.sum()
                assert_allclose((favourite.lift, favourite.share), (lifts[favourite.token], goes[here].mean()))
                assert favourite.text[0] in model.tokenizer.decode([favourite.token]) + "↵→"


def test_threads_change_nothing(seen, model):
    with thread_pool.pool(2) as pool:
        other = microscope.look(model, tokens_of(model, TEXTS), pool)
    assert microscope.to_json(other) == microscope.to_json(seen)


def test_json_holds_every_number_by_name(seen):
    found = json.loads(microscope.to_json(seen), parse_constant=pytest.fail)
    assert {name: found[name] for name in ("layers", "experts", "active_experts", "context")} == {
        "layers": 2,
        "experts": 5,
        "active_experts": 2,
        "context": 7,
    }
    assert found["texts"] == {"pyramid": {"tokens": 400}, "seasons": {"tokens": 350}}
    for layer, expected in zip(found["by_layer"], seen.layers, strict=True):
        assert set(layer) == {"entropy", "margin", "co_activation", "choices"}
        assert list(layer["choices"]) == ["first", "second", "either"]
        assert layer["entropy"]["seasons"] == expected.entropy[1]
        assert layer["margin"]["pyramid"] == expected.margin[0]
        for name, choice in layer["choices"].items():
            about = expected.choices[name]
            assert set(choice) == {"load", "divergence", "difference", "repetition", "favourites"}
            assert choice["load"]["seasons"] == about.load[1].tolist()
            assert list(choice["repetition"]["pyramid"].values()) == about.repetition[0].tolist()
            assert list(choice["repetition"]["pyramid"]) == ["observed", "uniform", "load", "shuffled"]
            assert [[f["lift"] for f in expert] for expert in choice["favourites"]] == [
                [f.lift for f in expert] for expert in about.favourites
            ]


def test_where_every_expert_is_chosen_the_margin_is_null(small):
    model = model_of(small, TEXTS["pyramid"], experts=2)
    found = json.loads(microscope.to_json(microscope.look(model, tokens_of(model, {"one": TEXTS["pyramid"]}))))
    assert found["by_layer"][0]["margin"] == {"one": None}


def test_one_choice_and_one_text_leave_out_what_needs_two(small):
    model = model_of(small, TEXTS["pyramid"], active_experts=1, renormalize=False)
    seen = microscope.look(model, tokens_of(model, {"one": TEXTS["pyramid"]}))
    assert list(seen.layers[0].choices) == ["first"]
    assert seen.layers[0].choices["first"].divergence == 0
    said = microscope.table(seen)
    assert [word for word in ("second", "either", "bits apart", "also to") if word in said] == []


def test_table_says_what_the_json_says(seen):
    said = microscope.table(seen)
    assert "2 layers, 2 of 5 experts per token. Tokens: pyramid 400, seasons 350." in said
    layers = said.split("LAYER ")[1:]
    for number, (block, layer) in enumerate(zip(layers, seen.layers, strict=True)):
        assert block.startswith(f"{number}\n")
        for choice, about in layer.choices.items():
            loads = block.split(f"load, {choice} choice")[1].splitlines()[1:4]
            for line, name, load in zip(loads, TEXTS, about.load, strict=False):
                assert line.split() == [name, *(f"{share:.1%}" for share in load)]
            assert f"{about.divergence:.4f} bits apart" in loads[2]
            rates = block.split(f"neighbours share, {choice} ")[1].splitlines()[1]
            assert rates.split() == ["pyramid", *(f"{rate:.1%}" for rate in about.repetition[0])]
        best = layer.choices["either"].favourites[0][0]
        assert f"'{best.text.strip()}' {best.lift:.1f}" in block.replace("\t", "")


def test_a_long_text_is_shuffled_once_at_least(monkeypatch):
    monkeypatch.setattr(microscope, "SHUFFLED_TOKENS", 25)
    logits = np.random.default_rng(0).standard_normal((1, 30, 4))
    trace = routing_trace.Trace(
        np.zeros(30, int), np.zeros(30, int), np.argsort(-logits)[..., :1], np.ones((1, 30, 1)), logits
    )
    assert microscope._rates(trace, "first")[0, 3] == routing_trace.repetition(trace, shuffles=1).shuffled[0]


def test_the_table_shows_the_shares_of_an_experts_own_tokens(seen):
    said = microscope.table(seen).split("\nLAYER 0")[1].split("of its tokens, also to")[1].split("\n\n")[0]
    shares = microscope.shared(seen.layers[0].co_activation)
    others = shares[~np.eye(len(shares), dtype=bool)]
    assert re.findall(r"[\d.]+%", said) == [f"{share:.1%}" for share in others]


def test_a_table_of_many_experts_is_cut_into_lines_that_can_be_read(small):
    config = dataclasses.replace(small, experts=64)
    model = model_of(config, TEXTS["pyramid"])
    said = microscope.table(microscope.look(model, tokens_of(model, {"pyramid": TEXTS["pyramid"]})))
    shares = [line for line in said.splitlines() if "%" in line]
    assert max(map(len, shares)) <= microscope.LINE
    heads = " ".join(re.findall(r"of its tokens, also to (.*)", said.split("LAYER ")[1]))
    assert heads.split() == [str(expert) for expert in range(64)]
    assert re.search(r"^  63 .* -$", said, re.MULTILINE), "itself"


def test_columns_of_a_table_line_up(seen):
    blocks = [block.splitlines() for block in microscope.table(seen).split("\n\n") if "%" in block]
    assert len(blocks) == 2 * 7
    assert all(len({len(line) for line in block if "bits" not in line}) == 1 for block in blocks)


def test_nothing_in_a_table_steers_the_terminal(small):
    model = model_of(small, HOSTILE)
    seen = microscope.look(model, tokens_of(model, {HOSTILE: HOSTILE, "b\x1b]0;x\x07": HOSTILE[::-1]}))
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028\u202e]", microscope.table(seen))
    assert "⟨1B⟩" in microscope.table(seen)
    assert microscope.to_json(seen).isascii()


def test_a_run_has_a_validation_split_and_files_come_first():
    model = open_model.load(small_runs.finished())
    held = microscope.read(model)
    whole = model.tokenizer.encode(small_runs.PYRAMID)
    assert list(held) == ["pyramid"]
    assert held["pyramid"].tolist() == whole[int(0.9 * len(whole)) :].tolist()
    files = corpus.Corpus("own", {"own": "up and up"})
    assert model.tokenizer.decode(microscope.read(model, files)["own"]) == "up and up"


def test_texts_that_cannot_be_looked_at_are_refused(model):
    with pytest.raises(UserError, match="no text"):
        microscope.look(model, {})
    with pytest.raises(UserError, match="'short' is 1 token long; give at least two"):
        microscope.look(model, {"short": np.array([1])})
    with pytest.raises(UserError, match="name a text with --text"):
        microscope.read(SimpleNamespace(run=None))


def test_the_command_prints_a_table_or_json_and_writes_a_page(tmp_path, capsys):
    text, page = tmp_path / "pyramid two.txt", tmp_path / "page.html"
    text.write_text(small_runs.PYRAMID[300:700], encoding="utf-8")
    run = str(small_runs.finished())
    assert main.main(["routing", run, "--threads", "1"]) == 0
    assert "LAYER 1" in capsys.readouterr().out
    assert main.main(["routing", run, "--text", str(text), "--json", "--html", str(page)]) == 0
    assert json.loads(capsys.readouterr().out)["texts"] == {"pyramid two": {"tokens": 400}}
    assert page.read_text(encoding="utf-8").startswith("<!doctype html>")
    assert main.main(["routing", run, "--html", str(page)]) == 0
    assert capsys.readouterr().out == f"{page} is written: open it in a browser.\n"
    assert main.main(["routing", run, "--html", str(tmp_path / "no" / "page.html")]) == 2
    assert "cannot be written" in capsys.readouterr().err


def test_the_layers_of_a_table_have_the_numbers_of_the_model_after_dense_ones(small):
    config = dataclasses.replace(small, layers=3, dense_layers=1, dense_width=4)
    codec = tokenizer.build("char", "".join(TEXTS.values()))
    config = dataclasses.replace(config, vocab_size=codec.vocab_size)
    model = Model(decoder.init(np.random.default_rng(1), config, np.float64), config, codec, None)
    seen = microscope.look(model, tokens_of(model, TEXTS))
    assert (len(seen.layers), seen.first_layer) == (2, 1)
    table = microscope.table(seen)
    assert table.startswith("2 layers after 1 dense, ")
    assert re.findall(r"\nLAYER (\d)", table) == ["1", "2"]
    assert (microscope.to_dict(seen)["layers"], microscope.to_dict(seen)["first_layer"]) == (2, 1)
