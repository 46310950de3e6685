#!/usr/bin/env bash
# Encode the clips and captions of a data set once, so that training needs neither the VAE nor the text encoder.
# Change the values below, or set them in the environment; --help lists them. Flags after this script's name are passed
# on.
#
#   CLIPS=my-clips PREPARED=my-prepared bash prepare_dataset.sh
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@" # started with sh
set -euo pipefail
root="$(dirname "$(realpath "${BASH_SOURCE[0]}")")"
script=training/prepare_dataset.py
source "$root/assets/scripts/launcher.sh"

# The model that you will train, and the folder for the prepared data.
MODEL_PATH="${MODEL_PATH:-THUDM/CogVideoX-5b}"
PREPARED="${PREPARED:-prepared}"

# CLIPS is the folder of the clips, with two lists (videos.txt, prompts.txt) or with a caption clip.txt beside each
# clip.mp4. DATASET_FILE is a table (csv, tsv, jsonl, json, parquet) with the columns CAPTION_COLUMN and VIDEO_COLUMN.
# DATASET_NAME is a data set of the hub, DATASET_MIX a list of several. Default: the folder clips. All formats:
# assets/docs/dataset.md
CLIPS="${CLIPS:-}"
DATASET_FILE="${DATASET_FILE:-}"
DATASET_NAME="${DATASET_NAME:-}"
DATASET_MIX="${DATASET_MIX:-}"
CAPTION_COLUMN="${CAPTION_COLUMN:-caption}"
VIDEO_COLUMN="${VIDEO_COLUMN:-video}"

# Sizes for the clips, separated by spaces; each clip gets the best one.
HEIGHT_BUCKETS="${HEIGHT_BUCKETS:-480}"
WIDTH_BUCKETS="${WIDTH_BUCKETS:-720}"
FRAME_BUCKETS="${FRAME_BUCKETS:-49}"
MAX_NUM_FRAMES="${MAX_NUM_FRAMES:-49}"

DTYPE="${DTYPE:-bf16}"
BATCH_SIZE="${BATCH_SIZE:-1}"
NUM_WORKERS="${NUM_WORKERS:-2}"

# The GPUs: their numbers, as in GPU_IDS="0,1", or how many each machine has. Default: one. With several machines, run
# this on each, with its MACHINE_RANK (from 0) and the address of machine 0 as MAIN_PROCESS_IP. PREPARED must be a
# shared folder.
GPU_IDS="${GPU_IDS:-}"
NUM_GPUS="${NUM_GPUS:-}"
NUM_MACHINES="${NUM_MACHINES:-1}"
MACHINE_RANK="${MACHINE_RANK:-}"
MAIN_PROCESS_IP="${MAIN_PROCESS_IP:-}"
MAIN_PROCESS_PORT="${MAIN_PROCESS_PORT:-29500}"

# The settings end here.
name_clips
count_gpus "$NUM_MACHINES"
launch=(python)
if ((NUM_MACHINES > 1)); then
  if [[ -z "$MACHINE_RANK" || -z "$MAIN_PROCESS_IP" ]]; then
    fail "NUM_MACHINES=$NUM_MACHINES: needs MACHINE_RANK (from 0) and MAIN_PROCESS_IP (the address of machine 0)"
  fi
  launch=(torchrun --nnodes "$NUM_MACHINES" --node_rank "$MACHINE_RANK" --nproc_per_node "${NUM_GPUS:-1}")
  launch+=(--master_addr "$MAIN_PROCESS_IP" --master_port "$MAIN_PROCESS_PORT")
elif ((${NUM_GPUS:-1} > 1)); then
  launch=(torchrun --standalone "--nproc_per_node=$NUM_GPUS")
fi
# shellcheck disable=SC2206 # the bucket lists must split at spaces
command=(
  "${launch[@]}" "$root/$script"
  --model_id "$MODEL_PATH"
  "${data[@]}" --caption_column "$CAPTION_COLUMN" --video_column "$VIDEO_COLUMN"
  --output_dir "$PREPARED"
  --height_buckets $HEIGHT_BUCKETS
  --width_buckets $WIDTH_BUCKETS
  --frame_buckets $FRAME_BUCKETS
  --max_num_frames "$MAX_NUM_FRAMES"
  --dtype "$DTYPE"
  --batch_size "$BATCH_SIZE"
  --dataloader_num_workers "$NUM_WORKERS"
  --use_slicing
  --save_latents_and_embeddings
)
"${command[@]}" "$@"
