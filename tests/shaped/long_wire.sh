#!/usr/bin/env bash
# A wire of 1 Gbit/s with 20 ms of delay each way and a queue of about what it holds (5 MB): one connection reaches at least 85 % of the
# line's rate. Of an IP packet's 1500 bytes on that wire 1448 are payload. Exit status 77: skipped.
#
# usage: long_wire.sh TCPX_PERF      RELAY_MBIT, RELAY_DELAY_MS, RELAY_QUEUE_BYTES
CONTROL_NIC=wire0 DATA_NICS=wire
. "$(dirname "$0")/lib.sh"
mbit=${RELAY_MBIT:-1000}
hosts
wire "$mbit" "${RELAY_DELAY_MS:-20}" "${RELAY_QUEUE_BYTES:-6000000}"
ip -n $a addr add 10.78.1.1/24 dev wire0
ip -n $b addr add 10.78.1.2/24 dev wire0
for host in $a $b; do ip -n $host link set wire0 mtu 1500 txqueuelen 10000 up; done
serve
# Checks that the wire is long: one small operation takes at least a round trip.
timeout 20 ip netns exec $a "$perf" client "$address" --op write --total 4K --warmup 0 --iters 10 --json "$scratch/row.json" >"$scratch/client" 2>&1 ||
  { cat "$scratch/client"; exit 1; }
round_trip=$(sed -n 's/.*"p50_us": \([0-9.]*\).*/\1/p' "$scratch/row.json")
awk -v us="$round_trip" -v ms="${RELAY_DELAY_MS:-20}" -v what="$name" 'BEGIN {
  printf "%s: one 4 KiB write takes %.1f ms\n", what, us / 1000
  exit !(us >= 2000 * ms)
}' || { echo "$name: the relay does not delay"; exit 1; }
# The relay is a program: on a busy machine it may run too late for its own queue and drop packets that a real wire would not.
for op in write read; do
  judge $op 85 "$mbit" 1448 1500 --total 256M --warmup 1 --iters 5
done
unwire
cat "$scratch/relayed"
finish
