"""The tokenizer: a Hugging Face fast tokenizer that is given, or one learned from the text.

It needs the ``tokenizers`` library alone. Slow (pure Python) tokenizers are refused: they turn
hours of tokenizing into days. What becomes of the token ids is not decided here.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.errors import TrainerError
from trainer.files import write_json

END_OF_TEXT = "<|endoftext|>"
FILES = (
    # Everything that a tokenizer directory may hold; the weights beside them are not copied.
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
)


@dataclass(frozen=True)
class FastTokenizer:
    """A loaded tokenizer.

    vocab_size: number of ids, added tokens included; every id is below it.
    eos_id: the id that ends a document.
    """

    engine: Any
    vocab_size: int
    eos_id: int

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Token ids of each text, without any special token, not even for text that spells one."""
        found = self.engine.encode_batch_fast(texts, add_special_tokens=False)
        return [encoding.ids for encoding in found]


def load(directory: Path) -> FastTokenizer:
    """Open a tokenizer directory. Raises TrainerError with a sentence that says what it lacks."""
    import tokenizers

    path = directory / "tokenizer.json"
    if not path.is_file():
        raise TrainerError(
            f"{directory} has no tokenizer.json: give a fast tokenizer "
            "(AutoTokenizer.from_pretrained(...).save_pretrained writes one)"
        )
    try:
        engine = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises a bare Exception
        raise TrainerError(f"{path} is no tokenizer: {error}") from None
    # A text that happens to spell a special token is text, or any document could end another.
    engine.encode_special_tokens = True
    engine.no_truncation()
    engine.no_padding()
    name = _end_of_text(directory)
    eos_id = engine.token_to_id(name) if name else None
    if eos_id is None:
        raise TrainerError(
            f"{directory} names no eos_token that its vocabulary has: "
            "set eos_token in its tokenizer_config.json"
        )
    highest = max(engine.get_vocab(with_added_tokens=True).values())
    return FastTokenizer(engine=engine, vocab_size=highest + 1, eos_id=eos_id)


def learn(texts: Iterable[str], vocab_size: int, directory: Path) -> None:
    """Learn a byte-level BPE vocabulary and save it as a Hugging Face tokenizer directory.

    Byte level means that any text, Chinese included, has ids and nothing is ever unknown.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    engine = Tokenizer(models.BPE())
    engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    engine.decoder = decoders.ByteLevel()
    settings = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    engine.train_from_iterator(texts, settings)
    directory.mkdir(parents=True, exist_ok=True)
    engine.save(str(directory / "tokenizer.json"))
    write_json(
        directory / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": END_OF_TEXT,
            "add_prefix_space": False,
            "clean_up_tokenization_spaces": False,
        },
    )
    write_json(directory / "special_tokens_map.json", {"eos_token": END_OF_TEXT})


def copy(source: Path, target: Path) -> None:
    """Copy a tokenizer's files, and nothing else of that directory."""
    target.mkdir(parents=True, exist_ok=True)
    for name in FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


@contextmanager
def all_cores() -> Iterator[None]:
    """Let the tokenizer use every core, whatever the launcher set.

    Launchers switch its threads off because a later fork would deadlock; this process forks
    nothing afterwards.
    """
    name = "TOKENIZERS_PARALLELISM"
    before = os.environ.get(name)
    os.environ[name] = "true"
    try:
        yield
    finally:
        os.environ[name] = before if before is not None else "false"


def _end_of_text(directory: Path) -> str | None:
    """The eos token's text, from whichever of the two customary files names it."""
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        try:
            content = json.loads((directory / name).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        token = content.get("eos_token") if isinstance(content, dict) else None
        if isinstance(token, dict):
            token = token.get("content")
        if isinstance(token, str) and token:
            return token
    return None
