import pytest
import torch
from longspan.attention.probe import MEASURES, Probe, in_blocks, in_reach
from longspan.kernels.blocks import Blocks
from longspan.kernels.grid import Grid
from longspan.kernels.reach import Reach
from reference.visibility import chosen as chosen_keys
from support.mechanisms import context, inputs, make, run, site

CU = [0, 3, 40]
CPU = torch.device("cpu")


def measured(table):
    return {name: table[0][name] for name in table[0]}


def by_hand(q, k, rows, seen_HTS, sinks):
    """The measures in float64, row by row."""
    share = q.shape[1] // k.shape[1]
    sums = dict.fromkeys(["kept", "recall", "entropy", "sink_share"], 0.0)
    for row in rows:
        first = max(start for start in CU[:-1] if start <= row)
        for h in range(q.shape[1]):
            scores = k[first : row + 1, h // share] @ q[row, h] * q.shape[2] ** -0.5
            p = torch.cat([sinks[h : h + 1], scores]).softmax(0)
            seen = seen_HTS[h, row, first : row + 1]
            sums["kept"] += float(seen.double().mean())
            sums["recall"] += float(p[1:][seen].sum() / p[1:].sum())
            sums["entropy"] -= float(torch.xlogy(p, p).sum())
            sums["sink_share"] += float(p[:2].sum())
    return {name: total / len(rows) / q.shape[1] for name, total in sums.items()}


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("sinks", [None, torch.tensor([0.5, -1.0, 2.0, 0.0]).double()])
def test_measures_are_those_of_explicit_maps(groups, sinks):
    torch.manual_seed(0)
    q, k = torch.randn(40, 4, 8).double(), torch.randn(40, groups, 8).double()
    reach, grid = Reach.documents(CU), Grid.documents(CU, 4)
    # Also choices of nothing, of other documents' blocks and of blocks out of reach.
    blocks = Blocks.choose(torch.randint(-2, len(grid), (20, groups, 4)), grid, range(0, 41, 2))
    group_T = torch.arange(40) // 2
    seen = chosen_keys(blocks.ids_QCN, grid.starts_B1, group_T, 4, 40)
    probe = Probe(1, 5, CPU)
    probe.look(0, q, k, reach, 8**-0.5, sinks, in_blocks(blocks))
    none = torch.full((4,), float("-inf")).double() if sinks is None else sinks
    want = by_hand(q, k, [7, 15, 23, 31, 39], seen, none)
    assert measured(probe.table()) == pytest.approx(want)


def test_windows_and_first_tokens():
    where = site()
    layer, given = make({"kind": "window", "window": 5, "first": 2}, where), inputs(40, where)
    probe = Probe(1, 40, CPU)
    run(layer, given, context(CU, probe=probe))
    kept = [1, 1, 1, *(min(n, min(n, 5) + min(2, max(0, n - 5))) / n for n in range(1, 38))]
    assert probe.table()[0]["kept"] == pytest.approx(sum(kept) / 40)
    assert 0 < probe.table()[0]["recall"] < 1
    reach = Reach.documents(CU)
    assert bool(in_reach(reach)(20, 3, 21).all())


def test_ssa_and_gates_are_measured():
    where = site()
    given, probe = inputs(40, where), Probe(2, 4, CPU)
    layer = make({"kind": "ssa", "block": 4, "count": 2}, where)
    ctx = context(CU, probe=probe, layer=1)
    run(layer, given, ctx)
    first, second = probe.table()
    total, weight = ctx.notes.sums["alignment"].tolist()
    assert not first and set(second) == {
        "kept", "recall", "entropy", "sink_share", "gate", "alignment"
    }  # fmt: skip
    assert second["alignment"] == pytest.approx(total / weight)
    assert set(second) < set(MEASURES) and 0 < second["gate"] < 1
    probe = Probe(1, 4, CPU)
    run(make({"kind": "dense"}, where, output_gate="head"), given, context(CU, probe=probe))
    assert set(probe.table()[0]) == {"entropy", "sink_share", "gate"}


@pytest.mark.parametrize(
    "settings",
    [
        {"kind": "indexer", "count": 3, "heads": 2, "dim": 4},
        {"kind": "indexer", "count": 3, "heads": 2, "dim": 4, "attend": "dense"},
        {"kind": "seer", "block": 4, "dim": 4, "count": 3},
        {"kind": "seer", "block": 4, "dim": 4, "count": 3, "form": "block"},
        {"kind": "nsa", "block": 4, "count": 3, "compress_length": 4, "compress_stride": 2},
        {"kind": "moba", "block": 4, "count": 3},
        {"kind": "sharded_heads", "block": 4, "local": 1, "stride": 2},
        {"kind": "infllm_v2", "block": 4, "count": 1, "local": 1, "dense_below": 0},
    ],
    ids=lambda settings: settings["kind"],
)
def test_every_mechanism_tells_what_it_keeps(settings):
    """Also while it learns with dense attention: what it would choose."""
    where, probe = site(), Probe(1, 40, CPU)
    run(make(settings, where), inputs(40, where), context(CU, probe=probe))
    found = probe.table()[0]
    assert 0 < found["recall"] < 1 and 0 < found["kept"] < 1 and found["entropy"] > 0
