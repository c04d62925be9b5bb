"""Parity with lm-evaluation-harness: a tiny Mixtral by minimoe's adapter and by the harness's own transformers backend.

The tasks are local files, so nothing is downloaded.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("lm_eval")

import lm_eval
import small_runs
import torch
import transformers
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from tokenizer_json import mixtral_like

from minimoe.evaluate import harness
from minimoe.inference import generation
from minimoe.layers import decoder
from minimoe.storage import open_model

pytestmark = pytest.mark.torch

SIZES: dict[str, Any] = {
    "vocab_size": 280,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 6,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 48,
    "sliding_window": None,
    "initializer_range": 0.4,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
DOCUMENTS = ("the bread and the beard", "the bread " * 40, "read", "bad, dear; the herb.")
CHOICES = [
    {"question": "the bread", "choices": [" here", " the bread", " dear"], "answer": 1},
    {"question": "the", "choices": [" beard", " bread"], "answer": 1},
    {"question": "red bread,", "choices": [" a", " the", " he"], "answer": 0},
]
TASKS = {
    "choices": """
task: choices
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{folder}/choices.jsonl"}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
target_delimiter: ""
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
""",
    "perplexity": """
task: perplexity
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{folder}/documents.jsonl"}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list:
  - {{metric: bits_per_byte, aggregation: bits_per_byte, higher_is_better: false}}
""",
    "writing": """
