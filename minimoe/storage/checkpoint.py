"""Runs on disk: written atomically, checked, resumable to the bit, readable by the safetensors library, without pickle.

    config.json           model, recipe, tokenizer and corpus; of a tuned run, also what it learns
    metrics.jsonl         one line per step: see ``metrics``
    model.safetensors     the parameters, named as in the code: blocks[2].moe.experts.w_up
    tokenizer.json        only if the model came from elsewhere: its own tokenizer
    resume.safetensors    parameters, optimiser, random state and position: all that a resumed run needs

Each name always holds a whole file (see ``core.files``), except that the last line of the metrics may be cut short. All
data that must be consistent are in one file, resume.safetensors, which is written last. If a crash comes before
resume.safetensors is written, the run continues from its previous version: the steps since then are taken again, and
the model is written again.

Every file has a checksum, and so has every line of the metrics, so damage is reported and never used. The two
safetensors files also record the settings, the characters and the text of their run, so files of two runs cannot be
mixed up.

A run that trains adapters has them in resume.safetensors, and their sum with the base in model.safetensors: see
``adapted``. A tuned run that may stop early keeps the parameters with the lowest validation loss in model.safetensors,
and the parameters of the last step in resume.safetensors.

The model of a run can be written to a folder of its own: with quantised weights (``save_quantized``), or after it was
changed (``save_changed``). Such a folder has neither metrics nor resume.safetensors, because it is not a run that can
be resumed. The config.json of a quantised model names the schemes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from minimoe.compression import quantize
from minimoe.compression.quantize import Plan
from minimoe.core import files, tree
from minimoe.core.arrays import Device, placeholder, to_device, to_host
from minimoe.core.config import ModelConfig, TrainConfig, from_dict
from minimoe.core.errors import UserError
from minimoe.core.files import Tensors
from minimoe.core.summary import brief
from minimoe.cost import parameters
from minimoe.layers import decoder
from minimoe.layers.decoder import Decoder
from minimoe.optim import optimizer
from minimoe.storage import adapted, metrics
from minimoe.text import batches, chat, huggingface_tokenizer, tokenizer
from minimoe.text.corpus import Corpus, Source
from minimoe.text.huggingface_tokenizer import PretrainedTokenizer
from minimoe.text.tokenizer import Tokenizer

CONFIG, MODEL, RESUME, LOCK = "config.json", "model.safetensors", "resume.safetensors", ".lock"
FILES = (CONFIG, metrics.FILE, MODEL, RESUME)
ADAPTERS = "adapters.safetensors"
"""What a run with adapters has learned in model.safetensors, where the adapters are merged: they are apart here."""
FORMAT = 2
KEYS = {"format", "model", "train", "tokenizer", "source"}
"""What config.json holds besides its checksum: ``model`` is a ``ModelConfig``, ``train`` a ``TrainConfig``."""

QUANTIZATION = "quantization"
"""The entry that only a quantised model has in its config.json: its ``Plan``."""

TUNING = "tuning"
"""The entry that only a tuned run has in its config.json: its ``Tuning``."""

STRANGERS = "the two do not belong to one run; restore the right file, or train again."

CHANGEABLE = ("steps", "evaluate_every", "save_every")
"""Settings that may change when a run is resumed; a change of any other setting would make it a different run."""


@brief
class Tuning(NamedTuple):
    """What a run learns other than the next token of its text: the values from which its task can be made again."""

    kind: str  # the module of ``minimoe/tuning/`` that made the task: "sft", …
    settings: dict[str, Any]  # plain values that JSON can write, for that module alone
    frozen: tuple[str, ...] = ()  # the names of the leaves that do not learn


@brief
class RunConfig(NamedTuple):
    """The contents of config.json."""

    config: ModelConfig
    recipe: TrainConfig
    tokenizer: Tokenizer | PretrainedTokenizer
    source: Source
    quantization: Plan | None = None
    tuning: Tuning | None = None  # None: it learns the next token of its text

    @property
    def frozen(self) -> tuple[str, ...]:
        """The names of the leaves that do not learn."""
        return () if self.tuning is None else self.tuning.frozen


@brief
class Model(NamedTuple):
    """A trained model, ready to evaluate or to generate."""

    params: Decoder
    config: ModelConfig
    tokenizer: Tokenizer | PretrainedTokenizer
    run: RunConfig
    step: int = 0  # how many steps it was trained for, which may be fewer than the run has taken since

    def to(self, device: Device) -> Model:
        """The same model on ``device``."""
        return self._replace(params=tree.map(lambda leaf: to_device(leaf, device), self.params))

    @property
    def end_tokens(self) -> tuple[int, ...]:
        """Ids that end a text: the id that ends an answer if the model was tuned to answer, none otherwise.

        A model that was not tuned has learned from texts without a token for their end.
        """
        return chat.end_ids(self.tokenizer) if chat.can_chat(self.tokenizer) else ()

    @property
    def on_gpu(self) -> bool:
        """Whether the parameters are on the GPU."""
        return not isinstance(self.params.norm.gain, np.ndarray)


@brief
class Progress(NamedTuple):
    """How far a run has come."""

    step: int
    seconds: float  # of training so far
    random_state: dict[str, Any]  # of the NumPy bit generator


# Runs


def save_config(folder: Path, run: RunConfig) -> None:
    """Writes config.json, with a checksum of its values."""
    values: dict[str, Any] = {
        "format": FORMAT,
        "model": dataclasses.asdict(run.config),
        "train": dataclasses.asdict(run.recipe),
        "tokenizer": _tokenizer_to_dict(run.tokenizer),
        "source": run.source._asdict(),
    }
    if run.quantization is not None:
        values[QUANTIZATION] = quantize.to_dict(run.quantization)
    if run.tuning is not None:
        values[TUNING] = _tuning_to_dict(run.tuning)
    if isinstance(run.tokenizer, PretrainedTokenizer):
        huggingface_tokenizer.write(folder, run.tokenizer)
    values["sha256"] = _checksum(values)
    written = json.dumps(values, indent=2, ensure_ascii=False) + "\n"
    # in Python, a path that is not UTF-8 contains surrogates, which JSON can only write as escapes
    files.write_atomically(folder / CONFIG, written.encode(errors="backslashreplace"))


def load_config(folder: str | Path) -> RunConfig:
    """Reads config.json; raises ``UserError`` if the folder is not a run, or if the file is damaged or invalid."""
    folder = files.user_path(folder)
    path = folder / CONFIG
    try:
        values = json.loads(files.read_text(path))
    except FileNotFoundError:
        raise UserError(
            f"{folder} is not a run: it has no {CONFIG}; give a folder that `minimoe train` wrote."
        ) from None
    except NotADirectoryError:
        raise UserError(f"{folder} is a file: give the folder of a run, perhaps {folder.parent}.") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error}): check the file.") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read as JSON ({error}): restore it, or train again.") from None
    if not isinstance(values, dict):
        raise UserError(f"{path} is not a run's config but a {type(values).__name__}: restore it, or train again.")
    if "format" not in values and "model_type" in values:
        raise UserError(
            f"{folder} is a Hugging Face model, which has no recipe and no text: give a folder that `minimoe train` "
            "wrote."
        )
    if (found := values.get("format")) != FORMAT:
        raise UserError(f"{path} has format {found!r:.40}, but this version reads {FORMAT}: use the one that wrote it.")
    if "sha256" in values and values.pop("sha256") != _checksum(values):
        raise UserError(
            f"{path} was damaged or edited, and does not match its checksum: restore it, or remove its sha256 to use "
            "it as it is."
        )
    quantised, tuned = values.pop(QUANTIZATION, None), values.pop(TUNING, None)
    for name in sorted(values.keys() ^ KEYS):
        raise UserError(
            f"{path} is not a run's config: {name!r:.40} is {'unknown' if name in values else 'missing'}; restore it, "
            "or train again."
        )
    try:
        source = Source(**values["source"])
        run = RunConfig(
            from_dict(ModelConfig, values["model"], str(path)),
            from_dict(TrainConfig, values["train"], str(path)),
            _tokenizer(values["tokenizer"], folder),
            Source(str(source.corpus), [str(file) for file in source.paths], str(source.sha256)),
            None if quantised is None else _plan(quantised, path),
            None if tuned is None else _tuning(tuned),
        )
        decoder.check(run.config)
    except (TypeError, AttributeError) as error:
        raise UserError(f"{path} is not a run's config ({error}): restore it, or train again.") from None
    pretrained = isinstance(run.tokenizer, PretrainedTokenizer)  # whose model may have rows that no text uses
    if run.config.vocab_size != run.tokenizer.vocab_size and not pretrained:
        raise UserError(
            f"{path} has vocab_size {run.config.vocab_size}, but its tokenizer has {run.tokenizer.vocab_size} tokens: "
            "restore it, or train again."
        )
    return run


def _plan(values: Any, path: Path) -> Plan:
    try:
        return quantize.from_dict(values)
    except UserError as error:
        raise UserError(f"{path} cannot be used: {error}") from None


def _tokenizer_to_dict(codec: Tokenizer | PretrainedTokenizer) -> dict[str, Any]:
    """What config.json says of a tokenizer: all of it, or the checksum of the tokenizer.json beside it."""
    if isinstance(codec, PretrainedTokenizer):
        rules = codec.files[huggingface_tokenizer.FILE]
        return {"kind": codec.kind, "sha256": hashlib.sha256(rules.encode()).hexdigest()}
    return codec.to_dict()


def _tokenizer(values: Any, folder: Path) -> Tokenizer | PretrainedTokenizer:
    """The tokenizer that ``_tokenizer_to_dict`` described."""
    if not (isinstance(values, dict) and values.get("kind") == PretrainedTokenizer.kind):
        return tokenizer.from_dict(values)
    found = huggingface_tokenizer.load(folder)
    if values != _tokenizer_to_dict(found):
        raise UserError(f"{folder / huggingface_tokenizer.FILE} is not the one that the run began with: restore it.")
    return found


def _tuning(values: Any) -> Tuning:
    """The ``Tuning`` that ``_tuning_to_dict`` described; ``TypeError`` if it is none."""
    kind, settings, frozen = Tuning(**values)
    if type(kind) is not str or type(settings) is not dict or not isinstance(frozen, list):
        raise TypeError(f"its tuning is {values!r:.60}")
    if not all(type(name) is str for name in frozen):
        raise TypeError(f"it freezes {frozen!r:.60}")
    return Tuning(kind, settings, tuple(frozen))


def _tuning_to_dict(tuning: Tuning) -> dict[str, Any]:
    return tuning._asdict() | {"frozen": list(tuning.frozen)}


def save(
    folder: Path,
    run: RunConfig,
    params: Decoder,
    state: optimizer.State,
    progress: Progress,
    model: bool = True,
) -> None:
    """Writes model.safetensors, then resume.safetensors; raises ``UserError`` if a file cannot be written.

    Without ``model``, only resume.safetensors is written: a run that keeps its best model writes model.safetensors with
    ``save_model``.
    """
    metrics.sync(folder)  # first, so that resume.safetensors is never ahead of the metrics on the disk
    everything = {name: to_host(leaf) for name, leaf in tree.named_leaves(params)}
    if model:
        save_model(folder, run, params, progress.step)
    for name, moments in state.items():
        for moment, values in zip(moments._fields, moments, strict=True):
            if values is not None:
                everything[f"optimizer.{name}.{moment}"] = to_host(values)
    metadata = {"settings": json.dumps(_settings(run)), "progress": json.dumps(progress._asdict())}
    files.write_tensors(folder / RESUME, everything, metadata)


def save_model(folder: Path, run: RunConfig, params: Decoder, step: int) -> None:
    """Writes model.safetensors: the parameters after ``step`` steps; raises ``UserError`` if it cannot be written."""
    metadata = {"settings": json.dumps(_settings(run)), "step": str(step)}
    tensors = {name: to_host(leaf) for name, leaf in tree.named_leaves(params)}
    if adapted.are_in(tensors):
        learned = {name: leaf for name, leaf in tensors.items() if name not in run.frozen}
        files.write_tensors(folder / ADAPTERS, learned, metadata)
        tensors = {name: to_host(leaf) for name, leaf in tree.named_leaves(adapted.merged(params))}
    files.write_tensors(folder / MODEL, tensors, metadata)


def save_quantized(folder: Path, model: Model, plan: Plan) -> None:
    """Writes the model into a new folder, with the parts that the plan names quantised; config.json is written last.

    Raises:
        UserError: the folder is not empty or cannot be written; the model is quantised already; or its weights are not
            float32 or not finite.
    """
    if model.run.quantization is not None:
        raise UserError(f"the model is {_named(model.run.quantization)} already: quantise the run that it came from.")
    tensors = quantize.compress(tree.map(to_host, model.params), plan)
    _write_model(folder, model._replace(run=model.run._replace(quantization=plan)), tensors)


def save_changed(folder: Path, model: Model) -> None:
    """Writes a model that was made from another one into a new folder; config.json is written last.

    Such a folder has neither metrics nor resume.safetensors: every command opens it, but it has no run to resume.

    Raises:
        UserError: the folder is not empty or cannot be written.
    """
    run = model.run._replace(config=model.config, quantization=None)
    tensors = {name: to_host(leaf) for name, leaf in tree.named_leaves(model.params)}
    _write_model(folder, model._replace(run=run), tensors)


def _write_model(folder: Path, model: Model, tensors: Tensors) -> None:
    files.new_folder(folder)
    metadata = {"settings": json.dumps(_settings(model.run)), "step": str(model.step)}
    files.write_tensors(folder / MODEL, tensors, metadata)
    save_config(folder, model.run)


def _named(plan: Plan) -> str:
    return f"quantised ({plan.experts} experts, {plan.attention} attention)"


def load_model(folder: str | Path) -> Model:
    """The trained model of a run, on the host; raises ``UserError`` if it is missing or damaged, or of another run.

    Quantised weights become float32 again, so such a model takes as much memory as before it was quantised.
    """
    folder = files.user_path(folder)
    run = load_config(folder)
    path = folder / MODEL
    if not path.exists():
        raise UserError(
            f"{folder} has no {MODEL} yet: the run has saved nothing so far; continue it with --resume {folder}."
        )
    tensors, metadata = files.read_tensors(path)
    if run.quantization is None:
        params = _fill(_blank(run, tensors, path), tensors, path)
        _refuse_surplus(tensors, path)
    else:
        params = quantize.restore(tensors, decoder.blank(run.config, placeholder), run.quantization, path)
    refuse_broken_state(params, path)
    _refuse_other_settings(metadata, run, path)
    step = metadata.get("step", "")
    if not (step.isdecimal() and step.isascii() and len(step) <= 10):
        raise UserError(f"{path} says that it has taken {step!r:.40} steps, expected a number: restore it.")
    return Model(params, run.config, run.tokenizer, run, int(step))


def describe(folder: str | Path) -> tuple[RunConfig, Path]:
    """A run and the file of its model, whose settings are compared but whose tensors are not read.

    Raises:
        UserError: as for ``load_model``, except for errors that only the tensors show.
    """
    folder = files.user_path(folder)
    run, path = load_config(folder), folder / MODEL
    if not path.exists():
        raise UserError(
            f"{folder} has no {MODEL} yet: the run has saved nothing so far; continue it with --resume {folder}."
        )
    _refuse_other_settings(files.read_metadata(path), run, path)
    return run, path


def load_progress(folder: Path, run: RunConfig) -> tuple[Decoder, optimizer.State, Progress] | None:
    """What a run needs to continue, or None if it has saved nothing yet; raises ``UserError`` like ``load_model``."""
    if run.quantization is not None:
        raise UserError(f"{folder} is {_named(run.quantization)} and cannot be trained: resume the run it came from.")
    path = folder / RESUME
    if not path.exists():
        if (folder / MODEL).exists() and (steps := files.read_tensors(folder / MODEL)[1].get("step", "0")) != "0":
            if not (folder / metrics.FILE).exists():
                raise UserError(
                    f"{folder} holds a model that was made from another one, and no run to resume: begin a new run "
                    f"with its weights, `minimoe train --from {folder}`."
                )
            raise UserError(
                f"{path} is missing, although {MODEL} has taken {steps} steps: restore it to continue, or start a new "
                "run with another --out."
            )
        return None
    tensors, metadata = files.read_tensors(path)
    params = _fill(_blank(run, tensors, path), tensors, path)
    refuse_broken_state(params, path)
    state = optimizer.init(params, run.recipe, run.frozen)
    for name, moments in state.items():
        state[name] = _fill(moments, tensors, path, f"optimizer.{name}.")
    _refuse_surplus(tensors, path)
    _refuse_other_settings(metadata, run, path)
    try:
        progress = Progress(**json.loads(metadata["progress"]))
        np.random.default_rng().bit_generator.state = progress.random_state
        if not (type(progress.step) is int and progress.step >= 0 and 0 <= progress.seconds < math.inf):
            raise ValueError(f"step {progress.step!r} after {progress.seconds!r} seconds")
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError, RecursionError) as error:
        raise UserError(
            f"{path} does not say how far the run has come ({error!r}): restore it, or train again."
        ) from None
    return params, state, progress


def with_adapters(folder: Path, run: RunConfig, params: Decoder) -> Decoder:
    """``params`` of a run's last checkpoint, with what its model had learned: that may be an earlier one.

    Raises:
        UserError: a file is missing, damaged, or of another run or step than model.safetensors.
    """
    path = folder / ADAPTERS
    if not path.exists():
        raise UserError(f"{path} is missing: restore it, or tune again.")
    tensors, metadata = files.read_tensors(path)
    _refuse_other_settings(metadata, run, path)
    steps = [metadata.get("step"), files.read_metadata(folder / MODEL).get("step")]
    if steps[0] != steps[1]:
        raise UserError(
            f"{path} is that of step {steps[0]!s:.20}, but {MODEL} that of step {steps[1]!s:.20}, because the run was "
            f"stopped while it saved them: continue it with --resume {folder}."
        )
    tensors |= {name: leaf for name, leaf in tree.named_leaves(params) if name in run.frozen}
    params = _fill(params, tensors, path)
    _refuse_surplus(tensors, path)
    refuse_broken_state(params, path)
    return params


def with_moved_text(folder: str | Path, run: RunConfig, corpus: Corpus) -> RunConfig | None:
    """The run with the new place of its text, if ``corpus`` is that text and is no longer where the run says.

    The run remembers the place, unless its folder cannot be written or another process is training in it.
    """
    if not batches.has_moved(run.source, run.tokenizer, run.config.context, corpus):
        return None
    run = run._replace(source=batches.where_now(run.source, corpus))
    with contextlib.suppress(UserError), locked(files.user_path(folder)):
        save_config(files.user_path(folder), run)
    return run


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Locks the folder for one training run. A lock ends with its process. ``UserError`` if another run has it."""
    try:
        import fcntl
    except ImportError:  # on Windows, where nothing prevents a second run in the same folder
        yield
        return
    try:
        file = files.open_regular(folder / LOCK, "ab")
    except OSError as error:
        refused = folder if error.errno in (errno.EROFS, errno.EACCES) else folder / LOCK
        raise files.unwritable(refused, error) from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"another training run is writing to {folder}: wait for it, or choose another --out."
            ) from None
        except OSError:  # the file system has no locks
            pass
        yield


