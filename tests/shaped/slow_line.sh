#!/usr/bin/env bash
# A slow network is not a fault: both directions at once over one so slow that only a fraction of a transfer fits the deadlines. 4 Mbit/s and
# deadlines of a quarter of the default stand for 1 Mbit/s and the defaults.
# Exit status 77: skipped.
#
# usage: slow_line.sh TCPX_PERF
. "$(dirname "$0")/lib.sh"
export UCCL_TCPX_TRANSFER_TIMEOUT_MS=2500 UCCL_TCPX_PEER_TIMEOUT_MS=2500
hosts
nics 4
serve
timeout 80 ip netns exec $a "$perf" client "$address" --op write --bidirectional --verify --total 4M --warmup 0 --iters 1 --channels 4 >"$scratch/client" 2>&1 ||
  { failed=1; cat "$scratch/client" "$scratch/server"; }
tail -2 "$scratch/client"
finish
