"""What `longspan submit` says about Weights & Biases: keys of this machine do not travel."""

import pytest

SECRET = "hunter2-hunter2"


@pytest.mark.parametrize(("tracking", "secret", "words"), [
    ("wandb", True, "Weights & Biases, project longspan, with the key in /keys/wandb on its nodes"),
    ("wandb", False, "Weights & Biases, project longspan, with a key of its nodes' own"),
    ("{wandb: auto, tensorboard: true}", True,
     "Weights & Biases, project longspan, with the key in /keys/wandb on its nodes and TensorBoard "
     "files in the run's folder"),
    ("{wandb: offline, project: mine}", False,
     "Weights & Biases, project mine, offline: `wandb sync` uploads it from the run's folder"),
    ("tensorboard", True, "TensorBoard files in the run's folder"),
    ("none", True, "none"),
])  # fmt: skip
def test_the_plan_says_what_becomes_of_metrics(longspan, lab, dashboard, tracking, secret, words):
    lab(secrets={"WANDB_API_KEY": "/keys/wandb"} if secret else {})
    code, out, err = longspan("submit", "smoke", "--dry-run", "--set", f"tracking={tracking}")
    assert code == 0 and f"\ntracking {words}\n" in out
    assert ("tracking:" in err) == (tracking == "wandb" and not secret)


def test_a_key_that_stays_here_is_a_warning(longspan, lab, dashboard, user, monkeypatch):
    """With auto nothing would be tracked without a word, and online would end at once."""
    submit = ("submit", "smoke", "--dry-run")
    assert longspan(*submit)[::2] == (0, "")
    (user / ".netrc").write_text(f"machine api.wandb.ai login user password {SECRET}\n")
    code, _, err = longspan(*submit)
    assert code == 0 and err.startswith("warning: tracking: cluster lab has no Weights & Biases")
    assert "as WANDB_API_KEY in `secrets` of lab in clusters.yaml" in err
    assert "(environment, ~/.netrc), nothing is tracked" in err
    assert "the run will not start" in longspan(*submit, "--set", "tracking=wandb")[2]
    assert "tracking:" not in longspan(*submit, "--set", "tracking=none")[2]
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert "WANDB_MODE=offline holds on this machine, not on" in longspan(*submit)[2]
    lab(secrets={"WANDB_API_KEY": "/keys/wandb"})
    assert longspan(*submit)[::2] == (0, "")
