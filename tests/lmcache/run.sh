#!/usr/bin/env bash
# LMCache's disaggregated prefill over TCPX between two processes on CPUs. In the long tier: LMCache brings torch, 7 GB. Exit status 77:
# skipped.
#   run.sh [PAIR-OPTIONS]       see pair.py
#   LMCACHE_VERSION=0.5.6       and the variables of tests/clients/environment.sh
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
. "$here/../clients/environment.sh"
client_python lmcache "lmcache==${LMCACHE_VERSION:-0.5.6}"
export LMCACHE_LOG_LEVEL=${LMCACHE_LOG_LEVEL:-WARNING}
"$python" "$here/pair.py" "$@"
