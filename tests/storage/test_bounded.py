"""A model whose experts are on the disk: the same numbers as the whole model, within a bound that is kept."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import measured
import mixtral_folders
import numpy as np
import pytest
from small_runs import finished, train

from minimoe.core import files, tree
from minimoe.core.errors import UserError
from minimoe.evaluate import text_loss
from minimoe.inference import generation
from minimoe.layers import decoder
from minimoe.storage import bounded, encoded, huggingface, open_model, quantized
from minimoe.storage.bounded import Bounded
from minimoe.storage.packed_weights import Matrix
from minimoe.training import run_report

GOLDEN = Path(__file__).parent.parent / "golden" / "mixtral"
PROMPT = [5, 1, 8, 8, 2, 11, 0, 3]
LENGTH = 48

MIDDLE: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 896,
    "num_hidden_layers": 4,
    "num_local_experts": 8,
    "num_attention_heads": 8,
}
"""Experts of 1.4 MB in 16 bits, 44 MB of them in all."""


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.fsync", lambda _: None)
    finished()
    monkeypatch.setattr(run_report, "write", lambda *_: None)


def least(folder: Path, experts: int = 0) -> int:
    """The least possible bound, and room for some experts more."""
    opened = bounded.open_folder(folder)
    budget = bounded.plan(opened.located, 10**12, len(PROMPT), LENGTH)
    return budget.least + (opened.config.active_experts + experts) * budget.expert


def within(folder: Path, memory: int) -> Bounded:
    return bounded.open_folder(folder).load(memory, len(PROMPT), LENGTH)


def written(model: Any, tokens: int = 12, temperature: float = 0.0) -> list[int]:
    prompt = np.array(PROMPT) % model.config.vocab_size
    return list(generation.generate(model.params, model.config, prompt, tokens=tokens, temperature=temperature, seed=1))


def folder_of(kind: str, path: Path) -> Path:
    """A folder of each kind that can be opened."""
    if kind == "golden":
        return GOLDEN
    if kind == "run":
        return finished()
    if kind in ("F32", "F16", "BF16", "mixed"):
        return mixtral_folders.write(path / "m", kind)
    if kind == "fused":
        return mixtral_folders.write(path / "m", shards=2, fused=True)
    if kind == "tied":
        return mixtral_folders.write(path / "m", tie_word_embeddings=True)
    if kind == "window":
        return mixtral_folders.write(path / "m", sliding_window=5)
    if kind == "dense":
        params, config = huggingface.load_params(
            mixtral_folders.write(path / "m", num_local_experts=1, num_experts_per_tok=1)
        )
        huggingface.save(path / "out", params, config)
        return path / "out"
    source = finished() if kind.endswith(" run") else mixtral_folders.write(path / "m")
    quantized.write(source, path / "out", kind.removesuffix(" run"), None if kind != "hqq2" else "float")
    return path / "out"


KINDS = (
    ["golden", "run", "F32", "F16", "BF16", "mixed", "fused", "tied", "window", "dense"]
    + ["nf4", "int8", "hqq3", "hqq2", "rtn4", "nf4 run"]
)  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_logits_losses_and_texts_are_those_of_the_whole_model_to_the_bit(kind: str, tmp_path: Path) -> None:
    folder = folder_of(kind, tmp_path)
    whole = open_model.load(folder)
    tokens = np.random.default_rng(0).integers(whole.config.vocab_size, size=(2, 3))
    logits = decoder.forward(whole.params, tokens, whole.config).logits
    documents = [np.arange(29, dtype=np.int32) % whole.config.vocab_size]
    for more in (0, 1, 100) if kind == "BF16" else (0, 100):
        model = within(folder, least(folder, more))
        np.testing.assert_array_equal(decoder.forward(model.params, tokens, model.config).logits, logits)
        assert written(model) == written(whole)
        ours, theirs = (text_loss.evaluate(one.params, one.config, documents) for one in (model, whole))
        assert ours.loss == theirs.loss
        np.testing.assert_array_equal(ours.load, theirs.load)
        assert len(model.cache.held) <= model.budget.slots
    assert model.budget.slots == model.budget.experts >= len(model.cache.held)  # each was read once at most
    assert sum(phase.bytes for phase in model.cache.phases.values()) == len(model.cache.held) * model.budget.expert


def test_logits_of_every_token_while_writing_are_the_same_to_the_bit(tmp_path: Path) -> None:
    folder = mixtral_folders.write(tmp_path / "m")
    models = open_model.load(folder), within(folder, least(folder, 2))
    caches = [bounded.generation.kv_cache.init(model.params, model.config) for model in models]
    for piece in ([PROMPT], [[3]], [[270]], [[9, 9]], [[0]]):
        a, b = (
            generation.extend(model.params, cache, np.array(piece)) for model, cache in zip(models, caches, strict=True)
        )
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("kind", ["BF16", "nf4", "tied", "run"])
def test_a_bound_that_is_too_small_names_the_least_possible_one(kind: str, tmp_path: Path) -> None:
    folder = folder_of(kind, tmp_path)
    enough = least(folder)
    assert within(folder, enough).budget.slots == 2
    with pytest.raises(UserError, match="is too small for this model: .* 2 experts take") as caught:
        within(folder, enough - 1)
    named = int(str(caught.value).partition("--memory ")[2].removesuffix("KB.")) * 1000
    assert enough <= named < enough + 1000
    assert within(folder, named)
    with pytest.raises(UserError, match="too small"):
        within(folder, 1)


def test_a_large_bound_is_named_in_megabytes() -> None:
    assert bounded._rounded_up(10**7 + 1) == "11MB"
    assert bounded._rounded_up(3001) == "4KB"


def test_what_the_bound_is_spent_on_is_what_is_held(tmp_path: Path) -> None:
    folder = mixtral_folders.write(tmp_path / "m", **MIDDLE)
    bound = least(folder, 3)
    model = within(folder, bound)
    budget = model.budget
    assert budget.least + budget.slots * budget.expert <= bound < budget.least + (budget.slots + 1) * budget.expert
    held = 0
    for leaf in tree.leaves(model.params):
        packed: Any = leaf
        if isinstance(leaf, np.ndarray):
            held += leaf.nbytes
        elif not hasattr(packed, "field"):
            held += packed.content.nbytes
    assert held <= budget.resident <= held + 2 * encoded.ALIGNMENT * len(tree.leaves(model.params))
    assert budget.matrix == 4 * 256 * 896  # an expert's, larger than attention's
    assert budget.expert == 3 * 2 * 256 * 896
    assert budget.experts == 32
    written(model)
    assert len(model.cache.held) == budget.slots
    assert all(content.nbytes == budget.expert for content in model.cache.held.values())


def test_a_slot_holds_the_largest_expert(tmp_path: Path) -> None:
    located = bounded.open_folder(mixtral_folders.write(tmp_path / "m", "mixed")).located
    stacks = [of for of in located.leaves.values() if isinstance(of, list)]
    sizes = {(i // 3, e): 0 for i in range(len(stacks)) for e in range(5)}
    for i, stack in enumerate(stacks):
        for e, one in enumerate(stack):
            sizes[i // 3, e] += one.size
    assert len(set(sizes.values())) > 1
    assert sizes[0, 0] < max(sizes.values())
    assert bounded.plan(located, 10**9, 8, 64).expert == max(sizes.values())


def test_attention_is_never_read_again(tmp_path: Path) -> None:
    """Only experts leave: all reads after loading are theirs, each of the size of one."""
    folder = mixtral_folders.write(tmp_path / "m")
    model = within(folder, least(folder))
    read: list[Any] = []
    fetch = model.cache.read
    model.cache.read = lambda key, content: (read.append((key, content.nbytes)), fetch(key, content))[1]
    written(model)
    uses = [phase.uses for phase in model.cache.phases.values()]
    assert 0 < len(read) <= sum(uses)
    assert {size for _, size in read} == {model.budget.expert}
    assert sum(phase.bytes for phase in model.cache.phases.values()) == len(read) * model.budget.expert


def test_tokens_and_uses_are_counted(tmp_path: Path) -> None:
    folder = mixtral_folders.write(tmp_path / "m")
    model = within(folder, least(folder, 4))
    written(model, tokens=11)
    model.cache.end()
    reading, writing = model.cache.phases["reading"], model.cache.phases["writing"]
    assert reading.tokens == len(PROMPT)
    assert writing.tokens == 10  # the last token is written, but not read
    assert writing.uses == 10 * 3 * 2
    assert reading.uses <= 3 * 5
    assert writing.bytes == writing.misses * model.budget.expert
    assert 0 < writing.hits < writing.uses
    assert writing.reading > 0 < writing.unpacking
    assert writing.seconds > writing.reading + writing.unpacking


def test_no_matrix_of_attention_or_experts_is_float32_between_products(tmp_path: Path) -> None:
    model = within(mixtral_folders.write(tmp_path / "m", **MIDDLE), 10**8)
    arrays = [leaf for leaf in tree.leaves(model.params) if isinstance(leaf, np.ndarray)]
    assert max(leaf.size for leaf in arrays) == 300 * 256  # the output layer
    assert all(content.dtype == np.uint8 for content in model.cache.held.values())
    kinds = {type(part.weight) for block in model.params.blocks for part in block.attention[:4]}
    assert kinds == {Matrix}


@pytest.mark.parametrize("what", ["cut", "touched", "cut before"])
def test_a_file_that_changes_during_the_run_stops_it_with_one_sentence(what: str, tmp_path: Path) -> None:
    folder = mixtral_folders.write(tmp_path / "m")
    path = folder / "model.safetensors"
    opened = bounded.open_folder(folder)
    if what == "cut before":
        os.truncate(path, 30_000)
        with pytest.raises(UserError, match=r"model.safetensors ends at byte \d+, .*: it was cut short"):
            opened.load(least_of(opened), len(PROMPT), LENGTH)
        return
    model = opened.load(least_of(opened), len(PROMPT), LENGTH)
    text = generation.generate(model.params, model.config, PROMPT, tokens=20, temperature=1.0, seed=3)
    next(text)
    if what == "cut":
        os.truncate(path, path.stat().st_size // 2)
    else:
        os.utime(path, ns=(5, 5))
    with pytest.raises(UserError, match="model.safetensors changed while the model was running"):
        list(text)


def least_of(opened: Any) -> int:
    budget = bounded.plan(opened.located, 10**12, len(PROMPT), LENGTH)
    return budget.least + opened.config.active_experts * budget.expert


def test_other_kinds_of_experts_and_a_gpu_are_refused(tmp_path: Path) -> None:
    model = within(finished(), 10**7)
    assert model.to("cpu") is model
    assert not model.on_gpu
    with pytest.raises(UserError, match="runs on the CPU"):
        model.to("gpu")
    run = Path(shutil.copytree(finished(), tmp_path / "run"))
    values = json.loads((run / "config.json").read_text())
    values["model"]["expert_kind"] = "zero_computation"
    values["model"]["zero_experts"] = 1
    values.pop("sha256")
    (run / "config.json").write_text(json.dumps(values))
    with pytest.raises(UserError):
        bounded.open_folder(run)


@pytest.mark.parametrize("settings", [{"shared_experts": 1}, {"router": "remoe", "noisy_gating": False}], ids=str)
def test_runs_with_shared_experts_and_with_any_number_of_experts_per_token(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    train(tmp_path / "run", **settings)
    model = within(tmp_path / "run", least(tmp_path / "run"))
    assert written(model) == written(open_model.load(tmp_path / "run"))


def test_a_router_that_compares_with_no_number_is_refused(tmp_path: Path) -> None:
    train(tmp_path / "run", router="sigmoid_bias", steps=1)
    path = tmp_path / "run" / "model.safetensors"
    tensors, metadata = files.read_tensors(path)
    tensors["blocks[1].moe.router.bias"][0] = np.nan
    files.write_tensors(path, tensors, metadata)
    with pytest.raises(UserError, match=r"holds blocks\[1\].moe.router.bias with nan"):
        within(tmp_path / "run", 10**8)


def test_from_python(tmp_path: Path) -> None:
    import minimoe

    folder = mixtral_folders.write(tmp_path / "m")
    whole = minimoe.load(folder)
    for memory in ("20MB", 20 * 10**6):
        model = minimoe.load(folder, memory=memory)
        assert minimoe.generate(model, "bread", tokens=9) == minimoe.generate(whole, "bread", tokens=9)
    with pytest.raises(UserError, match="memory '8 apples' is not a size"):
        minimoe.load(folder, memory="8 apples")


IMPORTS = """
from minimoe.inference import fast_decode, generation, sampling
from minimoe.storage import offload_report, open_model
"""
WRITE = """
model = bounded.open_folder({folder!r}).load({bound}, 12, 40)
before = model.before  # with the tokenizer and the descriptions of the files
print(list(generation.generate(model.params, model.config, range(12), tokens=28, temperature=0)))
"""


def test_a_text_longer_than_the_bound_has_room_for_is_written_all_the_same(tmp_path: Path) -> None:
    folder = mixtral_folders.write(tmp_path / "m")
    model = bounded.open_folder(folder).load(10**8, 4, 5)
    assert written(model, tokens=30) == written(open_model.load(folder), tokens=30)


EVALUATE = """
model = bounded.open_folder({folder!r}).load({bound}, 640, 64)
before = model.before
documents = [np.arange(641, dtype=np.int32) % 270]
print(text_loss.evaluate(model.params, model.config, documents).loss)
"""


def test_a_real_process_that_evaluates_stays_within_the_bound(tmp_path: Path) -> None:
    """640 tokens at once: what a pass computes is most of the bound here, and counted too."""
    pytest.importorskip("tokenizers")
    folder = mixtral_folders.write(tmp_path / "m", **MIDDLE)
    opened = bounded.open_folder(folder)
    budget = bounded.plan(opened.located, 10**12, 640, 64)
    bound = budget.least + 6 * budget.expert
    imports = IMPORTS + "import tokenizers\nfrom minimoe.evaluate import text_loss\n"
    peak, printed = measured.peak_of(imports, EVALUATE.format(folder=str(folder), bound=bound))
    assert 0.5 * bound < peak < 1.05 * bound
    whole = open_model.load(folder)
    documents = [np.arange(641, dtype=np.int32) % 270]
    assert float(printed) == text_loss.evaluate(whole.params, whole.config, documents).loss


def test_a_real_process_stays_within_the_bound(tmp_path: Path) -> None:
    """44 MB of experts with a bound of 20 MB: the resident size never rises by more than 5 % above the bound."""
    pytest.importorskip("tokenizers")
    folder = mixtral_folders.write(tmp_path / "m", **MIDDLE)
    bound = 20_000_000
    work = WRITE.format(folder=str(folder), bound=bound)
    peak, printed = measured.peak_of(IMPORTS + "import tokenizers\n", work)
    assert 0.7 * bound < peak < 1.05 * bound
    whole = open_model.load(folder)
    expected = list(generation.generate(whole.params, whole.config, list(range(12)), tokens=28, temperature=0))
    assert json.loads(printed) == expected


@pytest.mark.slow
@pytest.mark.parametrize(("scheme", "bound"), [(None, 60_000_000), (None, 150_000_000), ("nf4", 60_000_000)])
def test_larger_real_processes_stay_within_their_bounds(scheme: str | None, bound: int, tmp_path: Path) -> None:
    """270 MB of experts in 16 bits."""
    sizes = MIDDLE | {"hidden_size": 512, "intermediate_size": 1792, "num_hidden_layers": 6}
    folder = mixtral_folders.write(tmp_path / "m", **sizes)
    if scheme is not None:
        quantized.write(folder, tmp_path / "out", scheme)
        folder = tmp_path / "out"
    peak, _ = measured.peak_of(IMPORTS + "import tokenizers\n", WRITE.format(folder=str(folder), bound=bound))
    assert peak < 1.05 * bound
