#!/usr/bin/env bash
# UCCL's own tests of its Python module, with uccl_tcpx in its place: those that need neither RDMA nor a GPU, and with a GPU those too. Needs
# torch. Exit status 77: skipped.
#   upstream.sh LIBRARY       LIBRARY: libuccl_p2p.so
#   UCCL_SOURCE=DIR   UCCL's sources; without it they are fetched from GitHub
#   PYTHON=python3    an interpreter with torch
set -euo pipefail
[ $# = 1 ] || { sed -n '2,6p' "$0"; exit 2; }
library=$(readlink -f "$1")
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
repo=$(cd "$here/../.." && pwd)
python=${PYTHON:-python3}
commit=da914a2054c29725464803e379bb3b98de90dfa1
"$python" -c 'import torch, torch.distributed' 2>/dev/null || { echo "SKIPPED: $python has no torch (PYTHON names another)"; exit 77; }
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
source=${UCCL_SOURCE:-}
if [ -z "$source" ]; then
  source=$scratch/source
  git init -q "$source"
  git -C "$source" fetch -q --depth 1 https://github.com/uccl-project/uccl "$commit" && git -C "$source" checkout -q FETCH_HEAD ||
    { echo "SKIPPED: UCCL's sources could not be fetched, and UCCL_SOURCE does not name them"; exit 77; }
fi
tests=$source/p2p/tests
[ -e "$tests/test_remove_remote_endpoint.py" ] || { echo "SKIPPED: $source has no p2p/tests"; exit 77; }
# Their import, unchanged.
mkdir "$scratch/uccl"
echo 'from uccl_tcpx import p2p' >"$scratch/uccl/__init__.py"
export LIBUCCL_P2P=$library PYTHONPATH=$scratch:$repo/python${PYTHONPATH:+:$PYTHONPATH} PYTHONDONTWRITEBYTECODE=1 OMP_NUM_THREADS=1
export UCCL_TCPX_PLUGIN=${UCCL_TCPX_PLUGIN:-soft} UCCL_P2P_LOG_LEVEL=${UCCL_P2P_LOG_LEVEL:-off} GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-lo}
export NCCL_SOCKET_IFNAME=${NCCL_SOCKET_IFNAME:-lo} NCCL_GPUDIRECTTCPX_SOCKET_IFNAME=${NCCL_GPUDIRECTTCPX_SOCKET_IFNAME:-lo}
failed=0
# run NAME COMMAND...
run() {
  local name=$1
  shift
  if timeout 120 "$@" >"$scratch/log" 2>&1 && ! grep -q 'Traceback' "$scratch/log"; then echo "passed $name"; else
    echo "FAILED $name"
    tail -n 15 "$scratch/log"
    failed=1
  fi
}
two=("$python" -m torch.distributed.run --nproc_per_node=2)
run test_remove_remote_endpoint "${two[@]}" "$tests/test_remove_remote_endpoint.py"
run "benchmark_ray_p2p write, host memory" "${two[@]}" "$source/p2p/benchmarks/benchmark_ray_p2p.py" --device cpu --sizes 65536 --iters 3
if "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  run test_engine_read "$python" "$tests/test_engine_read.py"
  run test_engine_write "$python" "$tests/test_engine_write.py"
else
  echo "note: no GPU: test_engine_read and test_engine_write are left out"
fi
exit $failed
