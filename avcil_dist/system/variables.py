"""Changes of this process's environment, which libraries read.

A thread that reads the environment in machine code (`getenv`) while another one adds a variable reads freed memory: the
process may crash. So a rank changes its environment before it has threads. What is set already is not written again.
"""

import os
from collections.abc import Iterable, Mapping


def set_variables(values: Mapping[str, str]) -> None:
    """Set variables; one that has the value is left alone."""
    for name, value in values.items():
        if os.environ.get(name) != value:
            os.environ[name] = value


def set_missing_variables(values: Mapping[str, str]) -> None:
    """Set the variables that are not set."""
    set_variables({name: value for name, value in values.items() if name not in os.environ})


def unset_variables(names: Iterable[str]) -> None:
    """Remove those of the variables that are set."""
    for name in names:
        os.environ.pop(name, None)
