"""Hugging Face checkpoints in and out, by configuration and safetensors only."""
