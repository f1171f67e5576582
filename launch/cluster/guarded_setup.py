"""Shell lines around `setup` of a cluster file, the same in the jobs of every scheduler."""

from collections.abc import Sequence


def guarded_setup(setup: Sequence[str], failed: Sequence[str]) -> list[str]:
    """Return shell lines that execute `setup`; the first of its commands that fails ends the shell, as with `set -e`.

    Before the end the command is printed, and the shell lines `failed` are executed; `$code` is its exit code.
    What `setup` itself sets with `set -e`, `set -u` and `set -o pipefail` ends with it.
    """
    if not setup:
        return []
    return [
        "is_set_up=",
        "of_setup() {  # $1: the exit code, $2: the command that ends the shell",
        '  if [ "$is_set_up" ]; then return; fi',
        "  set +eu; set +o pipefail",
        '  code=$1; echo "avcil: setup failed with exit code $code: $2"',
        *(f"  {line}" for line in failed),
        "}",
        """trap 'of_setup "$?" "$BASH_COMMAND"' EXIT""",
        "set -e",
        *setup,
        "set +eu; set +o pipefail",
        "is_set_up=1",
    ]
