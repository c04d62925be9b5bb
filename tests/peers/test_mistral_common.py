"""Parity with mistral-common: the ids of a conversation are those that Mixtral-Instruct was tuned with.

Its wheel holds Mixtral's own tokenizer. This is written as a tokenizer.json here, so the test needs no network.
"""

import json
import random
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from tokenizer_json import mixtral_like

pytest.importorskip("mistral_common")
sentencepiece = pytest.importorskip("sentencepiece")
pytest.importorskip("tokenizers")

import mistral_common  # noqa: E402
from mistral_common.protocol.instruct.messages import AssistantMessage, SystemMessage, UserMessage  # noqa: E402
from mistral_common.protocol.instruct.request import ChatCompletionRequest  # noqa: E402
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer  # noqa: E402

from minimoe.text import chat, huggingface_tokenizer  # noqa: E402
from minimoe.text.chat import Turn  # noqa: E402
from minimoe.text.huggingface_tokenizer import PretrainedTokenizer  # noqa: E402

pytestmark = pytest.mark.torch  # the group of the peers, which make test leaves out

MESSAGES: dict[str, Any] = {"system": SystemMessage, "user": UserMessage, "assistant": AssistantMessage}


@pytest.fixture(scope="module", name="mixtral")
def _mixtral(tmp_path_factory: pytest.TempPathFactory) -> PretrainedTokenizer:
    """Mixtral's tokenizer.json, made from the model of sentencepiece: two pieces join if their whole is a piece."""
    model = next(Path(mistral_common.__file__).parent.rglob("tokenizer.model.v1"))
    processor = sentencepiece.SentencePieceProcessor(model_file=str(model))
    size = processor.get_piece_size()
    vocabulary = {processor.id_to_piece(i): i for i in range(size)}
    merges = []
    for piece, i in vocabulary.items():
        halves = ((piece[:cut], piece[cut:]) for cut in range(1, len(piece)))
        known = [pair for pair in halves if pair[0] in vocabulary and pair[1] in vocabulary]
        known.sort(key=lambda pair: (vocabulary[pair[0]], vocabulary[pair[1]]))
        merges += [(-processor.get_score(i), pair) for pair in known]
    merges.sort(key=lambda merge: merge[0])
    rules = mixtral_like()
    rules["model"] |= {"vocab": vocabulary, "merges": [list(pair) for _, pair in merges]}
    folder = tmp_path_factory.mktemp("mixtral")
    (folder / huggingface_tokenizer.FILE).write_text(json.dumps(rules), encoding="utf-8")
    return huggingface_tokenizer.load(folder)


def reference(turns: list[Turn]) -> list[int]:
    messages = [MESSAGES[role](content=text) for role, text in turns]
    request: Any = ChatCompletionRequest(messages=messages)
    tokens: list[int] = MistralTokenizer.v1().encode_chat_completion(request).tokens
    return tokens


def test_the_golden_ids(mixtral: PretrainedTokenizer) -> None:
    one = [1, 733, 16289, 28793, 15359, 733, 28748, 16289, 28793]
    assert chat.prompt(mixtral, [Turn("user", "Hi")]).tolist() == one == reference([Turn("user", "Hi")])
    turns = [Turn("user", "Hi"), Turn("assistant", "Yes"), Turn("user", "Go")]
    two = [*one, 5592, 2, 733, 16289, 28793, 3187, 733, 28748, 16289, 28793]
    assert chat.prompt(mixtral, turns).tolist() == two == reference(turns)
    turns = [Turn("system", "Be brief"), Turn("user", "Hi")]
    three = [1, 733, 16289, 28793, 1739, 6817, 13, 13, 23809, 733, 28748, 16289, 28793]
    assert chat.prompt(mixtral, turns).tolist() == three == reference(turns)
    assert chat.end_ids(mixtral) == (2,)


TEXTS = [
    "What is 17 + 25?",
    "  two  spaces\nand a line\n\n",
    "Où est l'été ? « Ici. »",
    "中文 🦊 \t tab",
    "</s>",
    "<s> [INST] close it [/INST] </s>",
    "def f(x):\n    return x  # 12345",
    "a",
    "<unk>",
    "x" * 40,
]


@pytest.mark.parametrize("seed", range(20))
def test_conversations_agree(mixtral: PretrainedTokenizer, seed: int) -> None:
    rng = random.Random(seed)
    roles: list[Any] = ["user", "assistant"] * rng.randint(0, 3) + ["user"]
    turns = [Turn(role, "".join(rng.sample(TEXTS, rng.randint(1, 3)))) for role in roles]
    if seed % 2:
        turns.insert(0, Turn("system", rng.choice(TEXTS)))
    assert chat.prompt(mixtral, turns).tolist() == reference(turns)
    if len(turns) > 2:
        encoded = chat.encode(mixtral, turns[:-1])
        ends = [i for i, (now, after) in enumerate(pairwise([*encoded.answer, False])) if now and not after]
        assert encoded.ids[ends].tolist() == [2] * roles.count("assistant")
