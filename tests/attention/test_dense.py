import torch
from longspan.attention.context import Context
from longspan.attention.documents import Documents
from longspan.attention.mechanism import make_mechanism
from longspan.attention.mechanism_settings import DenseSettings
from longspan.attention.notes import Notes
from longspan.attention.rope import Rope
from longspan.attention.settings import RopeSettings
from longspan.kernels.reach import Reach
from longspan.parallel.exchange import make_exchange
from longspan.parallel.layout import make_layout
from longspan.parallel.simulation import simulate
from reference.attention import naive_attend
from reference.rope import naive_rope
from reference.visibility import visible_in
from support.mechanisms import site

DOCUMENTS = [0, 9, 10, 32]
POSITIONS = torch.cat([torch.arange(9), torch.arange(1), torch.arange(22)])


def test_dense_is_rope_then_attention_on_any_number_of_ranks():
    torch.manual_seed(0)
    q, k, v = (torch.randn(32, heads, 8) for heads in (4, 2, 2))
    reach = Reach.documents(DOCUMENTS)
    rope = RopeSettings(base=500.0)
    turned = [naive_rope(x, POSITIONS, rope, 32) for x in (q, k)]
    want, _ = naive_attend(*turned, v, visible_in(reach.first_T, reach.last_T, len(v)), 8**-0.5)
    mechanism = make_mechanism(DenseSettings(), site())
    assert not mechanism.needs_hidden and not list(mechanism.parameters())
    for ranks in (1, 2, 4):
        layout = make_layout("zigzag", 32, ranks)

        def body(transport, layout=layout):
            index = layout.index(transport.rank)
            ctx = Context(
                cp=make_exchange("all_gather", layout, transport),
                documents=Documents(DOCUMENTS, index),
                rope=Rope(rope, 32),
                positions_T=POSITIONS[index],
                positions_S=POSITIONS[index],
                weights_T=torch.ones(len(index)),
                notes=Notes(),
            )
            return mechanism(None, q[index], k[index], v[index], ctx)

        out = torch.cat(simulate(ranks, body))
        order = torch.cat([layout.index(rank) for rank in range(ranks)]).argsort()
        torch.testing.assert_close(out[order].double(), want, atol=1e-5, rtol=1e-5)
