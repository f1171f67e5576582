"""Encoders of pictures and sound, each with its weights."""
