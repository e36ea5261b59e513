"""Spikes on the device against numpy, and what they do to a step of all ranks."""

import math

import numpy as np
import pytest
import torch
from longspan.trainer.engine.spikes import Spikes
from reference.spikes import spikes as reference
from support.cases import batches, take_step
from support.tiny import VOCAB, tiny_run


def judged(detector: Spikes, losses, norms) -> list[bool]:
    found = []
    for pair in zip(losses, norms, strict=True):
        values = torch.tensor(pair, dtype=torch.float64)
        found.append(bool(detector.judge(values, values.isfinite().all())))
    return found


def series(seed: int, count: int = 300) -> tuple[list[float], list[float]]:
    """A falling loss and a noisy norm with jumps up, jumps down and steps that are not finite."""
    random = np.random.default_rng(seed)
    losses = 3 * np.exp(-np.arange(count) / 300) + 0.05 * random.standard_normal(count)
    norms = 1 + 0.2 * random.random(count)
    for values in (losses, norms):
        values[random.integers(0, count, 12)] *= 4
        values[random.integers(0, count, 12)] *= 0.3
        values[random.integers(0, count, 5)] = math.nan
        values[random.integers(0, count, 5)] = math.inf
    return losses.tolist(), norms.tolist()


@pytest.mark.parametrize(("window", "sigma"), [(2, 6.0), (16, 3.0), (64, 6.0), (128, 4.0)])
def test_the_same_steps_spike_as_in_numpy(window, sigma):
    for seed in range(2):
        losses, norms = series(seed)
        want = reference(losses, norms, window, sigma)
        assert judged(Spikes(window, sigma, torch.device("cpu")), losses, norms) == want
        assert window == 2 or 0 < sum(want) < 40


def test_nothing_spikes_before_the_window_is_full():
    norms = [1.0, 1.1, 0.9, 50.0]
    assert judged(Spikes(4, 3.0, torch.device("cpu")), [2.0] * 4, norms) == [False] * 4
    assert judged(Spikes(3, 3.0, torch.device("cpu")), [2.0] * 4, norms) == [False] * 3 + [True]


def test_a_low_value_is_no_spike_and_equal_ones_are_none():
    detector = Spikes(4, 3.0, torch.device("cpu"))
    assert judged(detector, [2.0] * 5 + [0.5], [0.1] * 6) == [False] * 6
    detector = Spikes(7, 1e-3, torch.device("cpu"))
    assert judged(detector, [0.1] * 20, [1 / 3] * 20) == [False] * 20


def test_what_is_skipped_stays_out_of_the_window():
    losses = [2.0, 2.1, 1.9, 2.0, *[9.0] * 6, math.nan, 2.05, 9.0]
    found = judged(Spikes(4, 3.0, torch.device("cpu")), losses, [1.0] * len(losses))
    assert found == [False] * 4 + [True] * 6 + [False, False, True]


def test_its_state_goes_on_bit_for_bit():
    losses, norms = series(5)
    whole = Spikes(16, 2.0, torch.device("cpu"))
    want = judged(whole, losses, norms)
    for cut in (3, 237):
        first, then = (Spikes(16, 2.0, torch.device("cpu")) for _ in range(2))
        judged(first, losses[:cut], norms[:cut])
        then.load(first.state())
        assert then.state() == first.state()
        assert judged(then, losses[cut:], norms[cut:]) == want[cut:]
        assert then.state() == whole.state()
    with pytest.raises(ValueError, match="33 numbers are no state of 8 steps"):
        Spikes(8, 2.0, torch.device("cpu")).load(whole.state())


def state_of(engine):
    """Weights, moments and step counts on this rank."""
    states = [
        state[name].clone()
        for part in engine.optimizer._parts
        for state in part.optimizer.state.values()
        for name in ("step", "exp_avg", "exp_avg_sq")
    ]
    return [p.detach().clone() for p in engine.model.parameters()] + states


def spiked_step(run):
    """Three good steps, one with a huge gradient on one rank, one good step."""
    import torch.distributed as dist
    from longspan.trainer.engine.engine import Engine

    engine = Engine(run, run.stages[0], VOCAB)
    for step in range(3):
        take_step(engine, step)
    before, window = state_of(engine), engine.spikes.state()
    handle = None
    if dist.get_rank() == 0:
        weight = next(engine.model.parameters())
        handle = weight.register_hook(lambda grad: grad * 1e4)
    bad = engine.train_step(batches(engine, 3), 1e-2, False, ("x",)).on_host()
    if handle is not None:
        handle.remove()
    same = all(map(torch.equal, before, state_of(engine)))
    kept = window == engine.spikes.state()
    good = engine.train_step(batches(engine, 4), 1e-2, False, ("y",)).on_host()
    moved = not any(map(torch.equal, before[:1], state_of(engine)[:1]))
    return bad["skipped"], bad["spike"], same, kept, good["skipped"], moved, window


@pytest.mark.parametrize("parallel", [{"pipeline": 2}, {"context": 2}], ids=str)
def test_a_spike_of_one_rank_is_applied_by_none(worlds, parallel):
    spike = {"spike": "skip", "window": 3, "sigma": 30}
    found = worlds(2).run(spiked_step, tiny_run(stage__parallel=parallel, recovery=spike))
    assert [result[:-1] for result in found] == [(1.0, 1.0, True, True, 0.0, True)] * 2
    assert found[0][-1] == found[1][-1] and found[0][-1][0] == 3


def test_without_a_policy_a_spike_is_applied(worlds):
    (found,) = worlds(1).run(applied_step, tiny_run())
    assert found == (0.0, 0.0, False)


def applied_step(run):
    from longspan.trainer.engine.engine import Engine

    engine = Engine(run, run.stages[0], VOCAB)
    for step in range(3):
        take_step(engine, step)
    before = state_of(engine)
    handle = next(engine.model.parameters()).register_hook(lambda grad: grad * 1e4)
    sums = engine.train_step(batches(engine, 3), 1e-2, False, ("x",)).on_host()
    handle.remove()
    return sums["skipped"], sums["spike"], all(map(torch.equal, before, state_of(engine)))
