"""`longspan submit`: one job for one id, whatever goes wrong, and nothing secret in it."""

import io
import json
import os
import re
import shlex
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml
from longspan.cluster import entry, needs
from longspan.cluster import jobs as jobs_module
from longspan.cluster.jobs import Jobs
from longspan.cluster.registry import Registry
from longspan.errors import ClusterError
from longspan.recipes.loading import load_recipe
from longspan.trainer.run_directory import settings_hash
from longspan.trainer.settings import RunSettings
from support.recorded import leave_run

SECRET = "hunter2-hunter2"
BIG = ("--set", "defaults.batch_tokens=8192", "--set", "defaults.tokens=81920")
ID = r"smoke-\d{6}-[a-z]{6}"


def sent(dashboard) -> dict:
    """The one job that was sent."""
    (request,) = dashboard.posted()
    return json.loads(request.body)


def test_one_command_one_id_and_the_four_that_follow(longspan, lab, dashboard, storage):
    code, out, err = longspan("submit", "smoke", "--set", "seed=9")
    assert (code, err) == (0, "")
    run_id = re.search(rf"^submitted ({ID})$", out, re.MULTILINE)[1]
    plan, commands = out.split("\n\n")
    assert [line.split()[:3] for line in commands.splitlines()[1:]] == [
        ["longspan", "status", run_id], ["longspan", "logs", "-f"],
        ["longspan", "stop", run_id], ["longspan", "resume", run_id],
    ]  # fmt: skip
    words = dict(line.split(maxsplit=1) for line in plan.splitlines())
    assert words == {
        "recipe": "smoke: 2 stages, base at 128, stretch at 256",
        "cluster": "lab",
        "ranks": "2, one per CPU core, on 1 of 2 nodes with 4 CPU cores each",
        "tokens": "8.19K",
        "time": "not known: nothing like it was trained from here yet",
        "folder": f"{storage}/runs/{run_id}",
        "tracking": "Weights & Biases only if its nodes have a key of their own",
    }
    (record,) = Registry().records()
    assert (record.id, record.recipe, record.run_dir) == (run_id, "smoke", words["folder"])
    assert [job.id for job in record.submissions] == [f"{run_id}-1"] == list(dashboard.jobs)


def test_the_job_is_the_driver_with_the_resolved_recipe(longspan, lab, dashboard, storage):
    secrets = {"WANDB_API_KEY": "/etc/a b/key", "HF_TOKEN": "/etc/hf"}
    lab(secrets=secrets, interface="eth0")
    settings = ["--set", "seed=9", "--set", "recovery.grace=90s"]
    assert longspan("submit", "smoke", "--run-id", "mine", *settings)[0] == 0
    job = sent(dashboard)
    assert job["submission_id"] == "mine-1"
    assert job["entrypoint"].startswith("exec python -P -m longspan.cluster.entry ")
    words = shlex.split(job["entrypoint"])
    assert words[5:] == [
        "--run-id", "mine", "--run-dir", f"{storage}/runs/mine", "--name", "smoke",
        "--device", "cpu", "--ranks", "2", "--slots", "4", "--secrets",
        "WANDB_API_KEY=/etc/a b/key", "HF_TOKEN=/etc/hf", "--interface", "eth0",
    ]  # fmt: skip
    run = load_recipe("smoke", ["seed=9", "recovery.grace=90s"]).run()
    assert job["metadata"] == {
        "longspan_run": "mine", "longspan_settings": settings_hash(run)
    }  # fmt: skip
    environment = job["runtime_env"]
    assert environment.keys() == {"env_vars", "py_modules"}
    recipe = environment["env_vars"].pop("LONGSPAN_RECIPE")
    assert RunSettings.model_validate(yaml.safe_load(recipe)) == run
    assert environment["env_vars"] == {"RAY_JOB_STOP_WAIT_TIME_S": "150"}
    (code,) = environment["py_modules"]
    code = zipfile.ZipFile(io.BytesIO(dashboard.packages[code]))
    assert {"longspan/cli.py", "longspan/cluster/submission.py"} <= set(code.namelist())


