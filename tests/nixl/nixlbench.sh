#!/usr/bin/env bash
# NIXL's benchmark, compiled unchanged, over this library in the place of UCX (python -m nixl_tcpx as-ucx): each read and write of every block and batch size
# is compared by nixlbench itself. Two processes of this host meet over its ASIO runtime, without etcd. Needs NIXL's sources of a version whose wheel has the
# same interface, and the headers of gflags, asio and toml++. Exit status 77: skipped.
#   NIXL_SOURCE=DIR nixlbench.sh WHEEL
#   NIXL_VERSION=1.4.1   NIXL_CUDA=12   the wheel of NIXL, from PyPI
set -euo pipefail
[ $# = 1 ] || { sed -n '2,6p' "$0"; exit 2; }
wheel=$(readlink -f "$1")
source=${NIXL_SOURCE:-} version=${NIXL_VERSION:-1.4.1} cuda=${NIXL_CUDA:-12}
bench=$source/benchmark/nixlbench
[ -e "$bench/src/runtime/asio_runtime.h" ] || { echo "SKIPPED: NIXL_SOURCE does not name NIXL's sources of 1.4 or newer (git clone https://github.com/ai-dynamo/nixl)"; exit 77; }
printf '#include <gflags/gflags.h>\n#include <asio.hpp>\n#include <toml++/toml.h>\n' | g++ -std=c++20 -E -x c++ - >/dev/null 2>&1 ||
  { echo "SKIPPED: the headers of gflags, asio or toml++ are not installed (libgflags-dev libasio-dev libtomlplusplus-dev)"; exit 77; }
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
python3 -m venv "$scratch/venv"
python=$scratch/venv/bin/python
if ! "$python" -m pip install --quiet --disable-pip-version-check --no-deps "nixl==$version" "nixl-cu$cuda==$version" numpy; then
  echo "SKIPPED: NIXL $version could not be downloaded"
  exit 77
fi
"$python" -m pip install --quiet --disable-pip-version-check --no-deps "$wheel"
site=$(echo "$scratch"/venv/lib/python3*/site-packages)
libs=$site/.nixl_cu$cuda.mesonpy.libs

for feature in ETCD NVSHMEM CUDA ROCM CUDA_FABRIC; do echo "#define HAVE_$feature 0"; done >"$scratch/config.h"
# Debian 12's toml++ has another name for its header.
mkdir "$scratch/toml++"
echo '#include <toml++/toml.h>' >"$scratch/toml++/toml.hpp"
includes=(-I"$scratch" -I"$bench" -I"$bench/src" -I"$bench/src/runtime" -I"$source/src")
for folder in api/cpp infra core utils utils/common utils/serdes; do includes+=(-I"$source/src/$folder"); done
g++ -std=c++20 -O1 -w -fopenmp "${includes[@]}" "$bench"/src/main.cpp "$bench"/src/runtime/runtime.cpp "$bench"/src/utils/*.cpp "$bench"/src/worker/worker.cpp \
  "$bench"/src/worker/nixl/*.cpp -o "$scratch/nixlbench" -L"$libs" -lnixl -lnixl_common -lnixl_build -lserdes -Wl,-rpath,"$libs:$site/nixl_cu$cuda.libs" \
  -Wl,--disable-new-dtags -Wl,--allow-shlib-undefined -lgflags -lpthread -ldl

export NIXL_PACKAGE=nixl_cu$cuda UCCL_TCPX_PLUGIN=${UCCL_TCPX_PLUGIN:-soft} NCCL_SOCKET_IFNAME=${NCCL_SOCKET_IFNAME:-lo}
export NCCL_GPUDIRECTTCPX_SOCKET_IFNAME=${NCCL_GPUDIRECTTCPX_SOCKET_IFNAME:-lo}
unset NIXL_PLUGIN_DIR
port=$((20000 + RANDOM % 10000))
for operation in WRITE READ; do
  for more in "" "--max_batch_size 32 --num_threads 2 --pipeline_depth 2"; do
    # shellcheck disable=SC2206  # words
    command=("$python" -m nixl_tcpx as-ucx -- "$scratch/nixlbench" --backend UCX --runtime_type ASIO --asio_port $port --op_type $operation --check_consistency=true
      --total_buffer_size 536870912 --num_iter 64 --warmup_iter 16 --max_block_size 4194304 $more)
    port=$((port + 1))
    timeout 120 "${command[@]}" >"$scratch/target" 2>&1 &
    target=$!
    failed=
    timeout 120 "${command[@]}" >"$scratch/initiator" 2>&1 || failed=1
    wait $target || failed=1
    cat "$scratch/initiator" "$scratch/target" >"$scratch/both"
    # A line for each block size from 4 KiB to 4 MiB at least, and both processes over this library.
    rows=$(grep -cE '^[0-9]+ +[0-9]+ +[0-9.]+ ' "$scratch/both") || true
    [ "$(grep -c 'as UCX' "$scratch/both")" = 2 ] && [ "$rows" -ge 11 ] && ! grep -q 'Consistency check failed' "$scratch/both" || failed=1
    [ -z "$failed" ] || { echo "FAILED: $operation $more"; tail -n 40 "$scratch/initiator" "$scratch/target"; exit 1; }
    echo "ok    nixlbench $operation $more: $rows block and batch sizes"
  done
done
