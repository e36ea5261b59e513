"""Checkpoints: where they live, when they are complete, which of them may go."""
