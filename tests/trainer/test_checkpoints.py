import json

import pytest
from longspan.attention.settings import RopeSettings
from longspan.errors import CheckpointError
from longspan.trainer.checkpoints import refuse_other_rope


def test_a_stage_does_not_go_on_with_another_rope(tmp_path):
    rope = RopeSettings(base=500.0)
    state = {"rope": rope.model_dump(mode="json")}
    (tmp_path / "state.json").write_text(json.dumps(state))
    refuse_other_rope(tmp_path, rope)
    with pytest.raises(CheckpointError, match="another RoPE than the stage's base 700"):
        refuse_other_rope(tmp_path, RopeSettings(base=700.0))
