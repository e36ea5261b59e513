"""What a person sees: plain lines in a file, a live line on a terminal, and the summary."""

import io
from dataclasses import replace
from pathlib import Path

import pytest
from longspan.trainer.observe.sink import StepMetrics
from longspan.trainer.observe.summary import render_complete, render_summary
from longspan.trainer.observe.terminal import Eta, Terminal, duration

STAGES = [
    {"name": "short", "steps": 4, "tokens": 4000},
    {"name": "long", "steps": 10, "tokens": 40_000},
]
STEP = StepMetrics(
    step=1,
    steps=14,
    stage="short",
    stage_step=1,
    stage_steps=4,
    tokens=1000,
    loss=8.25,
    grad_norm=1.5,
    lr=3e-4,
    tokens_per_s=500.0,
    step_s=2.0,
)
SUMMARY = {
    "steps": 14,
    "tokens": 44_000,
    "wall_s": 88.4,
    "stages": [
        {
            "name": "short",
            "length": 1024,
            "steps": 4,
            "tokens": 4000,
            "loss": 6.5,
            "held_out_loss": 6.75,
        },
        {"name": "long", "length": 4096, "steps": 10, "tokens": 40_000, "loss": 5.125},
    ],
    "checkpoint": "/somewhere/runs/tiny/checkpoints/step-14",
    "evaluations": [
        {
            "name": "held-out documents",
            "buckets": [
                {"first": 0, "last": 1024, "loss": 5.5, "tokens": 65_536},
                {"first": 1024, "last": 4096, "loss": 5.0, "tokens": 196_608},
            ],
            "gain": {
                "full": 5.0,
                "visible_only": 5.12,
                "gain": 0.12,
                "standard_error": 0.03,
                "documents": 64,
                "visible": 1024,
                "visible_most": 1535,
            },
        }
    ],
}
PLAIN = """\
stage 1/2 short: length=1024 steps=4
stage=short step=1/14 loss=8.2500 grad_norm=1.500 lr=3.00e-04 tokens=1000 tokens/s=500 eta=1m26s
stage=short step=3/14 loss=8.2500 grad_norm=1.500 lr=3.00e-04 tokens=3000 tokens/s=500 eta=1m22s
stage=short step=4/14 loss=8.2500 grad_norm=1.500 lr=3.00e-04 tokens=4000 tokens/s=500 eta=1m20s
evaluated held_out at step 4: loss=6.75 sequences=16
saved step 4 in 0.2 s, training waited 0.1 s
warning: look out
"""
RENDERED = """
run complete: runs/tiny
  44,000 tokens, 88 s
    stage  length  steps  tokens  last loss  held-out loss
    short   1,024      4   4,000     6.5000         6.7500
    long    4,096     10  40,000     5.1250              -
  held-out documents: loss by position
    position          loss   tokens
    0 to 1,023      5.5000   65,536
    1,024 to 4,095  5.0000  196,608
  context beyond 1,024 tokens: loss 5.0000 with all of it, 5.1200 with the last 1,024 to 1,535 only
  gain +0.1200 +- 0.0300 over 64 documents (4.0 standard errors): the model uses its context
  checkpoint: /somewhere/runs/tiny/checkpoints/step-14
next:
  longspan export runs/tiny runs/tiny-hf --verify    its model for transformers
  longspan check runs/tiny/recipe.yaml    what this run computed
  longspan train runs/tiny/recipe.yaml --set seed=2 --run-dir runs/tiny-2    the same, other seed
"""


class Screen(io.StringIO):
    def __init__(self, encoding="utf-8"):
        super().__init__()
        self._encoding = encoding

    @property
    def encoding(self):
        return self._encoding


def at(step):
    return replace(STEP, step=step, stage_step=step, tokens=1000 * step)


def test_plain_lines_at_the_ends_of_a_stage_and_every_ten_seconds():
    screen, now = Screen(), [0.0]
    terminal = Terminal("runs/tiny", screen, clock=lambda: now[0])
    terminal.run_started({"stages": STAGES})
    terminal.stage_started("short", 0, {"length": 1024, "steps": 4, "layout": {"context": 2}})
    for step, time in ((1, 0.0), (2, 9.9), (3, 10.1), (4, 10.2)):
        now[0] = time
        terminal.step(at(step))
    terminal.evaluated("held_out", 4, {"loss": 6.75, "sequences": 16, "buckets": [1]}, 0.5)
    terminal.saving(4, 0.1)
    terminal.saved(4, Path("step-4"), 0.2)
    terminal.warning("look out")
    assert screen.getvalue() == PLAIN


