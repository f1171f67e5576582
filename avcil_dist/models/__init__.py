"""Networks: encoders, audio-guided attention and heads."""
