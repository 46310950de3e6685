#!/usr/bin/env bash
# Fine-tune a CogVideoX image-to-video model with LoRA, once for each combination of the settings in the sweep. Change
# the values below, or set them in the environment. Flags after this script's name go to every run. Started again, it
# skips finished runs and resumes an interrupted one.
#
#   bash train_image_to_video_lora.sh
#   MODEL_PATH=THUDM/CogVideoX1.5-5B-I2V NUM_FRAMES=81 HEIGHT=768 WIDTH=1360 bash train_image_to_video_lora.sh
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"

# The model and the data. DATA_ROOT is the OUTPUT_DIR of prepare_dataset.sh --save_image_latents; to train on raw
# clips (slower, needs more memory), set LOAD_TENSORS=false.
MODEL_PATH="${MODEL_PATH:-THUDM/CogVideoX-5b-I2V}"
DATA_ROOT="${DATA_ROOT:-prepared}"
LOAD_TENSORS="${LOAD_TENSORS:-true}"
OUTPUT_ROOT="${OUTPUT_ROOT:-outputs}"

# How to launch. For several GPUs, use accelerate_configs/ddp.yaml and NUM_PROCESSES. Other ways, and the settings for
# several machines (MACHINE_RANK, MAIN_PROCESS_IP, MAIN_PROCESS_PORT): assets/docs/distributed.md
ACCELERATE_CONFIG="${ACCELERATE_CONFIG:-$root/accelerate_configs/single_gpu.yaml}"
CPU_THREADS="${CPU_THREADS:-2}"
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

# Size of raw clips and of validation videos.
HEIGHT="${HEIGHT:-480}"
WIDTH="${WIDTH:-720}"
NUM_FRAMES="${NUM_FRAMES:-49}"

LORA_RANK="${LORA_RANK:-64}"
LORA_ALPHA="${LORA_ALPHA:-64}"
TRAIN_BATCH_SIZE="${TRAIN_BATCH_SIZE:-1}"
LR_WARMUP_STEPS="${LR_WARMUP_STEPS:-200}"
CHECKPOINTING_STEPS="${CHECKPOINTING_STEPS:-1000}"
SEED="${SEED:-42}"

# Several prompts are separated by :::
VALIDATION_PROMPT="${VALIDATION_PROMPT:-A panda in a small red jacket plays a tiny guitar in a bamboo forest}"
# An image for each prompt, also separated by ::: (a path or a URL). Without images, no videos are sampled.
VALIDATION_IMAGES="${VALIDATION_IMAGES:-}"
VALIDATION_EPOCHS="${VALIDATION_EPOCHS:-10}"

if [[ " $* " == *" --config"[\ =]* ]]; then
  echo "error: --config: the settings of this launcher would override the file; pass it to the script itself," \
    "training/cogvideox_image_to_video_lora.py" >&2
  exit 2
fi

# Not set if the toolkit chooses the memory settings.
memory_flags="--gradient_checkpointing"
if [[ " $* " == *" --memory_budget_gb"* || " $* " == *" --auto_fit "* ]]; then
  memory_flags=""
fi

for learning_rate in $LEARNING_RATES; do
  for lr_schedule in $LR_SCHEDULES; do
    for optimizer in $OPTIMIZERS; do
      for steps in $MAX_TRAIN_STEPS; do
        settings="${optimizer}__${steps}-steps__${lr_schedule}__lr-${learning_rate}__rank-${LORA_RANK}"
        output_dir="$OUTPUT_ROOT/cogvideox-i2v-lora__$(basename "$MODEL_PATH")__$settings"
        command=(
          accelerate launch --quiet --config_file "$ACCELERATE_CONFIG" --num_cpu_threads_per_process "$CPU_THREADS"
          ${NUM_PROCESSES:+--num_processes "$NUM_PROCESSES"} ${MACHINE_RANK:+--machine_rank "$MACHINE_RANK"}
          ${MAIN_PROCESS_IP:+--main_process_ip "$MAIN_PROCESS_IP"}
          ${MAIN_PROCESS_PORT:+--main_process_port "$MAIN_PROCESS_PORT"}
          "$root/training/cogvideox_image_to_video_lora.py"
          --pretrained_model_name_or_path "$MODEL_PATH"
          --data_root "$DATA_ROOT"
          --height "$HEIGHT" --width "$WIDTH"
          --frame_buckets "$NUM_FRAMES" --max_num_frames "$NUM_FRAMES"
          --output_dir "$output_dir"
          --rank "$LORA_RANK" --lora_alpha "$LORA_ALPHA"
          --mixed_precision "$MIXED_PRECISION"
          $memory_flags
          --train_batch_size "$TRAIN_BATCH_SIZE"
          --max_train_steps "$steps"
          --optimizer "$optimizer"
          --learning_rate "$learning_rate"
          --lr_scheduler "$lr_schedule" --lr_warmup_steps "$LR_WARMUP_STEPS"
          --checkpointing_steps "$CHECKPOINTING_STEPS"
          --enable_slicing --enable_tiling
          --dataloader_num_workers 2 --pin_memory
          --allow_tf32
          --seed "$SEED"
          --report_to "$REPORT_TO"
        )
        if [[ -n "$VALIDATION_IMAGES" ]]; then
          command+=(--validation_prompt "$VALIDATION_PROMPT" --validation_images "$VALIDATION_IMAGES")
          command+=(--validation_epochs "$VALIDATION_EPOCHS")
        else
          echo "VALIDATION_IMAGES is empty: no videos are sampled"
        fi
        if [[ "$LOAD_TENSORS" == true ]]; then
          command+=(--load_tensors)
        fi
        echo "=== $output_dir"
        if [[ -e "$output_dir/pytorch_lora_weights.safetensors" ]]; then
          echo "has a finished run: skipped (to train again, set another OUTPUT_ROOT)"
        elif compgen -G "$output_dir/checkpoint-*" >/dev/null; then
          "${command[@]}" --resume_from_checkpoint latest "$@"
        else
          "${command[@]}" "$@"
        fi
      done
    done
  done
done
