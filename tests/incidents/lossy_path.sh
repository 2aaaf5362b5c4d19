#!/usr/bin/env bash
# A network loses packets: the log says how many segments were retransmitted, and where. The trace level logs each transfer from
# start to end, and each step of the set-up. Exit status 77: skipped.
#
# usage: lossy_path.sh TCPX_PERF
. "$(dirname "$0")/lib.sh"
command -v iptables >/dev/null || skip "$name needs iptables"
export UCCL_TCPX_NUM_CHANNELS=2
hosts
nics 1000
ip netns exec $b iptables -A INPUT -p tcp -m statistic --mode random --probability 0.03 -j DROP 2>"$scratch/iptables" ||
  skip "$name needs iptables with statistic: $(head -1 "$scratch/iptables")"
# One segment per packet, so that each lost packet counts once.
for host in $a $b; do ip -n $host link set eth1 gso_max_segs 1; done
serve
UCCL_P2P_LOG_LEVEL=trace client 60 --wait
moving
reads 30 "WARN ${address}: [0-9]+ of [0-9]+ segments \([0-9.]+ %\) were retransmitted recently, most of them on .* -> 10\.78\.1\.2:.* on eth1: the network loses packets" log
reads 1 "TRACE.* transfer 1 starts: Write, [0-9]+ bytes in 1 segments" log
reads 1 "TRACE.* transfer 1 \(Write, [0-9]+ bytes\) ended: ok" log
for step in "the peer is proved" "this engine offers 2 channels" "the peer offers 2 channels" "2 channels are up here" "2 channels are up on both sides"; do
  reads 1 "TRACE.* set-up with ${address//./\\.}: $step, [0-9.]+ ?[^ ]*s after its start" log
done
kill -INT $client
end_client
finish
