#!/usr/bin/env bash
# Fine-tune end to end on a CPU with the launchers of real runs: a LoRA learns a style from 24 clips. The model is tiny
# and the clips are drawn. Run it with `make demo`.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

DEMO_DIR="${DEMO_DIR:-demo}"
DEMO_STEPS="${DEMO_STEPS:-150}"                   # of training
DEMO_SAMPLING_STEPS="${DEMO_SAMPLING_STEPS:-20}" # of each video
model=assets/models/tiny-cogvideox
id_token=OLD_FILM
# Neither the model nor the LoRA was trained on these two scenes.
first="$id_token a red circle moves from left to right over a plain light blue background"
second="$id_token a yellow square rises from bottom to top over a plain light blue background"
# Small models need little guidance.
sampling=(--num_inference_steps "$DEMO_SAMPLING_STEPS" --guidance_scale 2)
export MODEL_PATH="$model" PREPARED="$DEMO_DIR/prepared"
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
export TQDM_DELAY=2 # seconds before a progress bar appears

python assets/scripts/make_style_clips.py --output_dir "$DEMO_DIR/clips"

CLIPS="$DEMO_DIR/clips" DTYPE=fp32 HEIGHT_BUCKETS=64 WIDTH_BUCKETS=96 FRAME_BUCKETS=17 MAX_NUM_FRAMES=17 \
  bash prepare_dataset.sh --id_token "$id_token"

# Only the demo overwrites its output; a real run never overwrites an earlier one.
rm -rf "$DEMO_DIR/outputs"
OUTPUT_ROOT="$DEMO_DIR/outputs" ACCELERATE_CONFIG=accelerate_configs/cpu.yaml MIXED_PRECISION=no \
  CPU_THREADS="${CPU_THREADS:-2}" \
  HEIGHT=64 WIDTH=96 NUM_FRAMES=17 \
  LEARNING_RATES=1e-3 LR_SCHEDULES=constant OPTIMIZERS=adamw MAX_TRAIN_STEPS="$DEMO_STEPS" TRAIN_BATCH_SIZE=4 \
  CHECKPOINTING_STEPS=75 VALIDATION_EPOCHS=10 VALIDATION_PROMPT="$first:::$second" \
  bash train_text_to_video_lora.sh "${sampling[@]}"
lora=$(echo "$DEMO_DIR"/outputs/cogvideox-lora__*)

python training/generate.py --pretrained_model_name_or_path "$model" --lora "$lora" --prompt "$first" "$second" \
  --compare "${sampling[@]}" --output_dir "$DEMO_DIR/generated" --overwrite
python assets/scripts/measure_style.py --lora "$lora" --id_token "$id_token" \
  --num_inference_steps "$((DEMO_SAMPLING_STEPS / 2))" --output_file "$DEMO_DIR/style.json"

echo
echo "The LoRA:                     $lora/pytorch_lora_weights.safetensors"
echo "Its loss curve:               $lora/loss.png"
echo "The validations:              $lora/validation/progress.png"
echo "Videos, with and without it:  $DEMO_DIR/generated/"
echo "Side by side:                 $DEMO_DIR/generated/*-compare.png"
