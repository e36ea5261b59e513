"""One run, killed at random times until the kills are used up, and then finished.

Each kill takes one rank, all of them or the launcher. The run must end bit-equal to the unkilled
one, every step must have been made with the same loss, none may be left out, and no kill may cost
more steps than the interval between checkpoints and one that is being written.
Run: python benchmarks/kill_soak.py --kills 200 --out benchmarks/results/kill-soak-cpu.json
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

from about import about

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from support.kills import Kills
from support.soak import soak


def main() -> int:
    """Runs the soak, and writes what came of it with the versions."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--every", type=int, default=10, help="steps between checkpoints")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        # An interval for each kill, or most of them would come before anything was saved.
        kills = Kills(Path(folder), steps=args.kills * args.every, every=args.every)
        soaked = soak(kills, args.kills, args.seed)
        kills.close()
    result = {
        "outcome": "bit-equal",
        "seed": args.seed,
        "every": args.every,
        **asdict(soaked),
        "minutes": round((time.monotonic() - begun) / 60, 1),
        **about("torch", "megatron-core"),
    }
    text = json.dumps(result, indent=2) + "\n"
    print(text)
    if args.out:
        args.out.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
