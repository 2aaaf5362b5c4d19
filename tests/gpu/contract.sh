#!/usr/bin/env bash
# The contract probe over the plugins of this repository, with simulated device memory: no GPU is needed. scripts/gpu-test runs it with one.
#
# usage: contract.sh RELEASE_FOLDER
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
release=$(cd "$1" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
gcc -O2 -Wall -Wextra -Wno-unused-parameter -Werror -o "$work/probe" "$here"/contract_probe/*.c -ldl -lpthread
gcc -O2 -Wall -Wextra -Werror -shared -fPIC -o "$work/libcuda.so.1" "$here/simulated_cuda.c"
export LD_LIBRARY_PATH=$work UCCL_TCPX_EMULATE_DEVICE=1 UCCL_TCPX_SOFT_STRICT=1 NCCL_DYNAMIC_CHUNK_SIZE=1048576
export NCCL_SOCKET_IFNAME=lo NCCL_GPUDIRECTTCPX_SOCKET_IFNAME=lo
"$work/probe" main stress bench sender_killed receiver_killed "$release/libnccl_net_tcpx_soft.so"
# The other cases do things for which the strict plugin ends the process.
"$work/probe" stress "$release/libnccl_net_strict_foreign.so"
STRICT_FOREIGN_CONTRACT=tcpxo "$work/probe" in_place in_place_sender_killed in_place_receiver_killed stress "$release/libnccl_net_strict_foreign.so"
