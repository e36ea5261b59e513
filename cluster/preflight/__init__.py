"""Preflight: whether every node can do its part, before any rank starts."""
