"""Encoders of pictures and sound, and their pre-trained weights."""
