#!/usr/bin/env bash
# Installs the system packages of the tests and of `avcil sandbox`: on Debian, as root; elsewhere it lists them.
# Usage: bash launch/system.sh     (installed packages are skipped)
# The S3 server of the tests is a Python package of the extra `test`.
set -euo pipefail

PYTHON=${PYTHON:-python3}
POLICY=/usr/sbin/policy-rc.d

# quietly COMMAND...: run it without output; no package may start a service unless the system has a policy of its own.
quietly() {
    local made=""
    if [ ! -e $POLICY ]; then
        made=1
        printf '#!/bin/sh\nexit 101\n' > $POLICY
        chmod +x $POLICY
    fi
    local failed=0
    "$@" > /dev/null || failed=$?
    if [ -n "$made" ]; then rm -f $POLICY; fi
    return $failed
}

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
    quietly apt-get -qq install -y --no-install-recommends $packages 2> /dev/null \
        || { apt-get -qq update && quietly apt-get -qq install -y --no-install-recommends $packages; }
}

# has COMMANDS...: whether all are installed; not every user has the folders of daemons on the path.
has() {
    local command
    for command in "$@"; do PATH="$PATH:/usr/sbin:/sbin" command -v "$command" || return 1; done
}

need "virtual environments" python3-venv "$PYTHON" -c "import venv, ensurepip"
need "Chromium, for the tests of pages" chromium has chromium
need "SLURM with accounting, for \`avcil sandbox\`" "slurm-wlm slurmdbd munge mariadb-server" \
    has slurmctld slurmd sacct slurmdbd munged mariadbd mariadb-install-db
