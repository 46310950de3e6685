"""What is trained and what is written at the end: LoRA or full fine-tuning."""
