# Sourced by the other scripts: creates .venv if there is none and installs the project into it, with the tested versions
# of all packages, whose hashes pip compares (requirements.lock); with AVCIL_VERSIONS=lowest or newest the lowest
# (constraints.txt) or the newest that setup.py allows.
# Usage: ensure_environment [EXTRAS]; sets VENV.
set -euo pipefail

PROJECT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
VENV="$PROJECT/.venv"

ensure_environment() {
    local extras=${1:-} versions=${AVCIL_VERSIONS:-tested} stamp wanted pip
    case $versions in
        tested | lowest | newest) ;;
        *) echo "AVCIL_VERSIONS=$AVCIL_VERSIONS: give tested, lowest or newest" >&2; exit 2 ;;
    esac
    stamp="$VENV/.installed${extras}"
    wanted=$(cat "$PROJECT/setup.py" "$PROJECT/constraints.txt" "$PROJECT/requirements.lock" | cksum)${AVCIL_VERSIONS:+ $AVCIL_VERSIONS}
    if [ ! -x "$VENV/bin/python" ]; then
        "${PYTHON:-python3}" -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
            || { echo "Python 3.11 or newer is needed; set PYTHON=/path/to/python3.11" >&2; exit 2; }
        echo "Creating $VENV"
        "${PYTHON:-python3}" -m venv "$VENV"
    fi
    if [ ! -e "$stamp" ] || [ "$(cat "$stamp")" != "$wanted" ]; then
        echo "Installing avcil-dist and its dependencies (several GB the first time)"
        pip=("$VENV/bin/python" -m pip install --quiet --disable-pip-version-check)
        case $versions in
            lowest) "${pip[@]}" --constraint "$PROJECT/constraints.txt" --editable "$PROJECT${extras}" ;;
            newest) "${pip[@]}" --upgrade --upgrade-strategy eager --editable "$PROJECT${extras}" ;;
            tested)
                "$VENV/bin/python" "$PROJECT/launch/lock.py" "$extras" > "$VENV/requirements.txt"
                "${pip[@]}" --require-hashes --no-deps --requirement "$VENV/requirements.txt"
                "${pip[@]}" --no-deps --editable "$PROJECT"
                ;;
        esac
        echo "$wanted" > "$stamp"
    fi
}
