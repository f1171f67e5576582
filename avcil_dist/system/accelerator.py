"""Name of DeepSpeed's accelerator, which it reads when it is imported; otherwise it guesses, with a warning."""

from avcil_dist.system.variables import set_variables

VARIABLE = "DS_ACCELERATOR"


def name_accelerator(device_type: str) -> None:
    """Set the accelerator, `cuda` or `cpu`, of this process and of those that it starts."""
    set_variables({VARIABLE: device_type})
