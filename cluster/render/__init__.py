"""Render: a recipe as what Kubernetes and Slurm start."""
