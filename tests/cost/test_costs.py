"""Costs: operations and bytes against published numbers, and the command that shows them."""

import dataclasses
import json
import shutil

import pytest
import small_runs

from minimoe.cli.main import main
from minimoe.core import presets
from minimoe.cost import blueprint, costs, published


def test_the_cache_of_mixtral_takes_four_gibibytes_at_32k():
    found = costs.of(published.named("mixtral-8x7b"))
    assert found.cache_bytes_per_token == 131_072
    assert found.cache_bytes[32_768] == 4 * 2**30


def test_a_window_bounds_the_cache():
    found = costs.of(published.named("mistral-7b"))
    assert found.cache_bytes[8192] == found.cache_bytes_per_token * 4096


def test_weights_in_bytes_follow_their_bits():
    found = costs.of(published.named("mixtral-8x7b"))
    assert {bits: round(size / 1e9, 2) for bits, size in found.weight_bytes.items()} == {
        32: 186.81,
        16: 93.41,
        8: 46.70,
        4: 23.35,
    }


def test_operations_count_each_multiplied_parameter_twice_and_attention_over_half_the_context():
    config = presets.preset("tiny").config
    D, L, T = config.width, config.layers, config.context
    attention = 2 * D * config.head_width * (config.heads + config.kv_heads)
    experts = config.active_experts * 3 * D * config.expert_width
    active = L * (attention + experts + D * config.experts) + config.vocab_size * D
    looked_at = 4 * L * config.heads * config.head_width * (T + 1) // 2
    found = costs.of(blueprint.of_config("tiny", config))
    assert found.forward_operations == 2 * active + looked_at
    assert found.backward_operations == 2 * found.forward_operations


@pytest.mark.parametrize("window", [None, 1, 3, 31, 32, 50])
def test_attention_looks_at_what_is_in_its_window(window):
    config = dataclasses.replace(presets.preset("tiny").config, window=window)
    T = config.context
    seen = [min(t, window or T) for t in range(1, T + 1)]
    blind = costs.of(blueprint.of_config("tiny", config)._replace(attention_width=0))
    looked_at = costs.of(blueprint.of_config("tiny", config)).forward_operations - blind.forward_operations
    assert looked_at == 4 * config.layers * config.heads * config.head_width * sum(seen) // T


def test_an_encoder_looks_at_the_whole_text():
    """T5's: 12 layers of an encoder and 12 that look at it see all 512 tokens, the decoder's own half of them."""
    found = published.switch_base(8)
    blind = costs.of(found._replace(attention_width=0, unmasked_width=0))
    looked_at = costs.of(found).forward_operations - blind.forward_operations
    assert looked_at == 4 * 768 * 12 * 512 * 2 + 4 * 768 * 12 * 513 // 2


def test_every_name_has_costs_and_a_table():
    for name in (*presets.PRESETS, *published.PUBLISHED):
        found = costs.of(published.named(name))
        assert f"{found.total:,}" in costs.table(found)
        assert sum(part["active"] for part in found.parts.values()) == found.active <= found.total


def test_the_command_prints_a_table_or_json_and_draws(tmp_path, capsys):
    assert main(["params", "mixtral-8x7b"]) == 0
    assert "46,702,792,704" in capsys.readouterr().out
    assert main(["params", "switch-base-8", "--json", "--figure", str(tmp_path / "parts.png")]) == 0
    assert json.loads(capsys.readouterr().out)["active"] == 222_977_280
    assert (tmp_path / "parts.png").read_bytes().startswith(b"\x89PNG")


def test_an_unknown_name_gets_a_suggestion(capsys):
    assert main(["params", "mixtral-8x7"]) == 2
    assert "did you mean 'mixtral-8x7b'" in capsys.readouterr().err


def test_published_caches_and_the_attention_of_deepseek():
    caches = {"deepseek-moe-16b": (28, 2048), "switch-base-8": (24, 768), "olmoe-1b-7b": (16, 2048)}
    for name, (layers, numbers) in caches.items():
        assert costs.of(published.named(name)).cache_bytes_per_token == 2 * layers * 2 * numbers
    found = published.deepseek_moe_16b()
    blind = costs.of(found._replace(attention_width=0))
    assert costs.of(found).forward_operations - blind.forward_operations == 4 * 28 * 2048 * 4097 // 2


def test_training_keeps_four_numbers_for_each_and_a_tied_table_is_multiplied_too():
    config = presets.preset("tiny").config
    found = costs.of(blueprint.of_config("tiny", config))
    assert found.training_bytes == 4 * 4 * found.total
    tied = costs.of(blueprint.of_config("tied", dataclasses.replace(config, tied_embeddings=True)))
    assert tied.forward_operations == found.forward_operations


def test_sizes_and_lengths_are_those_that_a_person_expects():
    assert costs._size(10**9) == "1.00 GB" and costs._size(10**6) == "1.000 MB"
    assert costs._lengths(3) == [1, 3]


def test_the_command_knows_what_experts_share_and_where_it_stands(capsys, monkeypatch, tmp_path):
    assert main(["params", "rumour-8x220b", "--shared", "1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["total"] == 220_000_000_000
    folder = shutil.copytree(small_runs.finished(), tmp_path / "here")
    monkeypatch.chdir(folder)
    assert main(["params", "."]) == 0
    assert capsys.readouterr().out.startswith("here")
