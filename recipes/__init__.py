"""Recipes: settings put together, checked, and shipped."""
