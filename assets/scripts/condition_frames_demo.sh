#!/usr/bin/env bash
# Teach the tiny model to end at a given last frame, or to continue a video, on a CPU, with the launchers of real runs,
# and measure how well.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

DEMO_FRAMES="${DEMO_FRAMES:-first,last}" # given, as with --condition_frames: first,last or first:K
DEMO_DIR="${DEMO_DIR:-condition-frames-demo}"
DEMO_STEPS="${DEMO_STEPS:-}"                     # of training; default: 600, to continue a video 700
DEMO_SAMPLING_STEPS="${DEMO_SAMPLING_STEPS:-20}" # of each video
DEMO_VIDEOS="${DEMO_VIDEOS:-12}"                 # to measure, of clips that were not trained on
model=assets/models/tiny-cogvideox-i2v
export MODEL_PATH="$model" PREPARED="$DEMO_DIR/prepared"
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
export TQDM_DELAY=2 # seconds before a progress bar appears

drawn=() start_frames=0 from_frame=-1 steps=600 schedule=constant flags=()
if [[ "$DEMO_FRAMES" == first:* ]]; then
  drawn=(--straight) start_frames=$((4 * ${DEMO_FRAMES#first:} - 3)) from_frame=$start_frames steps=700 schedule=linear
  # Where a shape goes is decided at high noise; at low noise, the noisy frames show it.
  flags=(--timestep_sampling logit_normal --logit_mean 1.5 --noised_image_dropout 0)
fi
steps="${DEMO_STEPS:-$steps}"

# Only what an earlier demo wrote is replaced.
rm -rf "$DEMO_DIR"/{clips,held-out,prepared,outputs,generated}
python assets/scripts/make_control_clips.py --output_dir "$DEMO_DIR/clips" "${drawn[@]}"
python assets/scripts/make_control_clips.py --output_dir "$DEMO_DIR/held-out" --count "$DEMO_VIDEOS" --seed 1 \
  --start_frames "$start_frames" "${drawn[@]}"

CLIPS="$DEMO_DIR/clips" DTYPE=fp32 HEIGHT_BUCKETS=64 WIDTH_BUCKETS=96 FRAME_BUCKETS=17 MAX_NUM_FRAMES=17 \
  bash prepare_dataset.sh --save_image_latents --condition_frames "$DEMO_FRAMES"

OUTPUT_ROOT="$DEMO_DIR/outputs" ACCELERATE_CONFIG=accelerate_configs/cpu.yaml MIXED_PRECISION=no \
  CPU_THREADS="${CPU_THREADS:-2}" HEIGHT=64 WIDTH=96 NUM_FRAMES=17 LEARNING_RATES=1e-3 LR_SCHEDULES=$schedule \
  LR_WARMUP_STEPS=20 MAX_TRAIN_STEPS="$steps" TRAIN_BATCH_SIZE=4 CHECKPOINTING_STEPS="$steps" \
  bash train_image_to_video_sft.sh --condition_frames "$DEMO_FRAMES" "${flags[@]}"

held_out="$DEMO_DIR/held-out"
given=(--image "$held_out"/ends/*-first.png --last_image "$held_out"/ends/*-last.png)
if ((start_frames)); then given=(--video "$held_out"/starts/*.mp4); fi
python training/generate.py --pretrained_model_name_or_path "$model" \
  --transformer "$(echo "$DEMO_DIR"/outputs/cogvideox-i2v-sft__*)" --prompts_file "$held_out/prompts.txt" \
  "${given[@]}" --compare \
  --num_inference_steps "$DEMO_SAMPLING_STEPS" --guidance_scale 2 --output_dir "$DEMO_DIR/generated"
python assets/scripts/measure_control.py --videos "$DEMO_DIR/generated" --controls "$held_out/videos" \
  --from_frame "$from_frame" --output_file "$DEMO_DIR/measured.json"