def test_the_canary_and_alarms_are_lines():
    stream = io.StringIO()
    terminal = Terminal(stream=stream, live=False)
    values = {"loss": 5.25, "loss_alone": 5.2501, "grad_difference": 3.2e-7, "losses": {}}
    terminal.compared(0, {**values, "tokens": 2048, "seconds": 1.26})
    terminal.alarm("mfu", 12, "MFU 1.70 is impossible")
    assert stream.getvalue().splitlines() == [
        "canary: over context ranks loss 5.25, alone 5.2501; gradients differ by 3.2e-07 "
        "(2048 tokens, 1.3 s)",
        "ALARM at step 12: MFU 1.70 is impossible",
    ]


def test_the_summary_has_the_tables_the_gain_and_the_next_commands():
    screen = Screen()
    Terminal("runs/tiny", screen).finished(SUMMARY)
    assert screen.getvalue() == RENDERED


def test_the_summary_says_what_goodput_lost_most_to():
    seconds = {"productive": 6.0, "save": 1.0, "start_up": 2.5, "down": 0.4, "queue": 0.1}
    found = {"share": 0.6, "wall_s": 10.0, "seconds": seconds, "attempts": 2}
    line = "  goodput 60.0%, lost to start-up 25.0%, save 10.0%, down 4.0%\n"
    for render in (render_summary, render_complete):
        assert line in render("runs/tiny", {"tokens": 5, "goodput": found}) + "\n"
        assert "goodput" not in render("runs/tiny", {"goodput": {"share": None, "wall_s": 0.0}})


@pytest.mark.parametrize(("gain", "error"), [(0.05, 0.03), (-0.2, 0.03), (0.1, 0.0)])
def test_a_gain_within_the_noise_is_no_proof(gain, error):
    screen = Screen()
    numbers = {**SUMMARY["evaluations"][0]["gain"], "gain": gain, "standard_error": error}
    Terminal("runs/tiny", screen).finished({"evaluations": [{"gain": numbers}]})
    assert "no proof that the model uses its context" in screen.getvalue()


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_the_live_line_is_redrawn_and_gone_at_the_end(encoding, monkeypatch):
    monkeypatch.setenv("COLUMNS", "140")
    screen = Screen(encoding)
    terminal = Terminal("runs/tiny", screen, live=True, clock=iter(range(100)).__next__)
    terminal.run_started({"stages": STAGES})
    for step in (1, 2, 3):
        terminal.step(at(step))
    shown = screen.getvalue()
    assert "step 3/14  loss 8.2500  grad norm 1.500  lr 3.00e-04  500 tokens/s  1m22s" in shown
    assert shown.count("\n") == 0 and shown.isascii() == (encoding == "ascii")
    terminal.stopped(3, "asked to stop")
    assert screen.getvalue().endswith("stopped after step 3: asked to stop\n")


def test_a_narrow_live_line_keeps_what_matters(monkeypatch):
    monkeypatch.setenv("COLUMNS", "70")
    screen = Screen()
    terminal = Terminal("runs/tiny", screen, live=True)
    terminal.run_started({"stages": STAGES})
    terminal.step(at(1))
    assert "step 1/14  loss 8.2500  grad norm 1.500  500 tokens/s  1m26s" in screen.getvalue()


def test_a_terminal_that_went_away_is_ignored():
    tried = []

    class Gone(Screen):
        def write(self, text):
            tried.append(text)
            raise OSError(5, "Input/output error")

    for live in (False, True):
        tried.clear()
        terminal = Terminal("runs/tiny", Gone(), live=live)
        terminal.step(at(1))
        terminal.message("hello")
        terminal.finished(SUMMARY)
        terminal.close()
        assert tried, "nothing was written at all"


def test_the_time_left_counts_later_stages_by_their_tokens_and_forgets_the_first_step():
    eta = Eta({stage["name"]: (stage["steps"], stage["tokens"]) for stage in STAGES})
    eta.update(replace(at(1), step_s=60.0, tokens_per_s=1000 / 60))
    eta.update(at(2))
    assert eta.seconds(at(2)) == pytest.approx(2 * 2.0 + 40_000 / 500)
    eta.update(replace(at(3), step_s=4.0, tokens_per_s=250.0))
    assert 2.0 < eta.seconds(at(3)) - 80 - 2.0 < 20
    assert Eta().seconds(at(3)) == 0.0


def test_durations():
    shown = [duration(seconds) for seconds in (-1, 41.4, 192, 7500, 273_600)]
    assert shown == ["0s", "41s", "3m12s", "2h05m", "3d04h"]
