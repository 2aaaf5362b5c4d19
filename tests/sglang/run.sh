#!/usr/bin/env bash
# SGLang's disaggregated prefill over TCPX between two processes on CPUs, the model left out. In the long tier: SGLang brings torch and
# more, 10 GB. Exit status 77: skipped.
#   run.sh [PAIR-OPTIONS]       see pair.py
#   SGLANG_VERSION=0.5.23       and the variables of tests/clients/environment.sh
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
. "$here/../clients/environment.sh"
client_python sglang "sglang==${SGLANG_VERSION:-0.5.23}"
export SGLANG_DISAGGREGATION_NIXL_BACKEND=TCPX SGLANG_DISAGGREGATION_NIXL_BACKEND_PARAMS=${SGLANG_DISAGGREGATION_NIXL_BACKEND_PARAMS:-'{"num_channels": "4"}'}
"$python" -W ignore "$here/pair.py" "$@"
