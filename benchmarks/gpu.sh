#!/usr/bin/env bash
# Correctness of every GPU kernel, then the timing tables: under 9 minutes on one Hopper GPU.
# Usage: benchmarks/gpu.sh [FOLDER FOR RESULTS]. Needs torch for CUDA, triton, pytest, hypothesis
# and, for the CUDA C++ kernels, cuda-core; not the package installed.
set -uo pipefail

root=$(cd "$(dirname "$0")/.." && pwd)
out=$(mkdir -p "${1:-$root/benchmarks/results}" && cd "${1:-$root/benchmarks/results}" && pwd)
packages=$(mktemp -d)
trap 'rm -rf "$packages"' EXIT
# The root of the repository is the package, whatever its folder is called.
ln -s "$root" "$packages/longspan"
export PYTHONPATH="$packages${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
cd "$packages/longspan" || exit 1

failed=0
step() {
    local limit=$1
    shift
    printf '\n== %s\n' "$*"
    timeout "$limit" "$@" || { failed=1; printf 'FAILED (%s): %s\n' "$?" "$*"; }
}

card=$(python -c 'import torch; print(torch.cuda.get_device_name().split()[1].lower())') || exit 1
nvidia-smi --query-gpu=name,driver_version --format=csv,noheader

step 200 python -m pytest -q -p no:cacheprovider tests/kernels/test_gpu.py tests/kernels/triton \
    tests/kernels/cuda --durations=5
step 150 python benchmarks/kernels.py --lengths 16384 65536 131072 --seconds 0.5 \
    --out "$out/kernels-$card.json"
step 100 python benchmarks/kernels.py --lengths 65536 --groups 32 16 8 4 --seconds 0.5 \
    --skip-dense-above 0 --out "$out/kernels-$card-groups.json"
step 60 python benchmarks/kernels.py --lengths 1048576 --heads 8 --groups 1 --seconds 0.5 \
    --skip-dense-above 0 --out "$out/kernels-$card-1m.json"
exit "$failed"
