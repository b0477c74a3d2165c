#!/usr/bin/env bash
# Everything a CUDA device is to be asked, in one go: training steps beside what was planned for
# them, the operator, decode steps, and the GPU tests last, since they compile the most.
#
#   benchmarks/gpu.sh [OUT]      OUT: docs/results unless named
#
# Each step's figures are JSON and markdown in OUT as soon as it ends, its words a file in OUT/logs.
# MODEL names the model to decode and train (the packaged SmolLM2-135M-Instruct unless set; "random"
# makes one of its shape, which times as well), GPU its name for supra plan (h100 unless set), LIMIT
# the seconds a step may take (1800), PYTHON the interpreter. flash-linear-attention is measured
# beside ours where it is installed.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python3}
out=${1:-docs/results}
limit=${LIMIT:-1800}
export PYTHONPATH="$PWD:$PWD/backends:$PWD/cli${PYTHONPATH:+:$PYTHONPATH}"

"$python" -c 'import torch, sys; sys.exit(not torch.cuda.is_available())' || {
  echo "torch in $python sees no CUDA device: the benchmarks of a CPU are benchmarks/operator_cpu.py and supra bench" >&2
  exit 2
}
mkdir -p "$out/logs"
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

failed=()
run() { # NAME COMMAND...: python -m COMMAND, at most so long
  local name=$1
  shift
  echo "== $name: $*"
  timeout "$limit" "$python" -m "$@" 2>&1 | tee "$out/logs/$name.txt" || {
    failed+=("$name: $*")
    return 1
  }
}

model=${MODEL:-$("$python" -c 'from supra_cli.demo import packaged_model; print(packaged_model())')}
if [ "$model" = random ]; then
  model=$scratch/random
  "$python" benchmarks/random_model.py "$model" || model=
fi

if [ -n "$model" ]; then
  plans=()
  for recipe in windowed pure paper; do
    kinds=(--kind transfer --kind distill)
    [ "$recipe" = paper ] && kinds=(--kind uptrain)
    # As the benchmark trains: in whole rows, whole batches.
    settings=(--set batch_tokens=16384 --set stages.0.cut=1 --set stages.0.batch_share=1)
    [ "$recipe" = paper ] || settings+=(--set stages.1.cut=1 --set stages.1.batch_share=1)
    for length in 2048 8192; do
      # Beside the steps: a plan takes none of the device's time.
      CUDA_VISIBLE_DEVICES='' run "plan-$recipe-$length" supra_cli plan "$model" --recipe "$recipe" \
        --gpu "${GPU:-h100}" "${settings[@]}" --set sequence_length="$length" --json &
      plans+=($!)
      run "train-$recipe-$length" supra_cli bench train "$model" --recipe "$recipe" "${kinds[@]}" \
        --length "$length" --batch-tokens 16384 --steps 20 --out "$out/$recipe-$length" --force
    done
  done
  for plan in "${plans[@]}"; do
    wait "$plan" || failed+=("a plan, see $out/logs")
  done
fi

run op supra_cli bench op --out "$out" --force

if [ -n "$model" ]; then
  run decode supra_cli bench decode "$model" --batch 1 --batch 8 --batch 64 --out "$out" --force
  for recipe in windowed pure; do
    # Speed does not depend on what calibration would find.
    run "convert-$recipe" supra_cli convert "$model" "$scratch/$recipe" --recipe "$recipe" --no-calibrate
    run "decode-$recipe" supra_cli bench decode "$scratch/$recipe" --batch 1 --batch 8 --batch 64 \
      --dtype bfloat16 --out "$out/decode-$recipe" --force
  done
fi

# Kernels compile side by side where pytest-xdist is installed.
parallel=()
"$python" -c 'import xdist' 2>/dev/null && parallel=(-n 8)
OMP_NUM_THREADS=1 TORCHINDUCTOR_COMPILE_THREADS=2 run tests pytest -m gpu -q "${parallel[@]}" tests/torch

if ((${#failed[@]})); then
  printf 'failed: %s\n' "${failed[@]}" >&2
  exit 1
fi
