"""All kills of the kill matrix, of which the tests draw some every day.

A tiny run is killed at every file operation that its launcher and its two ranks do, and that they
do when they resume: one rank, the other one, all ranks, or the launcher. It is resumed once, and
must end bit-equal to the unkilled run, with nothing left over.
Run: python benchmarks/kill_matrix.py --out benchmarks/results/kill-matrix-cpu.json
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from about import about

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from support.kills import STORE, Case, Kills, as_row

BIT_EQUAL = "bit-equal"


def every_case(folder: Path) -> list[tuple[Kills, Case]]:
    """The cases of a run with its checkpoints in its folder, and what is new with them outside."""
    (folder / "inside").mkdir()
    (folder / "outside").mkdir()
    inside, outside = Kills(folder / "inside"), Kills(folder / "outside", outside=True)
    cases = [(inside, case) for case in inside.cases()]
    known = {case.fault.point.label for _, case in cases}
    twins = {label.replace("run/checkpoints", STORE) for label in known}
    return cases + [(outside, case) for case in outside.cases(known | twins)]


def survive(kills: Kills, case: Case) -> dict[str, Any]:
    """A row of the table."""
    begun = time.monotonic()
    try:
        row = as_row(case, kills.assert_survives(case)) | {"outcome": BIT_EQUAL}
    except (AssertionError, TimeoutError) as error:
        row = as_row(case) | {"outcome": str(error)[-2000:]}
        print(f"FAILED: {case}\n{error}", flush=True)
    return row | {"seconds": round(time.monotonic() - begun, 1)}


def main() -> int:
    """Runs the matrix, and writes what came of it with the versions."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--sample", type=int, help="this many cases, drawn at random")
    parser.add_argument("--only", default="", help="cases whose name has this in it")
    args = parser.parse_args()
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        cases = [case for case in every_case(Path(folder)) if args.only in str(case[1])]
        if args.sample is not None:
            cases = random.Random(0).sample(cases, min(args.sample, len(cases)))
        rows = []
        for number, (kills, case) in enumerate(cases):
            rows.append(survive(kills, case))
            print(f"{number + 1}/{len(cases)} {rows[-1]['outcome'][:60]}: {case}", flush=True)
        for kills in {kills for kills, _ in cases}:
            kills.close()
    equal = sum(row["outcome"] == BIT_EQUAL for row in rows)
    result = {
        "cases": len(rows),
        "bit_equal": equal,
        "points": len({(row["role"], row["label"], row["when"]) for row in rows}),
        "killed": dict(Counter(row["killed"] for row in rows)),
        "minutes": round((time.monotonic() - begun) / 60, 1),
        **about("torch", "megatron-core"),
        "rows": rows,
    }
    print(json.dumps({name: value for name, value in result.items() if name != "rows"}, indent=2))
    if args.out:
        text = json.dumps(result, indent=2)
        # A row a line: hundreds of them are read side by side.
        lines = ",\n".join(f"    {json.dumps(row)}" for row in rows)
        head = text[: text.index('"rows"')]
        args.out.write_text(f'{head}"rows": [\n{lines}\n  ]\n}}\n')
    return int(equal < len(rows))


if __name__ == "__main__":
    sys.exit(main())
