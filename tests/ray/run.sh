#!/usr/bin/env bash
# Ray's NIXL transport of tensors between two actors, on CPUs. Ray names UCX; `as-ucx` makes this library stand for it. In the long tier: Ray and
# torch are 6 GB. Exit status 77: skipped.
#   run.sh
#   RAY_VERSION=2.60.0          and the variables of tests/clients/environment.sh
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
. "$here/../clients/environment.sh"
client_python ray "ray==${RAY_VERSION:-2.60.0}" torch numpy
unset NIXL_PLUGIN_DIR
export RAY_USAGE_STATS_ENABLED=0 RAY_AUTH_MODE=disabled UCCL_P2P_LOG_LEVEL=${UCCL_P2P_LOG_LEVEL:-info}
"$python" -m nixl_tcpx as-ucx -- "$python" "$here/actors.py" "$@"
