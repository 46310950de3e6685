#!/usr/bin/env bash
# Make the trained tiny model of assets/tiny-cogvideox from nothing: clips, VAE, text encoder, transformer, measures.
# Some hours on two CPU cores. Run again, it goes on where it was.
#
#   WORK_DIR=base bash assets/train_base_model.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

WORK_DIR="${WORK_DIR:-base}"
OUTPUT_DIR="${OUTPUT_DIR:-$WORK_DIR/tiny-cogvideox}"
STEPS="${STEPS:-4000}"
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false

if [[ ! -d "$WORK_DIR/model" ]]; then
  rm -rf "$WORK_DIR/model.partial"
  python assets/make_tiny_model.py --kind 5b --output_dir "$WORK_DIR/model.partial" --num_layers 5 --num_heads 6 \
    --vae_channels 8 16 32 64
  python assets/train_text_encoder.py --model_dir "$WORK_DIR/model.partial"
  python assets/train_vae.py --model_dir "$WORK_DIR/model.partial" --num_steps 3000 --learning_rate 3e-4
  python assets/train_vae.py --model_dir "$WORK_DIR/model.partial" --num_steps 1700 --learning_rate 2e-4
  mv "$WORK_DIR/model.partial" "$WORK_DIR/model"
fi
python assets/make_base_clips.py --output_dir "$WORK_DIR/clips"
MODEL_ID="$WORK_DIR/model" DATA_ROOT="$WORK_DIR/clips" OUTPUT_DIR="$WORK_DIR/prepared" DTYPE=fp32 \
  HEIGHT_BUCKETS=64 WIDTH_BUCKETS=96 FRAME_BUCKETS=17 MAX_NUM_FRAMES=17 \
  bash prepare_dataset.sh

accelerate launch --quiet --config_file accelerate_configs/cpu.yaml --num_cpu_threads_per_process 2 \
  training/cogvideox_text_to_video_sft.py \
  --pretrained_model_name_or_path "$WORK_DIR/model" --data_root "$WORK_DIR/prepared" --load_tensors \
  --output_dir "$WORK_DIR/run" --resume_from_checkpoint latest \
  --height 64 --width 96 --frame_buckets 17 --max_num_frames 17 --mixed_precision no \
  --train_batch_size 16 --max_train_steps "$STEPS" --learning_rate 1e-3 --lr_scheduler cosine --lr_warmup_steps 100 \
  --caption_dropout 0.1 --use_ema --ema_decay 0.999 --checkpointing_steps 250 --checkpoints_total_limit 2 \
  --validation_steps 500 --num_inference_steps 20 --fps 8 \
  --validation_prompt "a red circle moves from left to right over a plain white background:::a blue square falls from \
top to bottom over a plain black background:::a yellow triangle moves from right to left over a plain grey background"
