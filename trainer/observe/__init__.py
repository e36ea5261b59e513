"""Watching a run: events.jsonl, the terminal, Weights & Biases, the summary at the end."""
