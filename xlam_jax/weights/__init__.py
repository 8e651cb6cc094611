"""Weights on disk: Hugging Face and PEFT folders, safetensors files, Orbax checkpoints."""
