"""Parity with transformers: a random model of each family is made there, saved, loaded here, and computes the same.

transformers has no DeepSeekMoE, so an independent model in PyTorch, ``deepseek_moe``, takes its place.

Both compute in float32 and add up in different orders, so numbers agree to 1e-5 of the largest. Weights that are only
moved agree to the bit.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import transformers
from deepseek_moe import DeepseekForCausalLM
from safetensors.torch import load_file, save_file
from tokenizer_json import mixtral_like
from torch.nn import functional

from minimoe.core import tree
from minimoe.core.config import ModelConfig
from minimoe.inference import generation
from minimoe.layers import decoder
from minimoe.layers.decoder import Decoder
from minimoe.layers.mode import Mode
from minimoe.layers.routers import noisy_top_k
from minimoe.layers.routing import RouterStats
from minimoe.losses import balance, cross_entropy
from minimoe.losses.balance import Coefficients
from minimoe.storage import huggingface, huggingface_config
from minimoe.text import huggingface_tokenizer, tokenizer

pytestmark = pytest.mark.torch

SIZES: dict[str, Any] = {
    "vocab_size": 37,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 6,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 64,
    "sliding_window": None,
    "rope_theta": 1000.0,
    "initializer_range": 0.2,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
EAGER = {"attn_implementation": "eager", "experts_implementation": "eager"}
"""The plain implementations of both. The default one of the experts needs widths that are multiples of 4."""

SHAPES: dict[str, dict[str, Any]] = {
    "grouped queries": {},
    "multi-head": {"num_key_value_heads": 4},
    "multi-query": {"num_key_value_heads": 1},
    "a window shorter than the text": {"sliding_window": 5},
    "wide heads": {"head_dim": 12, "hidden_size": 20},
    "three of five experts": {"num_local_experts": 5, "num_experts_per_tok": 3},
    "one active expert": {"num_experts_per_tok": 1},
    "every expert": {"num_local_experts": 4, "num_experts_per_tok": 4},
    "tied embeddings, long wavelengths": {"tie_word_embeddings": True, "rope_theta": 1e6, "rms_norm_eps": 1e-3},
    "a Mistral": {"model_type": "mistral"},
    "a Mistral with a window": {"model_type": "mistral", "sliding_window": 4, "num_key_value_heads": 1},
    "an OLMoE": {"model_type": "olmoe", "num_key_value_heads": 4, "num_experts_per_tok": 3},
    "an OLMoE, grouped, renormalising": {"model_type": "olmoe", "norm_topk_prob": True},
    "an OLMoE with one active expert": {"model_type": "olmoe", "num_experts_per_tok": 1, "rms_norm_eps": 1e-3},
    "a Qwen3-MoE": {"model_type": "qwen3_moe", "norm_topk_prob": True, "head_dim": 12},
    "a Qwen3-MoE that does not renormalise": {"model_type": "qwen3_moe", "num_key_value_heads": 1},
    "a Qwen3-MoE with dense layers": {"model_type": "qwen3_moe", "mlp_only_layers": [0, 1], "norm_topk_prob": True},
    "a Qwen3-MoE with a window": {"model_type": "qwen3_moe", "use_sliding_window": True, "sliding_window": 4},
    "a DeepSeekMoE": {"model_type": "deepseek", "n_shared_experts": 2, "num_key_value_heads": 4},
    "a DeepSeekMoE that renormalises": {"model_type": "deepseek", "norm_topk_prob": True, "n_shared_experts": None},
    "a DeepSeekMoE without dense layers": {"model_type": "deepseek", "first_k_dense_replace": 0},
    "a DeepSeekMoE with one active expert": {
        "model_type": "deepseek",
        "num_experts_per_tok": 1,
        "norm_topk_prob": True,
        "tie_word_embeddings": True,
    },
}
MIXTURES = [name for name, changes in SHAPES.items() if changes.get("model_type") != "mistral"]
OF_THE_LIBRARY = [name for name, changes in SHAPES.items() if changes.get("model_type") != "deepseek"]
MIXTRALS = [name for name in MIXTURES if name in OF_THE_LIBRARY]
DEEPSEEKS = [name for name in SHAPES if name not in OF_THE_LIBRARY]


class Twins(NamedTuple):
    """One model, there and here."""

    theirs: Any
    params: Decoder
    config: ModelConfig


class Batch(NamedTuple):
    """Two sequences, the second of which ends in padding if there is any."""

    tokens: Any  # (2, T)
    mask: Any  # (2, T)  1 counts

    @property
    def counted(self) -> Any:
        return self.mask > 0

    @property
    def targets(self) -> tuple[Any, Any]:
        """The next token (2, T), and whether it counts: never for the last of a row."""
        predicted = np.zeros_like(self.mask)
        predicted[:, :-1] = self.mask[:, 1:]
        return np.roll(self.tokens, -1, axis=1), predicted


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture(params=["whole", "padded"])
def batch(request: pytest.FixtureRequest) -> Batch:
    tokens = np.random.default_rng(3).integers(0, SIZES["vocab_size"], (2, 17))
    mask = np.ones_like(tokens)
    mask[1, 11 if request.param == "padded" else 17 :] = 0
    return Batch(tokens, mask)


def make(model_type: str = "mixtral", **changes: Any) -> Any:
    """A random model of the library, or of ``deepseek_moe``, in float32, whose gains are not all one."""
    kinds = {
        "mixtral": (transformers.MixtralConfig, transformers.MixtralForCausalLM),
        "mistral": (transformers.MistralConfig, transformers.MistralForCausalLM),
        "olmoe": (transformers.OlmoeConfig, transformers.OlmoeForCausalLM),
        "qwen3_moe": (transformers.Qwen3MoeConfig, transformers.Qwen3MoeForCausalLM),
    }
    if model_type == "deepseek":
        sizes = {name: value for name, value in SIZES.items() if name not in ("num_local_experts", "sliding_window")}
        model = DeepseekForCausalLM(**sizes | {"n_routed_experts": 6, "moe_intermediate_size": 20} | changes)
    else:
        config, kind = kinds[model_type]
        own = {"moe_intermediate_size": 20} if model_type == "qwen3_moe" else {}
        sizes = dict(SIZES)
        if model_type in ("olmoe", "qwen3_moe"):
            sizes["num_experts"] = sizes.pop("num_local_experts")
        if model_type == "olmoe":
            del sizes["sliding_window"]
        model = kind(config(**sizes | EAGER | own | changes)).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data.uniform_(0.5, 1.5)
    return model


@pytest.fixture(params=SHAPES)
def twins(request: pytest.FixtureRequest, tmp_path: Path) -> Twins:
    return of(make(**SHAPES[request.param]), tmp_path / "saved")


mixtrals = pytest.mark.parametrize("twins", MIXTRALS, indirect=True)
mixtures = pytest.mark.parametrize("twins", MIXTURES, indirect=True)
of_the_library = pytest.mark.parametrize("twins", OF_THE_LIBRARY, indirect=True)
deepseeks = pytest.mark.parametrize("twins", DEEPSEEKS, indirect=True)


def of(theirs: Any, folder: Path, **how: Any) -> Twins:
    theirs.save_pretrained(folder, **how)
    return Twins(theirs, *huggingface.load_params(folder))


def assert_close(ours: Any, theirs: Any, name: str = "") -> None:
    theirs = theirs.detach().numpy() if isinstance(theirs, torch.Tensor) else theirs
    assert np.abs(theirs).max() > 0, f"{name} is zero, which proves nothing"
    assert np.abs(ours - theirs).max() < 1e-5 * np.abs(theirs).max(), name


def theirs_of(twins: Twins, batch: Batch, **more: Any) -> Any:
    return twins.theirs(torch.tensor(batch.tokens), attention_mask=torch.tensor(batch.mask), **more)


def is_dense(twins: Twins) -> bool:
    return twins.theirs.config.model_type == "mistral"


# Values


def test_logits_agree(twins: Twins, batch: Batch) -> None:
    assert_logits_agree(twins, batch)


def assert_logits_agree(twins: Twins, batch: Batch) -> None:
    logits, _, _ = decoder.forward(twins.params, batch.tokens, twins.config, Mode(mask=batch.mask))
    assert_close(logits[batch.counted], theirs_of(twins, batch).logits.detach().numpy()[batch.counted])


@mixtures
def test_router_logits_agree(twins: Twins, batch: Batch) -> None:
    _, _, cache = decoder.forward(twins.params, batch.tokens, twins.config, Mode(mask=batch.mask))
    theirs = theirs_of(twins, batch, output_router_logits=True).router_logits
    counted = batch.counted.reshape(-1)
    first = twins.config.dense_layers
    for block, done, logits in zip(twins.params.blocks[first:], cache.blocks[first:], theirs, strict=True):
        [(ours, _)] = noisy_top_k.compared(block.moe.router, done.moe.router)
        assert_close(ours[counted], logits.detach().numpy()[counted])


@mixtrals
def test_pooled_balance_loss_agrees(twins: Twins, batch: Batch) -> None:
    _, routed, _ = decoder.forward(twins.params, batch.tokens, twins.config, Mode(mask=batch.mask))
    ours, _ = balance.pooled(routed.stats, 1.0)
    theirs = theirs_of(twins, batch, output_router_logits=True).aux_loss
    assert ours == pytest.approx(theirs.item(), rel=1e-6)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("experts", ["grouped_mm", "batched_mm", "eager"])
def test_every_implementation_of_theirs_agrees(tmp_path: Path, batch: Batch, attention: str, experts: str) -> None:
    twins = of(make(sliding_window=5), tmp_path / "saved")
    twins.theirs.set_attn_implementation(attention)
    twins.theirs.set_experts_implementation(experts)
    assert_logits_agree(twins, batch)


# Gradients


def their_gradient(twins: Twins, folder: Path) -> Decoder:
    """The gradient that autograd has left, saved as if it were a model and loaded here."""
    for parameter in twins.theirs.parameters():
        # an expert that got no token has none
        parameter.data = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    return of(twins.theirs, folder).params


def assert_gradients_agree(twins: Twins, batch: Batch, folder: Path, auxiliary: float) -> None:
    wanted = {"output_router_logits": True} if auxiliary else {}
    out = theirs_of(twins, batch, **wanted)
    targets, predicted = batch.targets
    labels = torch.tensor(np.where(predicted > 0, targets, -100)).reshape(-1)
    loss = functional.cross_entropy(out.logits.reshape(len(labels), -1), labels)
    (loss + auxiliary * out.aux_loss if auxiliary else loss).backward()

    logits, routed, cache = decoder.forward(twins.params, batch.tokens, twins.config, Mode(mask=batch.mask))
    nats, nats_cache = cross_entropy.forward(logits, targets, predicted)
    assert nats.total / nats.tokens == pytest.approx(loss.item(), rel=1e-6)
    dstats: list[RouterStats] | None = None
    if auxiliary:
        dstats = [balance.pooled(routed.stats, auxiliary)[1]] * len(routed.stats)
    gradient = decoder.backward(twins.params, cache, cross_entropy.backward(nats_cache, 1 / nats.tokens), dstats)
    for (name, ours), theirs in zip(
        tree.named_leaves(gradient), tree.leaves(their_gradient(twins, folder)), strict=True
    ):
        single = twins.config.active_experts == 1 and twins.config.renormalize
        always_one = is_dense(twins) or (single and not auxiliary)
        if always_one and name.endswith("router.w_gate"):
            assert not ours.any(), "a router whose only weight is always 1 has nothing to learn"
        else:
            assert_close(ours, theirs, name)


def test_every_gradient_of_the_cross_entropy_agrees(twins: Twins, batch: Batch, tmp_path: Path) -> None:
    assert_gradients_agree(twins, batch, tmp_path / "gradient", auxiliary=0.0)


@mixtrals
def test_every_gradient_with_the_pooled_balance_loss_agrees(twins: Twins, batch: Batch, tmp_path: Path) -> None:
    assert_gradients_agree(twins, batch, tmp_path / "gradient", auxiliary=0.5)


@deepseeks
def test_the_loss_of_a_deepseek_is_the_balance_within_sequences(twins: Twins, tmp_path: Path) -> None:
    """Its gradient too, together with that of the cross-entropy."""
    tokens = np.random.default_rng(3).integers(0, SIZES["vocab_size"], (2, 17))
    out = twins.theirs(torch.tensor(tokens))
    loss = functional.cross_entropy(out.logits[:, :-1].reshape(32, -1), torch.tensor(tokens[:, 1:]).reshape(-1))
    (loss + 0.5 * out.sequence_loss).backward()

    mask = np.ones_like(tokens)
    logits, routed, cache = decoder.forward(twins.params, tokens, twins.config, Mode(balance_by_sequence=True))
    mask[:, -1] = 0
    nats, nats_cache = cross_entropy.forward(logits, np.roll(tokens, -1, axis=1), mask)
    losses, dstats = zip(*(balance.loss(layer, Coefficients(sequence=0.5)) for layer in routed.stats), strict=True)
    assert sum(layer.sequence for layer in losses) == pytest.approx(out.sequence_loss.item(), rel=1e-5)
    gradient = decoder.backward(twins.params, cache, cross_entropy.backward(nats_cache, 1 / nats.tokens), dstats)
    theirs = their_gradient(twins, tmp_path / "gradient")
    for (name, ours), one in zip(tree.named_leaves(gradient), tree.leaves(theirs), strict=True):
        assert_close(ours, one, name)


# Generation


PROMPTS = ([3, 14, 15, 9, 2, 6], [2, 7, 1, 8, 2, 8], [0, 1, 1, 2, 3, 5])


def test_greedy_text_agrees_token_for_token_with_and_without_a_cache(twins: Twins) -> None:
    count, seen = 20, set()
    for prompt in PROMPTS:
        settings = {"max_new_tokens": count, "do_sample": False}
        theirs = twins.theirs.generate(torch.tensor([prompt]), use_cache=True, **settings)[0].tolist()
        assert twins.theirs.generate(torch.tensor([prompt]), use_cache=False, **settings)[0].tolist() == theirs
        written = generation.generate(twins.params, twins.config, prompt, tokens=count, temperature=0)
        assert prompt + list(written) == theirs
        ids = list(prompt)
        for _ in range(count):
            logits, _, _ = decoder.forward(twins.params, np.array([ids]), twins.config)
            ids.append(int(logits[0, -1].argmax()))
        assert ids == theirs
        seen.update(theirs[len(prompt) :])
    assert len(seen) > 5, "texts that repeat themselves would prove little"


# Files


@deepseeks
def test_the_weights_of_a_deepseek_come_back_to_the_bit(twins: Twins, tmp_path: Path) -> None:
    huggingface.save(tmp_path / "back", twins.params, twins.config)
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("saved", "back"))
    assert before.keys() == after.keys()
    for name, values in before.items():
        assert torch.equal(values, after[name]), name
    back = json.loads((tmp_path / "back/config.json").read_text())
    same = ("n_routed_experts", "n_shared_experts", "first_k_dense_replace", "moe_intermediate_size", "rope_theta")
    assert {name: back[name] for name in same} == {name: twins.theirs.values[name] for name in same}


@of_the_library
def test_weights_come_back_to_the_library_to_the_bit(twins: Twins, batch: Batch, tmp_path: Path) -> None:
    huggingface.save(tmp_path / "back", twins.params, twins.config)
    back, told = type(twins.theirs).from_pretrained(tmp_path / "back", output_loading_info=True, **EAGER)
    assert not any(told.values()), "keys are missing, surplus or of another shape"
    before, after = twins.theirs.state_dict(), back.state_dict()
    assert before.keys() == after.keys()
    for name, values in before.items():
        assert torch.equal(values, after[name]), name
    for setting in ("rope_parameters", "sliding_window", "max_position_embeddings", "eos_token_id", "norm_topk_prob"):
        assert getattr(back.config, setting, None) == getattr(twins.theirs.config, setting, None)
    assert torch.equal(theirs_of(twins, batch).logits, theirs_of(twins._replace(theirs=back), batch).logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_every_type_and_many_shards_are_read_to_the_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    model = make().to(dtype)
    model.save_pretrained(tmp_path / "saved", max_shard_size=20_000)
    assert len(list((tmp_path / "saved").glob("*.safetensors"))) > 2
    params, config = huggingface.load_params(tmp_path / "saved")
    huggingface.save(tmp_path / "back", params, config)
    back = transformers.MixtralForCausalLM.from_pretrained(tmp_path / "back", dtype=torch.float32)
    for name, values in model.state_dict().items():
        assert torch.equal(values.to(torch.float32), back.state_dict()[name]), name


@pytest.mark.parametrize("model_type", ["mixtral", "olmoe", "qwen3_moe"])
def test_names_that_the_library_uses_in_memory_are_read(tmp_path: Path, model_type: str) -> None:
    twins = of(make(model_type), tmp_path / "saved")
    state = twins.theirs.state_dict()
    assert "model.layers.0.mlp.experts.gate_up_proj" in state
    save_file(state, tmp_path / "saved/model.safetensors")
    params, _ = huggingface.load_params(tmp_path / "saved")
    for (name, ours), fused in zip(tree.named_leaves(twins.params), tree.leaves(params), strict=True):
        np.testing.assert_array_equal(ours, fused, err_msg=name)


@pytest.mark.parametrize("tie", [False, True])
def test_a_folder_that_also_holds_what_it_implies_is_read(tmp_path: Path, tie: bool) -> None:
    twins = of(make(tie_word_embeddings=tie, rope_theta=1e6), tmp_path / "saved")
    state = {name: values.clone() for name, values in twins.theirs.state_dict().items()}
    state["model.rotary_emb.inv_freq"] = twins.theirs.model.rotary_emb.inv_freq
    assert "lm_head.weight" in state
    save_file(state, tmp_path / "saved/model.safetensors")
    params, _ = huggingface.load_params(tmp_path / "saved")
    for (name, ours), again in zip(tree.named_leaves(twins.params), tree.leaves(params), strict=True):
        np.testing.assert_array_equal(ours, again, err_msg=name)


def test_text_ends_where_the_library_ends_it(tmp_path: Path) -> None:
    twins = of(make(eos_token_id=7), tmp_path / "saved")
    twins.theirs.generation_config.eos_token_id = [7, 3]
    twins.theirs.save_pretrained(tmp_path / "again")
    theirs = transformers.GenerationConfig.from_pretrained(tmp_path / "again").eos_token_id
    assert huggingface.load(tmp_path / "again").end_tokens == tuple(theirs) == (7, 3)


@pytest.mark.parametrize("model_type", ["mixtral", "mistral", "olmoe", "qwen3_moe"])
def test_a_config_of_the_library_has_no_setting_that_is_refused(tmp_path: Path, model_type: str) -> None:
    config = make(model_type).config
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict(), default=str))
    assert huggingface_config.read(tmp_path).config.width == SIZES["hidden_size"]


def test_special_tokens_and_the_chat_template_come_back_to_the_library(tmp_path: Path) -> None:
    of(make(vocab_size=280, bos_token_id=1, eos_token_id=2), tmp_path / "theirs")
    (tmp_path / "tokenizer.json").write_text(json.dumps(mixtral_like()))
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(tmp_path / "tokenizer.json"), bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    theirs.chat_template = "{{ bos_token }}{% for m in messages %}[INST] {{ m['content'] }}{% endfor %}"
    theirs.save_pretrained(tmp_path / "theirs")
    read = huggingface.load(tmp_path / "theirs")
    huggingface.save(tmp_path / "back", read.params, read.config, read.tokenizer, read.end_tokens)
    back = transformers.AutoTokenizer.from_pretrained(tmp_path / "back")
    assert back.special_tokens_map == theirs.special_tokens_map and len(back.special_tokens_map) == 3
    chat = [{"role": "user", "content": "the bread , here ."}]
    assert back.apply_chat_template(chat, tokenize=False) == theirs.apply_chat_template(chat, tokenize=False)
    ids = back("the bread , here .").input_ids
    assert ids == theirs("the bread , here .").input_ids == read.tokenizer.encode("the bread , here .").tolist()
    assert back.decode(ids, skip_special_tokens=True) == read.tokenizer.decode(ids)
    assert set(back("a")) == {"input_ids", "attention_mask"}
    config = transformers.AutoConfig.from_pretrained(tmp_path / "back")
    assert (config.bos_token_id, config.eos_token_id) == (1, 2)
    assert transformers.GenerationConfig.from_pretrained(tmp_path / "back").eos_token_id == 2


@pytest.mark.parametrize("model_type", ["mixtral", "mistral", "olmoe", "qwen3_moe"])
def test_what_a_config_leaves_out_is_what_the_library_fills_in(tmp_path: Path, model_type: str) -> None:
    make(model_type).save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    optional = ("rope_parameters", "rms_norm_eps", "sliding_window", "tie_word_embeddings", "hidden_act", "head_dim")
    optional += ("norm_topk_prob", "use_sliding_window", "mlp_only_layers", "decoder_sparse_step", "clip_qkv")
    (tmp_path / "config.json").write_text(json.dumps({n: v for n, v in values.items() if n not in optional}))
    theirs, ours = transformers.AutoConfig.from_pretrained(tmp_path), huggingface_config.read(tmp_path).config
    assert theirs.rope_parameters == {"rope_type": "default", "rope_theta": ours.rope_theta}
    assert (theirs.rms_norm_eps, getattr(theirs, "sliding_window", None)) == (ours.norm_eps, ours.window)
    assert getattr(theirs, "norm_topk_prob", True) == ours.renormalize
    assert (theirs.tie_word_embeddings, theirs.hidden_act) == (ours.tied_embeddings, "silu")


@pytest.mark.parametrize("own", [tokenizer.ByteTokenizer(), tokenizer.build("char", "Ça va ?\n")])
def test_our_tokenizers_are_read_by_the_library(tmp_path: Path, own: tokenizer.Tokenizer) -> None:
    twins = of(make(), tmp_path / "theirs")
    huggingface.save(tmp_path / "saved", twins.params, twins.config, own)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "saved")
    ids = own.encode("Ça va ?\n\n Ça")
    assert theirs("Ça va ?\n\n Ça").input_ids == ids.tolist()
    assert theirs.decode(ids) == huggingface_tokenizer.load(tmp_path / "saved").decode(ids) == "Ça va ?\n\n Ça"
