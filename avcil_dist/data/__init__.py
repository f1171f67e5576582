"""Clips: where they are, in what order they are read, and how they become tensors."""
