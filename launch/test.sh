#!/usr/bin/env bash
# Lint, types and the whole test suite, in the project's own environment.
# Usage: bash launch/test.sh [--with-system] [PYTEST ARGUMENTS]     (-m fast: a minute of tests without processes)
# Three tests run side by side, since most of them wait for processes; -n 0 runs them one by one.
#   --with-system   first run launch/system.sh, which installs the services that some tests start
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

if [ "${1:-}" = "--with-system" ]; then
    shift
    bash "$PROJECT/launch/system.sh"
fi
ensure_environment "[test]"
unset PYTHONDONTWRITEBYTECODE  # hundreds of processes import the project

cd "$PROJECT"
"$VENV/bin/ruff" check .
"$VENV/bin/ruff" format --check .
"$VENV/bin/mypy"
"$VENV/bin/python" -m pytest -n 3 "$@"
