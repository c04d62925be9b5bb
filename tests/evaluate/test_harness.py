"""The adapter for lm-evaluation-harness: its three answers by hand, without the harness. With it: tests/peers."""

import json
import math
import sys
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import pytest
import small_runs
from hypothesis import given
from hypothesis import strategies as st
from tokenizer_json import mixtral_like

from minimoe.core import tree
from minimoe.core.config import ModelConfig
from minimoe.core.errors import UserError
from minimoe.evaluate import harness
from minimoe.inference import generation
from minimoe.layers import decoder
from minimoe.storage import huggingface, open_model
from minimoe.text import tokenizer

CONFIG = ModelConfig(width=8, layers=2, heads=2, kv_heads=1, head_width=4, context=12, experts=4, expert_width=8)
LETTERS = "abc xyz.\n"


class Model(NamedTuple):
    params: Any
    config: ModelConfig
    tokenizer: Any
    end_tokens: tuple[int, ...] = ()


class Request(NamedTuple):
    args: tuple[Any, ...]


def model_of(end_tokens: tuple[int, ...] = (), **changes: Any) -> Model:
    """Random, with logits that are far from uniform."""
    codec = tokenizer.build("char", LETTERS)
    settings = {**{name: getattr(CONFIG, name) for name in CONFIG.__dataclass_fields__}, **changes}
    config = ModelConfig(**{**settings, "vocab_size": codec.vocab_size})
    rng = np.random.default_rng(3)
    params = tree.map(lambda leaf: leaf + 0.3 * rng.standard_normal(leaf.shape), decoder.init(rng, config, np.float64))
    return Model(params, config, codec, end_tokens)


def with_beginning(folder: Path) -> Model:
    """A model whose tokenizer begins every text with a token."""
    config = ModelConfig(**{**{n: getattr(CONFIG, n) for n in CONFIG.__dataclass_fields__}, "vocab_size": 275})
    params = decoder.init(np.random.default_rng(1), config)
    huggingface.save(folder, params, config)
    (folder / "tokenizer.json").write_text(json.dumps(mixtral_like()))
    read = huggingface.load(folder)
    return Model(read.params, read.config, read.tokenizer, read.end_tokens)


def nats(model: Model, ids: list[int], first: int) -> tuple[float, bool]:
    """The loss of ids[first:] after the ids before them, by the plain model, and whether each is the likeliest."""
    logits = decoder.forward(model.params, np.array([ids[:-1]]), model.config).logits[0]
    total, greedy = 0.0, True
    for t in range(first, len(ids)):
        z = logits[t - 1]
        total += math.log(np.exp(z - z.max()).sum()) + float(z.max() - z[ids[t]])
        greedy &= int(z.argmax()) == ids[t]
    return total, greedy


def ids_of(model: Model, text: str) -> list[int]:
    return model.tokenizer.encode(text).tolist()


def ask(model: Any, kind: str, *args: tuple[Any, ...]) -> list[Any]:
    return getattr(harness.Harness(model), kind)([Request(one) for one in args])


# A continuation


def test_a_continuation_is_scored_after_its_context_whatever_else_is_asked() -> None:
    model = model_of()
    asked = [("ab", "c xyz"), ("xyz", "."), ("ab", "c"), ("b", "b b b"), ("abc xyz.", "abc")]
    found = ask(model, "loglikelihood", *asked)
    for (context, continuation), (logp, greedy) in zip(asked, found, strict=True):
        expected, likeliest = nats(model, ids_of(model, context + continuation), len(context))
        assert logp == pytest.approx(-expected, rel=1e-12)
        assert greedy == likeliest


def test_the_likeliest_continuation_is_greedy_and_any_other_is_not() -> None:
    model = model_of()
    context = "ab"
    best = likeliest(model, context, 4)
    other_end = best[:3] + next(letter for letter in LETTERS if letter != best[3])
    other_start = next(letter for letter in LETTERS if letter != best[0]) + best[1:]
    found = ask(model, "loglikelihood", *((context, text) for text in (best, other_end, other_start)))
    assert [greedy for _, greedy in found] == [True, False, False]


def test_spaces_at_the_end_of_a_context_belong_to_what_follows() -> None:
    model = model_of()
    with_space, moved = ask(model, "loglikelihood", ("ab ", "xyz"), ("ab", " xyz"))
    assert with_space == moved
    assert ask(model, "loglikelihood", ("  ", "x"))[0] == ask(model, "loglikelihood", ("", "  x"))[0]


