"""`python -m launch` is `avcil`, for launchers that want a module."""

from launch.cli.main import cli

if __name__ == "__main__":
    cli(prog_name="avcil")
