# Sourced by the other scripts: creates .venv if there is none and installs the project into it, with the tested set of
# versions (constraints.txt).
# Usage: ensure_environment [EXTRAS]; sets VENV.
set -euo pipefail

PROJECT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
VENV="$PROJECT/.venv"

ensure_environment() {
    local extras=${1:-} stamp wanted
    stamp="$VENV/.installed${extras}"
    wanted=$(cat "$PROJECT/setup.py" "$PROJECT/constraints.txt" | cksum)
    if [ ! -x "$VENV/bin/python" ]; then
        "${PYTHON:-python3}" -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
            || { echo "Python 3.11 or newer is needed; set PYTHON=/path/to/python3.11" >&2; exit 2; }
        echo "Creating $VENV"
        "${PYTHON:-python3}" -m venv "$VENV"
    fi
    if [ ! -e "$stamp" ] || [ "$(cat "$stamp")" != "$wanted" ]; then
        echo "Installing avcil-dist and its dependencies (several GB the first time)"
        "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check \
            --constraint "$PROJECT/constraints.txt" --editable "$PROJECT${extras}"
        echo "$wanted" > "$stamp"
    fi
}
