#!/usr/bin/env bash
# LMCache's disaggregated prefill over TCPX between two processes on CPUs. Outside scripts/test: LMCache brings torch. Exit status 77: skipped.
#   run.sh [PAIR-OPTIONS]       see pair.py
#   LMCACHE_VERSION=0.5.6  NIXL_VERSION=1.5.1
#   LMCACHE_PYTHON=python3  an interpreter that has lmcache, nixl and nixl-tcpx already; nothing is installed then
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
repo=$(cd "$here/../.." && pwd)
lmcache=${LMCACHE_VERSION:-0.5.6} nixl=${NIXL_VERSION:-1.5.1}
python=${LMCACHE_PYTHON:-}
if [ -z "$python" ]; then
  venv=$repo/.venv/lmcache
  if [ ! -e "$venv/complete" ]; then
    python3 -m venv "$venv"
    if ! "$venv/bin/pip" install --quiet --disable-pip-version-check "lmcache==$lmcache" "nixl==$nixl" "nixl-cu12==$nixl"; then
      echo "SKIPPED: LMCache $lmcache could not be installed"
      exit 77
    fi
    touch "$venv/complete"
  fi
  "$venv/bin/pip" install --quiet --disable-pip-version-check --force-reinstall --no-deps "$("$repo/scripts/build-wheel")"
  python=$venv/bin/python
fi
NIXL_PLUGIN_DIR=$("$python" -m nixl_tcpx plugin-dir)
export NIXL_PLUGIN_DIR NIXL_LOG_LEVEL=${NIXL_LOG_LEVEL:-WARN} LMCACHE_LOG_LEVEL=${LMCACHE_LOG_LEVEL:-WARNING}
export UCCL_TCPX_PLUGIN=${UCCL_TCPX_PLUGIN:-soft} NCCL_SOCKET_IFNAME=${NCCL_SOCKET_IFNAME:-lo}
export NCCL_GPUDIRECTTCPX_SOCKET_IFNAME=${NCCL_GPUDIRECTTCPX_SOCKET_IFNAME:-lo}
"$python" "$here/pair.py" "$@"
