#!/usr/bin/env bash
# vLLM's NixlConnector and NixlPushConnector over TCPX between two processes on CPUs, the model replaced. In the long tier: vLLM and torch are 10 GB.
# Exit status 77: skipped.
#   run.sh [PAIR-OPTIONS]       see pair.py
#   VLLM_VERSION=0.33.0         and the variables of tests/clients/environment.sh
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
. "$here/../clients/environment.sh"
# It requires a newer certifi than some indexes have.
overrides="certifi>=2026" client_python vllm "vllm==${VLLM_VERSION:-0.33.0}"
# Only GPUs use it, and it does not load without one.
[ -n "${VLLM_PYTHON:-}" ] || "$python" -m pip uninstall --quiet --yes flashinfer-python
export HF_HUB_OFFLINE=1 VLLM_NO_USAGE_STATS=1 GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-lo}
"$python" "$here/pair.py" "$@"
