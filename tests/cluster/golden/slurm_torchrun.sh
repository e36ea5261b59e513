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

export PYTHONSAFEPATH=1 TORCH_ELASTIC_SHUTDOWN_TIMEOUT=600
cat > "$WORK/ranks.sh" << 'END_OF_FILE'
set -euo pipefail
WANDB_API_KEY="$(cat /run/secrets/wandb)"
export WANDB_API_KEY
export LONGSPAN_HIDDEN=WANDB_API_KEY
export NCCL_SOCKET_IFNAME=eth0 GLOO_SOCKET_IFNAME=eth0
exec torchrun --nnodes=2 --nproc-per-node=8 --node-rank="$SLURM_NODEID" \
  --master-addr="$HEAD_IP" --master-port="$PORT" \
  -m longspan.cli train "$RECIPE" --run-dir "$RUN_DIR"
END_OF_FILE

# The time is almost over: save, and be queued again. scancel (SIGTERM) saves only.
asked=0 again=0
stop() {
  asked=1 again=$1
  kill -TERM "$worker"
}
trap 'stop 1' USR1
trap 'stop 0' TERM
srun --kill-on-bad-exit=1 bash "$WORK/ranks.sh" &
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
