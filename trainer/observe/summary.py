"""The end of a run as text: what was trained, what it scored and what to do next.

A summary is a plain dict, so that `complete.json` holds it as it is:

    {"wall_s", "tokens", "tokens_per_s",
     "stages": [{"name", "length", "steps", "tokens", "loss", "held_out_loss"}, ...],
     "checkpoint": path of the final checkpoint,
     "goodput": {"wall_s", "share", "seconds": {bucket: seconds, ...}, "attempts"},
     "evaluations": [{"name", "step",
                      "buckets": [{"first", "last", "loss", "tokens"}, ...],
                      "gain": {"full", "visible_only", "gain", "standard_error",
                               "documents", "visible", "visible_most"}}, ...]}

Every key may be missing; what is missing is left out of the text. Losses are in nats.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_SHOWN_LOSSES = 3


def render_summary(directory: str, summary: Mapping[str, Any]) -> str:
    """All of a finished run.

    Args:
        directory: The run directory as the user would type it.
        summary: See the module.
    """
    parts = [f"\nrun complete: {directory}", *_headline(summary), *_goodput_lines(summary)]
    parts += _stage_lines(summary.get("stages", ()))
    for evaluation in summary.get("evaluations", ()):
        parts += _evaluation_lines(evaluation)
    if summary.get("checkpoint"):
        # Inside the run's folder as the user typed it, elsewhere as it is.
        inside, whole = str(Path(directory).absolute()), str(summary["checkpoint"])
        shown = whole.replace(inside, directory, 1) if whole.startswith(f"{inside}/") else whole
        parts.append(f"  checkpoint: {shown}")
    return "\n".join([*parts, *_next_commands(directory)])


def render_complete(directory: str, summary: Mapping[str, Any]) -> str:
    """What to say instead of training a finished run again."""
    parts = [f"{directory} is complete; nothing to do", *_headline(summary)]
    parts += _goodput_lines(summary)
    parts += _stage_lines(summary.get("stages", ()))
    for evaluation in summary.get("evaluations", ()):
        parts += [f"  {line}" for line in _gain_lines(evaluation)]
    return "\n".join([*parts, *_next_commands(directory)])


def _headline(summary: Mapping[str, Any]) -> list[str]:
    parts = []
    if "tokens" in summary:
        parts.append(f"{summary['tokens']:,} tokens")
    if "wall_s" in summary:
        parts.append(f"{summary['wall_s']:,.0f} s")
    if "tokens_per_s" in summary:
        parts.append(f"{summary['tokens_per_s']:,.0f} tokens/s")
    return ["  " + ", ".join(parts)] if parts else []


def _goodput_lines(summary: Mapping[str, Any]) -> list[str]:
    found = summary.get("goodput") or {}
    line = goodput_line(found.get("share"), found.get("wall_s", 0.0), found.get("seconds", {}))
    return [f"  {line}"] if line else []


def goodput_line(share: float | None, wall_s: float, seconds: Mapping[str, float]) -> str:
    """Goodput and what it lost most to; empty before any time has passed."""
    if share is None or wall_s <= 0:
        return ""
    losses = {name: part / wall_s for name, part in seconds.items() if name != "productive"}
    largest = sorted(losses.items(), key=lambda item: -item[1])[:_SHOWN_LOSSES]
    words = [f"{name.replace('_', '-')} {part:.1%}" for name, part in largest if part >= 0.001]
    return f"goodput {share:.1%}" + (f", lost to {', '.join(words)}" if words else "")


def _stage_lines(stages: Sequence[Mapping[str, Any]]) -> list[str]:
    if not stages:
        return []
    rows = [
        (
            str(stage["name"]),
            *(_number(stage.get(key), ",d") for key in ("length", "steps", "tokens")),
            *(_number(stage.get(key), ".4f") for key in ("loss", "held_out_loss")),
        )
        for stage in stages
    ]
    return table(("stage", "length", "steps", "tokens", "last loss", "held-out loss"), rows)


def _evaluation_lines(evaluation: Mapping[str, Any]) -> list[str]:
    buckets = evaluation.get("buckets", ())
    lines = []
    if buckets:
        lines.append(f"  {evaluation.get('name', 'held out')}: loss by position")
        rows = [
            (
                f"{bucket['first']:,} to {bucket['last'] - 1:,}",
                _number(bucket.get("loss"), ".4f"),
                _number(bucket.get("tokens"), ",d"),
            )
            for bucket in buckets
        ]
        lines += table(("position", "loss", "tokens"), rows)
    return [*lines, *(f"  {line}" for line in _gain_lines(evaluation))]


def _gain_lines(evaluation: Mapping[str, Any]) -> list[str]:
    """The proof of context, and whether it is one."""
    gain = evaluation.get("gain")
    if not gain:
        return []
    error = gain["standard_error"]
    sure = error > 0 and gain["gain"] > 2 * error
    verdict = f"{gain['gain'] / error:.1f} standard errors" if error > 0 else "no standard error"
    return [
        f"context beyond {gain['visible']:,} tokens: loss {gain['full']:.4f} with all of it, "
        f"{gain['visible_only']:.4f} with the last {gain['visible']:,} to "
        f"{gain['visible_most']:,} only",
        f"gain {gain['gain']:+.4f} +- {error:.4f} over {gain['documents']} documents ({verdict}): "
        + ("the model uses its context" if sure else "no proof that the model uses its context"),
    ]


def _next_commands(directory: str) -> list[str]:
    recipe = f"{directory}/recipe.yaml"
    return [
        "next:",
        f"  longspan export {directory} {directory}-hf --verify    its model for transformers",
        f"  longspan check {recipe}    what this run computed",
        f"  longspan train {recipe} --set seed=2 --run-dir {directory}-2    the same, other seed",
    ]


def _number(value: Any, form: str) -> str:
    return "-" if value is None else format(value, form)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table: the first column to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    return [
        "    "
        + "  ".join(
            cell.ljust(width) if index == 0 else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in (head, *rows)
    ]