task: writing
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{folder}/writing.jsonl"}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{prompt}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: ["\\n"], max_gen_toks: 3, do_sample: false}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
""",
}


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("mixtral")
    transformers.MixtralForCausalLM(transformers.MixtralConfig(**SIZES)).eval().save_pretrained(folder)
    (folder / "tokenizer.json").write_text(json.dumps(mixtral_like()))
    transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"), bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)
    return folder


# Its cache of logits is off: after "the" it would take the probability of " bread" from a request without a context.
@pytest.fixture(scope="module")
def both(folder: Path) -> tuple[Any, Any]:
    theirs = HFLM(pretrained=str(folder), device="cpu", dtype="float32", batch_size=1, logits_cache=False)
    return harness.lm(folder, device="cpu"), theirs


def ask(model: Any, kind: str, *args: tuple[Any, ...]) -> list[Any]:
    requests = [Instance(request_type=kind, doc={}, arguments=one, idx=0) for one in args]
    return getattr(model, kind)(requests, disable_tqdm=True)


def test_the_log_probability_of_a_continuation_agrees(both: tuple[Any, Any]) -> None:
    pairs = [("the bread", " here"), ("the bread ", "and the"), ("", "the bread"), ("a" * 60 + " the", " bread")]
    pairs += [("the", " bread" * n) for n in range(1, 30, 7)]
    mine, other = (ask(model, "loglikelihood", *pairs) for model in both)
    assert [logp for logp, _ in mine] == pytest.approx([logp for logp, _ in other], rel=1e-5)
    assert [greedy for _, greedy in mine] == [greedy for _, greedy in other]


def test_the_likeliest_continuation_is_greedy_for_both(both: tuple[Any, Any]) -> None:
    ours, _ = both
    ids = ours.model.tokenizer.encode("the").tolist()
    best = int(decoder.forward(ours.model.params, np.array([ids]), ours.model.config).logits[0, -1].argmax())
    scored = [harness.score(ours.model, [(ids, [token])])[0].greedy for token in (best, (best + 1) % 280)]
    theirs = both[1]._loglikelihood_tokens([(("", ""), ids, [token]) for token in (best, (best + 1) % 280)])
    assert scored == [greedy for _, greedy in theirs] == [True, False]


def test_the_log_probability_of_a_document_agrees_where_no_beginning_is_predicted(folder: Path) -> None:
    ours = harness.lm(folder, device="cpu")
    theirs = HFLM(pretrained=str(folder), device="cpu", dtype="float32", batch_size=1, add_bos_token=False)
    documents = [(text,) for text in DOCUMENTS]
    mine, other = (ask(model, "loglikelihood_rolling", *documents) for model in (ours, theirs))
    assert mine == pytest.approx(other, rel=1e-5)


def test_the_backend_counts_a_beginning_after_a_beginning_and_minimoe_does_not(both: tuple[Any, Any]) -> None:
    ours, theirs = both
    model = ours.model
    logits = decoder.forward(model.params, np.array([[1]]), model.config).logits[0, 0].astype(np.float64)
    again = logits[1] - np.log(np.exp(logits).sum())
    ids = model.tokenizer.encode("read").tolist()
    twice = harness.score(model, [([1], ids)])[0].logp
    (theirs_of_it,) = ask(theirs, "loglikelihood_rolling", ("read",))
    (ours_of_it,) = ask(ours, "loglikelihood_rolling", ("read",))
    assert theirs_of_it == pytest.approx(twice, rel=1e-5)
    assert again < -0.1 and theirs_of_it != pytest.approx(ours_of_it, rel=1e-3)


def test_what_is_written_agrees(both: tuple[Any, Any]) -> None:
    asked = [
        ("the bread", {"until": ["e"], "max_gen_toks": 20}),
        ("a", {"until": ["\n\n"], "max_gen_toks": 12}),
        ("the " * 60, {"until": [], "max_gen_toks": 12}),
        ("dear", {"until": ["a", "t"], "max_gen_toks": 30}),
    ]
    mine, other = (ask(model, "generate_until", *asked) for model in both)
    assert mine == other
    assert any(mine)


def run(model: Any, folder: Path, name: str, rows: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """The results of one task, from files in a folder."""
    for file, of_file in rows.items():
        (folder / f"{file}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in of_file))
    (folder / f"{name}.yaml").write_text(TASKS[name].format(folder=folder))
    tasks = TaskManager(include_path=str(folder), include_defaults=False)
    found = lm_eval.simple_evaluate(model=model, tasks=[name], task_manager=tasks, bootstrap_iters=0, log_samples=False)
    return found["results"][name]


def test_a_task_of_choices_gives_the_accuracy_of_both(both: tuple[Any, Any], tmp_path: Path) -> None:
    ours, theirs = both
    mine = run(ours, tmp_path, "choices", {"choices": CHOICES})
    right = 0
    for row in CHOICES:
        scores = [logp for logp, _ in ask(ours, "loglikelihood", *((row["question"], c) for c in row["choices"]))]
        right += int(np.argmax(scores)) == row["answer"]
    assert mine["acc,none"] == pytest.approx(right / len(CHOICES))
    assert run(theirs, tmp_path, "choices", {"choices": CHOICES})["acc,none"] == mine["acc,none"]


def test_tasks_run_on_a_model_that_minimoe_trained(tmp_path: Path) -> None:
    """Perplexity and writing, with the numbers that minimoe computes itself."""
    run_folder = small_runs.finished()
    model, ours = open_model.load(run_folder), harness.lm(run_folder, device="cpu")
    texts = ["7 steps up, 49 stones laid", "à 10 pieds."]
    found = run(ours, tmp_path, "perplexity", {"documents": [{"text": text} for text in texts]})
    nats = -sum(ask(ours, "loglikelihood_rolling", *((text,) for text in texts)))
    size = sum(len(text.encode()) for text in texts)
    assert found["bits_per_byte,none"] == pytest.approx(nats / np.log(2) / size, rel=1e-6)

    written = generation.generate(model.params, model.config, model.tokenizer.encode("7 st"), tokens=3, temperature=0)
    rows = [{"prompt": "7 st", "answer": model.tokenizer.decode(list(written))}, {"prompt": "12 s", "answer": "???"}]
    assert run(ours, tmp_path, "writing", {"writing": rows})["exact_match,none"] == 0.5
