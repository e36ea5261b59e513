"""Model, data, stages, loop, checkpoints, evaluation and observation."""
