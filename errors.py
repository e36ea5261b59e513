"""Errors that a user can act on: they are printed as a message with a fix, never as a traceback."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from .redact import HIDDEN, is_secret_name, redact_text


class LongspanError(Exception):
    """A problem that the user can mend. `str(error)` is the whole message, fix included.

    Args:
        what: What went wrong and where, as one or more sentences.
        fix: What to do about it; printed on its own line.
    """

    exit_code = 2

    def __init__(self, what: str, fix: str = "") -> None:
        self.what = what
        self.fix = fix
        super().__init__(what + (f"\n  fix: {fix}" if fix else ""))


class DataError(LongspanError):
    """A source, tokenizer or corpus that cannot be read or is empty."""


class CheckpointError(LongspanError):
    """A checkpoint that cannot be written, found or read."""


class ConversionError(LongspanError):
    """A Hugging Face checkpoint that cannot be read, or a model that cannot be written as one."""


class RunError(LongspanError):
    """A run directory, launch or training step that cannot go on."""


class ClusterError(LongspanError):
    """A cluster that cannot be reached or used, or a run that it cannot take."""


@dataclass(frozen=True)
class Problem:
    """One mistake in a recipe: its dotted path, the value there, what is expected, the fix."""

    path: str
    value: str
    expected: str
    fix: str = ""

    def __str__(self) -> str:
        line = f"{self.path}: got {self.value}; expected {self.expected}"
        return line + (f"\n    fix: {self.fix}" if self.fix else "")


def _without_credentials(problem: Problem) -> Problem:
    secret = is_secret_name(problem.path.rpartition(".")[2])
    value = HIDDEN if secret else redact_text(problem.value)
    return replace(problem, value=value, fix=redact_text(problem.fix))


class RecipeError(LongspanError):
    """Every problem of a recipe at once."""

    kind = "recipe"

    def __init__(self, recipe: str, problems: Sequence[Problem]) -> None:
        self.problems = tuple(map(_without_credentials, problems))
        count = f"{len(self.problems)} problem{'s' if len(self.problems) != 1 else ''}"
        super().__init__(
            "\n  ".join([f"{self.kind} {recipe} has {count}:", *map(str, self.problems)])
        )


class ClustersFileError(RecipeError):
    """Every problem of the file of clusters at once."""

    kind = "file"
