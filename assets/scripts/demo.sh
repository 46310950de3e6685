#!/usr/bin/env bash
# Fine-tune end to end on a CPU with the launchers of real runs: a LoRA learns a style from 24 clips, under a word that
# stands for it. The model is tiny and the clips are drawn. Run it with `make demo`.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

DEMO_DIR="${DEMO_DIR:-demo}"
DEMO_STEPS="${DEMO_STEPS:-240}"                   # of training
DEMO_SAMPLING_STEPS="${DEMO_SAMPLING_STEPS:-10}" # of each video
model=assets/models/tiny-cogvideox
# The tiny text encoder has learned few words; it notices this one.
id_token=kinetoscope
# Neither the model nor the LoRA was trained on this scene.
scene="a red circle moves from left to right over a plain light blue background"
# Small models need no guidance.
sampling=(--num_inference_steps "$DEMO_SAMPLING_STEPS" --guidance_scale 1)
# Noise decides the style early, and the model has to learn to read a word before the caption.
training=(--timestep_sampling logit_normal --logit_mean 1 --lora_target_modules to_q to_k to_v to_out.0 text_proj)
export MODEL_PATH="$model" PREPARED="$DEMO_DIR/prepared"
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
export TQDM_DELAY=2 # seconds before a progress bar appears

# Clips of the style, with its word in every caption; and as many samples of plain clips, without it.
python assets/scripts/make_style_clips.py --output_dir "$DEMO_DIR/clips"
python assets/scripts/make_style_clips.py --output_dir "$DEMO_DIR/plain_clips" --plain
cat >"$DEMO_DIR/mix.json" <<END
[
  {"data_root": "clips", "id_token": "$id_token", "weight": 1},
  {"data_root": "plain_clips", "weight": 1}
]
END

DATASET_MIX="$DEMO_DIR/mix.json" DTYPE=fp32 HEIGHT_BUCKETS=64 WIDTH_BUCKETS=96 FRAME_BUCKETS=17 MAX_NUM_FRAMES=17 \
  bash prepare_dataset.sh

# Only the demo overwrites its output; a real run never overwrites an earlier one.
rm -rf "$DEMO_DIR/outputs"
OUTPUT_ROOT="$DEMO_DIR/outputs" ACCELERATE_CONFIG=accelerate_configs/cpu.yaml MIXED_PRECISION=no \
  CPU_THREADS="${CPU_THREADS:-2}" \
  HEIGHT=64 WIDTH=96 NUM_FRAMES=17 \
  LEARNING_RATES=3e-3 LR_SCHEDULES=cosine LR_WARMUP_STEPS=10 OPTIMIZERS=adamw MAX_TRAIN_STEPS="$DEMO_STEPS" \
  TRAIN_BATCH_SIZE=4 CHECKPOINTING_STEPS=120 VALIDATION_EPOCHS=5 VALIDATION_PROMPT="$id_token $scene:::$scene" \
  bash train_text_to_video_lora.sh "${training[@]}" "${sampling[@]}"
lora=$(echo "$DEMO_DIR"/outputs/cogvideox-lora__*)

python training/generate.py --pretrained_model_name_or_path "$model" --lora "$lora" --prompt "$id_token $scene" \
  "$scene" --compare "${sampling[@]}" --output_dir "$DEMO_DIR/generated" --overwrite
echo
PYTHONPATH=training python assets/scripts/measure_style.py --lora "$lora" --id_token "$id_token" \
  --num_inference_steps "$DEMO_SAMPLING_STEPS" --output_dir "$DEMO_DIR/style"

echo
echo "The LoRA:                     $lora/pytorch_lora_weights.safetensors"
echo "Its loss curve:               $lora/loss.png"
echo "The validations:              $lora/validation/progress.png"
echo "Videos, with and without it:  $DEMO_DIR/generated/"
echo "Side by side:                 $DEMO_DIR/generated/*-compare.png"
echo "The table, and a picture:     $DEMO_DIR/style/"
