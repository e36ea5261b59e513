"""Slurm: a run as a batch script, with a Ray cluster inside of its allocation, or torchrun."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import replace

import yaml

from ...errors import RunError
from ...redact import HIDDEN_NAMES
from ..command import ENDING_S
from .order import Order

_END = "END_OF_FILE"
_PORT = "@PORT@"
_CLUSTER = "slurm"

_HEAD = """\
#!/bin/bash
# {run_id}: a run of {name}. Submitted again, or requeued, it goes on where it was.
# longspan has to be on the PATH of the nodes. What is given to sbatch itself wins over this.
#
#   sbatch FILE
#   longspan status {run_dir}
#
#SBATCH --job-name={run_id}
#SBATCH --nodes={nodes}
#SBATCH --ntasks-per-node=1
{resources}#SBATCH --exclusive
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:USR1@{stop_s}

set -euo pipefail
umask 077
export RUN_ID={run_id}
STORAGE={storage}
export RUN_DIR="$STORAGE/runs/$RUN_ID"
export WORK="$STORAGE/slurm/$RUN_ID-$SLURM_JOB_ID"
export RECIPE="$WORK/"{file}
export PORT=$((20000 + SLURM_JOB_ID % 20000))
mkdir -p "$WORK" "$STORAGE/runs"
pids=()
finish() {{
  kill "${{pids[@]}}" 2> /dev/null || true
  rm -rf "$WORK"
}}
trap finish EXIT

cat > "$RECIPE" << '{end}'
{text}{end}

# This script runs on the first node of the allocation.
HEAD_IP=$({address})
export HEAD_IP
"""

_TRAPS = """\
# The time is almost over: save, and be queued again. scancel (SIGTERM) saves only.
asked=0 again=0
stop() {{
  asked=1 again=$1
  {stop}
}}
trap 'stop 1' USR1
trap 'stop 0' TERM
"""

_TAIL = """\
worker=$!
code=0
wait "$worker" || code=$?
if [[ $asked == 1 ]]; then
  # A signal ends the wait, not what is waited for.
  while kill -0 "$worker" 2> /dev/null; do wait "$worker" || true; done
  code=0
  wait "$worker" || code=$?
  if [[ $again == 1 && $code != 0 ]]; then
    scontrol requeue "$SLURM_JOB_ID" || true
  fi
fi
exit "$code"
"""

_RAY = """\
# The token lies in a folder of yours and goes with the job; the dashboard stays on loopback.
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH="$WORK/token" RAY_USAGE_STATS_ENABLED=0
unset RAY_AUTH_TOKEN RAY_ADDRESS
python3 -c 'import secrets; print(secrets.token_hex(32), end="")' > "$RAY_AUTH_TOKEN_PATH"
export LONGSPAN_HOME="$WORK/home" LONGSPAN_CLUSTERS="$WORK/clusters.yaml"
sed "s/{port}/$((PORT + 1))/; s|@WORK@|$WORK|" > "$LONGSPAN_CLUSTERS" << '{end}'
{clusters}{end}

head=$(hostname -s)
srun --overlap --nodes=1 --ntasks=1 --nodelist="$head" \\
  ray start --head --node-ip-address="$HEAD_IP" --port="$PORT" \\
  --dashboard-host=127.0.0.1 --dashboard-port=$((PORT + 1)) \\
  --dashboard-agent-listen-port=$((PORT + 2)){given} --block &
pids+=($!)
# The dashboard is what comes up last.
for _ in $(seq 120); do
  if (: < "/dev/tcp/127.0.0.1/$((PORT + 1))") 2> /dev/null; then break; fi
  kill -0 "${{pids[0]}}"
  sleep 1
done
{others}
{traps}longspan submit "$RECIPE" --cluster {cluster} --run-id "$RUN_ID"
longspan logs -f "$RUN_ID" &
"""

_OTHERS = """\
srun --overlap --nodes={count} --ntasks={count} --exclude="$head" \\
  ray start --address="$HEAD_IP:$PORT" \\
  --dashboard-agent-listen-port=$((PORT + 2)){given} --block &
pids+=($!)
nodes_up() {{
  {{ ray list nodes --address="http://127.0.0.1:$((PORT + 1))" --filter=state=ALIVE \\
    --limit=10000 --format=json || true; }} 2> /dev/null |
    {{ grep -o '"node_id"' || true; }} | wc -l
}}
# A run takes the nodes that it finds: for some minutes all of them are waited for.
for _ in $(seq 60); do
  up=$(nodes_up)
  if [[ $up -ge {nodes} ]]; then break; fi
  kill -0 "${{pids[1]}}" 2> /dev/null || break
  sleep 3
done
if [[ $up -lt {nodes} ]]; then
  echo "warning: $up of {nodes} nodes have joined; the run begins when those are enough" >&2
fi
"""

_TORCHRUN = """\
export PYTHONSAFEPATH=1 TORCH_ELASTIC_SHUTDOWN_TIMEOUT={stop_s}
cat > "$WORK/ranks.sh" << '{end}'
set -euo pipefail
{variables}exec torchrun --nnodes={nodes} --nproc-per-node={local} --node-rank="$SLURM_NODEID" \\
  --master-addr="$HEAD_IP" --master-port="$PORT" \\
  -m longspan.cli train "$RECIPE" --run-dir "$RUN_DIR"
{end}

