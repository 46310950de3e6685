#!/usr/bin/env bash
# Teach the tiny model to follow controls, or to fill in masked parts (DEMO_CONTROL=inpaint), on a CPU, with the launchers
# of real runs, and measure by how much it does.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

DEMO_CONTROL="${DEMO_CONTROL:-}" # computed from the clips, as with --compute_control; default: their silhouettes
DEMO_DIR="${DEMO_DIR:-${DEMO_CONTROL:-control}-demo}"
DEMO_STEPS="${DEMO_STEPS:-400}"                  # of training
DEMO_SAMPLING_STEPS="${DEMO_SAMPLING_STEPS:-20}" # of each video
DEMO_VIDEOS="${DEMO_VIDEOS:-12}"                 # to measure, of clips that were not trained on
model=assets/models/tiny-cogvideox
export MODEL_PATH="$model" PREPARED="$DEMO_DIR/prepared"
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
export TQDM_DELAY=2 # seconds before a progress bar appears

wanted=controls computed=() measured=()
if [[ -n "$DEMO_CONTROL" ]]; then wanted=videos computed=(--compute_control "$DEMO_CONTROL"); fi
if [[ "$DEMO_CONTROL" == inpaint ]]; then measured=(--masked); fi

# Only what an earlier demo wrote is replaced.
rm -rf "$DEMO_DIR"/{clips,held-out,prepared,outputs,generated}
python assets/scripts/make_control_clips.py --output_dir "$DEMO_DIR/clips"
python assets/scripts/make_control_clips.py --output_dir "$DEMO_DIR/held-out" --count "$DEMO_VIDEOS" --seed 1

CLIPS="$DEMO_DIR/clips" DTYPE=fp32 HEIGHT_BUCKETS=64 WIDTH_BUCKETS=96 FRAME_BUCKETS=17 MAX_NUM_FRAMES=17 \
  bash prepare_dataset.sh --save_control_latents "${computed[@]}"

OUTPUT_ROOT="$DEMO_DIR/outputs" ACCELERATE_CONFIG=accelerate_configs/cpu.yaml MIXED_PRECISION=no \
  CPU_THREADS="${CPU_THREADS:-2}" HEIGHT=64 WIDTH=96 NUM_FRAMES=17 LEARNING_RATES=1e-3 LR_SCHEDULES=constant \
  MAX_TRAIN_STEPS="$DEMO_STEPS" TRAIN_BATCH_SIZE=4 CHECKPOINTING_STEPS="$DEMO_STEPS" \
  bash train_control_to_video_lora.sh

python training/generate.py --pretrained_model_name_or_path "$model" \
  --lora "$(echo "$DEMO_DIR"/outputs/cogvideox-control-lora__*)" --prompts_file "$DEMO_DIR/held-out/prompts.txt" \
  --control "$DEMO_DIR/held-out/$wanted"/*.mp4 "${computed[@]}" --compare \
  --num_inference_steps "$DEMO_SAMPLING_STEPS" --guidance_scale 2 --output_dir "$DEMO_DIR/generated"
python assets/scripts/measure_control.py --videos "$DEMO_DIR/generated" --controls "$DEMO_DIR/held-out/$wanted" \
  "${measured[@]}" --output_file "$DEMO_DIR/measured.json"
