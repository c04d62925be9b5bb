"""A small model with tokens for a chat, untrained: it answers nonsense, but by the rules."""

import dataclasses
from pathlib import Path

import numpy as np
from small_runs import finished

from minimoe.core.config import ModelConfig
from minimoe.layers import decoder
from minimoe.optim import optimizer
from minimoe.storage import checkpoint
from minimoe.storage.checkpoint import Model, Progress
from minimoe.text.tokenizer import Tokenizer, build, with_chat_tokens

LETTERS = build("char", "\n +.?abcdefghijklmnopqrstuvwxyz0123456789àé")


def tuned(context: int = 48, tokenizer: Tokenizer = LETTERS, seed: int = 0, base: Path | None = None) -> Model:
    """A model that was never trained, with the tokens of a chat after those of ``tokenizer``, on the text of a run."""
    run = checkpoint.load_config(base or finished())
    codec = with_chat_tokens(tokenizer)
    config: ModelConfig = dataclasses.replace(run.config, vocab_size=codec.vocab_size, context=context)
    params = decoder.init(np.random.default_rng(seed), config, np.float32)
    return Model(params, config, codec, run._replace(config=config, tokenizer=codec))


def save(folder: Path, model: Model) -> Path:
    """The run folder of such a model."""
    folder.mkdir()
    checkpoint.save_config(folder, model.run)
    state = optimizer.init(model.params, model.run.recipe)
    random_state = np.random.default_rng(0).bit_generator.state
    checkpoint.save(folder, model.run, model.params, state, Progress(model.step, 0.0, random_state))
    return folder
