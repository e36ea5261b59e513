"""What each rank does in the tests of exchanges; spawned processes import it by name."""

import torch
from longspan.attention.pooling import pool_keys
from longspan.kernels.mirror import Mirror
from longspan.kernels.reach import Reach
from longspan.kernels.windows import Windows
from longspan.parallel.exchange import make_exchange
from longspan.parallel.layout import make_layout
from longspan.parallel.transport import DistributedTransport, Incoming, Outgoing

SCALE = 0.4
LENGTH = 96
DOCUMENTS = [0, 1, 20, 50, 96]
EXCHANGES = {
    "ring": {},
    "double_ring": {"inner": 2},
    "all_gather": {},
    "fetch": {},
    "ulysses": {},
    "two_d_ring": {"kind": "two_d", "inner": 2, "across": "ring"},
    "two_d_all_gather": {"kind": "two_d", "inner": 2, "across": "all_gather"},
}
KEEPING = {
    f"{name}_keeps": {"kind": name, **how, "keeps": True}
    for name, how in EXCHANGES.items()
    if name != "ulysses"
}


def whole_tensors(dtype=torch.float64, length=LENGTH):
    """q, k, v and the output's gradient of the whole sequence; the value dim is smaller."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(length, 8, 6), (length, 2, 6), (length, 2, 4), (length, 8, 4)]
    return [
        torch.randn(shape, dtype=torch.float64, generator=generator).to(dtype) for shape in shapes
    ]


def exchange_of(name, layout, transport):
    """The exchange of `EXCHANGES`; a node holds no more ranks than there are."""
    how = dict((EXCHANGES | KEEPING)[name])
    how["inner"] = min(how.get("inner", 1), layout.ranks)
    return make_exchange(how.pop("kind", name), layout, transport, **how)


def attend_on_rank(transport, kind, layout, reach, tensors):
    """This rank's rows of output, dq, dk and dv."""
    index = layout.index(transport.rank if transport else 0)
    q, k, v = (x[index].clone().requires_grad_() for x in tensors[:3])
    exchange = exchange_of(kind, layout, transport)
    out = exchange.attend(q, k, v, reach.rows(index), scale=SCALE)[0]
    return out.detach(), *torch.autograd.grad(out, (q, k, v), tensors[3][index])


def together(layout, results):
    """The ranks' rows in global order."""
    index = torch.cat([layout.index(rank) for rank in range(layout.ranks)])
    return [torch.cat(parts)[index.argsort()] for parts in zip(*results, strict=True)]


def gloo_attend(kind, layout_kind, window):
    """One real rank of `attend_on_rank` in fp32."""
    transport = DistributedTransport()
    layout = make_layout(layout_kind, LENGTH, transport.size)
    reach = Reach.documents(DOCUMENTS, window)
    return attend_on_rank(transport, kind, layout, reach, whole_tensors(torch.float32))


def gloo_transport(dtype):
    """What one real rank receives of every kind of transfer, two trades under way at once."""
    transport = DistributedTransport()
    peer = 1 - transport.rank
    number = torch.full((2 + transport.rank, 3), float(transport.rank), dtype=dtype)
    coming = Incoming(peer, 2 + peer, number)
    first = transport.trade([Outgoing(peer, number), Outgoing(peer, number + 10)], [coming, coming])
    # Only one of the two sends, and nothing has no message.
    sends = [Outgoing(peer, number + 20)] if transport.rank else [Outgoing(peer, number[:0])]
    second = transport.trade(sends, [Incoming(peer, 3 if peer else 0, number)])
    traded = [x.mean().item() if len(x) else None for x in (*first.wait(), *second.wait())]
    (gathered,) = transport.all_gather(number[:2].T).wait()
    rows = torch.arange(transport.size, dtype=dtype)[:, None].expand(-1, 4) + transport.rank
    (summed,) = transport.reduce_scatter(rows).wait()
    return traded, gathered[:, 0, 0].tolist(), summed.tolist()


def pooled_on_rank(layout, x, windows, how):
    """What makes all windows of the whole tensor on a rank, each by its owner."""

    def body(transport):
        exchange = make_exchange("ring", layout, transport)
        size = windows.length, windows.stride, windows.keys
        of_rank = Windows(windows.starts_P, windows.stops_P, *size)
        own = x[layout.index(transport.rank)]
        return exchange.pooled(own, of_rank, lambda k, some: pool_keys(k, some, how))

    return body


def gloo_pooled(x, index_N):
    """One real rank's windows and entries, and the gradient of its tokens."""
    transport = DistributedTransport()
    layout = make_layout("zigzag", LENGTH, transport.size)
    index = layout.index(transport.rank)
    own, exchange = x[index].requires_grad_(), make_exchange("ring", layout, transport)
    windows, make = Windows.documents(DOCUMENTS, 6, 2), lambda k, w: pool_keys(k, w, "mean")
    outs = exchange.pooled(own, windows, make), exchange.gather_some(own, Mirror(index_N))
    (grad,) = torch.autograd.grad(outs, own, [torch.ones_like(out) for out in outs])
    return [out.detach() for out in outs], (grad, index)
