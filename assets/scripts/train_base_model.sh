#!/usr/bin/env bash
# Train the tiny models of assets/models/tiny-cogvideox and assets/models/tiny-cogvideox-i2v from scratch: clips, VAE, text
# encoder, transformers, measures. Takes some hours on two CPU cores. Run again, it continues where it stopped.
#
#   WORK_DIR=base bash assets/scripts/train_base_model.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

WORK_DIR="${WORK_DIR:-base}"
MODEL_DIR="${MODEL_DIR:-$WORK_DIR/tiny-cogvideox}"
STEPS="${STEPS:-4500}"
IMAGE_STEPS="${IMAGE_STEPS:-500}"
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false

if [[ ! -d "$WORK_DIR/model" ]]; then
  rm -rf "$WORK_DIR/model.partial"
  python assets/scripts/make_tiny_model.py --kind 5b --learned_positions --output_dir "$WORK_DIR/model.partial" \
    --num_layers 5 --num_heads 6 --vae_channels 8 16 32 64
  python assets/scripts/train_text_encoder.py --model_dir "$WORK_DIR/model.partial"
  python assets/scripts/train_vae.py --model_dir "$WORK_DIR/model.partial" --num_steps 3000 --learning_rate 3e-4
  python assets/scripts/train_vae.py --model_dir "$WORK_DIR/model.partial" --num_steps 1700 --learning_rate 2e-4
  python assets/scripts/train_vae.py --model_dir "$WORK_DIR/model.partial" --num_steps 900 --learning_rate 1e-4
  mv "$WORK_DIR/model.partial" "$WORK_DIR/model"
fi
python assets/scripts/make_base_clips.py --output_dir "$WORK_DIR/clips"
MODEL_PATH="$WORK_DIR/model" CLIPS="$WORK_DIR/clips" PREPARED="$WORK_DIR/prepared" DTYPE=fp32 \
  HEIGHT_BUCKETS=64 WIDTH_BUCKETS=96 FRAME_BUCKETS=17 MAX_NUM_FRAMES=17 \
  bash prepare_dataset.sh --save_image_latents

# Full fine-tuning: train SCRIPT MODEL RUN STEPS [flags]
train() {
  if [[ ! -d "$3/pipeline" ]]; then
    accelerate launch --quiet --config_file accelerate_configs/cpu.yaml --num_cpu_threads_per_process 2 \
      "training/$1" --pretrained_model_name_or_path "$2" --output_dir "$3" --max_train_steps "$4" \
      --data_root "$WORK_DIR/prepared" --load_tensors --resume_from_checkpoint latest \
      --height 64 --width 96 --frame_buckets 17 --max_num_frames 17 --mixed_precision no \
      --train_batch_size 8 --learning_rate 1e-3 --lr_scheduler cosine --lr_warmup_steps 100 \
      --caption_dropout 0.1 --use_ema --ema_decay 0.999 --checkpointing_steps 500 --checkpoints_total_limit 2 \
      --save_pipeline "${@:5}"
  fi
}

# Save in float16, with figures; link the parts that another model has too: publish PIPELINE FOLDER [MODEL]
publish() {
  python - "$1" "$2" <<'END'
import sys

import torch
from diffusers import DiffusionPipeline

DiffusionPipeline.from_pretrained(sys.argv[1], dtype=torch.float16).save_pretrained(sys.argv[2])
END
  if [[ -n "${3:-}" ]]; then
    for part in vae text_encoder tokenizer; do
      rm -r "${2:?}/$part"
      ln -s "../$(basename "$3")/$part" "$2/$part"
    done
  fi
  python assets/scripts/measure_model.py --model_dir "$2" --output_file "$2/measures.json"
}

train cogvideox_text_to_video_sft.py "$WORK_DIR/model" "$WORK_DIR/run" "$STEPS" \
  --validation_steps 1500 --num_inference_steps 20 \
  --validation_prompt "a red circle moves from left to right over a plain white background:::a blue square falls from \
top to bottom over a plain black background:::a yellow triangle moves from right to left over a plain grey background"
publish "$WORK_DIR/run/pipeline" "$MODEL_DIR"

if [[ ! -d "$WORK_DIR/image-model" ]]; then
  python assets/scripts/widen_to_images.py --model_dir "$WORK_DIR/run/pipeline" --output_dir "$WORK_DIR/image-model"
fi
# With a low learning rate: only the image is new.
train cogvideox_image_to_video_sft.py "$WORK_DIR/image-model" "$WORK_DIR/image-run" "$IMAGE_STEPS" \
  --learning_rate 2e-4 --ema_decay 0.99
publish "$WORK_DIR/image-run/pipeline" "$MODEL_DIR-i2v" "$MODEL_DIR"
