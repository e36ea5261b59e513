from itertools import pairwise

import pytest
import torch
from longspan.attention.layer_settings import AttentionSettings
from pydantic import ValidationError
from reference.window import naive_layer, naive_window
from support.accuracy import assert_as_good_as
from support.mechanisms import context, gradients, halves, inputs, make, run, site

CU = [0, 1, 4, 11, 48, 85]
OPTIONS = [
    {},
    {"sinks": True},
    {"output_gate": "head"},
    {"output_gate": "channel", "sinks": True},
    {"scale": 0.9, "log_scale_from": 5},
    {"scale": 0.2, "log_scale_from": 2, "sinks": True, "output_gate": "head"},
]


def window(size, first=0):
    return {"kind": "window", "window": size, "first": first}


def twin(layer, given, cu, settings, dtype=torch.float64, **options):
    """Output and gradients of hidden, q, k, v and all parameters, by automatic differentiation."""
    leaves = [x.detach().to(dtype).requires_grad_() for x in given.leaves()]
    parameters = {n: p.detach().to(dtype).requires_grad_() for n, p in layer.named_parameters()}
    options = {name: value for name, value in options.items() if name != "sinks"}
    out = naive_layer(
        *leaves,
        cu,
        lambda *_: naive_window(cu, settings["window"], settings["first"]),
        sink_H=parameters.get("sink_H"),
        weight=parameters.get("gate.weight"),
        **options,
    )
    return out.detach(), gradients(out, given.dout.to(dtype), [*leaves, *parameters.values()])


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize(("heads", "groups"), [(2, 2), (4, 2), (4, 1)])
@pytest.mark.parametrize("settings", [window(1), window(6), window(6, 4), window(50, 3)], ids=str)
def test_outputs_and_gradients_equal_the_twin(settings, heads, groups, options):
    where = site(heads, groups)
    layer, given = make(settings, where, **options), inputs(CU[-1], where)
    assert layer.needs_hidden == ("output_gate" in options)
    out, grads = run(layer, given, context(CU))
    want, want_grads = twin(layer, given, CU, settings, **options)
    # Logarithms of positions are in single precision.
    near = {"atol": 2e-6 if "log_scale_from" in options else 1e-10, "rtol": 0}
    torch.testing.assert_close(out, want, **near)
    names = ["hidden", *"qkv", *(name for name, _ in layer.named_parameters())]
    for name, got, expected in zip(names, grads, want_grads, strict=True):
        torch.testing.assert_close(got, expected, **near, msg=lambda m, n=name: n + m)


def test_a_wide_window_is_dense_and_a_narrow_one_is_not():
    where = site()
    given = inputs(CU[-1], where)
    dense = run(make({"kind": "dense"}, where), given, context(CU))
    wide = run(make(window(37), where), given, context(CU))
    joined = run(make(window(5, 32), where), given, context(CU))
    for one, other, third in zip(*([x[0], *x[1]] for x in (dense, wide, joined)), strict=True):
        torch.testing.assert_close(one, other, atol=1e-12, rtol=0)
        torch.testing.assert_close(one, third, atol=1e-12, rtol=0)
    narrow = run(make(window(36), where), given, context(CU))[0]
    assert not torch.allclose(dense[0], narrow)


@pytest.mark.parametrize("first", [0, 3])
def test_a_changed_token_reaches_its_window_only(first):
    where = site()
    layer, given = make(window(6, first), where, output_gate="head", sinks=True), inputs(85, where)
    before = run(layer, given, context(CU))[0]
    for at in (0, 10, 11, 13, 14, 47, 60):
        other = inputs(85, where)
        for x in (other.hidden, other.q, other.k, other.v):
            x[at] += 1.0
        after = run(layer, other, context(CU))[0]
        begin, end = next((a, b) for a, b in pairwise(CU) if a <= at < b)
        stop = end if at - begin < first else min(end, at + 6)
        same = torch.ones(85, dtype=torch.bool)
        same[at:stop] = False
        assert torch.equal(before[same], after[same])
        assert bool((before[~same] != after[~same]).flatten(1).any(1).all())


def test_the_last_rows_alone_are_those_of_the_whole():
    where = site()
    layer = make(window(6, 2), where, **OPTIONS[-1])
    given, rows = inputs(61, where), torch.arange(50, 61)
    whole = run(layer, given, context([0, 61]))[0]
    part = layer(given.hidden, given.q[rows], given.k, given.v, context([0, 61], rows))
    torch.testing.assert_close(part, whole[rows], atol=1e-12, rtol=0)


@pytest.mark.parametrize("gate", ["head", "channel"])
def test_tensor_ranks_together_are_one(gate):
    settings, options = window(6, 2), {"sinks": True, "output_gate": gate}
    where = site(4, 2)
    layer, given = make(settings, where, **options), inputs(85, where)
    out, (dhidden, dq, dk, dv, dsink, dweight) = run(layer, given, context(CU))
    parts = []
    for rank, (half, share) in enumerate(halves(where, given)):
        mine = make(settings, half, **options)
        with torch.no_grad():
            for held, whole in zip(mine.parameters(), layer.parameters(), strict=True):
                held.copy_(whole.chunk(2)[rank])
        parts.append(run(mine, share, context(CU)))
    one, other = ([x[0], *x[1]] for x in parts)
    found = [
        *(torch.cat([one[i], other[i]], 1) for i in (0, 2, 3, 4)),
        *(torch.cat([one[i], other[i]]) for i in (5, 6)),
        one[1] + other[1],
    ]
    for got, expected in zip(found, [out, dq, dk, dv, dsink, dweight, dhidden], strict=True):
        torch.testing.assert_close(got, expected, atol=1e-10, rtol=0)


def test_single_precision_is_as_good_as_one_softmax():
    where, options = site(dtype=torch.float32), {"sinks": True, "output_gate": "channel"}
    settings = window(6, 4)
    layer, given = make(settings, where, **options), inputs(85, where, dtype=torch.float32)
    got = run(layer, given, context(CU))
    plain = twin(layer, given, CU, settings, dtype=torch.float32, **options)
    exact = twin(layer, given, CU, settings, **options)
    columns = zip(*([x[0], *x[1]] for x in (plain, got, exact)), strict=True)
    for naive, mine, want in columns:
        assert_as_good_as(naive, mine, want)


def test_wrong_windows_are_refused():
    for wrong in ({"window": 0}, {"window": 4, "first": -1}, {}):
        with pytest.raises(ValidationError):
            AttentionSettings.model_validate({"mechanism": {"kind": "window", **wrong}})
