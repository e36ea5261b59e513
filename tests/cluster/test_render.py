"""Rendered manifests and scripts: as the golden files have them, valid, and without secrets.

`python tests/cluster/test_render.py` writes the golden files anew; look at what it changes.
"""

import json
import subprocess
from dataclasses import replace
from pathlib import Path

import jsonschema
import pytest
import yaml
from longspan.cluster.render import k8s
from longspan.cluster.render.k8s import job_name
from longspan.cluster.render.order import Order, Wanted, label, take
from longspan.cluster.render.slurm import render_slurm
from longspan.errors import LongspanError, RunError
from longspan.recipes.loading import load_recipe

HERE = Path(__file__).parent
SCHEMA = json.loads((HERE / "rayjob_schema.json").read_text())
ORDER = Order(
    run_id="stretch-260102-abcdef",
    name="stretch",
    text="# The resolved recipe of stretch.\nseed: 1234\nranks: 16\n",
    ranks=16,
    nodes=2,
    gpus=8,
    cores=96,
    storage="/shared/longspan",
    grace_s=600,
    secrets={"WANDB_API_KEY": "/run/secrets/wandb"},
    interface="eth0",
)
PLAIN = replace(ORDER, run_id="smoke-1", name="smoke", ranks=1, nodes=1, gpus=0, cores=2,
                secrets={}, interface=None)  # fmt: skip
CASES = {
    "rayjob.yaml": lambda: k8s.render_k8s(ORDER, "registry.example/longspan:1", "scratch"),
    "rayjob_plain.yaml": lambda: k8s.render_k8s(PLAIN, "longspan:1", "longspan"),
    "slurm.sh": lambda: render_slurm(ORDER),
    "slurm_plain.sh": lambda: render_slurm(PLAIN),
    "slurm_torchrun.sh": lambda: render_slurm(ORDER, ray=False),
}


@pytest.fixture(autouse=True)
def version(monkeypatch):
    monkeypatch.setattr(k8s, "__version__", "1.2.3")


@pytest.mark.parametrize("name", CASES)
def test_what_is_rendered_is_the_golden_file(name):
    assert CASES[name]() == (HERE / "golden" / name).read_text()


@pytest.mark.parametrize("name", [name for name in CASES if name.endswith(".sh")])
def test_scripts_are_bash(name, tmp_path):
    script = tmp_path / "script.sh"
    script.write_text(CASES[name]())
    done = subprocess.run(["bash", "-n", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stderr == ""
    script.write_text(CASES[name]().replace("trap 'stop 0' TERM", "trap 'stop 0' TERM ("))
    assert subprocess.run(["bash", "-n", script], capture_output=True, check=False).returncode


@pytest.mark.parametrize("name", ["rayjob.yaml", "rayjob_plain.yaml"])
def test_manifests_are_rayjobs(name):
    recipe, job = yaml.safe_load_all(CASES[name]())
    jsonschema.validate(job, SCHEMA)
    assert recipe["kind"] == "ConfigMap"
    for pod in pods(job):
        mounted = {mount["name"] for mount in pod["containers"][0]["volumeMounts"]}
        assert mounted == {volume["name"] for volume in pod["volumes"]}


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("metadata", "name"), "3b-long"), (("metadata", "name"), "a" * 48),
        (("spec", "backoffLimit"), "2"), (("spec", "retries"), 2),
        (("spec", "entrypoint"), ["ray"]),
        (("spec", "rayClusterSpec", "authOptions", "mode"), "password"),
        (("spec", "rayClusterSpec", "rayVersion"), "2.51.1"),
        (("spec", "rayClusterSpec", "headGroupSpec", "rayStartParams", "num-cpus"), 0),
        (("spec", "rayClusterSpec", "headGroupSpec", "serviceType"), "LoadBalancer"),
        (("spec", "rayClusterSpec", "workerGroupSpecs", 0, "template", "spec", "volumes", 0), {}),
        (("spec", "rayClusterSpec", "workerGroupSpecs", 0, "groupName"), None),
    ],
)  # fmt: skip
def test_manifests_with_mistakes_are_none(place, value):
    _, job = yaml.safe_load_all(CASES["rayjob.yaml"]())
    node = job
    for key in place[:-1]:
        node = node[key]
    node[place[-1]] = value
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(job, SCHEMA)


