#!/usr/bin/env bash
# Installs what the tests need of the system: on Debian, as root; elsewhere it says what it leaves out.
# Usage: bash launch/system.sh     (again and again, if you like: what is there is left alone)
# The S3 server of the tests is no part of this: it comes as a Python package, with the extra `test`.
set -euo pipefail

PYTHON=${PYTHON:-python3}

# need WHAT PACKAGES CHECK: install the Debian packages unless the command CHECK succeeds.
need() {
    local what=$1 packages=$2
    shift 2
    if "$@" > /dev/null 2>&1; then return; fi
    if [ ! -e /etc/debian_version ] || [ "$(id -u)" != 0 ]; then
        echo "launch/system.sh: not installing $what (needs Debian and root: apt-get install $packages)" >&2
        return
    fi
    echo "Installing $what"
    export DEBIAN_FRONTEND=noninteractive
    # shellcheck disable=SC2086  # several packages
    apt-get -qq install -y --no-install-recommends $packages > /dev/null 2>&1 \
        || { apt-get -qq update && apt-get -qq install -y --no-install-recommends $packages > /dev/null; }
}

need "virtual environments" python3-venv "$PYTHON" -c "import venv, ensurepip"
need "a C++ compiler, for DeepSpeed" g++ sh -c "command -v c++"
