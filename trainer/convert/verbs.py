"""`longspan import` and `longspan export`: what they do, and the lines that they print."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import cast

from ...errors import ConversionError
from ..observe.tracked_export import track_export
from .convert import import_checkpoint
from .export import export
from .hf_config import DTYPES, Dtype, HfModel
from .parity import report
from .stored_weights import StoredWeights
from .verify import TOLERANCE, require_transformers, verify
from .weights import FolderWeights


@dataclass(frozen=True)
class Report:
    """Lines for the terminal, and whether a comparison that was asked for held."""

    lines: tuple[str, ...]
    equal: bool = True


def import_model(
    hf_dir: Path, out: Path, *, dtype: str | None, verify: bool, text: Path | None
) -> Report:
    """Import a Hugging Face folder and, if asked, compare transformers on it with our `out`."""
    words = _text(verify, text)
    hf_dir, out = hf_dir.expanduser(), out.expanduser()
    hf = import_checkpoint(hf_dir, out, dtype=_dtype(dtype))
    lines = [
        f"imported {hf_dir} into {out}",
        *_about(hf),
        "start a run from it with:",
        f"  model: {{from: hf:{out}}}",
    ]
    if not verify:
        return Report(tuple(lines))
    return _compared(lines, hf, FolderWeights(out), hf_dir, words)


def export_model(
    what: Path, out: Path, *, dtype: str | None, verify: bool, text: Path | None
) -> Report:
    """Export a run and, if asked, compare transformers on `out` with our checkpoint."""
    words = _text(verify, text)
    what, out = what.expanduser(), out.expanduser()
    done = export(what, out, dtype=_dtype(dtype))
    lines = [
        f"exported {done.checkpoint.folder} of {what} to {out}",
        *_about(done.model),
        f"with: {', '.join(('README.md', *done.companions))}",
        *([done.attention] if done.attention else []),
        *track_export(done.run, out, done.checkpoint.folder),
    ]
    if not verify:
        return Report(tuple(lines))
    return _compared(lines, done.model, StoredWeights(done.checkpoint), out, words)


def _compared(
    lines: list[str],
    hf: HfModel,
    weights: FolderWeights | StoredWeights,
    folder: Path,
    words: str | None,
) -> Report:
    parity = verify(hf, weights, folder, words)
    return Report((*lines, *report(parity, TOLERANCE)), parity.holds(TOLERANCE))


def _about(hf: HfModel) -> list[str]:
    model = hf.model
    return [
        f"{hf.family.name}: {model.layers} layers, hidden {model.hidden}, heads {model.heads} "
        f"({model.kv_heads} key-value), vocabulary {hf.vocab:,}, {hf.dtype}",
        f"RoPE: {hf.rope.words}; up to {hf.max_length:,} tokens",
    ]


def _dtype(name: str | None) -> Dtype | None:
    if name is None or name in DTYPES.values():
        return cast(Dtype | None, name)
    raise ConversionError(f"--dtype: got {name}", f"one of {', '.join(DTYPES.values())}")


def _text(verify: bool, path: Path | None) -> str | None:
    """What is compared; whatever a comparison lacks is said before anything is converted."""
    if verify:
        require_transformers()
    if path is None:
        return None
    if not verify:
        raise ConversionError("--text has no effect without --verify", "add --verify")
    try:
        words = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        what = f"--text: {path} cannot be read: {error}"
        raise ConversionError(what, "give a text file") from None
    if not words.strip():
        raise ConversionError(f"--text: {path} is empty", "give a text of some hundred words")
    return words
