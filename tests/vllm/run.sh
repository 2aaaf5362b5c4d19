#!/usr/bin/env bash
# vLLM's NixlConnector over TCPX between two processes on CPUs, the model replaced. Outside scripts/test: vLLM and torch are 10 GB.
# Exit status 77: skipped.
#   run.sh [PAIR-OPTIONS]       see pair.py
#   VLLM_VERSION=0.33.0  NIXL_VERSION=1.5.1
#   VLLM_PYTHON=python3  an interpreter that has vllm, nixl and nixl-tcpx already; nothing is installed then
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
repo=$(cd "$here/../.." && pwd)
vllm=${VLLM_VERSION:-0.33.0} nixl=${NIXL_VERSION:-1.5.1}
python=${VLLM_PYTHON:-}
if [ -z "$python" ]; then
  venv=$repo/.venv/vllm
  if [ ! -e "$venv/complete" ]; then
    python3 -m venv "$venv"
    if ! "$venv/bin/pip" install --quiet --disable-pip-version-check "vllm==$vllm" "nixl==$nixl" "nixl-cu12==$nixl"; then
      echo "SKIPPED: vLLM $vllm could not be installed"
      exit 77
    fi
    # Only GPUs use it, and it does not load without one.
    "$venv/bin/pip" uninstall --quiet --yes flashinfer-python
    touch "$venv/complete"
  fi
  "$venv/bin/pip" install --quiet --disable-pip-version-check --force-reinstall --no-deps "$("$repo/scripts/build-wheel")"
  python=$venv/bin/python
fi
NIXL_PLUGIN_DIR=$("$python" -m nixl_tcpx plugin-dir)
export NIXL_PLUGIN_DIR NIXL_LOG_LEVEL=${NIXL_LOG_LEVEL:-WARN} HF_HUB_OFFLINE=1 VLLM_NO_USAGE_STATS=1
export UCCL_TCPX_PLUGIN=${UCCL_TCPX_PLUGIN:-soft} NCCL_SOCKET_IFNAME=${NCCL_SOCKET_IFNAME:-lo}
export NCCL_GPUDIRECTTCPX_SOCKET_IFNAME=${NCCL_GPUDIRECTTCPX_SOCKET_IFNAME:-lo} GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-lo}
"$python" "$here/pair.py" "$@"
