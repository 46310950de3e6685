#!/usr/bin/env bash
# Encode the clips and captions of a data set once, so that training needs neither the VAE nor the text encoder.
# Change the values below, or set them in the environment. Flags after this script's name are passed on.
#
#   DATA_ROOT=my-clips OUTPUT_DIR=prepared bash prepare_dataset.sh
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"

# The model that you will train.
MODEL_ID="${MODEL_ID:-THUDM/CogVideoX-5b}"

# DATA_ROOT is the folder of the clips, with two lists (videos.txt, prompts.txt) or with a caption clip.txt beside each
# clip.mp4. DATASET_FILE is a table (csv, tsv, jsonl, json, parquet) with the columns CAPTION_COLUMN and VIDEO_COLUMN.
# DATASET_NAME is a data set of the hub, DATASET_MIX a list of several. All formats: assets/docs/dataset.md
DATASET_FILE="${DATASET_FILE:-}"
DATASET_NAME="${DATASET_NAME:-}"
DATASET_MIX="${DATASET_MIX:-}"
CAPTION_COLUMN="${CAPTION_COLUMN:-caption}"
VIDEO_COLUMN="${VIDEO_COLUMN:-video}"
if [[ -z "$DATASET_FILE$DATASET_NAME$DATASET_MIX" ]]; then
  DATA_ROOT="${DATA_ROOT:-clips}"
fi
OUTPUT_DIR="${OUTPUT_DIR:-prepared}"

# Sizes for the clips, separated by spaces; each clip gets the best one.
HEIGHT_BUCKETS="${HEIGHT_BUCKETS:-480}"
WIDTH_BUCKETS="${WIDTH_BUCKETS:-720}"
FRAME_BUCKETS="${FRAME_BUCKETS:-49}"
MAX_NUM_FRAMES="${MAX_NUM_FRAMES:-49}"

DTYPE="${DTYPE:-bf16}"
BATCH_SIZE="${BATCH_SIZE:-1}"
NUM_WORKERS="${NUM_WORKERS:-2}"

# GPUs of each machine. With several machines, run this on each, with its MACHINE_RANK (from 0) and the address of
# machine 0 as MAIN_PROCESS_IP. OUTPUT_DIR must be a shared folder.
NUM_GPUS="${NUM_GPUS:-1}"
NUM_MACHINES="${NUM_MACHINES:-1}"

if [[ " $* " == *" --config"[\ =]* ]]; then
  echo "error: --config: the settings of this launcher would override the file; pass it to the script itself," \
    "training/prepare_dataset.py" >&2
  exit 2
fi

launcher=(python)
if ((NUM_MACHINES > 1)); then
  launcher=(torchrun --nnodes "$NUM_MACHINES" --node_rank "${MACHINE_RANK:?}" --nproc_per_node "$NUM_GPUS")
  launcher+=(--master_addr "${MAIN_PROCESS_IP:?}" --master_port "${MAIN_PROCESS_PORT:-29500}")
elif ((NUM_GPUS > 1)); then
  launcher=(torchrun --standalone "--nproc_per_node=$NUM_GPUS")
fi
# shellcheck disable=SC2206 # the bucket lists must split at spaces
command=(
  "${launcher[@]}" "$root/training/prepare_dataset.py"
  --model_id "$MODEL_ID"
  --caption_column "$CAPTION_COLUMN"
  --video_column "$VIDEO_COLUMN"
  --output_dir "$OUTPUT_DIR"
  --height_buckets $HEIGHT_BUCKETS
  --width_buckets $WIDTH_BUCKETS
  --frame_buckets $FRAME_BUCKETS
  --max_num_frames "$MAX_NUM_FRAMES"
  --dtype "$DTYPE"
  --batch_size "$BATCH_SIZE"
  --dataloader_num_workers "$NUM_WORKERS"
  --use_slicing --use_tiling
  --save_latents_and_embeddings
)
for name in data_root dataset_file dataset_name dataset_mix; do
  variable="${name^^}"
  if [[ -n "${!variable:-}" ]]; then
    command+=("--$name" "${!variable}")
  fi
done
"${command[@]}" "$@"
