"""The weights of a Hugging Face folder: checked against its config.json, and read into a model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ...errors import ConversionError
from ..settings import ModelSettings
from .hf_config import CONFIG, HfModel, read_config
from .names import EMBEDDING, HEAD, Assembly, Rows, assemblies
from .safetensors_folder import SafetensorsFolder, is_plain, some

if TYPE_CHECKING:
    from ..engine.model import LongModel

_HARMLESS_TAIL = ".rotary_emb.inv_freq"


class FolderWeights:
    """The weights of a model in a folder. Call it with a rank's model to fill its parameters.

    Args:
        path: A Hugging Face folder, or one that `import_checkpoint` made.

    Attributes:
        hf: What config.json says.
        assemblies: What each of our parameters is made of.

    Raises:
        ConversionError: Whatever can be told from config.json and the files' headers: tensors that
            are missing, too many, or of another shape than config.json says, all at once.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.hf: HfModel = read_config(path)
        self.assemblies = assemblies(self.hf.model, self.hf.vocab)
        self._folder = SafetensorsFolder(path)
        self._check()

    def __call__(self, model: LongModel) -> None:
        """Fill the parameters of a rank's part of a model, of any layout, a block at a time.

        What the stage's attention adds to the model is not in the folder, and left alone.

        Raises:
            ConversionError: The model is another one, or the folder cannot be read.
        """
        from ..engine.partition import global_names, is_added, place_of

        self.check_model(model.settings, model.real_vocab)
        group = model.pg_collection.tp
        with torch.no_grad():
            for name, parameter in global_names(model):
                if is_added(name):
                    continue
                place = place_of(parameter, name, group.rank(), group.size())
                top = 0
                for first, last in place.rows:
                    self._fill(parameter[top : top + last - first], name, first, place.columns)
                    top += last - first

    def check_model(self, model: ModelSettings, vocab: int) -> None:
        """Refuse settings that are not those of the weights.

        Raises:
            ConversionError: With every setting that differs.
        """
        here, there = _shape_of(model), _shape_of(self.hf.model)
        wrong = [
            f"model.{name} is {here[name]!r}, the weights have {value!r}"
            for name, value in there.items()
            if here[name] != value
        ]
        if vocab != self.hf.vocab:
            wrong.append(f"the vocabulary has {vocab} tokens, the weights have {self.hf.vocab}")
        if wrong:
            what = "\n  ".join([f"the model is not the one in {self.path}:", *wrong])
            raise ConversionError(what, "take these settings from the weights")

    def blocks(self, name: str) -> Iterator[torch.Tensor]:
        """A Hugging Face tensor in blocks of rows, as it is stored.

        Raises:
            ConversionError: A tied output layer that is not the embedding.
        """
        rows = self._folder.headers[name].shape[0]
        for block, _row in self._blocks(Rows(name, 0, rows), None):
            yield block

    def dtypes(self) -> set[str]:
        """The dtypes of the model's tensors as safetensors calls them, such as BF16."""
        names = (name for assembly in self.assemblies.values() for name in assembly.shapes())
        return {self._folder.headers[name].dtype for name in names}

    def _fill(
        self, part: torch.Tensor, name: str, first: int, columns: tuple[int, int] | None
    ) -> None:
        """Our rows from `first` on; rows beyond the assembly's are padding."""
        assembly = self.assemblies[name]
        whole = columns is None or columns == (0, assembly.columns)
        for at, rows in assembly.within(first, first + len(part)):
            for block, row in self._blocks(rows, None if whole else columns):
                part[at + row : at + row + len(block)].copy_(block)
        part[max(0, assembly.rows - first) :].zero_()

    def _blocks(
        self, rows: Rows, columns: tuple[int, int] | None
    ) -> Iterator[tuple[torch.Tensor, int]]:
        """Blocks with their first row, counted from the first of `rows`."""
        twin = None
        if (
            rows.name == EMBEDDING
            and HEAD in self._folder.headers
            and self.hf.model.tied_embeddings
        ):
            twin = self._folder.read(HEAD, rows.first, rows.count, columns)
        done = 0
        for block in self._folder.read(rows.name, rows.first, rows.count, columns):
            if twin is not None and not torch.equal(next(twin), block):
                raise ConversionError(
                    f"{self.path / CONFIG} says tie_word_embeddings (or leaves it to the default "
                    f"of {self.hf.family.name}), but {HEAD} is not {EMBEDDING}",
                    f'set "tie_word_embeddings": false there, or remove {HEAD}',
                )
            yield block, done
            done += len(block)

    def _check(self) -> None:
        headers = self._folder.headers
        expected: dict[str, tuple[int, ...]] = {}
        for assembly in self.assemblies.values():
            expected |= assembly.shapes()
        missing = [name for name in expected if name not in headers]
        surplus = [n for n in headers if n not in expected and not self._harmless(n, expected)]
        wrong = [
            f"{name} has shape {list(headers[name].shape)}, expected {list(shape)}"
            for name, shape in expected.items()
            if name in headers and headers[name].shape != shape
        ]
        odd = [
            f"{n} is {headers[n].dtype}"
            for n in expected
            if n in headers and not is_plain(headers[n])
        ]
        said = {
            "tensors are missing": missing,
            "tensors have no place in this model": surplus,
            "tensors contradict config.json": wrong,
            "tensors are neither BF16, F16 nor F32": odd,
        }
        found = [f"{len(them)} {what}: {some(them)}" for what, them in said.items() if them]
        if not found:
            return
        fix = f"make sure that {CONFIG} and the weights are of one {self.hf.family.name} model"
        if missing == [HEAD]:
            fix = f'set "tie_word_embeddings": true in {CONFIG} if the model has no output layer'
        what = "\n  ".join([f"the weights in {self.path} are not what {CONFIG} says:", *found])
        raise ConversionError(what, fix)

    def _harmless(self, name: str, expected: dict[str, tuple[int, ...]]) -> bool:
        """Tables that are computed anyway, and a second copy of tied embeddings."""
        if name == HEAD and self.hf.model.tied_embeddings:
            return self._folder.headers[name].shape == expected[EMBEDDING]
        return name.endswith(_HARMLESS_TAIL)


def _shape_of(model: ModelSettings) -> dict[str, Any]:
    """The settings that decide what a model with given weights computes, all of them explicit."""
    values = model.model_dump(exclude={"weights", "vocab", "init", "init_std", "moe"})
    values |= {"query_groups": model.kv_heads, "head_dim": model.head_width}
    return values | {"moe": model.moe and model.moe.model_dump(exclude={"aux_loss"})}


def split(full: torch.Tensor, assembly: Assembly) -> Iterator[tuple[str, torch.Tensor]]:
    """The Hugging Face tensors in a whole parameter of ours, padding cut off."""
    for name in assembly.shapes():
        top, parts = 0, []
        for piece in assembly.pieces:
            if piece.name == name:
                parts.append(full[top : top + piece.count])
            top += piece.count
        yield name, parts[0] if len(parts) == 1 else torch.cat(parts)