def test_a_context_that_is_too_long_loses_its_beginning() -> None:
    model = model_of()
    long = "xyz.abc xyz.abc xyz.abc"
    ((logp, _),) = ask(model, "loglikelihood", (long, "abc"))
    ids = ids_of(model, long + "abc")[-13:]  # 12 tokens are read, and the last one only predicted
    assert logp == pytest.approx(-nats(model, ids, 10)[0], rel=1e-12)


def test_a_continuation_longer_than_the_context_is_refused() -> None:
    with pytest.raises(UserError, match="a continuation of 13 tokens .* context of 12"):
        ask(model_of(), "loglikelihood", ("a", "b" * 13))


def test_a_score_needs_a_context() -> None:
    with pytest.raises(UserError, match="a context without a token"):
        harness.score(model_of(), [([], [1])])


def test_many_tokens_of_a_large_vocabulary_are_scored_some_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of()
    whole = ask(model, "loglikelihood", ("ab", "c xyz.abc"))
    monkeypatch.setattr(harness, "LOGITS", 2 * model.config.vocab_size)
    parts = ask(model, "loglikelihood", ("ab", "c xyz.abc"))
    assert parts[0][0] == pytest.approx(whole[0][0], rel=1e-12)
    assert parts[0][1] == whole[0][1]


def test_long_sequences_are_read_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of()
    whole = ask(model, "loglikelihood", ("abc", " xyz"), ("a", "b"))
    monkeypatch.setattr(harness.reading, "TOKENS", 4)
    assert ask(model, "loglikelihood", ("abc", " xyz"), ("a", "b")) == [
        (pytest.approx(logp, rel=1e-12), greedy) for logp, greedy in whole
    ]


# What begins a text


def test_without_a_token_that_begins_texts_the_first_one_is_not_counted() -> None:
    model = model_of()
    (rolling,) = ask(model, "loglikelihood_rolling", ("abc xyz",))
    assert rolling == pytest.approx(-nats(model, ids_of(model, "abc xyz"), 1)[0], rel=1e-12)
    ((logp, _),) = ask(model, "loglikelihood", ("", "abc"))
    assert logp == pytest.approx(-nats(model, ids_of(model, "abc"), 1)[0], rel=1e-12)
    assert ask(model, "loglikelihood_rolling", ("",), ("a",)) == [0, 0]


def test_a_token_that_ends_texts_stands_before_the_first_one() -> None:
    model = model_of(end_tokens=(3,))
    (rolling,) = ask(model, "loglikelihood_rolling", ("abc",))
    assert rolling == pytest.approx(-nats(model, [3, *ids_of(model, "abc")], 1)[0], rel=1e-12)


def test_a_token_that_begins_every_text_stands_there_once(tmp_path: Path) -> None:
    model = with_beginning(tmp_path / "model")
    ids = ids_of(model, "the bread")
    assert ids[0] == 1
    (rolling,) = ask(model, "loglikelihood_rolling", ("the bread",))
    ((after_nothing, _),) = ask(model, "loglikelihood", ("", "the bread"))
    expected = -nats(model, ids, 1)[0]
    assert rolling == pytest.approx(expected, rel=1e-5)
    assert after_nothing == pytest.approx(expected, rel=1e-5)
    ((logp, _),) = ask(model, "loglikelihood", ("the", " bread"))
    assert logp == pytest.approx(-nats(model, ids, len(ids_of(model, "the")))[0], rel=1e-5)


# A document


@given(length=st.integers(1, 60), end=st.booleans())
def test_every_token_of_a_document_is_predicted_once_with_all_the_context_that_fits(length: int, end: bool) -> None:
    model = model_of(end_tokens=(3,) if end else ())
    ids = np.random.default_rng(length).integers(model.config.vocab_size, size=length).tolist()
    text = model.tokenizer.decode(ids)
    windows = list(harness._windows(model, text))
    predicted = [token for _, continuation in windows for token in continuation]
    assert predicted == (ids if end else ids[1:])
    known = [3, *ids] if end else ids
    place = 1
    for number, (context, continuation) in enumerate(windows):
        place += len(continuation)
        assert known[place - len(continuation) - len(context) : place] == context + continuation
        assert len(context) + len(continuation) == (min(13, len(known)) if number == 0 else 13)


def test_a_long_document_is_the_sum_of_its_pieces() -> None:
    model = model_of()
    ids = np.random.default_rng(0).integers(model.config.vocab_size, size=30).tolist()
    short = "abc"
    found = ask(model, "loglikelihood_rolling", (model.tokenizer.decode(ids),), (short,))
    expected = nats(model, ids[:13], 1)[0] + nats(model, ids[12:25], 1)[0] + nats(model, ids[17:30], 8)[0]
    assert found == pytest.approx([-expected, -nats(model, ids_of(model, short), 1)[0]], rel=1e-12)


