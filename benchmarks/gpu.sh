#!/usr/bin/env bash
# The whole GPU set in under nine minutes on one large card: the GPU tests, then memory and speed at full size, the most
# important rows first. Results are written as they come, so that a run that is stopped has what it had done.
#
#   make benchmark-gpu                       where everything is installed
#   PYTHON=python3 OUT=/tmp/results bash benchmarks/gpu.sh
#
# On a machine without a package index, unpack the wheels it lacks into a folder first, and put that on PYTHONPATH:
# diffusers, torchao, av, imageio, imageio-ffmpeg, came-pytorch, prodigyopt, schedulefree, hypothesis. bitsandbytes may
# be missing: the rows and tests that need it say so. Nothing is downloaded; 20 GB of disk and a card of 80 GB do.
#
# Settings:
#   PYTHON   the interpreter with torch                                    (default: python3)
#   OUT      where memory.json, speed_gpu.json and tests.log go            (default: benchmarks/)
#   SECONDS_TESTS, SECONDS_MEMORY, SECONDS_SPEED   the share of each part  (default: 100, 200, 100)
#   TINY=1   tiny models: to try the script out, on a CPU too
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

PYTHON="${PYTHON:-python3}"
OUT="${OUT:-benchmarks}"
SECONDS_TESTS="${SECONDS_TESTS:-100}"
SECONDS_MEMORY="${SECONDS_MEMORY:-200}"
SECONDS_SPEED="${SECONDS_SPEED:-100}"
flags=()
[ -n "${TINY:-}" ] && flags+=(--tiny)

mkdir -p "$OUT"
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
export PYTHONPATH="training:assets${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1

# The first row makes models and clips, which the others share. A row that has begun is let finish: the limits are less
# than the time there is.
"$PYTHON" benchmarks/memory.py "${flags[@]}" --work_dir "$work" --output_file "$OUT/memory.json" \
  --time_limit "$SECONDS_MEMORY" 2>"$OUT/memory.log"
timeout "$SECONDS_TESTS" "$PYTHON" -m pytest -m gpu -q -p no:cacheprovider 2>&1 | tee "$OUT/tests.log" | tail -n 20
"$PYTHON" benchmarks/gpu_speed.py "${flags[@]}" --work_dir "$work" --output_file "$OUT/speed_gpu.json" \
  --time_limit "$SECONDS_SPEED" 2>"$OUT/speed.log"
echo "results: $OUT/memory.json, $OUT/speed_gpu.json, $OUT/tests.log; 'make tables' puts them into assets/memory.md"
