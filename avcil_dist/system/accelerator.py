"""Name of DeepSpeed's accelerator, which it reads when it is imported; otherwise it guesses, with a warning."""

import os

VARIABLE = "DS_ACCELERATOR"


def name_accelerator(device_type: str) -> None:
    """Set the accelerator, `cuda` or `cpu`, of this process and of those that it starts."""
    os.environ[VARIABLE] = device_type