# Writing


def likeliest(model: Model, context: str, tokens: int) -> str:
    written = generation.generate(model.params, model.config, ids_of(model, context), tokens=tokens, temperature=0)
    return model.tokenizer.decode(list(written))


def test_a_text_is_written_up_to_the_first_stop_string() -> None:
    model = model_of()
    whole = likeliest(model, "ab", 10)
    stop = whole[4:6]
    assert ask(model, "generate_until", ("ab", {"until": [stop, ""], "max_gen_toks": 10})) == [whole.partition(stop)[0]]
    assert ask(model, "generate_until", ("ab", {"until": stop, "max_gen_toks": 10})) == [whole.partition(stop)[0]]
    both = [whole[6], whole[2]]
    assert ask(model, "generate_until", ("ab", {"until": both, "max_gen_toks": 10})) == [
        min((whole.partition(one)[0] for one in both), key=len)
    ]


@pytest.mark.parametrize("name", harness.LIMITS)
def test_without_a_stop_string_as_much_is_written_as_is_asked(name: str) -> None:
    model = model_of()
    assert ask(model, "generate_until", ("ab", {name: 7}), ("x", {"until": None, name: 3})) == [
        likeliest(model, "ab", 7),
        likeliest(model, "x", 3),
    ]


def test_a_task_that_sets_no_limit_gets_half_of_the_context_or_256_tokens() -> None:
    model = model_of()
    assert ask(model, "generate_until", ("ab", {})) == [likeliest(model, "ab", 6)]
    assert len(ask(model_of(context=600), "generate_until", ("ab", {}))[0]) == 256


def test_a_token_that_ends_texts_is_not_part_of_what_is_written() -> None:
    model = model_of()
    whole = likeliest(model, "ab", 8)
    end = ids_of(model, whole)[3]
    assert ask(model._replace(end_tokens=(end,)), "generate_until", ("ab", {"max_gen_toks": 8})) == [
        whole.partition(whole[3])[0]
    ]


def test_a_prompt_without_room_loses_its_beginning() -> None:
    model = model_of()
    long = "xyz.abc xyz.abc"
    (found,) = ask(model, "generate_until", (long, {"max_gen_toks": 5}))
    assert found == likeliest(model, long[-7:], 5)


@pytest.mark.parametrize(
    ("settings", "temperature"),
    [
        ({"do_sample": True}, 1.0),
        ({"do_sample": True, "temperature": 0.6, "top_k": 3, "top_p": 0.9}, 0.6),
        ({"temperature": 0.6}, 0.6),
        ({"do_sample": False, "temperature": 0.6}, 0.0),
    ],
)
def test_a_task_may_ask_for_samples(settings: dict[str, Any], temperature: float) -> None:
    model = model_of()
    (found,) = ask(model, "generate_until", ("ab", {"max_gen_toks": 9} | settings))
    expected = generation.generate(
        model.params,
        model.config,
        ids_of(model, "ab"),
        tokens=9,
        temperature=temperature,
        top_k=settings.get("top_k"),
        top_p=settings.get("top_p"),
    )
    assert found == model.tokenizer.decode(list(expected))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"num_beams": 4}, "sets 'num_beams' .*until"),
        ({"max_gen_toks": 12}, "12 tokens are to be written, .* context is 12"),
        ({"max_gen_toks": 0}, "0 tokens"),
    ],
)
def test_a_setting_that_is_not_possible_is_refused_in_a_sentence(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        ask(model_of(), "generate_until", ("ab", settings))


# The harness


class StandIn:
    """What the harness's own base class does when it is made."""

    def __init__(self) -> None:
        self.rank_is_set = True


def test_the_model_of_a_folder_is_one_of_the_harness(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("lm_eval.api.model")
    module.LM = StandIn  # type: ignore[attr-defined]
    for name in ("lm_eval", "lm_eval.api"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, "lm_eval.api.model", module)
    folder = small_runs.finished()
    made = harness.lm(folder, device="cpu")
    assert isinstance(made, StandIn) and made.rank_is_set
    assert made.tokenizer_name == str(folder)
    text = "7 steps up"
    plain = open_model.load(folder)
    assert made.loglikelihood([Request((text, ", 49"))]) == ask(plain, "loglikelihood", (text, ", 49"))


def test_without_the_harness_it_is_said_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval.api.model", None)
    with pytest.raises(UserError, match=r'cannot be imported .*pip install "minimoe\[harness\]"'):
        harness.lm(small_runs.finished())
