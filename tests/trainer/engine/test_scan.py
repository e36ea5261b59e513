import time
import pytest
from support.cases import train
from support.mechanism_cases import MECHANISMS
from support.tiny import tiny_run
from longspan.tests.trainer.engine.test_layouts import relative, ODD


@pytest.mark.parametrize("other", ["tensor", "pipeline"])
@pytest.mark.parametrize("name", MECHANISMS)
def test_x(worlds, name, other):
    attention = {"stage__attention": MECHANISMS[name]}
    want = worlds(1).run(train, tiny_run(ODD, **attention), 20, 1e-3)[0]
    b = time.time()
    found = worlds(4).run(
        train,
        tiny_run(
            ODD,
            **attention,
            recompute="full",
            stage__parallel={other: 2, "context": 2, "exchange": "fetch", "layout": "balanced"},
        ),
        20,
        1e-3,
    )
    print("SCAN", name, other, relative(found[0], want), time.time() - b, flush=True)