{traps}srun --kill-on-bad-exit=1 bash "$WORK/ranks.sh" &
"""


def render_slurm(order: Order, *, ray: bool = True) -> str:
    """The script.

    Args:
        order: What is to run.
        ray: Start a Ray cluster in the allocation, whose driver replaces what is lost; else
            torchrun, which ends with the first rank that fails.

    Raises:
        RunError: torchrun cannot spread the ranks evenly without splitting their groups.
    """
    if not ray:
        order = _evenly(order)
    head = _HEAD.format(
        run_id=order.run_id,
        name=order.name,
        run_dir=shlex.quote(order.run_dir),
        nodes=order.nodes,
        resources="".join(_resources(order)),
        stop_s=order.grace_s + ENDING_S,
        storage=shlex.quote(order.storage.rstrip("/") or "/"),
        file=shlex.quote(f"{order.name}.yaml"),
        end=_END,
        text=order.text,
        address=_address(order.interface),
    )
    return "\n".join((head, _ray(order) if ray else _torchrun(order))) + _TAIL


def _resources(order: Order) -> Iterator[str]:
    if order.gpus:
        yield f"#SBATCH --gpus-per-node={order.gpus}\n"
    if order.cores:
        yield f"#SBATCH --cpus-per-task={order.cores}\n"


def _address(interface: str | None) -> str:
    """The command that prints this node's address on the interface between the nodes."""
    if interface is None or not _is_name(interface):
        return "hostname -I | awk '{print $1}'"
    show = f"ip -4 -o address show dev {shlex.quote(interface)}"
    return show + """ | awk '{split($4, a, "/"); print a[1]; exit}'"""


def _is_name(interface: str) -> bool:
    """Whether it is the name of one interface, and no pattern of NCCL's."""
    return re.fullmatch(r"[A-Za-z0-9_.-]+", interface) is not None


def _ray(order: Order) -> str:
    nodes: dict[str, int] = {"count": order.nodes, "gpus": order.gpus}
    nodes |= {"cores": order.cores} if order.cores else {}
    settings = {
        "address": f"http://127.0.0.1:{_PORT}",
        "storage": order.storage,
        "nodes": nodes,
        "token": "@WORK@/token",
        **({"secrets": dict(order.secrets)} if order.secrets else {}),
        **({"interface": order.interface} if order.interface else {}),
    }
    given = f" --num-gpus={order.gpus}" if order.gpus else ""
    given += f" --num-cpus={order.cores}" if order.cores else ""
    others = ""
    if order.nodes > 1:
        others = _OTHERS.format(count=order.nodes - 1, nodes=order.nodes, given=given)
    return _RAY.format(
        port=_PORT,
        end=_END,
        clusters=yaml.safe_dump({"clusters": {_CLUSTER: settings}}, sort_keys=False),
        given=given,
        others=others,
        traps=_TRAPS.format(stop='longspan stop "$RUN_ID" || true'),
        cluster=_CLUSTER,
    )


def _evenly(order: Order) -> Order:
    """The order on as few nodes as torchrun can use, which starts as many ranks on each."""

    def divide(nodes: int) -> bool:
        local, rest = divmod(order.ranks, nodes)
        return not rest and not any(local % group for group in order.groups.values())

    fitting = [n for n in range(order.nodes, order.ranks + 1) if divide(n)]
    if fitting and fitting[0] <= max(order.nodes, order.most_nodes):
        return replace(order, nodes=fitting[0])
    local, rest = divmod(order.ranks, order.nodes)
    what = f"torchrun starts as many ranks on each node, and {order.ranks} ranks do not divide "
    what += f"into {order.nodes} nodes"
    if not rest:
        path, group = next(item for item in order.groups.items() if local % item[1])
        what = f"{path}: groups of {group} ranks (tensor x context) stay on one node, and torchrun "
        what += f"puts {local} on each of {order.nodes} nodes"
    more = f"--nodes {fitting[0]}, " if fitting else ""
    raise RunError(what, f"{more}other ranks, or leave out --no-ray")


def _torchrun(order: Order) -> str:
    lines = [
        f'{name}="$(cat {shlex.quote(path)})"\nexport {name}\n'
        for name, path in order.secrets.items()
    ]
    if order.secrets:
        lines.append(f"export {HIDDEN_NAMES}={','.join(order.secrets)}\n")
    if order.interface is not None:
        # A pattern is for NCCL alone: gloo takes whole names.
        names = ["NCCL_SOCKET_IFNAME"] + ["GLOO_SOCKET_IFNAME"] * _is_name(order.interface)
        given = " ".join(f"{name}={shlex.quote(order.interface)}" for name in names)
        lines.append(f"export {given}\n")
    return _TORCHRUN.format(
        stop_s=order.grace_s,
        end=_END,
        variables="".join(lines),
        # srun hands it on to the ranks, which save.
        traps=_TRAPS.format(stop='kill -TERM "$worker"'),
        nodes=order.nodes,
        local=order.ranks // order.nodes,
    )