def test_the_entry_becomes_the_driver_and_hands_the_recipe_on(tmp_path):
    """A recipe of any length; the ranks' environment is without it."""
    recipe = "# " + "x" * 100_000 + "\nend"
    cluster = tmp_path / "longspan" / "cluster"
    cluster.mkdir(parents=True)
    for module in (entry, needs):
        (cluster / Path(module.__file__).name).write_text(Path(module.__file__).read_text())
    (cluster / "driver.py").write_text(
        "import os, sys\nfrom pathlib import Path\n"
        "print(os.getpid(), os.getcwd(), 'LONGSPAN_RECIPE' in os.environ, sys.argv[1:-1])\n"
        "print(Path(sys.argv[-1]).read_text('utf-8'), end='')\nsys.exit(75)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "longspan.cluster.entry", "--run-id", "a b"],
        env={**os.environ, "PYTHONPATH": str(tmp_path), "LONGSPAN_RECIPE": recipe},
        stdout=subprocess.PIPE,
        text=True,
    )
    out, _ = process.communicate()
    first, rest = out.split("\n", 1)
    assert first == f"{process.pid} {tmp_path} False ['--run-id', 'a b', '--recipe']"
    assert rest == recipe and process.returncode == 75


def test_a_node_that_cannot_start_the_driver_says_what_it_lacks(tmp_path):
    """With nothing but the standard library."""
    (tmp_path / "longspan").symlink_to(Path(entry.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", f"import sys; sys.path.insert(0, {str(tmp_path)!r}); "
         "from longspan.cluster.entry import main; main()", "--run-id", "a"],
        env={"LONGSPAN_RECIPE": "x: 1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "where the job started, lacks PyYAML, pydantic, ray" in done.stderr
    assert "fix: on every node: pip install 'megatron-core>=0.16.1,<0.20' numpy" in done.stderr


def test_a_dry_run_checks_everything_and_sends_nothing(longspan, lab, dashboard):
    code, out, _ = longspan("submit", "smoke", "--dry-run")
    assert code == 0 and "nothing was sent (--dry-run)" in out and "code     longspan-" in out
    assert {request.method for request in dashboard.requests} == {"GET"}
    assert Registry().records() == []
    assert longspan("submit", "smoke", "--dry-run", "--set", "ranks=64")[0] == 2


def test_a_url_needs_no_file(longspan, dashboard, storage, monkeypatch):
    monkeypatch.setenv("RAY_AUTH_TOKEN", dashboard.token)
    url = dashboard.address
    assert longspan("submit", "smoke", "--cluster", url, "--storage", str(storage))[0] == 0
    (record,) = Registry().records()
    assert record.cluster.address == record.cluster.name == url
    assert longspan("status", record.id)[0] == 0


@pytest.mark.parametrize("name", ["RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"])
def test_an_address_in_the_environment_sends_it_nowhere_else(
    longspan, lab, dashboard, monkeypatch, name
):
    monkeypatch.setenv(name, "http://127.0.0.1:1")
    assert longspan("submit", "smoke")[0] == 0 and dashboard.jobs


def test_the_same_id_twice_is_one_run(longspan, lab, dashboard):
    assert longspan("submit", "smoke", "--run-id", "mine")[0] == 0
    code, out, err = longspan("submit", "smoke", "--run-id", "mine")
    assert (code, err) == (0, "")
    assert out.startswith("mine was submitted before; nothing was sent\n\nmine: running\n")
    assert len(dashboard.posted()) == 1
    dashboard.end(dashboard.jobs["mine-1"], "FAILED", 1)
    code, out, _ = longspan("submit", "smoke", "--run-id", "mine")
    assert code == 0 and "mine: failed" in out and "longspan resume mine" in out
    assert len(dashboard.posted()) == 1


def test_the_same_id_for_another_recipe_is_refused(longspan, lab, dashboard, tmp_path, monkeypatch):
    assert longspan("submit", "smoke", "--run-id", "mine")[0] == 0
    refused = longspan("submit", "smoke", "--run-id", "mine", "--set", "seed=2")
    assert refused[0] == 2 and "a run of another recipe or of other settings" in refused[2]
    assert "give another --run-id" in refused[2]
    # Also from a machine that has no record of it.
    monkeypatch.setenv("LONGSPAN_HOME", str(tmp_path / "elsewhere"))
    assert longspan("submit", "smoke", "--run-id", "mine", "--set", "seed=2")[0] == 2
    assert "submitted before" in longspan("submit", "smoke", "--run-id", "mine")[1]
    assert longspan("status", "mine")[0] == 0
    assert len(dashboard.posted()) == 1


def test_an_id_of_a_run_in_another_place_is_refused(longspan, lab, dashboard, tmp_path):
    assert longspan("submit", "smoke", "--run-id", "mine")[0] == 0
    lab(storage=str(tmp_path / "other"))
    code, _, err = longspan("submit", "smoke", "--run-id", "mine")
    assert code == 2 and "mine is a run in " in err
    leave_run(tmp_path / "here")
    assert longspan("resume", str(tmp_path / "here"), "--from", "99")[0] == 2
    (local,) = [record for record in Registry().records() if record.cluster is None]
    code, _, err = longspan("submit", "smoke", "--run-id", local.id)
    assert code == 2 and "is a run of this machine" in err
    assert len(dashboard.posted()) == 1


def test_a_client_that_died_before_it_sent_the_job_can_send_it_again(
    longspan, lab, dashboard, monkeypatch
):
    def die(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Jobs, "submit", die)
        assert longspan("submit", "smoke", "--run-id", "mine")[0] == 130
    assert Registry().get("mine") is not None and not dashboard.jobs
    code, out, _ = longspan("submit", "smoke", "--run-id", "mine")
    assert code == 0 and "submitted mine\n" in out
    assert list(dashboard.jobs) == ["mine-1"]
    assert [job.id for job in Registry().get("mine").submissions] == ["mine-1"]


@pytest.mark.parametrize("loses", ["break", "gateway"])
def test_an_answer_that_was_lost_starts_nothing_twice(longspan, lab, dashboard, loses):
    """The job arrived, and the connection broke before the cluster could say so."""
    dashboard.loses = loses
    assert longspan("submit", "smoke", "--run-id", "mine")[0] == 0
    assert longspan("submit", "smoke", "--run-id", "mine")[1].startswith("mine was submitted bef")
    assert list(dashboard.jobs) == ["mine-1"]


def test_a_request_that_may_have_been_heard(longspan, lab, dashboard, monkeypatch):
    """No answer, and no job yet: it may still come, so the run is kept in mind."""
    dashboard.loses = "late"
    code, _, err = longspan("submit", "smoke", "--run-id", "mine")
    assert code == 2 and "broke off the connection" in err
    assert "whether mine was started is not known" in err
    assert "--run-id mine starts it at most once" in err
    assert "mine: not known" in longspan("status", "mine")[1]
    dashboard.arrive()
    assert longspan("status", "mine")[1].startswith("mine: running\n")
    assert longspan("submit", "smoke", "--run-id", "mine")[1].startswith("mine was submitted bef")
    assert list(dashboard.jobs) == ["mine-1"]


def test_a_head_that_goes_down_meanwhile(longspan, lab, dashboard, monkeypatch):
    def go_down(*_, **__):
        dashboard.stop()
        raise ClusterError("the connection broke", "")

    monkeypatch.setattr(Jobs, "submit", go_down)
    code, _, err = longspan("submit", "smoke", "--run-id", "mine")
    assert code == 2 and "whether mine was started is not known" in err
    assert Registry().get("mine") is not None


def test_a_head_that_has_just_started_is_waited_for(longspan, lab, dashboard, monkeypatch):
    monkeypatch.setattr(jobs_module, "_POLL_S", 0.01)
    dashboard.not_ready = 3
    assert longspan("submit", "smoke")[0] == 0 and len(dashboard.posted()) == 4
    monkeypatch.setattr(jobs_module, "_READY_S", 0.0)
    dashboard.not_ready = 3
    code, _, err = longspan("submit", "smoke", "--run-id", "mine")
    assert code == 2 and "No available agent to submit job" in err
    assert Registry().get("mine") is None


def test_a_job_that_the_cluster_refuses_leaves_no_record(longspan, lab, dashboard):
    dashboard.refuses = f"no space, see https://me:{SECRET}@host"
    code, _, err = longspan("submit", "smoke", "--run-id", "mine")
    assert code == 2 and "cannot start mine-1: ValueError: no space" in err
    assert SECRET not in err and Registry().records() == []


def test_a_job_of_the_same_name_that_is_not_ours(longspan, lab, dashboard):
    dashboard.jobs["mine-1"] = {"submission_id": "mine-1", "status": "RUNNING", "metadata": {}}
    code, _, err = longspan("submit", "smoke", "--run-id", "mine")
    assert code == 2 and "has a job mine-1 that is not one of this run" in err


def test_what_the_recipe_gets_wrong_is_told_at_once(longspan, lab, dashboard, storage):
    text = {"kind": "text", "paths": ["data/a.txt", "/nowhere/b.txt"]}
    changes = [f"stages.0.data.sources=[{json.dumps(text)}]", "ranks=64", "model.hidden=65"]
    code, out, err = longspan("submit", "smoke", *(x for c in changes for x in ("--set", c)))
    assert (code, out) == (2, "")
    assert err.startswith("error: recipe smoke has ")
    assert "ranks: got 64; expected at most 8 CPU cores: cluster lab has 2 nodes with 4 CPU" in err
    assert "model.hidden: got 65" in err and "got data/a.txt; expected an absolute path" in err
    assert "/nowhere/b.txt" in err
    assert not dashboard.posted() and not dashboard.packages


def test_gpus_count_where_there_are_any(longspan, lab, dashboard):
    dashboard.nodes = [(0, 64), (4, 16), (4, 16)]
    code, out, err = longspan("submit", "smoke", "--dry-run", *BIG, "--set", "ranks=8")
    assert code == 0, err
    assert "ranks    8, one per GPU, on 2 nodes with 4 GPUs each" in out
    code, _, err = longspan("submit", "smoke", "--set", "ranks=16")
    assert code == 2
    assert "at most 8 GPUs: cluster lab has 2 nodes with 4 GPUs each, says the cluster" in err
    assert "for a cluster that grows, nodes: of lab in clusters.yaml" in err


def test_the_file_says_what_a_cluster_can_grow_to(longspan, lab, dashboard):
    dashboard.nodes = [(0, 2)]
    lab(nodes={"count": 4, "gpus": 8})
    code, out, err = longspan("submit", "smoke", "--dry-run", *BIG, "--set", "ranks=32")
    assert code == 0, err
    assert "of 4 nodes with 8 GPUs each (clusters.yaml), 1 node with 2 CPU cores is up now" in err
    assert "ranks    32, one per GPU, on 4 nodes with 8 GPUs each" in out
    code, _, err = longspan("submit", "smoke", "--set", "ranks=64")
    assert code == 2 and "at most 32 GPUs: cluster lab has 4 nodes" in err
    lab(nodes={"count": 4, "gpus": 8, "cores": 4})  # a rank takes a core beside its GPU
    code, _, err = longspan("submit", "smoke", "--set", "ranks=32")
    assert code == 2 and "at most 16 GPUs: cluster lab has 4 nodes with 4 GPUs each" in err


def test_groups_that_talk_much_are_not_split(longspan, lab, dashboard):
    """Of 6 GPUs a node can use 4 where 4 ranks belong together."""
    dashboard.nodes = [(6, 16), (6, 16)]
    split = ("--set", "defaults.parallel={tensor: 2, context: 2}")
    split += ("--set", "stages.1.parallel={tensor: 2, context: 2}")
    code, _, err = longspan("submit", "smoke", *BIG, *split, "--set", "ranks=12")
    assert code == 2
    assert "at most 8: cluster lab has 2 nodes with 6 GPUs each, says the cluster" in err
    assert "and 4 ranks (tensor x context) stay on one node" in err
    code, out, err = longspan("submit", "smoke", "--dry-run", *BIG, *split, "--set", "ranks=4")
    assert code == 0 and "ranks    4, one per GPU, on 1 of 2 nodes with 6 GPUs each" in out, err


def test_fewer_ranks_are_a_warning_where_the_recipe_allows_them(longspan, lab, dashboard):
    ranks = ("--set", "ranks=16", "--set", "ranks_at_least=4")
    code, out, err = longspan("submit", "smoke", "--dry-run", *BIG, *ranks)
    assert code == 0 and "ranks    16, " in out
    assert "cluster lab has 2 nodes with 4 CPU cores each, says the cluster; the run would" in err
    assert "begin with 8 of 16 ranks (ranks_at_least)" in err
    dashboard.nodes = [(0, 2)]
    code, _, err = longspan("submit", "smoke", *BIG, *ranks)
    assert code == 2 and "ranks: got 16; expected at most 2 CPU cores" in err


@pytest.mark.parametrize(("nodes", "words"), [
    ([(0, 4), (0, 2)], "2 nodes with 4, 2 CPU cores"), ([(0, 4)], "1 node with 4 CPU cores"),
    ([(4, 1), (4, 8)], "2 nodes with 4, 1 GPUs"),
])  # fmt: skip
def test_nodes_in_words(longspan, lab, dashboard, nodes, words):
    dashboard.nodes = nodes
    assert words in longspan("submit", "smoke", *BIG, "--set", "ranks=64")[2]


def test_data_that_only_the_nodes_see_is_a_warning(longspan, lab, dashboard):
    text = {"kind": "text", "paths": ["/nowhere/b.txt"]}
    source = ["--set", f"stages.0.data.sources=[{json.dumps(text)}]"]
    assert longspan("submit", "smoke", "--dry-run", *source)[0] == 2
    lab(storage="/only/on/the/nodes")
    code, out, err = longspan("submit", "smoke", "--dry-run", *source)
    assert code == 0 and "cannot be checked from here" in err and "/nowhere/b.txt" in err
    assert "(not visible from here: its nodes have to see it)" in out
    assert longspan("submit", "smoke", "--dry-run", *source, "--set", "model.hidden=65")[0] == 2


def test_no_secret_travels_with_a_run(longspan, lab, dashboard, user, monkeypatch, tmp_path):
    """A key in the environment, in the home directory and in the working directory."""
    monkeypatch.setenv("WANDB_API_KEY", SECRET)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    (user / ".netrc").write_text(f"machine api.wandb.ai login user password {SECRET}\n")
    (user / ".env").write_text(f"KEY={SECRET}\n")
    (user / "recipe.yaml").write_text(f"base: smoke\n# {SECRET}\n")
    lab(secrets={"WANDB_API_KEY": "/etc/longspan/wandb"})
    shown = "".join(map(str, longspan("submit", "./recipe.yaml", "--run-id", "mine")))
    dashboard.output["mine-1"] += f"login with {SECRET}\nHF_TOKEN={SECRET}\n"
    for verb in (["status", "mine"], ["logs", "mine"], ["logs", "-f", "mine"], ["stop", "mine"],
                 ["resume", "mine"], ["runs"], ["status", "--json"]):  # fmt: skip
        if verb == ["logs", "-f", "mine"]:
            dashboard.end(dashboard.jobs["mine-1"], "FAILED", 1)
        shown += "".join(map(str, longspan(*verb)))
    assert len(dashboard.posted()) == 2
    files = [file.read_bytes() for file in (tmp_path / "records").rglob("*") if file.is_file()]
    assert len(files) == 2
    held = [shown.encode(), *files, json.dumps(dashboard.jobs).encode()]
    held += [request.body for request in dashboard.requests]
    held += [json.dumps(request.headers).encode() for request in dashboard.requests]
    for package in dashboard.packages.values():
        archive = zipfile.ZipFile(io.BytesIO(package))
        held += [archive.read(name) for name in archive.namelist()]
    assert not [part for part in held if SECRET.encode() in part]
    # The token is in a header, and nowhere else.
    token = dashboard.token.encode()
    bodies = [shown.encode(), *files, *(request.body for request in dashboard.requests)]
    assert not [part for part in bodies if token in part]


def test_a_recipe_with_a_credential_is_refused(longspan, lab, dashboard):
    code, out, err = longspan("submit", "smoke", "--set", f"tracking.project=x?token={SECRET}")
    assert code == 2 and "no credential" in err and SECRET not in out + err
    assert not dashboard.posted()


def test_a_recipe_with_a_key_of_this_machine_is_refused(longspan, lab, dashboard, monkeypatch):
    """Under a name that says nothing: only the environment tells what it is."""
    monkeypatch.setenv("STORE_SECRET", SECRET)
    for verb in (["submit"], ["render", "slurm", "--nodes", "1", "--cores", "4"]):
        code, out, err = longspan(*verb, "smoke", "--set", f"tracking.project=of-{SECRET}")
        assert code == 2 and "tracking.project holds a credential" in err
        assert SECRET not in out + err
    assert not dashboard.posted() and Registry().records() == []