def test_a_driver_that_fails_is_started_again_a_few_times_only():
    """Each time on a new cluster, with the same words: the run's folder says where it goes on."""
    text = CASES["rayjob.yaml"]()
    _, job = yaml.safe_load_all(text)
    assert job["spec"]["backoffLimit"] == 2 and ", 2 times at most." in text
    assert "kubectl replace --force -f FILE" in text
    assert "--from" not in job["spec"]["entrypoint"]


def pods(job):
    cluster = job["spec"]["rayClusterSpec"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    return [group["template"]["spec"] for group in groups]


def test_a_manifest_asks_for_the_nodes_of_the_run_and_opens_nothing():
    _, job = yaml.safe_load_all(CASES["rayjob.yaml"]())
    head, workers = pods(job)
    group = job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]
    assert group["replicas"] == 2
    resources = workers["containers"][0]["resources"]
    assert resources["limits"] == {"cpu": "96", "nvidia.com/gpu": "8"}
    assert "nvidia.com/gpu" not in head["containers"][0]["resources"]["limits"]
    text = CASES["rayjob.yaml"]()
    for word in (
        "hostNetwork",
        "hostPort",
        "NodePort",
        "LoadBalancer",
        "dashboard-host",
        "0.0.0.0",
    ):
        assert word not in text


def test_the_driver_gets_secrets_by_path_and_its_recipe_from_the_manifest():
    recipe, job = yaml.safe_load_all(CASES["rayjob.yaml"]())
    assert recipe["data"]["recipe.yaml"] == ORDER.text
    entrypoint = job["spec"]["entrypoint"]
    assert "--secrets WANDB_API_KEY=/run/secrets/wandb --interface eth0" in entrypoint
    from longspan.cluster.driver import _parse

    # The driver reads them too, on the head.
    for pod in pods(job):
        mounts = pod["containers"][0]["volumeMounts"]
        assert [m["subPath"] for m in mounts if m["mountPath"] == "/run/secrets/wandb"] == [
            "WANDB_API_KEY"
        ]
    options, file = _parse(entrypoint.split()[5:])
    assert str(file) == "/etc/longspan/recipe.yaml" and options.run_id == ORDER.run_id


def test_no_value_of_a_secret_is_rendered(monkeypatch):
    key = "0123456789abcdef" * 2
    asked = wanted(nodes=2, cores=1, changes=[f"tracking.project=of-{key}"])
    assert key in take(asked).text  # nobody knows what it is
    monkeypatch.setenv("HF_TOKEN", key)
    with pytest.raises(
        RunError, match="holds a credential, that of the environment variable HF_TOKEN"
    ) as caught:
        take(asked)
    assert key not in str(caught.value)
    assert key not in render_slurm(take(wanted(nodes=2, cores=1)))


def test_torchrun_needs_ranks_that_divide():
    with pytest.raises(RunError, match="15 ranks do not divide into 2 nodes") as caught:
        render_slurm(replace(ORDER, ranks=15), ray=False)
    assert caught.value.fix == "--nodes 3, other ranks, or leave out --no-ray"
    assert "--nproc-per-node=6" in render_slurm(replace(ORDER, ranks=12), ray=False)
    script = render_slurm(replace(ORDER, ranks=15, most_nodes=4), ray=False)
    assert "#SBATCH --nodes=3\n" in script and "--nnodes=3 --nproc-per-node=5" in script
    assert "#SBATCH --nodes=2\n" in render_slurm(replace(ORDER, ranks=15, most_nodes=4))


