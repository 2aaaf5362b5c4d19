#!/bin/bash
# Device memory TCP as a path of the library: tcpx-perf between two hosts over the pair of test NICs, memory of emulated GPUs, every byte
# verified by tcpx-perf, and what the NICs counted.
# usage: path.sh [ROW...]     rows by the names of their functions, below; default: all
. /vm/lib.sh
export UCCL_TCPX_PLUGIN=soft UCCL_TCPX_DEVMEM=auto UCCL_TCPX_EMULATE_DEVICE=1 UCCL_P2P_DISABLE_IPC=1 UCCL_P2P_LOG_LEVEL=info
export UCCL_TCPX_SOFT_DEVMEM_BYTES=48M UCCL_TCPX_NUM_CHANNELS=2 UCCL_TCPX_SOFT_THREADS=2
total=2097152 spread=3

# host HOST NIC [QUEUES]: header split, and so many queues for ordinary connections
host() {
  on "$1" ethtool -G "$2" tcp-data-split on && on "$1" ethtool -K "$2" ntuple on && on "$1" ethtool -X "$2" equal "${3:-$spread}"
}
prepare() { pair "$@" && host $a vmnic0 && host $b vmnic1; }

# written HOST NIC: bytes that the NIC has written into device memory; read HOST NIC: that it has read there
written() { on "$1" ethtool -S "$2" | awk '/device_memory_bytes/ && !/tx/ {n += $2} END {print n + 0}'; }
taken() { counter "$1" "$2" tx_device_memory_bytes; }
rules() { on "$1" ethtool -n "$2" | grep -c '^Filter:'; }

start_server() {
  on $b env "$@" tcpx-perf server >$out/server 2>&1 &
  server=$!
  until address=$(grep -oE '10\.78\.1\.2:[0-9]+' $out/server | head -1) && [ -n "$address" ]; do
    kill -0 $server 2>/dev/null || return 1
    sleep 0.1
  done
}
client() { timeout 90 ip netns exec $a tcpx-perf client "$address" --verify --total $total --iters 3 --warmup 1 "$@" >$out/client 2>&1; }
stop_server() { kill $server && wait $server 2>/dev/null; true; }

# by WORD: what carried the bytes, as tcpx-perf says
by() { grep -qw "$1" $out/client; }

write() { prepare && start_server && client --op write --require devmem && stop_server && by devmem && all_by_device; }
# Nothing of the payload came another way.
all_by_device() {
  local bytes=$((4 * total))
  echo "note: device memory: $(taken $a vmnic0) bytes read by the sender's NIC, $(written $b vmnic1) written by the receiver's"
  [ "$(taken $a vmnic0)" -ge $bytes ] && [ "$(written $b vmnic1)" -ge $bytes ]
}

rows=(write)
[ $# = 0 ] || rows=("$@")
for name in "${rows[@]}"; do row "${name//_/ }" "$name"; done
unpair
conclude
