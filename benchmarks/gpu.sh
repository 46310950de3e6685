#!/usr/bin/env bash
# Run all GPU benchmarks in at most nine minutes on one large card, the most important first: one block, the steps of a
# 5b LoRA, the smallest memory of two runs, and the GPU tests. Each result is written at once, so that a stopped part
# keeps those it has.
#
#   make benchmark-gpu && make tables        where everything is installed
#   PYTHON=python3 OUT=/tmp/results bash benchmarks/gpu.sh
#
# Needs 13 GB of disk and a card of 80 GB, but no download. On a machine without a package index, unpack the missing
# wheels into a folder first, and put it on PYTHONPATH. Besides torch, torchvision, transformers, accelerate, peft,
# sentencepiece, pyarrow, tensorboard, pytest and hypothesis with their requirements, these are needed, in the versions
# of constraints.txt for Linux on x86-64, in MB of 10^6 bytes:
#
#   av 35.8, diffusers 6.4, torchao 3.4, importlib-metadata and zipp 0.05
#   prodigyopt, came-pytorch and schedulefree 0.07, for the tests of these optimizers
#   bitsandbytes 43.1; zipped again with only the kernels for CUDA 13.0, 3.6
#
# In total 46 MB without bitsandbytes and 49 with the small one, which fit within 64 MiB. Rows and tests that need a
# missing bitsandbytes say so. No row needs imageio-ffmpeg (68 MB), openai, or matplotlib: without it, runs warn that
# they draw no loss curve.
#
# Settings:
#   PYTHON   the interpreter with torch                                    (default: python3)
#   OUT      where block_gpu.json, speed_gpu.json, memory.json and the logs go   (default: benchmarks/)
#   SECONDS_ALL  of everything; parts that are late take the time of later ones  (default: 540)
#   SECONDS_BLOCK, SECONDS_SPEED, SECONDS_MEMORY   after which a part starts no row (default: 80, 180, 50)
#   SECONDS_ROW  the limit for a row of memory                             (default: 100)
#   TINY=1   tiny models, and a minute and a half: to try the script out, on a CPU too; needs OUT
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

PYTHON="${PYTHON:-python3}"
tiny=()
if [ -n "${TINY:-}" ]; then
  if [ -z "${OUT:-}" ]; then
    echo "TINY: figures of tiny models do not belong in benchmarks/; set OUT" >&2
    exit 2
  fi
  tiny=(--tiny)
  SECONDS_BLOCK="${SECONDS_BLOCK:-20}" SECONDS_SPEED="${SECONDS_SPEED:-30}" SECONDS_MEMORY="${SECONDS_MEMORY:-10}"
fi
SECONDS_ALL="${SECONDS_ALL:-540}"
SECONDS_BLOCK="${SECONDS_BLOCK:-80}"
SECONDS_SPEED="${SECONDS_SPEED:-180}"
SECONDS_MEMORY="${SECONDS_MEMORY:-50}"
SECONDS_ROW="${SECONDS_ROW:-100}"
OUT="${OUT:-benchmarks}"

mkdir -p "$OUT"
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
export PYTHONPATH="training:assets/scripts${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
failed=()

# A started row is finished: the last one may start just before the part's time is over.
benchmark() { # script, file of results, seconds, rows or nothing for all
  local left=$((SECONDS_ALL - SECONDS)) rows=("${@:4}") limits=(--time_limit "$3")
  local limit=$(($3 + SECONDS_ROW < left ? $3 + SECONDS_ROW : left))
  [ ${#rows[@]} -eq 0 ] || rows=(--only "${rows[@]}")
  [ "$1" != measure_memory ] || limits+=(--row_limit "$SECONDS_ROW") # its rows are processes
  [ "$limit" -gt 0 ] && timeout --kill-after=5 "$limit" "$PYTHON" "benchmarks/$1.py" "${tiny[@]}" --work_dir "$work" \
    --output_file "$OUT/$2.json" "${limits[@]}" "${rows[@]}" 2>"$OUT/$2.log" \
    || failed+=("$2")
}

gpu_tests() { # files
  local left=$((SECONDS_ALL - SECONDS))
  [ "$left" -gt 0 ] && timeout --kill-after=5 "$left" "$PYTHON" -m pytest -m gpu -v --tb=short -p no:cacheprovider \
    --continue-on-collection-errors "$@" 2>&1 | tee "$OUT/tests.log" | tail -n 30 || failed+=(tests)
}

benchmark gpu_block block_gpu "$SECONDS_BLOCK"
# The first row makes the model, and clips for it, which the later parts share.
benchmark gpu_speed speed_gpu "$SECONDS_SPEED"
benchmark measure_memory memory "$SECONDS_MEMORY" "5b LoRA, int8, streamed blocks" \
  "5b full, bf16 weights, 8-bit, step in backward" "5b LoRA"
first=(tests/runs/test_syncs.py tests/memory/test_activations.py tests/memory/test_block_streaming.py
  tests/models/test_quantization.py tests/models/test_attention.py)
mapfile -t others < <(grep -l 'mark\.gpu' -r tests --include="test_*.py" | grep -vFx -f <(printf '%s\n' "${first[@]}"))
mapfile -t last < <(printf '%s\n' "${others[@]}" | grep '^tests/optimizers/')
mapfile -t others < <(printf '%s\n' "${others[@]}" | grep -v '^tests/optimizers/')
gpu_tests "${first[@]}" "${others[@]}" "${last[@]}"

echo "results: $OUT/block_gpu.json, $OUT/speed_gpu.json, $OUT/memory.json, $OUT/tests.log"
if [ ${#failed[@]} -gt 0 ]; then
  echo "not finished, or with failures: ${failed[*]}; see $OUT/*.log" >&2
  exit 1
fi
