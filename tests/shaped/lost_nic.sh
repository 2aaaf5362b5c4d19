#!/usr/bin/env bash
# One of two NICs is lost in the middle of a transfer: packets dropped, link down, device deleted, connections reset, rate cut to a tenth; writes and
# reads; default deadlines. The transfer ends in OK or in an error that names a cause, in time, and never with wrong bytes; then a
# new connection moves data over the other NIC. All cases run in parallel.
# Exit status 77: skipped.
#
# usage: lost_nic.sh TCPX_PERF [FAULT OP]
here=$0
. "$(dirname "$0")/lib.sh"
command -v iptables >/dev/null || skip "$name needs iptables"
command -v ss >/dev/null || skip "$name needs ss"

if [ $# -eq 1 ]; then
  pids=() cases=() status=0
  for fault in drop down delete reset rate; do
    for op in write read; do
      "$here" "$perf" $fault $op >"$scratch/$fault-$op" 2>&1 &
      pids+=($!) cases+=("$fault-$op")
    done
  done
  for i in "${!pids[@]}"; do
    wait "${pids[$i]}" || { rc=$?; [ $rc = 77 ] && [ $status = 0 ] && status=77 || status=1; }
    cat "$scratch/${cases[$i]}"
  done
  exit $status
fi

fault=$2 op=$3
# The default deadline of a transfer, a second for polling, and a margin for a busy machine.
limit=13
hosts
nics 100 100
serve

client() { timeout 60 ip netns exec $a "$perf" client "$address" --op "$op" --verify --warmup 0 "$@" >"$scratch/client" 2>&1; }
wrong() { grep -aiE 'mismatch|wrong|differ' "$scratch/client" "$scratch/server"; }

# Long enough to be in the middle of one transfer.
client --total 64M --iters 1 --channels 4 &
running=$!
for _ in $(seq 100); do
  sent=$(ip netns exec $a sh -c 'cat /sys/class/net/eth2/statistics/tx_bytes /sys/class/net/eth2/statistics/rx_bytes' | paste -sd+ | bc)
  [ "$sent" -gt 4000000 ] && break
  kill -0 $running 2>/dev/null || break
  sleep 0.05
done
kill -0 $running 2>/dev/null || { echo "$name: $fault, $op: the transfer did not begin:"; cat "$scratch/client"; exit 1; }
began=$(date +%s%N)
case $fault in
drop) for host in $a $b; do ip netns exec $host iptables -A INPUT -i eth2 -j DROP; done ;;
down) ip -n $b link set eth2 down ;;
delete) ip -n $b link del eth2 ;;
reset) ip netns exec $b ss -K -t state established src 10.78.2.2 >"$scratch/ss" 2>&1 ;;
rate) for host in $a $b; do tc -n $host qdisc change dev eth2 root tbf rate 10mbit burst 128k latency 20ms; done ;;
esac
rc=0
wait $running || rc=$?
took=$((($(date +%s%N) - began) / 1000000))
cause=$(grep -aE 'has not moved|on eth|closed' "$scratch/client" | head -1 || true)
case $rc in
0) verdict=OK ;;
124) verdict="no end" failed=1 ;;
*) verdict="error: $cause"; [ -n "$cause" ] || failed=1 ;;
esac
# The messages name only the lost NIC.
case $fault-$rc in
drop-1 | down-1 | delete-1 | reset-1)
  case $cause in
  *eth1*) failed=1 verdict="$verdict, NAMES eth1" ;;
  *eth2*) ;;
  *) failed=1 verdict="$verdict, names no NIC" ;;
  esac
  ;;
esac
# Slow transfers may take longer; stalled ones may not.
[ $fault = rate ] && [ $rc = 0 ] || [ $took -le $((limit * 1000)) ] || { failed=1; verdict="$verdict, too late"; }
wrong && { failed=1; verdict="$verdict, WRONG BYTES"; }
echo "$name: $fault, $op: $took ms: $verdict"
[ $failed = 0 ] || { echo "$name: the client:"; tail -20 "$scratch/client"; }

began=$(date +%s%N)
if client --total 4M --iters 1; then
  echo "$name: $fault, $op: connected again after $((($(date +%s%N) - began) / 1000000)) ms in all"
else
  failed=1
  echo "$name: $fault, $op: no new connection:"
  cat "$scratch/client"
fi
wrong && failed=1
kill -0 $server 2>/dev/null || { failed=1; echo "$name: $fault, $op: the server has ended"; }
[ $failed = 0 ] || { echo "$name: the server:"; tail -20 "$scratch/server"; }
exit $failed
