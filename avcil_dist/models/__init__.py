"""Encoders, audio-guided attention, heads, and the network made of them."""
