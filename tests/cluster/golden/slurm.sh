#!/bin/bash
# stretch-260102-abcdef: a run of stretch. Submitted again, or requeued, it goes on where it was.
# longspan has to be on the PATH of the nodes. What is given to sbatch itself wins over this.
#
#   sbatch FILE
#   longspan status /shared/longspan/runs/stretch-260102-abcdef
#
#SBATCH --job-name=stretch-260102-abcdef
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=96
#SBATCH --exclusive
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:USR1@660

set -euo pipefail
umask 077
export RUN_ID=stretch-260102-abcdef
STORAGE=/shared/longspan
export RUN_DIR="$STORAGE/runs/$RUN_ID"
export WORK="$STORAGE/slurm/$RUN_ID-$SLURM_JOB_ID"
export RECIPE="$WORK/"stretch.yaml
export PORT=$((20000 + SLURM_JOB_ID % 20000))
mkdir -p "$WORK" "$STORAGE/runs"
pids=()
finish() {
  kill "${pids[@]}" 2> /dev/null || true
  rm -rf "$WORK"
}
trap finish EXIT

cat > "$RECIPE" << 'END_OF_FILE'
# The resolved recipe of stretch.
seed: 1234
ranks: 16
END_OF_FILE

# This script runs on the first node of the allocation.
HEAD_IP=$(ip -4 -o address show dev eth0 | awk '{split($4, a, "/"); print a[1]; exit}')
export HEAD_IP

# The token lies in a folder of yours and goes with the job; the dashboard stays on loopback.
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH="$WORK/token" RAY_USAGE_STATS_ENABLED=0
unset RAY_AUTH_TOKEN RAY_ADDRESS
python3 -c 'import secrets; print(secrets.token_hex(32), end="")' > "$RAY_AUTH_TOKEN_PATH"
export LONGSPAN_HOME="$WORK/home" LONGSPAN_CLUSTERS="$WORK/clusters.yaml"
sed "s/@PORT@/$((PORT + 1))/; s|@WORK@|$WORK|" > "$LONGSPAN_CLUSTERS" << 'END_OF_FILE'
clusters:
  slurm:
    address: http://127.0.0.1:@PORT@
    storage: /shared/longspan
    nodes:
      count: 2
      gpus: 8
      cores: 96
    token: '@WORK@/token'
    secrets:
      WANDB_API_KEY: /run/secrets/wandb
    interface: eth0
END_OF_FILE

head=$(hostname -s)
srun --overlap --nodes=1 --ntasks=1 --nodelist="$head" \
  ray start --head --node-ip-address="$HEAD_IP" --port="$PORT" \
  --dashboard-host=127.0.0.1 --dashboard-port=$((PORT + 1)) \
  --dashboard-agent-listen-port=$((PORT + 2)) --num-gpus=8 --num-cpus=96 --block &
pids+=($!)
# The dashboard is what comes up last.
for _ in $(seq 120); do
  if (: < "/dev/tcp/127.0.0.1/$((PORT + 1))") 2> /dev/null; then break; fi
  kill -0 "${pids[0]}"
  sleep 1
done
srun --overlap --nodes=1 --ntasks=1 --exclude="$head" \
  ray start --address="$HEAD_IP:$PORT" \
  --dashboard-agent-listen-port=$((PORT + 2)) --num-gpus=8 --num-cpus=96 --block &
pids+=($!)
nodes_up() {
  { ray list nodes --address="http://127.0.0.1:$((PORT + 1))" --filter=state=ALIVE \
    --limit=10000 --format=json || true; } 2> /dev/null |
    { grep -o '"node_id"' || true; } | wc -l
}
# A run takes the nodes that it finds: for some minutes all of them are waited for.
for _ in $(seq 60); do
  up=$(nodes_up)
  if [[ $up -ge 2 ]]; then break; fi
  kill -0 "${pids[1]}" 2> /dev/null || break
  sleep 3
done
if [[ $up -lt 2 ]]; then
  echo "warning: $up of 2 nodes have joined; the run begins when those are enough" >&2
fi

# The time is almost over: save, and be queued again. scancel (SIGTERM) saves only.
asked=0 again=0
stop() {
  asked=1 again=$1
  longspan stop "$RUN_ID" || true
}
trap 'stop 1' USR1
trap 'stop 0' TERM
longspan submit "$RECIPE" --cluster slurm --run-id "$RUN_ID"
longspan logs -f "$RUN_ID" &
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
