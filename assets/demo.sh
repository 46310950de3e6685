#!/usr/bin/env bash
# The main job end to end on a CPU, with the launchers that real runs use: a tiny model with random weights and drawn
# clips stand in for CogVideoX and yours. Run it with `make demo`.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

DEMO_DIR="${DEMO_DIR:-demo}"
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
export TQDM_DELAY=2 # no bars for what takes less
prompt="a red circle moves from left to right over a blue background"

python assets/make_tiny_model.py --kind 5b --output_dir "$DEMO_DIR/model" --height 64 --width 96 --num_frames 17
python assets/make_demo_clips.py --output_dir "$DEMO_DIR/clips"

MODEL_ID="$DEMO_DIR/model" DATA_ROOT="$DEMO_DIR/clips" OUTPUT_DIR="$DEMO_DIR/prepared" DTYPE=fp32 \
  HEIGHT_BUCKETS="64 96" WIDTH_BUCKETS="64 96" FRAME_BUCKETS=17 MAX_NUM_FRAMES=17 \
  bash prepare_dataset.sh

# The demo's own output may be written again; a real run never overwrites an earlier one.
rm -rf "$DEMO_DIR/demo-outputs"
MODEL_PATH="$DEMO_DIR/model" DATA_ROOT="$DEMO_DIR/prepared" OUTPUT_ROOT="$DEMO_DIR/demo-outputs" \
  ACCELERATE_CONFIG=accelerate_configs/cpu.yaml MIXED_PRECISION=no \
  HEIGHT=64 WIDTH=96 NUM_FRAMES=17 \
  LEARNING_RATES=1e-3 LR_SCHEDULES=constant OPTIMIZERS=adamw MAX_TRAIN_STEPS=200 CHECKPOINTING_STEPS=100 \
  VALIDATION_PROMPT="$prompt" VALIDATION_EPOCHS=4 \
  bash train_text_to_video_lora.sh --num_inference_steps 10

lora=$(echo "$DEMO_DIR"/demo-outputs/cogvideox-lora__*)
python tests/test_lora_inference.py --prompt "$prompt" --model_path "$DEMO_DIR/model" --lora_path "$lora" \
  --lora_name demo --output_file "$DEMO_DIR/with-lora.mp4" --fps 8 --num_inference_steps 10

echo
echo "The LoRA:               $lora/pytorch_lora_weights.safetensors"
echo "Its loss curve:         $lora/loss.png"
echo "The validations:        $lora/validation/progress.png"
echo "A video with the LoRA:  $DEMO_DIR/with-lora.mp4"
