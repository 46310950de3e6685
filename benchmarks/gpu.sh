#!/usr/bin/env bash
# Run all GPU benchmarks in at most nine minutes on one large card: memory and speed at full size, the most important
# rows first, and the GPU tests. Each result is written at once, so that a stopped part keeps those it has.
#
#   make benchmark-gpu && make tables        where everything is installed
#   PYTHON=python3 OUT=/tmp/results bash benchmarks/gpu.sh
#
# Needs 26 GB of disk and a card of 80 GB, but no download. On a machine without a package index, unpack the missing
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
#   OUT      where memory.json, speed_gpu.json and the logs go             (default: benchmarks/)
#   SECONDS_MEMORY, SECONDS_SPEED, SECONDS_TESTS   the share of each part  (default: 160, 60, 120)
#   SECONDS_ROW   the limit for a row of memory or speed                    (default: 100)
#   TINY=1   tiny models: to try the script out, on a CPU too; needs OUT
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

PYTHON="${PYTHON:-python3}"
SECONDS_MEMORY="${SECONDS_MEMORY:-160}"
SECONDS_SPEED="${SECONDS_SPEED:-60}"
SECONDS_TESTS="${SECONDS_TESTS:-120}"
SECONDS_ROW="${SECONDS_ROW:-100}"
tiny=()
if [ -n "${TINY:-}" ]; then
  if [ -z "${OUT:-}" ]; then
    echo "TINY: figures of tiny models do not belong in benchmarks/; set OUT" >&2
    exit 2
  fi
  tiny=(--tiny)
fi
OUT="${OUT:-benchmarks}"

mkdir -p "$OUT"
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
export PYTHONPATH="training:assets/scripts${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
failed=()

# A started row is finished: the last one may start just before the part's time is over.
benchmark() { # script, file of results, seconds
  timeout --kill-after=10 "$(($3 + SECONDS_ROW))" "$PYTHON" "benchmarks/$1.py" "${tiny[@]}" --work_dir "$work" \
    --output_file "$OUT/$2.json" --time_limit "$3" --row_limit "$SECONDS_ROW" 2>"$OUT/$2.log" || failed+=("$2")
}

# The first row of a model makes it, and clips for it, which the others share.
benchmark measure_memory memory "$SECONDS_MEMORY"
mapfile -t tests < <(grep -l 'mark\.gpu' -r tests --include="test_*.py")
timeout --kill-after=10 "$SECONDS_TESTS" "$PYTHON" -m pytest -m gpu -v --tb=short --continue-on-collection-errors \
  -p no:cacheprovider "${tests[@]}" 2>&1 | tee "$OUT/tests.log" | tail -n 30 || failed+=(tests)
benchmark gpu_speed speed_gpu "$SECONDS_SPEED"

echo "results: $OUT/memory.json, $OUT/speed_gpu.json, $OUT/tests.log"
if [ ${#failed[@]} -gt 0 ]; then
  echo "not finished, or with failures: ${failed[*]}; see $OUT/*.log" >&2
  exit 1
fi
