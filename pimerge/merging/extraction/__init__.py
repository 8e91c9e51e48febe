"""``pimerge.extract``: a LoRA from the difference between a fine-tuned checkpoint and its base."""
