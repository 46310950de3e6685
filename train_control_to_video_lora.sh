#!/usr/bin/env bash
# Fine-tune a CogVideoX model with LoRA to follow control videos, once for each combination of the settings in the sweep.
# Change the values below, or set them in the environment; --help lists them. Flags after this script's name go to every
# run. Started again, it skips finished runs and resumes an interrupted one.
#
#   bash train_control_to_video_lora.sh
#   MODEL_PATH=THUDM/CogVideoX1.5-5B NUM_FRAMES=80 HEIGHT=768 WIDTH=1360 bash train_control_to_video_lora.sh
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@" # started with sh
set -euo pipefail
root="$(dirname "$(realpath "${BASH_SOURCE[0]}")")"
script=training/cogvideox_control_to_video_lora.py
source "$root/assets/scripts/launcher.sh"

# The model, text-to-video or control, and the data that prepare_dataset.sh --save_control_latents wrote for it.
MODEL_PATH="${MODEL_PATH:-THUDM/CogVideoX-5b}"
PREPARED="${PREPARED:-prepared}"
OUTPUT_ROOT="${OUTPUT_ROOT:-outputs}"
# The folder of a finished run, to train it up to MAX_TRAIN_STEPS. All other settings of training are those of the run.
CONTINUE="${CONTINUE:-}"

# false trains on raw clips, which is slower and needs more memory. They are named as for prepare_dataset.sh.
LOAD_TENSORS="${LOAD_TENSORS:-true}"
CLIPS="${CLIPS:-}"
DATASET_FILE="${DATASET_FILE:-}"
DATASET_NAME="${DATASET_NAME:-}"
DATASET_MIX="${DATASET_MIX:-}"
CAPTION_COLUMN="${CAPTION_COLUMN:-text}"
VIDEO_COLUMN="${VIDEO_COLUMN:-video}"

# The GPUs: their numbers, as in GPU_IDS="0,1", or how many each machine has. Default: one. For several machines, run
# this on each, with its MACHINE_RANK (from 0) and the address of machine 0 as MAIN_PROCESS_IP.
GPU_IDS="${GPU_IDS:-}"
NUM_GPUS="${NUM_GPUS:-}"
NUM_MACHINES="${NUM_MACHINES:-}"
MACHINE_RANK="${MACHINE_RANK:-}"
MAIN_PROCESS_IP="${MAIN_PROCESS_IP:-}"
MAIN_PROCESS_PORT="${MAIN_PROCESS_PORT:-}"
# How they share a run (assets/docs/distributed.md). Default: accelerate_configs/single_gpu.yaml, for several GPUs
# ddp.yaml, for several machines ddp_2_machines.yaml.
ACCELERATE_CONFIG="${ACCELERATE_CONFIG:-}"
# Of each process. Default: the cores of the machine, shared among its processes.
CPU_THREADS="${CPU_THREADS:-}"
MIXED_PRECISION="${MIXED_PRECISION:-bf16}"

# tensorboard, wandb, trackio, comet_ml, all, none. W&B keeps its files for `wandb sync` unless WANDB_MODE=online.
REPORT_TO="${REPORT_TO:-tensorboard}"
WANDB_MODE="${WANDB_MODE:-offline}"
export WANDB_MODE

# The sweep: values separated by spaces; one run for each combination.
LEARNING_RATES="${LEARNING_RATES:-1e-4}"
LR_SCHEDULES="${LR_SCHEDULES:-cosine_with_restarts}"
OPTIMIZERS="${OPTIMIZERS:-adamw}"
MAX_TRAIN_STEPS="${MAX_TRAIN_STEPS:-3000}"

LORA_RANK="${LORA_RANK:-64}"
LORA_ALPHA="${LORA_ALPHA:-64}"
TRAIN_BATCH_SIZE="${TRAIN_BATCH_SIZE:-1}"
LR_WARMUP_STEPS="${LR_WARMUP_STEPS:-200}"
CHECKPOINTING_STEPS="${CHECKPOINTING_STEPS:-1000}"
SEED="${SEED:-42}"

# Size of validation videos, by default that of most clips, and of raw clips, by default 480, 720, 49.
HEIGHT="${HEIGHT:-}"
WIDTH="${WIDTH:-}"
NUM_FRAMES="${NUM_FRAMES:-}"
# Several prompts are separated by :::
VALIDATION_PROMPT="${VALIDATION_PROMPT:-A panda in a small red jacket plays a tiny guitar in a bamboo forest}"
# A control clip for each prompt, also separated by :::. Without them, no videos are sampled. With --compute_control,
# controls are computed from these clips.
VALIDATION_CONTROLS="${VALIDATION_CONTROLS:-}"
VALIDATION_EPOCHS="${VALIDATION_EPOCHS:-10}"

# The settings end here.
name=cogvideox-control-lora name_end="__rank-$LORA_RANK"
flags=(--rank "$LORA_RANK" --lora_alpha "$LORA_ALPHA")
validate_with VALIDATION_CONTROLS
train "$@"
