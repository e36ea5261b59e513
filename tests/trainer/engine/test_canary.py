"""The canary agrees where context ranks are right, names what is wrong, and leaves no trace."""

from contextlib import ExitStack
from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from longspan.errors import RunError
from longspan.parallel.exchange import Exchange
from longspan.trainer.engine.comparison import Comparison
from support.cases import batches, take_step
from support.grid import sample
from support.mechanism_cases import MECHANISMS, SEER
from support.tiny import LENGTH, VOCAB, random_sample, tiny_run

MOE = {"model__moe": {"experts": 4, "top_k": 2, "aux_loss": 0.01}}
SELECTION = {
    "stage__trainable": "selection",
    "stage__attention": {"mechanism": SEER["token"], "sinks": True},
}
RIGHT = {
    "dense": (2, {"exchange": "all_gather"}, {"stage__attention": MECHANISMS["dense"]}),
    "nsa": (2, {"exchange": "ring"}, {"stage__attention": MECHANISMS["nsa"]}),
    "indexer_pp2": (4, {"pipeline": 2}, {"stage__attention": MECHANISMS["indexer"]}),
    "ssa_tp2": (4, {"tensor": 2}, {"stage__attention": MECHANISMS["ssa"]}),
    "dense_tp2_sp": (4, {"tensor": 2, "sequence": True}, {"recompute": "full"}),
    "balanced": (2, {"exchange": "fetch", "layout": "balanced"}, {"length": 61}),
    "moe_ep2": (2, {"expert": 2}, MOE),
    "selection": (2, {}, SELECTION),
}


def settings(parallel, **changes):
    return tiny_run(stage__parallel={"context": 2, **parallel}, **changes)


def make_engine(run):
    from longspan.trainer.engine.engine import Engine

    return Engine(run, run.stages[0], VOCAB)


def compare_on_rank(run):
    """The comparison of the first micro-batch."""
    from longspan.trainer.engine.canary import compare

    engine = make_engine(run)
    return compare(engine, batches(engine, 0)[0])


def first_step(run):
    """Losses and gradient norm of a training step of that micro-batch."""
    engine = make_engine(run)
    sums = engine.train_step(batches(engine, 0)[:1], 1e-2, False, ("test", 0))
    host = sums.on_host()
    return {"loss": host["loss"] / host["tokens"], **sums.noted()}, host["square_norm"] ** 0.5


@pytest.mark.parametrize("name", sample("canaries", RIGHT, 3))
def test_both_passes_are_those_of_one_rank(worlds, name):
    ranks, parallel, changes = RIGHT[name]
    run = settings(parallel, **changes)
    found = worlds(ranks).run(compare_on_rank, run)
    losses, norm = worlds(1).run(first_step, tiny_run(**changes))[0]
    for comparison in found:
        assert replace(comparison, seconds=0) == replace(found[0], seconds=0)
        comparison.demand(run, run.stages[0])
    assert found[0].weights == (run.stages[0].length - 3,) * 2
    assert found[0].grad_difference < 2e-6
    for place in (0, 1):
        means = {key: pair[place] for key, pair in found[0].losses.items()}
        assert means == pytest.approx(losses, rel=2e-6)
        assert found[0].grad_norm[place] == pytest.approx(norm, rel=2e-6)


def test_data_ranks_have_samples_of_their_own(worlds):
    found = worlds(4).run(compare_on_rank, settings({"layout": "contiguous"}))[0]
    assert found.weights == (122, 122) and found.grad_difference < 2e-6


@pytest.mark.parametrize("kind", ["dense", "moba"])
def test_bf16_agrees_within_its_tolerance(worlds, kind):
    run = settings({}, precision="bf16", stage__attention=MECHANISMS[kind])
    comparison = worlds(2).run(compare_on_rank, run)[0]
    assert comparison.grad_difference > 1e-4
    comparison.demand(run, run.stages[0])


ATTEND = Exchange.attend


def attend_to_local_keys(self, q, k, v, reach, blocks=None, *, here=False, **how):
    """Every rank takes its own keys for all there are."""
    if self._gathering is not None and not here:
        index = self._gathering.layout.index(dist.get_rank())
        reach, blocks, here = reach.keys(index), blocks and blocks.keys(index), True
    return ATTEND(self, q, k, v, reach, blocks, here=here, **how)


def faults(name):
    """What to replace in a rank: owner, name, and what comes in its place."""
    from longspan.trainer.engine import engine
    from longspan.trainer.engine.microbatch import BatchBuilder

    build, report = BatchBuilder.__call__, engine._report

    def positions_off_by_one(self, sample, notes=None):
        batch = build(self, sample, notes)
        if dist.get_rank() == 1 and not batch.attention.documents.whole:
            later = batch.attention.positions_T + 1
            batch.attention = replace(batch.attention, positions_T=later, positions_S=later)
        return batch

    def scaled_loss(batch, output):
        loss, *rest = report(batch, output)
        return loss / 2, *rest

    def without_the_token_count(batch, output):
        loss, _, reported = report(batch, output)
        return loss, reported

    def half_of_the_tokens_count(self, sample, notes=None):
        batch = build(self, sample, notes)
        if dist.get_rank() == 1 and not batch.attention.documents.whole:
            nothing = torch.zeros_like(sample.weights_T)
            return build(self, replace(sample, weights_T=nothing), notes)
        return batch

    return {
        "local keys": (Exchange, "attend", attend_to_local_keys),
        "positions": (BatchBuilder, "__call__", positions_off_by_one),
        "loss over context": (engine, "_report", scaled_loss),
        "trap S2": (engine, "_report", without_the_token_count),
        "weights": (BatchBuilder, "__call__", half_of_the_tokens_count),
    }[name]


