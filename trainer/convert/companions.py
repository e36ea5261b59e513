"""The files that travel with a model's weights: its tokenizer, and how it is generated with."""

from __future__ import annotations

import shutil
from pathlib import Path

from .hf_config import CONFIG

TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "chat_template.json",
)
GENERATION = "generation_config.json"
COMPANIONS = (*TOKENIZER, GENERATION)


def keep_companions(kept: Path, folder: Path | None, tokenizer: Path) -> None:
    """Keep a run's tokenizer, and what its model came with, so that an export needs nothing else.

    Args:
        kept: The run's own folder for them; left alone where it exists.
        folder: Of the model that the run starts from, if any; its config.json is kept, too.
        tokenizer: The folder of the run's tokenizer; no file of another one is mixed in.
    """
    if kept.exists():
        return
    part = kept.with_name(f".{kept.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    if folder is not None:
        shutil.copyfile(folder / CONFIG, part / CONFIG)
    copy_companions(tokenizer, part)
    part.rename(kept)


def copy_companions(source: Path, target: Path) -> list[str]:
    """Copy what there is of them into an existing folder; the names of the copied files."""
    found = [name for name in COMPANIONS if (source / name).is_file()]
    for name in found:
        shutil.copyfile(source / name, target / name)
    return found
