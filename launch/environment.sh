# Sourced by the other scripts: creates .venv if there is none and installs the project into it, with the tested set of
# versions (constraints.txt), the lowest that setup.py allows; with AVCIL_VERSIONS=newest the newest that it allows.
# Usage: ensure_environment [EXTRAS]; sets VENV.
set -euo pipefail

PROJECT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
VENV="$PROJECT/.venv"

ensure_environment() {
    local extras=${1:-} stamp wanted versions=(--constraint "$PROJECT/constraints.txt")
    case ${AVCIL_VERSIONS:-tested} in
        tested) ;;
        newest) versions=(--upgrade --upgrade-strategy eager) ;;
        *) echo "AVCIL_VERSIONS=$AVCIL_VERSIONS: give tested or newest" >&2; exit 2 ;;
    esac
    stamp="$VENV/.installed${extras}"
    wanted=$(cat "$PROJECT/setup.py" "$PROJECT/constraints.txt" | cksum)${AVCIL_VERSIONS:+ $AVCIL_VERSIONS}
    if [ ! -x "$VENV/bin/python" ]; then
        "${PYTHON:-python3}" -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
            || { echo "Python 3.11 or newer is needed; set PYTHON=/path/to/python3.11" >&2; exit 2; }
        echo "Creating $VENV"
        "${PYTHON:-python3}" -m venv "$VENV"
    fi
    if [ ! -e "$stamp" ] || [ "$(cat "$stamp")" != "$wanted" ]; then
        echo "Installing avcil-dist and its dependencies (several GB the first time)"
        "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check \
            "${versions[@]}" --editable "$PROJECT${extras}"
        echo "$wanted" > "$stamp"
    fi
}
