"""Norms of queries and keys, and dense first layers, through everything: training, files, statistics, generation.

A dense layer has no router. Nothing about it may appear where the routers report, and the numbers of the other layers
must be those of the layers that they belong to.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_runs
from small_models import drawn
from small_runs import CORPUS, lasting, metrics

from minimoe.analysis import coloured_text, microscope, microscope_page, routing_trace
from minimoe.cli.main import main
from minimoe.compression import alignment, binding, prune, upcycle
from minimoe.core import presets, tree
from minimoe.core.config import ModelConfig, TrainConfig
from minimoe.core.errors import UserError
from minimoe.cost import offloading, parameters
from minimoe.draw import plots
from minimoe.evaluate import text_loss
from minimoe.inference import generation
from minimoe.layers import decoder
from minimoe.losses import objective
from minimoe.losses.balance import Coefficients
from minimoe.losses.objective import Objective, Shard
from minimoe.optim import optimizer
from minimoe.storage import bounded, checkpoint, open_model, pruned, quantized
from minimoe.training import run_report, step

DENSE: dict[str, Any] = {"layers": 3, "dense_layers": 1, "dense_width": 6}
SETTINGS: dict[str, dict[str, Any]] = {
    "queries and keys normalised": {"qk_norm": "whole"},
    "heads normalised, first layer dense": {"qk_norm": "per_head", **DENSE},
    "two dense layers and a shared expert": {"layers": 4, "dense_layers": 2, "shared_experts": 1},
    "a dense layer before routers with a state": {"router": "sigmoid_bias", **DENSE},
    "a dense layer before routers with a loss of their own": {"router": "remoe", **DENSE},
    "a dense layer before experts that copy": {"expert_kind": "zero_computation", **DENSE},
}
BASE = ModelConfig(
    vocab_size=13, width=6, layers=3, heads=4, kv_heads=2, head_width=8, context=7, experts=5, expert_width=3
)


@pytest.fixture(params=SETTINGS)
def settings(request: pytest.FixtureRequest) -> dict[str, Any]:
    return SETTINGS[request.param]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """No figures and no waiting for the disk: the figures have tests of their own below."""
    monkeypatch.setattr(run_report, "write", lambda *_: None)
    monkeypatch.setattr("os.fsync", lambda _: None)


def test_a_run_trains_and_is_resumed_to_the_bit_and_opened(tmp_path: Path, settings: dict[str, Any]) -> None:
    always_warming = {"warmup": 100}  # so that a rate depends only on the number of its step
    whole = small_runs.train(tmp_path / "whole", **settings, **always_warming)
    small_runs.train(tmp_path / "cut", **settings, **always_warming, steps=2)
    small_runs.resume(tmp_path / "cut", steps=6)
    cut, uncut = lasting(tmp_path / "cut"), lasting(tmp_path / "whole")
    assert cut["state"] == uncut["state"]
    assert cut["model"] == uncut["model"]
    opened = checkpoint.load_model(tmp_path / "whole")
    for (name, ours), again in zip(tree.named_leaves(whole.model.params), tree.leaves(opened.params), strict=True):
        np.testing.assert_array_equal(ours, again, err_msg=name)
    mixtures = whole.model.config.layers - whole.model.config.dense_layers
    for row in metrics(tmp_path / "whole"):
        assert [len(row[name]) for name in ("load", "active_experts", "dropped", "router_entropy")] == [mixtures] * 4
        assert {len(values) for values in row["auxiliary"].values()} == {mixtures}
        assert all(abs(sum(load) - 1) < 1e-3 for load in row["load"])


@pytest.mark.parametrize("threads", [2, 3])
def test_workers_and_shards_give_the_gradient_of_one(settings: dict[str, Any], threads: int) -> None:
    """``threads`` shards on one worker: the sums of the layers add up in the same order."""
    preset = presets.override(small_runs.SMALL, settings | {"noisy_gating": False})
    config = dataclasses.replace(preset.config, vocab_size=13)
    rng = np.random.default_rng(0)
    params, (tokens, targets) = drawn(rng, config), rng.integers(13, size=(2, 6, config.context))
    goal = Objective(Coefficients(0.5, 0.3, 0.4, 0.2))
    cuts = np.split(np.arange(6), threads)
    one, whole = objective.loss_and_gradient(params, [Shard(tokens, targets)], config, goal)
    several, parts = objective.loss_and_gradient(
        params, [Shard(tokens[rows], targets[rows]) for rows in cuts], config, goal
    )
    assert abs(one.total - several.total) < 1e-12
    for (name, ours), other in zip(tree.named_leaves(whole), tree.leaves(parts), strict=True):
        np.testing.assert_allclose(ours, other, atol=1e-11, err_msg=name)


def test_several_workers_train_as_one(tmp_path: Path) -> None:
    settings = SETTINGS["heads normalised, first layer dense"] | {"capacity_factor": None, "dtype": "float64"}
    one, two = (small_runs.train(tmp_path / str(n), threads=n, **settings).model.params for n in (1, 2))
    for (name, ours), other in zip(tree.named_leaves(one), tree.leaves(two), strict=True):
        np.testing.assert_allclose(ours, other, atol=1e-9, err_msg=name)


def test_the_auxiliary_losses_are_those_of_the_mixtures_alone(rng: np.random.Generator) -> None:
    """The pooled balance loss too, as in the library that it follows: it pools the layers that have a router."""
    config = dataclasses.replace(BASE, dense_layers=1, noisy_gating=False)
    params, (tokens, targets) = drawn(rng, config), rng.integers(13, size=(2, 2, 7))
    batch = [Shard(tokens, targets)]
    for pooled in (False, True):
        goal = Objective(Coefficients(balance=0.5), pooled_balance=pooled)
        totals, _ = objective.loss_and_gradient(params, batch, config, goal)
        assert len(totals.stats) == len(totals.auxiliary) == len(totals.dstats) == 2
        _, routed, _ = decoder.forward(params, tokens, config)
        added = [layer.probability @ layer.assignments / layer.assignments.sum() / 14 * 5 for layer in routed.stats]
        if pooled:
            p, f = (sum(getattr(layer, of) for layer in routed.stats) / 28 for of in ("probability", "assignments"))
            added = [5 * p @ f]
        assert abs(totals.total - totals.loss - 0.5 * sum(added)) < 1e-12


def test_gains_are_adamw_s_and_the_matrices_of_a_dense_layer_muon_s(rng: np.random.Generator) -> None:
    config = dataclasses.replace(BASE, dense_layers=1, qk_norm="whole")
    params = decoder.init(rng, config)
    moments = optimizer.init(params, TrainConfig())
    by_muon = {name for name, of in moments.items() if of.square is None}
    assert "blocks[0].moe.shared.w_up" in by_muon
    assert {"blocks[0].attention.query_norm.gain", "blocks[2].attention.key_norm.gain"} <= moments.keys() - by_muon
    assert sum(dict(tree.named_leaves(params))[name].size for name in by_muon) == parameters.by_muon(config)


@pytest.fixture
def trained(tmp_path: Path) -> Path:
    small_runs.train(tmp_path / "run", **SETTINGS["two dense layers and a shared expert"])
    return tmp_path / "run"


def test_a_trace_has_the_layers_with_a_router_and_knows_their_numbers(trained: Path) -> None:
    model = checkpoint.load_model(trained)
    tokens = model.tokenizer.encode(small_runs.PYRAMID[:60])
    seen = routing_trace.trace(model.params, model.config, tokens)
    assert (seen.first_layer, seen.experts.shape[:2], seen.logits.shape) == (2, (2, len(tokens)), (2, len(tokens), 4))
    _, routed, cache = decoder.forward(model.params, tokens[None, :8], model.config)
    for layer in (0, 1):
        logits = cache.blocks[2 + layer].moe.router.gate.x @ model.params.blocks[2 + layer].moe.router.w_gate
        np.testing.assert_allclose(seen.logits[layer, :8], logits, atol=1e-5)
    load = text_loss.evaluate(model.params, model.config, [tokens]).load
    assert load.shape == (2, 4)
    np.testing.assert_allclose(load.sum(1), 1)
    assert len(routed.stats) == 2


def test_tables_pages_and_figures_number_the_layers_as_the_model_does(
    trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = checkpoint.load_model(trained)
    texts = {"pyramid": model.tokenizer.encode(small_runs.PYRAMID[:200])}
    seen = microscope.look(model, texts)
    table = microscope.table(seen)
    assert table.startswith("2 layers after 2 dense, 2 of 4 experts per token.")
    assert [line for line in table.splitlines() if line.startswith("LAYER")] == ["LAYER 2", "LAYER 3"]
    values = microscope.to_dict(seen)
    assert (values["layers"], values["first_layer"], len(values["by_layer"])) == (2, 2, 2)
    microscope_page.write(trained / "page.html", seen, "title")
    assert '"first_layer":2' in (trained / "page.html").read_text(encoding="utf-8")
    figure = plots.experts(
        metrics(trained), routing_trace.load_by_domain(model.params, model.config, texts), model.config.dense_layers
    )
    assert [axes.get_title() for axes in figure.axes[:2]] == ["layer 2", "layer 3"]
    assert main(["routing", str(trained), "--text", str(_text(trained))]) == 0
    assert "LAYER 3" in capsys.readouterr().out


def _text(folder: Path) -> Path:
    (folder / "text.txt").write_text(small_runs.PYRAMID[:100], encoding="utf-8")
    return folder / "text.txt"


def test_a_coloured_text_offers_the_layers_with_a_router(trained: Path) -> None:
    model = checkpoint.load_model(trained)
    trace = routing_trace.trace(model.params, model.config, model.tokenizer.encode("3 steps up"))
    shown = coloured_text.ColouredText(trace, model.tokenizer)
    assert shown.to_terminal() == shown.to_terminal(2)
    assert shown.to_terminal(3).startswith("layer 3,")
    assert [line.split("  ")[0] for line in shown.to_text().splitlines()[1:]] == ["layer 2", "layer 3"]
    page = shown.to_html()
    assert ">layer 2</label>" in page
    assert 'title="L2: ' in page
    assert '[title*="L3: 0 "]' in page
    with pytest.raises(UserError, match="Layer 1 is dense; choose one from 2 to 3"):
        shown.to_terminal(1)
    with pytest.raises(UserError, match="There is no layer 4; choose one from 2 to 3"):
        shown.to_terminal(4)


def test_it_writes_what_one_pass_over_the_whole_text_would_write(settings: dict[str, Any]) -> None:
    config = dataclasses.replace(BASE, **settings, noisy_gating=False, norm_eps=0.01)
    params = drawn(np.random.default_rng(0), config)
    ids = [3, 1]
    written = list(generation.generate(params, config, ids, tokens=5, temperature=0))
    for token in written:
        logits, _, _ = decoder.forward(params, np.array([ids]), config)
        assert token == int(logits[0, -1].argmax())
        ids.append(token)


def test_the_dense_twin_keeps_the_dense_layers_and_has_as_many_active_parameters() -> None:
    sparse = presets.override(small_runs.SMALL, SETTINGS["two dense layers and a shared expert"])
    twin = presets.dense_twin(sparse)
    ours, theirs = parameters.count(sparse.config), parameters.count(twin.config)
    assert theirs.dense_layers == ours.dense_layers > 0
    assert ours.active - ours.router == theirs.active - theirs.router


def test_options_of_the_command_line_reach_the_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text.txt").write_text(CORPUS.documents["pyramid"], encoding="utf-8")
    options = ["--qk-norm", "per_head", "--layers", "3", "--dense-layers", "1", "--dense-width", "20"]
    train = ["train", "--preset", "tiny", "--text", str(tmp_path / "text.txt"), "--steps", "2", "--threads", "1"]
    assert main([*train, "--out", str(tmp_path / "run"), *options]) == 0
    config = json.loads((tmp_path / "run/config.json").read_text())["model"]
    assert (config["qk_norm"], config["dense_layers"], config["dense_width"]) == ("per_head", 1, 20)
    capsys.readouterr()
    assert main(["evaluate", str(tmp_path / "run")]) == 0
    assert len(json.loads(capsys.readouterr().out)["load"]) == 2
    assert main(["quantize", str(tmp_path / "run"), "--scheme", "nf4", "--out", str(tmp_path / "small")]) == 0
    assert main(["evaluate", str(tmp_path / "small")]) == 0
    assert main([*train, "--out", str(tmp_path / "other"), "--dense-layers", "2"]) == 2
    assert "dense_layers 2 leave none of the layers 2 for a mixture" in capsys.readouterr().err
    assert main([*train, "--out", str(tmp_path / "other"), "--qk-norm", "heads"]) == 2


def test_settings_that_cannot_be_are_refused() -> None:
    with pytest.raises(UserError, match="dense_layers 3 leave none of the layers 3"):
        dataclasses.replace(BASE, dense_layers=3)
    with pytest.raises(UserError, match="give a dense_width"):
        ModelConfig(layers=2, dense_layers=1, active_experts=8, expert_width=2**18)
    with pytest.raises(UserError, match="qk_norm 'head' is unknown: choose one of none, whole, per_head"):
        dataclasses.replace(BASE, qk_norm="head")
    assert (
        ModelConfig(layers=2, dense_layers=1, active_experts=8, expert_width=2**18, dense_width=8).width_of_dense == 8
    )


def test_noise_and_state_belong_to_the_layers_that_they_had_before(rng: np.random.Generator) -> None:
    """The noise of a layer is drawn for its number; what a router learns without a gradient is its own."""
    config = dataclasses.replace(BASE, dense_layers=1, router="sigmoid_bias")
    recipe = TrainConfig(batch=4, bias_rate=0.5, optimizer="adamw", capacity_factor=None)
    params = decoder.init(rng, config, np.float64)
    before = [layer.router.bias.copy() for layer in decoder.mixtures(params)]
    tokens = rng.integers(13, size=(4, 7))
    totals, _ = step.train_step(params, optimizer.init(params, recipe), [Shard(tokens, tokens)], config, recipe, 0)
    for was, layer, stats in zip(before, decoder.mixtures(params), totals.stats, strict=True):
        below = stats.assignments < stats.assignments.mean()
        assert ((layer.router.bias > was) == below).all()


# The other commands


GOLDEN = Path(__file__).parent / "golden"


@pytest.mark.parametrize("family", ["olmoe", "qwen3_moe", "deepseek"])
def test_a_folder_runs_with_its_experts_on_the_disk(family: str) -> None:
    """The same logits to the bit, and the same text."""
    whole, opened = open_model.load(GOLDEN / family), bounded.open_folder(GOLDEN / family)
    model = opened.load(10**7)
    tokens = np.arange(12)[None] % 13
    logits, _, _ = decoder.forward(whole.params, tokens, whole.config)
    np.testing.assert_array_equal(decoder.forward(model.params, tokens, model.config).logits, logits)
    texts = [
        list(generation.generate(one.params, one.config, [3, 1], tokens=8, temperature=0)) for one in (whole, model)
    ]
    assert texts[0] == texts[1]


@pytest.mark.parametrize("scheme", ["nf4", "int8", "hqq2"])
def test_a_quantised_run_runs_with_its_experts_on_the_disk(trained: Path, tmp_path: Path, scheme: str) -> None:
    quantized.write(trained, tmp_path / "small", scheme)
    whole, model = open_model.load(tmp_path / "small"), bounded.open_folder(tmp_path / "small").load(10**7)
    tokens = np.arange(8)[None] % 20
    logits, _, _ = decoder.forward(whole.params, tokens, whole.config)
    np.testing.assert_array_equal(decoder.forward(model.params, tokens, model.config).logits, logits)
    texts = [
        list(generation.generate(one.params, one.config, [3, 1], tokens=8, temperature=0)) for one in (whole, model)
    ]
    assert texts[0] == texts[1]


def test_experts_are_removed_from_mixtures_only(trained: Path) -> None:
    model = checkpoint.load_model(trained)
    tokens = np.arange(32).reshape(2, 16) % 20
    done = prune.prune(model.params, model.config, tokens, 3)
    assert (len(done.kept), len(done.errors), done.config.experts) == (2, 2, 3)
    assert [of.moe.experts is None for of in done.params.blocks] == [True, True, False, False]
    np.testing.assert_array_equal(done.params.blocks[1].moe.shared.w_up, model.params.blocks[1].moe.shared.w_up)
    assert [len(of.experts.w_up) for of in decoder.mixtures(done.params)] == [3, 3]
    every = prune.remove(model.params, model.config, [[0, 1, 2, 3]] * 2)[0]
    for ours, same in zip(tree.leaves(model.params), tree.leaves(every), strict=True):
        np.testing.assert_array_equal(ours, same)
    ratios = prune.median_ratios(model.params, model.config, tokens)
    assert ratios[:2] == [0.0, 0.0]
    assert min(ratios[2:]) > 0
    assert pruned.table(pruned.Report("random", [[0], [1]], [0.5, 0.25], 9, (8, 4), 2)).splitlines()[1].startswith("2 ")


def test_models_with_dense_layers_are_aligned_and_bound(trained: Path) -> None:
    model = checkpoint.load_model(trained)
    rng = np.random.default_rng(0)
    blocks = [of._replace(moe=alignment.shuffled(rng, of.moe)) for of in model.params.blocks]
    other = model.params._replace(blocks=blocks)
    again = alignment.decoder(model.params, other, model.config)
    tokens = np.arange(32).reshape(2, 16) % 20
    for (name, ours), back in zip(tree.named_leaves(model.params), tree.leaves(again), strict=True):
        np.testing.assert_allclose(back, ours, rtol=1e-4, atol=1e-5, err_msg=name)
    bound = binding.merge_experts(model.params, model.config, tokens, 2)
    assert [len(np.unique(of.experts.w_up[:, 0, 0])) for of in decoder.mixtures(bound)] == [2, 2]
    np.testing.assert_array_equal(bound.blocks[0].moe.shared.w_up, model.params.blocks[0].moe.shared.w_up)


def test_a_dense_model_with_layers_of_another_width_is_not_copied() -> None:
    config = dataclasses.replace(BASE, experts=1, active_experts=1, dense_layers=1)
    with pytest.raises(UserError, match="the first 1 layers of the model have a width of their own"):
        upcycle.config_of(config)


def test_what_a_token_reads_from_the_disk_is_what_mixtures_have() -> None:
    config = dataclasses.replace(BASE, dense_layers=1, dense_width=500)
    assert offloading.bytes_per_token(config, 16) == 2 * 2 * (3 * 6 * 3) * 2
    assert offloading.pass_bytes(config, 1, 1) > offloading.pass_bytes(BASE, 1, 1)
