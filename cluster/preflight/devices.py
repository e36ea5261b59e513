"""Devices: as many GPUs as Ray gives away, healthy, free and as fast as they should be."""

from __future__ import annotations

import shutil
import statistics
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ...trainer.flops import peak_flops
from .child import ChildError, run_children
from .result import FAIL_SHARE, Level, Result, size

CHECK = "devices"
_EXPECTED_SHARE = 0.5
"""Of the peak; a large product in bf16 reaches two thirds of it and more."""

_CPU_SHARE = 1 / 3
"""Of the median of all nodes."""

_FREE_SHARE = 0.9
_USABLE_SHARE = 0.5
_FIELDS = ("index", "name", "ecc.errors.uncorrected.volatile.total", "retired_pages.pending")
_SMI_LIMIT_S = 15.0


def probe(limit_s: float) -> dict[str, Any]:
    """What the devices of this node did and what the driver says of them."""
    try:
        found = run_children("product", [{}], limit_s)[0]
    except ChildError as error:
        found = {"gpus": 0, "devices": [], "error": str(error)}
    return {**found, "cards": _ask_driver()}


def read_cards(text: str) -> list[dict[str, str]]:
    """The lines of nvidia-smi's CSV as cards: index, name, ecc, pending."""
    rows = [[part.strip() for part in line.split(",")] for line in text.splitlines()]
    names = ("index", "name", "ecc", "pending")
    return [dict(zip(names, row, strict=True)) for row in rows if len(row) == len(names)]


def judge(nodes: Mapping[str, Mapping[str, Any]], gpus: Mapping[str, int]) -> Iterator[Result]:
    """One result per node, of the worst that was found there.

    Args:
        nodes: What `probe` found on each.
        gpus: That Ray gives away on each; 0 for a node that computes on its CPU.
    """
    cpus = [
        found["devices"][0]
        for found in nodes.values()
        if not found.get("gpus") and found.get("devices")
    ]
    for node, found in nodes.items():
        declared = gpus.get(node, 0)
        if error := found.get("error"):
            fix = "see the node's log; a GPU that crashes a process needs a reset or a repair"
            yield Result(node, CHECK, "fail", str(error), "a short matrix product", fix)
        elif declared:
            yield _worst(list(_gpu_findings(node, found, declared)))
        else:
            yield _cpu_result(node, found["devices"][0], cpus)


def _gpu_findings(node: str, found: Mapping[str, Any], declared: int) -> Iterator[Result]:
    def result(level: Level, what: str, expected: str, fix: str = "") -> Result:
        return Result(node, CHECK, level, what, expected, fix)

    devices: Sequence[Mapping[str, Any]] = found["devices"]
    if found["gpus"] < declared:
        fix = "see nvidia-smi there; `ray start --num-gpus` must not promise more"
        yield result("fail", f"{found['gpus']} GPUs", f"{declared} GPUs", fix)
        return
    for card in found.get("cards", ()):
        name = f"GPU {card['index']}"
        if card["ecc"].isdigit() and int(card["ecc"]):
            what = f"{name} with {card['ecc']} uncorrected ECC errors"
            yield result("fail", what, "none", "reset or replace the GPU (nvidia-smi -q -d ECC)")
        if card["pending"].lower() == "yes":
            what = f"{name} with memory pages that wait to be retired"
            yield result("warn", what, "none", "restart the node when it is free")
    for index, device in enumerate(devices):
        yield from _about_device(result, f"GPU {index}", device)
    speed = min(device["flops"] for device in devices) / 1e12
    what = f"{len(devices)} x {devices[0]['name']}, {speed:.0f} TFLOP/s or more each"
    yield result("ok", what, f"{declared} GPUs, healthy and free")


def _about_device(result: Any, name: str, device: Mapping[str, Any]) -> Iterator[Result]:
    if not device["right"]:
        fix = "take the node out; its results cannot be trusted"
        yield result("fail", f"{name} multiplies wrongly", "the right product", fix)
    share = device["free"] / device["total"] if device["total"] else 1.0
    if share < _FREE_SHARE:
        what = f"{name} with {size(device['free'])} of {size(device['total'])} free"
        fix = "end what else runs there (nvidia-smi shows it)"
        level = "fail" if share < _USABLE_SHARE else "warn"
        yield result(level, what, f"{_FREE_SHARE:.0%} free", fix)
    peak = peak_flops(device["name"])
    if peak and device["flops"] < _EXPECTED_SHARE * peak:
        what = f"{name} with {device['flops'] / 1e12:.0f} TFLOP/s"
        expected = f"{_EXPECTED_SHARE * peak / 1e12:.0f} TFLOP/s ({_EXPECTED_SHARE:.0%} of peak)"
        fix = "see nvidia-smi -q -d PERFORMANCE for throttling, and for what else runs there"
        slow = device["flops"] < FAIL_SHARE * _EXPECTED_SHARE * peak
        yield result("fail" if slow else "warn", what, expected, fix)


def _cpu_result(node: str, device: Mapping[str, Any], cpus: Sequence[Mapping[str, Any]]) -> Result:
    typical, of_core = (
        statistics.median(cpu[name] for cpu in cpus) if cpus else 0.0
        for name in ("flops", "core_flops")
    )
    speed = f"{device['flops'] / 1e9:.3g} GFLOP/s"
    expected = f"{_CPU_SHARE * typical / 1e9:.3g} GFLOP/s (a third of the median)"
    if not device["right"]:
        fix = "take the node out; its results cannot be trusted"
        return Result(node, CHECK, "fail", "wrong products", "right products", fix)
    fix = "end what else runs there"
    # A rank has a core. Nodes may have few of them, and threads that wait for each other on a busy
    # node are slower than any of them.
    if device.get("core_flops", of_core) < FAIL_SHARE * of_core:
        speed = f"{device['core_flops'] / 1e9:.3g} GFLOP/s of a core"
        expected = f"{FAIL_SHARE * of_core / 1e9:.3g} GFLOP/s (a fifth of the median)"
        return Result(node, CHECK, "fail", speed, expected, fix)
    if device["flops"] < _CPU_SHARE * typical:
        return Result(node, CHECK, "warn", speed, expected, fix)
    return Result(node, CHECK, "ok", speed, expected)


def _worst(results: Sequence[Result]) -> Result:
    order = ("ok", "warn", "fail")
    return max(results, key=lambda result: order.index(result.level))


def _ask_driver() -> list[dict[str, str]]:
    """What nvidia-smi says of all cards; nothing where it is not there."""
    if shutil.which("nvidia-smi") is None:
        return []
    command = ("nvidia-smi", f"--query-gpu={','.join(_FIELDS)}", "--format=csv,noheader,nounits")
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_SMI_LIMIT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return []
    return read_cards(done.stdout) if done.returncode == 0 else []
