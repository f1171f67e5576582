"""`python -m launch` runs `avcil`, for launchers such as torchrun that take a module."""

from launch.cli.main import cli

if __name__ == "__main__":
    cli(prog_name="avcil")
