#!/usr/bin/env bash
# SGLang's disaggregated prefill over TCPX between two processes on CPUs, the model left out. Outside scripts/test: SGLang brings torch and
# more. Exit status 77: skipped.
#   run.sh [PAIR-OPTIONS]       see pair.py
#   SGLANG_VERSION=0.5.23  NIXL_VERSION=1.5.1
#   SGLANG_PYTHON=python3  an interpreter that has sglang, nixl and nixl-tcpx already; nothing is installed then
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
repo=$(cd "$here/../.." && pwd)
sglang=${SGLANG_VERSION:-0.5.23} nixl=${NIXL_VERSION:-1.5.1}
python=${SGLANG_PYTHON:-}
if [ -z "$python" ]; then
  venv=$repo/.venv/sglang
  if [ ! -e "$venv/complete" ]; then
    python3 -m venv "$venv"
    if ! "$venv/bin/pip" install --quiet --disable-pip-version-check "sglang==$sglang" "nixl==$nixl" "nixl-cu12==$nixl"; then
      echo "SKIPPED: SGLang $sglang could not be installed"
      exit 77
    fi
    touch "$venv/complete"
  fi
  "$venv/bin/pip" install --quiet --disable-pip-version-check --force-reinstall --no-deps "$("$repo/scripts/build-wheel")"
  python=$venv/bin/python
fi
NIXL_PLUGIN_DIR=$("$python" -m nixl_tcpx plugin-dir)
export NIXL_PLUGIN_DIR NIXL_LOG_LEVEL=${NIXL_LOG_LEVEL:-WARN}
export UCCL_TCPX_PLUGIN=${UCCL_TCPX_PLUGIN:-soft} NCCL_SOCKET_IFNAME=${NCCL_SOCKET_IFNAME:-lo}
export NCCL_GPUDIRECTTCPX_SOCKET_IFNAME=${NCCL_GPUDIRECTTCPX_SOCKET_IFNAME:-lo}
export SGLANG_DISAGGREGATION_NIXL_BACKEND=TCPX SGLANG_DISAGGREGATION_NIXL_BACKEND_PARAMS=${SGLANG_DISAGGREGATION_NIXL_BACKEND_PARAMS:-'{"num_channels": "4"}'}
"$python" -W ignore "$here/pair.py" "$@"
