#!/usr/bin/env bash
# Everything a CUDA device is to be asked, in one go: the GPU tests, then the operator, decode steps
# and training steps, each as JSON and markdown in a folder.
#
#   benchmarks/gpu.sh [OUT]      OUT: docs/results unless named
#
# MODEL names the model to decode and train (the packaged SmolLM2-135M-Instruct unless set), PYTHON
# the interpreter. flash-linear-attention is measured beside ours where it is installed.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python3}
out=${1:-docs/results}
export PYTHONPATH="$PWD:$PWD/backends:$PWD/cli${PYTHONPATH:+:$PYTHONPATH}"

"$python" -c 'import torch, sys; sys.exit(not torch.cuda.is_available())' || {
  echo "torch in $python sees no CUDA device: the benchmarks of a CPU are benchmarks/operator_cpu.py and supra bench" >&2
  exit 2
}
model=${MODEL:-$("$python" -c 'from supra_cli.demo import packaged_model; print(packaged_model())')} || exit 2
mkdir -p "$out"

failed=()
run() {
  echo "== $*"
  "$python" -m "$@" || failed+=("$*")
}

run pytest -m gpu -q
run supra_cli bench op --out "$out" --force
run supra_cli bench decode "$model" --batch 1 --batch 8 --batch 64 --out "$out" --force
run supra_cli bench train "$model" --length 2048 --length 8192 --batch-tokens 16384 \
  --recipe windowed --recipe pure --recipe paper --out "$out" --force

if ((${#failed[@]})); then
  printf 'failed: %s\n' "${failed[@]}" >&2
  exit 1
fi
