#!/usr/bin/env bash
# Correctness of every GPU kernel, training, then the timing tables of the kernels: under 12 minutes
# on one Hopper GPU.
# Usage: benchmarks/gpu.sh [FOLDER FOR RESULTS]. Needs torch for CUDA, triton, pytest, hypothesis
# and, for the CUDA C++ kernels, cuda-core; not the package installed. With pytest-xdist the tests
# compile their kernels side by side. Training needs all that the package depends on.
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
    local limit=$1 code
    shift
    printf '\n== %s\n' "$*"
    timeout "$limit" "$@"
    code=$?
    if [ "$code" != 0 ]; then
        failed=1
        printf 'FAILED (%s): %s\n' "$code" "$*"
    fi
}

card=$(python -c 'import torch; print(torch.cuda.get_device_name().split()[1].lower())') || exit 1
nvidia-smi --query-gpu=name,driver_version --format=csv,noheader
workers=()
python -c 'import xdist' 2>/dev/null && workers=(-n "$(($(nproc) < 12 ? $(nproc) : 12))")

tests=(tests/kernels/test_gpu.py tests/kernels/triton/test_block_scores.py
    tests/kernels/triton/test_pooled_scores.py)
# Not the package's own options: one -q less shows how many passed.
pytest=(python -m pytest -q -o addopts=--import-mode=importlib -p no:cacheprovider)
step 180 "${pytest[@]}" "${workers[@]}" "${tests[@]}" -k "not beyond"
# By itself: it takes most of the GPU's memory.
step 60 "${pytest[@]}" tests/kernels/test_gpu.py -k beyond
if python -c 'import megatron.core, pydantic, typer' 2>/dev/null; then
    step 130 python benchmarks/gpu_training.py --quick --out "$out/training-$card.json"
else
    printf '\n== training is left out: megatron-core, pydantic or typer is missing\n'
fi
step 180 python -W ignore benchmarks/kernels.py --lengths 65536 131072 --dense-up-to 65536 \
    --turns 2 --seconds 0.3 --out "$out/kernels-$card.json"
step 90 python -W ignore benchmarks/kernels.py --lengths 65536 --groups 8 16 32 --seconds 0.3 \
    --peers-up-to 0 --dense-up-to 0 --out "$out/kernels-$card-groups.json"
step 60 python -W ignore benchmarks/kernels.py --lengths 1048576 --heads 8 --groups 1 --seconds 0.3 \
    --peers-up-to 0 --dense-up-to 0 --out "$out/kernels-$card-1m.json"
exit "$failed"
