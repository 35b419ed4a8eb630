"""Changes that others made, as patches: LoRA adapters, and the difference of two checkpoints."""
