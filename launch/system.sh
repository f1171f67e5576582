#!/usr/bin/env bash
# Installs what the tests need of the system: on Debian, as root; elsewhere it says what it leaves out.
# Usage: bash launch/system.sh     (again and again, if you like: what is there is left alone)
# The S3 server of the tests is no part of this: it comes as a Python package, with the extra `test`.
set -euo pipefail

PYTHON=${PYTHON:-python3}
POLICY=/usr/sbin/policy-rc.d

# quietly COMMAND...: run it while no package may start a service; what the machine says of that itself stays.
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

# has COMMANDS...: whether all are there; daemons are not on everyone's path.
has() {
    local command
    for command in "$@"; do PATH="$PATH:/usr/sbin:/sbin" command -v "$command" || return 1; done
}

need "virtual environments" python3-venv "$PYTHON" -c "import venv, ensurepip"
need "SLURM with accounting, for \`avcil sandbox\`" "slurm-wlm slurmdbd munge mariadb-server" \
    has slurmctld slurmd sacct slurmdbd munged mariadbd mariadb-install-db
