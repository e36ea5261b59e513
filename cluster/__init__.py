"""Runs on a cluster: submission, preflight, gang and supervision."""
