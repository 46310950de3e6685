"""Flags of the original scripts and of related toolkits: what to pass instead, where similar names do not tell it."""

_SIZES = "frame_buckets height_buckets width_buckets"
_PREPARED = "load_tensors"  # data of prepare_dataset.py

# Our flags for a foreign one; a script that lacks some of them ignores the entry.
OURS = {
    # the original factory, in the other script
    "model_id": "pretrained_model_name_or_path",
    "save_tensors": "save_latents_and_embeddings",
    "target_fps": "fps",
    "dtype": "mixed_precision",
    "mixed_precision": "dtype",
    # CogVideo's finetune and CogKit
    "model_path": "pretrained_model_name_or_path",
    "model_name": "model",
    "train_resolution": "frame_buckets max_num_frames height width",
    "checkpointing_limit": "checkpoints_total_limit",
    "do_validation": "validation_prompt",
    "validation_dir": "validation_prompt",
    "gen_fps": "fps",
    "low_vram": "quantize_base",
    # finetrainers
    "lr": "learning_rate",
    "dataset_config": "dataset_mix",
    "image_resolution_buckets": _SIZES,
    "video_resolution_buckets": _SIZES,
    **dict.fromkeys(("precompute_conditions", "enable_precomputation", "precomputation_items"), _PREPARED),
    **dict.fromkeys(("precomputation_dir", "precomputation_once", "precomputation_reuse"), _PREPARED),
    **dict.fromkeys(("transformer_dtype", "vae_dtype", "text_encoder_dtype"), "mixed_precision"),
    "flow_weighting_scheme": "timestep_sampling",
    "layerwise_upcasting_modules": "quantize_base",
    "attn_provider_training": "attention_backend",
    "attn_provider_inference": "validation_attention_backend",
    "cp_degree": "context_parallel_size",
    # diffusers' examples, and trainers of images
    "instance_data_dir": "data_root",
    "train_data_dir": "data_root",
    "resolution": "height width",
    "num_frames": "frame_buckets",
    "resume": "resume_from_checkpoint",
    "network_dim": "rank",
    "enable_xformers_memory_efficient_attention": "attention_backend",
}
# What to do where no flag is needed.
ADVICE = {
    "model_name": "omit it: the config of the model says which kind it is",
    "model_type": "omit it: each task has its script, cogvideox_text_to_video_* and cogvideox_image_to_video_*",
    "training_type": "omit it: each method has its script, cogvideox_*_lora.py and cogvideox_*_sft.py",
    "validation_videos": "omit it: models that start from a video are not supported",
    **dict.fromkeys(
        ("parallel_backend", "dp_degree", "dp_shards", "tp_degree", "pp_degree"),
        "omit it: accelerate launch --config_file with a file of accelerate_configs/ divides the work",
    ),
}
