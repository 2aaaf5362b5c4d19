#!/usr/bin/env bash
# Runs the NIXL tests against wheels from PyPI.
#   run.sh LIBDIR PLUGINDIR [CASE...]      LIBDIR holds libuccl_p2p.so, PLUGINDIR libplugin_TCPX.so
#   NIXL_VERSION=1.5.1   version of the wheels        NIXL_CUDA=12   12 or 13: which nixl-cuNN wheel
#   NIXL_TEST=test_nixl_tcpx.py                       the test program
#   NIXL_JOBS=1          cases that run side by side
#   NIXL_INSTALL_ONLY=1  the wheels, and no test
#   NIXL_PYTHON=python3  an interpreter that has the wheels (and torch) already; nothing is installed then
set -euo pipefail

[ $# -ge 2 ] || { sed -n '2,8p' "$0"; exit 2; }
libdir=$(cd "$1" && pwd)
plugindir=$(cd "$2" && pwd)
shift 2
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
repo=$(cd "$here/../.." && pwd)
version=${NIXL_VERSION:-1.5.1}
cuda=${NIXL_CUDA:-12}
python=${PYTHON:-python3}

library=$libdir/libuccl_p2p.so
[ -e "$library" ] || library=$library.0
for file in "$library" "$plugindir/libplugin_TCPX.so"; do
    [ -e "$file" ] || { echo "run.sh: $file does not exist" >&2; exit 2; }
done

interpreter=${NIXL_PYTHON:-}
if [ -z "$interpreter" ]; then
    venv=$repo/.venv/nixl
    [ "$version-cu$cuda" = 1.5.1-cu12 ] || venv=$venv-$version-cu$cuda
    stamp=$venv/complete
    if [ ! -e "$stamp" ]; then
        rm -rf "$venv"
        "$python" -m venv "$venv"
        # --no-deps: the wheels depend on torch and both CUDA builds, which the tests do not need.
        if ! "$venv/bin/pip" install --quiet --disable-pip-version-check --no-deps "nixl==$version" "nixl-cu$cuda==$version" numpy; then
            echo "SKIPPED: NIXL $version could not be downloaded"
            exit 77
        fi
        touch "$stamp"
    fi
    interpreter=$venv/bin/python
fi
[ -z "${NIXL_INSTALL_ONLY:-}" ] || exit 0

# The plugin links to the library by its SONAME, which cargo's build directory does not have as a file.
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
[ -e "$libdir/libuccl_p2p.so.0" ] || ln -s "$library" "$scratch/libuccl_p2p.so.0"

# NIXL_PLUGIN_DIR replaces the wheel's own directory, so the wheel's plugins are hidden unless a test adds them.
export NIXL_PLUGIN_DIR=$plugindir
export LD_LIBRARY_PATH=$scratch:$libdir${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
export NIXL_PACKAGE=nixl_cu$cuda
if ! "$interpreter" -c "import $NIXL_PACKAGE._api" 2>/dev/null && ! "$interpreter" -c 'import torch' 2>/dev/null; then
    export PYTHONPATH=$here/torch_stub${PYTHONPATH:+:$PYTHONPATH}
fi
export NIXL_LOG_LEVEL=${NIXL_LOG_LEVEL:-WARN}
export UCCL_TCPX_PLUGIN=${UCCL_TCPX_PLUGIN:-soft}
export UCCL_TCPX_SOFT_STRICT=${UCCL_TCPX_SOFT_STRICT:-1}
export NCCL_SOCKET_IFNAME=${NCCL_SOCKET_IFNAME:-lo}
export NCCL_GPUDIRECTTCPX_SOCKET_IFNAME=${NCCL_GPUDIRECTTCPX_SOCKET_IFNAME:-lo}
"$interpreter" "$here/${NIXL_TEST:-test_nixl_tcpx.py}" "$@"
