"""Byte-pair tokenizers: trained on a run's own documents, or a Hugging Face one on local disk."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from ...errors import DataError

END_OF_TEXT = "<|endoftext|>"
_MODEL = "tokenizer.json"
_CONFIG = "tokenizer_config.json"
_SPECIAL = "special_tokens_map.json"
# End-of-text tokens of well-known families, for folders that do not name theirs.
_KNOWN_ENDS = (END_OF_TEXT, "<|end_of_text|>", "<|end\u2581of\u2581sentence|>", "</s>", "<eos>")
PART_CHARACTERS = 2**20
"""Longer texts are encoded in parts: the tokenizers library takes over 100 bytes a character."""

_BATCH_CHARACTERS = 2**21
# Before the space between two letters, or between two lines that abut: byte-level and
# SentencePiece pre-tokenizers alike always end a word there.
_SEAM = re.compile(r"[^\W\d_](?= [^\W\d_])|\S\n(?=\S)")
_SEAM_CHARACTERS = 2**16
_FIX_END = f'name it in {_CONFIG}, such as {{"eos_token": "{END_OF_TEXT}"}}'


class TextTokenizer:
    """Text to token ids, without any special tokens.

    Args:
        files: The files of a Hugging Face tokenizer by name, `tokenizer.json` at least.
        origin: Where they come from, for messages.

    Attributes:
        vocab: Token ids are below this.
        eod: The id that ends a document.
        key: Changes when the files do.

    Raises:
        DataError: The files are no tokenizer, or have no end-of-text token.
    """

    def __init__(self, files: dict[str, bytes], origin: str) -> None:
        self._files = files
        try:
            self._tokenizer = tokenizers.Tokenizer.from_buffer(files[_MODEL])
        except Exception as error:  # the tokenizers library raises nothing more specific
            what = f"{origin} is not a tokenizer that the tokenizers library can read: {error}"
            raise DataError(what, f"save it again with `save_pretrained`, as {_MODEL}") from error
        ids = self._tokenizer.get_vocab(with_added_tokens=True)
        if len(ids) < 2:
            what = f"the vocabulary of {origin} has {len(ids)} tokens"
            raise DataError(what, "use a complete tokenizer: training needs at least 2 tokens")
        self.vocab = max(ids.values()) + 1
        self.eod = self._end_of_text(ids, origin)
        # Text that spells a special token stays text: a document must not end itself.
        self._tokenizer.encode_special_tokens = True
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        key = hashlib.blake2b(digest_size=16)
        for name in sorted(files):
            key.update(f"{name} {len(files[name])} ".encode() + files[name])
        self.key = key.hexdigest()

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Token ids of each text, int64, in parallel over texts."""
        parts = [(index, part) for index, text in enumerate(texts) for part in _parts(text)]
        found: list[list[np.ndarray]] = [[] for _ in texts]
        for batch in _batches(parts):
            encoded = self._tokenizer.encode_batch_fast(
                [part for _, part in batch], add_special_tokens=False
            )
            for (index, _), encoding in zip(batch, encoded, strict=True):
                found[index].append(np.array(encoding.ids, np.int64))
        return [ids[0] if len(ids) == 1 else np.concatenate(ids) for ids in found]

    def decode(self, tokens: np.ndarray) -> str:
        """The text of some tokens, special ones included."""
        return self._tokenizer.decode(tokens.tolist(), skip_special_tokens=False)

    def save(self, folder: Path) -> None:
        """Write the files into `folder`, as Hugging Face libraries load them."""
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in self._files.items():
            (folder / name).write_bytes(content)

    @classmethod
    def load(cls, path: Path) -> TextTokenizer:
        """A tokenizer from a folder or from its `tokenizer.json`.

        Raises:
            DataError: There is none, or it cannot be used.
        """
        model = path / _MODEL if path.is_dir() else path
        fix = f"set `path` to a local folder that holds {_MODEL}, or to that file"
        if not model.is_file():
            raise DataError(f"no tokenizer at {model}", fix)
        try:
            others = (model.parent / name for name in (_CONFIG, _SPECIAL))
            files = {other.name: other.read_bytes() for other in others if other.is_file()}
            files[_MODEL] = model.read_bytes()
        except OSError as error:
            raise DataError(f"cannot read the tokenizer {path}: {error.strerror}", fix) from error
        return cls(files, str(path))

    def _end_of_text(self, ids: dict[str, int], origin: str) -> int:
        for name in (_CONFIG, _SPECIAL):
            token = _named_end(self._files.get(name), f"{name} of {origin}")
            if token is not None:
                if token not in ids:
                    what = f"{name} of {origin} names {token!r}, which the vocabulary lacks"
                    raise DataError(what, _FIX_END)
                return ids[token]
        for token in _KNOWN_ENDS:
            if token in ids:
                return ids[token]
        raise DataError(f"{origin} has no end-of-text token", _FIX_END)


def train_tokenizer(texts: Iterable[str], vocab: int) -> TextTokenizer:
    """A byte-level BPE of at most `vocab` tokens; the same texts always give the same one.

    Args:
        texts: Training documents; read once.
        vocab: Vocabulary size, the 256 bytes and the end-of-text token included.
    """
    from tokenizers import decoders, models, pre_tokenizers, trainers

    model = tokenizers.Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    model.train_from_iterator((part for text in texts for part in _parts(text)), trainer)
    config = {"eos_token": END_OF_TEXT, "tokenizer_class": "PreTrainedTokenizerFast"}
    files = {_MODEL: model.to_str().encode(), _CONFIG: json.dumps(config, indent=2).encode()}
    return TextTokenizer(files, "the tokenizer trained on this run's documents")


def _parts(text: str) -> list[str]:
    """The text in parts of at most `PART_CHARACTERS`, which encode as the whole would.

    Only a text without any seam in the last `_SEAM_CHARACTERS` of a part is cut anywhere.
    """
    parts, start = [], 0
    while len(text) - start > PART_CHARACTERS:
        limit = start + PART_CHARACTERS
        seams = _SEAM.finditer(text, max(start, limit - _SEAM_CHARACTERS), limit)
        cut = max((seam.end() for seam in seams), default=limit)
        parts.append(text[start:cut])
        start = cut
    return [*parts, text[start:]]


def _batches(parts: Sequence[tuple[int, str]]) -> Iterator[Sequence[tuple[int, str]]]:
    """The parts in runs of about `_BATCH_CHARACTERS`, which bounds the memory."""
    start = characters = 0
    for end, (_, part) in enumerate(parts, 1):
        characters += len(part)
        if characters >= _BATCH_CHARACTERS:
            yield parts[start:end]
            start, characters = end, 0
    if start < len(parts):
        yield parts[start:]


def _named_end(content: bytes | None, origin: str) -> str | None:
    """The `eos_token` of a Hugging Face JSON file: a string, or an object with its content."""
    if content is None:
        return None
    try:
        settings: Any = json.loads(content)
    except ValueError as error:
        raise DataError(f"{origin} is not valid JSON: {error}", "mend or remove it") from error
    token = settings.get("eos_token") if isinstance(settings, dict) else None
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) else None
