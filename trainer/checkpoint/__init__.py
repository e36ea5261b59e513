"""Checkpoints: what lies where in them, how they are written, committed, found and read."""
