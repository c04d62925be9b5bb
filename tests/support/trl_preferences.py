"""What trl makes of pairs of answers: its losses, which the peers tests and the maker of the golden file differentiate.

Import it where trl is installed; ``preference_shards`` holds the same pairs for minimoe and needs nothing but NumPy.
"""

import importlib
import tempfile
from types import SimpleNamespace
from typing import Any, NamedTuple

from preference_shards import Case, examples


class Theirs(NamedTuple):
    loss: Any  # (), with a gradient
    batch: dict[str, Any]  # what trl's collator makes of the examples


def loss_of(case: Case, model: Any, reference: Any) -> Theirs:
    """trl's loss of the examples, with the auxiliary loss of the library's Mixtral if the case has a coefficient."""
    trainer = trainer_of(case, model, reference)
    batch = trainer.data_collator(examples(case))
    if case.trl == "simpo":
        return Theirs(_simpo(case, model, batch), batch)
    return Theirs(trainer.compute_loss(model.eval(), batch), batch)


def trainer_of(case: Case, model: Any, reference: Any) -> Any:
    """A DPO trainer with the settings of the case; its data are never read."""
    datasets, trl = importlib.import_module("datasets"), importlib.import_module("trl")
    args = trl.DPOConfig(
        output_dir=tempfile.gettempdir(),
        use_cpu=True,
        bf16=False,
        report_to=[],
        disable_tqdm=True,
        gradient_checkpointing=False,
        beta=case.loss.beta,
        loss_type="sigmoid" if case.trl == "simpo" else case.trl,
        label_smoothing=case.loss.label_smoothing,
        router_aux_loss_coef=case.auxiliary,
    )
    datasets.disable_progress_bars()
    data = datasets.Dataset.from_list([{"prompt": "w3 w4", "chosen": "w5 w6", "rejected": "w7"}])
    return trl.DPOTrainer(model, reference, args=args, train_dataset=data, processing_class=_words())


def _words() -> Any:
    """A tokenizer, without which there is no trainer; the batches are made of ids."""
    tokenizers, transformers = importlib.import_module("tokenizers"), importlib.import_module("transformers")
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({f"w{i}": i for i in range(13)}, unk_token="w0"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", eos_token="w1", unk_token="w2")


def _simpo(case: Case, model: Any, batch: dict[str, Any]) -> Any:
    """SimPO is a loss of trl's CPO trainer: its log-probabilities, and its loss of them."""
    kind = importlib.import_module("trl.experimental.cpo").CPOTrainer
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
    logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    logp = kind.get_batch_logps(logits, labels, average_log_prob=True)
    settings = SimpleNamespace(
        loss_type="simpo",
        beta=case.loss.beta,
        label_smoothing=case.loss.label_smoothing,
        simpo_gamma=case.loss.margin,
        alpha=0.0,
        accelerator=SimpleNamespace(device=logp.device),
    )
    return kind.cpo_loss(settings, *logp.chunk(2))[0].mean()