def test_torchrun_splits_no_group_over_nodes():
    """Ray's driver puts 8 and 4 ranks on two nodes of 8; torchrun could only put 6 on each."""
    sizes = ["ranks=12", "stages.0.batch_tokens=12K", "stages.1.batch_tokens=12K",
             "stages.1.parallel={context: 4}"]  # fmt: skip
    order = take(Wanted("quickstart", sizes, storage="/shared", nodes=2, gpus=8))
    assert (order.nodes, order.groups) == (2, {"stages.0.parallel": 1, "stages.1.parallel": 4})
    with pytest.raises(RunError) as caught:
        render_slurm(order, ray=False)
    assert caught.value.what == (
        "stages.1.parallel: groups of 4 ranks (tensor x context) stay on one node, and torchrun "
        "puts 6 on each of 2 nodes"
    )
    assert caught.value.fix == "--nodes 3, other ranks, or leave out --no-ray"
    order = take(Wanted("quickstart", sizes, storage="/shared", nodes=3, gpus=8))
    assert "--nnodes=3 --nproc-per-node=4" in render_slurm(order, ray=False)
    # A context group that no node has room for is spread anyway.
    order = take(Wanted("quickstart", sizes, storage="/shared", nodes=6, gpus=2))
    assert "--nnodes=6 --nproc-per-node=2" in render_slurm(order, ray=False)


def test_a_pattern_of_interfaces_is_for_nccl_alone():
    """Gloo would look for an interface of that name."""
    script = render_slurm(replace(ORDER, interface="^docker0,lo"), ray=False)
    assert "export NCCL_SOCKET_IFNAME='^docker0,lo'\n" in script and "GLOO" not in script


def test_names_are_those_of_kubernetes():
    assert label("Llama-3.1_8B--x") == "llama-3-1-8b-x"
    assert label("a" * 39 + "-" + "b" * 20) == "a" * 39
    assert label("...") == "run"
    assert job_name("mine-261126-abcdef") == "mine-261126-abcdef"
    assert job_name("3b-261126-abcdef").startswith("run-3b-261126-abcdef-")
    long = {
        job_name("a" * 40 + end) for end in ("-261126-abcdef", "-261126-abcdeg", "-261127-abcdef")
    }
    assert len(long) == 3 and max(map(len, long)) <= 40
    assert job_name("a.b") != job_name("a-b")


def wanted(**more):
    return Wanted(recipe="quickstart", storage="/shared/longspan", **more)


def test_an_order_takes_the_nodes_that_the_run_needs():
    order = take(wanted(nodes=8, gpus=1))
    assert (order.nodes, order.gpus, order.ranks) == (2, 1, 2)
    assert order.run_id.startswith("quickstart-")
    assert take(wanted(nodes=8, cores=4, run_id="mine")).nodes == 1
    resolved = yaml.safe_load(order.text)
    assert resolved == load_recipe("quickstart", []).run().model_dump(mode="json")


def test_an_order_reads_the_cluster(tmp_path, monkeypatch):
    file = tmp_path / "clusters.yaml"
    file.write_text("clusters: {lab: {address: 'http://10.0.0.1:8265', storage: /data, "
                    "nodes: {count: 4, gpus: 8, cores: 64}, secrets: {HF_TOKEN: /keys/hf}, "
                    "interface: ib0}}")  # fmt: skip
    monkeypatch.setenv("LONGSPAN_CLUSTERS", str(file))
    order = take(Wanted(recipe="quickstart", cluster="lab"))
    assert (order.nodes, order.gpus, order.cores) == (1, 8, 64)
    assert (order.storage, order.interface, order.secrets) == (
        "/data",
        "ib0",
        {"HF_TOKEN": "/keys/hf"},
    )
    assert take(Wanted(recipe="quickstart", cluster="lab", storage="/other")).storage == "/other"


MISTAKES = {
    "no nodes": ({}, "the nodes are not known"),
    "no cores": ({"nodes": 2}, "the nodes are not known"),
    "too few": ({"nodes": 1, "gpus": 1}, "at most 1 GPU"),
    "an id": ({"nodes": 2, "cores": 1, "run_id": "a/b"}, "cannot be the id"),
    "a relative storage": ({"nodes": 2, "cores": 1, "storage": "here"}, "--storage here is not"),
    "no such cluster": ({"cluster": "nowhere"}, "no cluster is named `nowhere`"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_told(name, tmp_path, monkeypatch):
    monkeypatch.setenv("LONGSPAN_CLUSTERS", str(tmp_path / "none.yaml"))
    changes, part = MISTAKES[name]
    with pytest.raises(LongspanError, match=part):
        take(replace(wanted(), **changes))


if __name__ == "__main__":
    k8s.__version__ = "1.2.3"
    for golden, make in CASES.items():
        (HERE / "golden" / golden).write_text(make())