# Which files belong together


def _checksum(values: dict[str, Any]) -> str:
    """SHA-256 of the values of config.json; the layout of the file does not change it."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _settings(run: RunConfig) -> dict[str, Any]:
    """The settings that identify a run, by name."""
    settings = dataclasses.asdict(run.config) | dataclasses.asdict(run.recipe)
    settings |= {"tokenizer": _tokenizer_to_dict(run.tokenizer), "text": run.source.sha256}
    if run.quantization is not None:
        settings[QUANTIZATION] = quantize.to_dict(run.quantization)
    if run.tuning is not None:
        settings[TUNING] = _tuning_to_dict(run.tuning)
    return {name: value for name, value in settings.items() if name not in CHANGEABLE}


def _defaults() -> dict[str, Any]:
    """The default of every setting of a model and a recipe, by name."""
    settings = {field.name: field.default for kind in (ModelConfig, TrainConfig) for field in dataclasses.fields(kind)}
    return settings | {TUNING: None}


def _refuse_other_settings(metadata: dict[str, str], run: RunConfig, path: Path) -> None:
    mine = {TUNING: None} | _settings(run)
    try:
        # The width was always a setting. One that did not exist when the file was written has its default, as in
        # ``from_dict``.
        told = json.loads(metadata["settings"])
        made_with = _defaults() | told | {"width": told["width"]}
        other = next((name for name in mine if made_with[name] != mine[name]), None)
    except (KeyError, TypeError, ValueError, RecursionError):
        raise UserError(f"{path} does not say with which settings it was made: restore it, or train again.") from None
    if other is not None:
        raise UserError(
            f"{path} was made with another {other} than {CONFIG} says ({made_with[other]!r:.30}, not "
            f"{mine[other]!r:.30}): {STRANGERS}"
        )


# Tensors to parameters


def _blank(run: RunConfig, tensors: Tensors, path: Path) -> Decoder:
    """A decoder in the shapes of config.json, without memory; ``UserError`` if it has more numbers than ``tensors``.

    If the tensors have adapters, the decoder has adapters too. There may be fewer numbers in ``tensors`` then, because
    bases may be quantised.
    """
    if run.tuning is not None and adapted.are_in(tensors):
        return adapted.blank(decoder.blank(run.config, lambda shape: placeholder(shape, run.recipe.dtype)), tensors)
    counts = parameters.count(run.config)
    asked, held = counts.total + counts.noise, sum(values.size for values in tensors.values())
    if asked > held:
        raise UserError(f"{path} holds {held:,} numbers, but {CONFIG} asks for a model of {asked:,}: {STRANGERS}")
    return decoder.blank(run.config, lambda shape: placeholder(shape, run.recipe.dtype))


def _fill(blank: Any, tensors: Tensors, path: Path, prefix: str = "") -> Any:
    """``blank`` with each leaf replaced by the tensor of its name, which is removed from ``tensors``."""
    filled = []
    for name, leaf in tree.named_leaves(blank):
        if prefix + name not in tensors:
            raise UserError(f"{path} lacks the tensor {prefix + name}: it does not belong to this {CONFIG}.")
        values = tensors.pop(prefix + name)
        if values.shape != leaf.shape or values.dtype != leaf.dtype:
            raise UserError(
                f"{path} holds {prefix + name} as {values.dtype} {values.shape}, but {CONFIG} asks for "
                f"{leaf.dtype} {leaf.shape}: {STRANGERS}"
            )
        filled.append(values)
    return tree.rebuild(blank, filled)


def refuse_broken_state(params: Decoder, path: Path) -> None:
    """Raises ``UserError`` if the state of a router is not finite, or is negative where that is not allowed.

    A NaN in a weight makes the loss NaN, but one in this state need not. If a threshold is NaN, for example, no token
    reaches the threshold, and the layer is silently left out.
    """
    named = dict(tree.named_leaves(params))
    not_negative = set(tree.marked(params, "not_negative"))
    for name in tree.marked(params, "state"):
        lowest = 0.0 if name in not_negative else -np.inf
        for value in named[name].tolist():
            if not (math.isfinite(value) and value >= lowest):
                raise UserError(
                    f"{path} holds {name} with {value}, expected finite numbers{', none below 0' * (lowest == 0)}: "
                    "the model has diverged or is damaged, so restore the file, or train again."
                )


def _refuse_surplus(tensors: Tensors, path: Path) -> None:
    if tensors:
        raise UserError(f"{path} holds the tensor {min(tensors)}, which {CONFIG} does not know: {STRANGERS}")
