"""The Megatron engine. Importing it prepares this process for megatron-core (see hooks.py)."""

from .hooks import install

install()
