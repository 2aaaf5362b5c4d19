#!/usr/bin/env bash
# Tests the Python package uccl_tcpx from the sources over a library of this build, with numpy from PyPI if it can be had.
#   run.sh LIBRARY [CASE...]      LIBRARY: libuccl_p2p.so
#   PYTHON=python3
set -euo pipefail
[ $# -ge 1 ] || { sed -n '2,4p' "$0"; exit 2; }
library=$(readlink -f "$1")
shift
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
repo=$(cd "$here/../.." && pwd)
python=${PYTHON:-python3}
if ! "$python" -c 'import numpy' 2>/dev/null; then
  venv=$repo/.venv/python
  if [ ! -e "$venv/complete" ]; then
    rm -rf "$venv"
    "$python" -m venv "$venv"
    "$venv/bin/pip" install --quiet --disable-pip-version-check numpy || echo "note: numpy could not be downloaded"
    touch "$venv/complete"
  fi
  python=$venv/bin/python
fi
export LIBUCCL_P2P=$library PYTHONPATH=$repo/python${PYTHONPATH:+:$PYTHONPATH} PYTHONDONTWRITEBYTECODE=1
export UCCL_TCPX_PLUGIN=${UCCL_TCPX_PLUGIN:-soft} UCCL_P2P_LOG_LEVEL=${UCCL_P2P_LOG_LEVEL:-off}
export NCCL_SOCKET_IFNAME=${NCCL_SOCKET_IFNAME:-lo} NCCL_GPUDIRECTTCPX_SOCKET_IFNAME=${NCCL_GPUDIRECTTCPX_SOCKET_IFNAME:-lo}
exec "$python" "$here/test_uccl_tcpx.py" "$@"