def complaint(run, fault):
    """What this rank is told where something is wrong."""
    with patch.object(*faults(fault)):
        comparison = compare_on_rank(run)
    try:
        comparison.demand(run, run.stages[0])
    except RunError as error:
        return str(error)
    return None


@pytest.mark.parametrize(
    ("kind", "fault", "found"),
    [
        ("dense", "local keys", "gradient (tolerance"),
        ("moba", "local keys", "gradient (tolerance"),
        ("dense", "positions", "gradient (tolerance"),
        ("moba", "positions", "gradient (tolerance"),
        ("dense", "loss over context", "gradient (tolerance"),
        ("dense", "trap S2", "gradient (tolerance"),
        ("dense", "weights", "sum of loss weights"),
    ],
)
def test_a_fault_stops_every_rank_with_a_reason(worlds, kind, fault, found):
    run = settings({"exchange": "all_gather"}, stage__attention=MECHANISMS[kind])
    texts = worlds(2).run(complaint, run, fault)
    assert texts[0] is not None and texts[0] == texts[1]
    assert found in texts[0].split("beyond rounding: ")[1]
    for part in ("exchange all_gather, layout zigzag", "gradient norm", "and alone", "64 tokens"):
        assert part in texts[0]
    assert "fix: another stages.0.parallel.exchange" in texts[0]


def steps_and_traces(run, canary):
    """Losses and norms of two steps, after a canary or not, and whether it left anything."""
    from longspan.trainer.engine.canary import compare

    engine = make_engine(run)
    if canary:
        state = torch.get_rng_state()
        weights = [p.detach().clone() for p in engine.model.parameters()]
        compare(engine, batches(engine, 0)[0])
        assert torch.equal(torch.get_rng_state(), state)
        now = list(engine.model.parameters())
        assert all(torch.equal(*pair) for pair in zip(weights, now, strict=True))
        assert not any(bool(p.main_grad.any()) for p in now)
        assert not any(held for _, _, held, _ in engine.optimizer.shards())
    return [take_step(engine, step) for step in range(2)]


@pytest.mark.parametrize("kind", ["ssa", "indexer"])
def test_nothing_of_it_remains(worlds, kind):
    run = settings({}, stage__attention=MECHANISMS[kind])
    want = worlds(2).run(steps_and_traces, run, False)
    assert worlds(2).run(steps_and_traces, run, True) == want


def compare_a_part(run):
    """The comparison of a part of a long sample, and the documents that both passes saw."""
    from longspan.trainer.engine import canary
    from longspan.trainer.engine.microbatch import BatchBuilder

    engine, seen, build = make_engine(run), [], BatchBuilder.__call__

    def seeing(self, sample, notes=None):
        seen.append(sample.cu_seqlens.tolist())
        return build(self, sample, notes)

    with ExitStack() as stack:
        stack.enter_context(patch.object(canary, "SHORTEST", 10))
        stack.enter_context(patch.object(BatchBuilder, "__call__", seeing))
        return canary.compare(engine, random_sample(1, 3 * LENGTH + 3, 5)), seen


def test_of_a_long_micro_batch_what_a_rank_can_hold_is_compared(worlds):
    run = settings({"tensor": 2, "sequence": True, "exchange": "ulysses"})
    comparison, seen = worlds(4).run(compare_a_part, run)[0]
    bounds = random_sample(1, 3 * LENGTH + 3, 5).cu_seqlens.tolist()
    want = [*(bound for bound in bounds if bound < 97), 97]
    assert seen == [want, want] and len(want) > 2
    assert comparison.tokens == 97 and comparison.grad_difference < 2e-6


@pytest.mark.parametrize(
    ("tokens", "context", "want"),
    [
        (1024, 8, 1024),
        (4096, 2, 2048),
        (9999, 3, 3333),
        (2**20, 8, 8 * 4096),
        (2**20, 64, 2**14),
    ],
)
def test_how_many_tokens_are_compared(tokens, context, want):
    from longspan.trainer.engine.canary import canary_tokens

    assert canary_tokens(tokens, context) == want


def made(**changes):
    given = {
        "exchange": "ring",
        "tokens": 64,
        "weights": (61.0, 61.0),
        "losses": {"loss": (4.0, 4.0), "index_loss": (0.5, 0.5)},
        "grad_norm": (1.0, 1.0),
        "grad_difference": 0.0,
        "seconds": 0.5,
    }
    return Comparison(**(given | changes))


def test_what_is_not_finite_is_a_fault_of_context_ranks_only_if_one_rank_is_finite():
    run, nan = settings({}), float("nan")
    made().demand(run, run.stages[0])
    both = made(losses={"loss": (nan, nan)}, grad_norm=(nan, nan), grad_difference=nan)
    both.demand(run, run.stages[0])
    with pytest.raises(RunError, match="beyond rounding: loss"):
        made(losses={"loss": (nan, 4.0)}).demand(run, run.stages[0])
    with pytest.raises(RunError, match="beyond rounding: gradient"):
        made(grad_difference=nan).demand(run, run.stages[0])


def test_losses_of_indexers_count_too():
    run = settings({})
    wrong = made(losses={"loss": (4.0, 4.0), "index_loss": (0.25, 0.5)})
    with pytest.raises(RunError, match=r"beyond rounding: index_loss \(0.25 and 0.5"):
        wrong.demand(run, run.stages[0])
    assert wrong.values["losses"] == {"index_loss": [0.25, 0.5]}
