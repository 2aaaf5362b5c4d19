#!/usr/bin/env bash
# One of two NICs is lost and comes back while transfers run: packets dropped, link down, address removed, connections reset; a link that
# comes and goes; and one that was down when the connection was made (absent). No transfer fails, every byte is right, and within 5 s after the
# end of the fault channels on both NICs carry data, by the channels' own counters.
# Exit status 77: skipped.
#
# usage: nic_returns.sh TCPX_PERF [long | FAULT OP]     FAULT: drop, down, address, reset, absent, or flap:SECONDS; long: all faults
here=$0
. "$(dirname "$0")/lib.sh"
command -v iptables >/dev/null || skip "$name needs iptables"
command -v ss >/dev/null || skip "$name needs ss"

if [ $# -le 2 ]; then
  faults=(down drop absent)
  [ "${2:-}" = long ] && faults=(down drop absent address reset flap:0.5 flap:3)
  status=0
  for fault in "${faults[@]}"; do
    pids=()
    for op in write read; do
      "$here" "$perf" "$fault" $op >"$scratch/$fault-$op" 2>&1 &
      pids+=($!)
    done
    for pid in "${pids[@]}"; do
      wait "$pid" || { rc=$?; [ $rc = 77 ] && [ $status = 0 ] && status=77 || status=1; }
    done
    cat "$scratch/$fault"-*
  done
  exit $status
fi

fault=$2 op=$3
export UCCL_P2P_LOG_LEVEL=info UCCL_TCPX_METRICS=9400
hosts
nics 100 100
[ $fault != absent ] || ip -n $b link set eth2 down
serve

begins() {
  case $fault in
  drop) for host in $a $b; do ip netns exec $host iptables -A INPUT -i eth2 -j DROP; done ;;
  down | flap:*) ip -n $b link set eth2 down ;;
  address) ip -n $b addr flush dev eth2 ;;
  absent) ;;
  reset) ip netns exec $b ss -K -t state established src 10.78.2.2 >"$scratch/ss" 2>&1 ;;
  esac
}
ends() {
  case $fault in
  drop) for host in $a $b; do ip netns exec $host iptables -D INPUT -i eth2 -j DROP; done ;;
  down | absent | flap:*) ip -n $b link set eth2 up ;;
  address) ip -n $b addr add 10.78.2.2/24 dev eth2 ;;
  reset) ;;
  esac
}
back() { cat "$scratch/client" "$scratch/server" | grep -ac ' are back after ' || true; }

# Transfers one after another, until this is over and a little longer.
duration=11
[[ $fault == flap:* ]] && duration=26
observed --op "$op" --verify --warmup 0 --total 8M --time $duration --channels 4
first=eth2
[ $fault != absent ] || first=eth1
for _ in $(seq 100); do
  scrape
  [ "$(carried $first)" -gt 1000000 ] && break
  alive || break
  sleep 0.1
done
alive || { echo "$name: $fault, $op: the transfers did not begin:"; cat "$scratch/client"; exit 1; }
begins
case $fault in
flap:*)
  pause=${fault#flap:}
  for _ in $(seq "$(awk -v pause="$pause" 'BEGIN { print int(10 / pause / 2) }')"); do
    sleep "$pause"
    ends
    sleep "$pause"
    begins
  done
  sleep "$pause"
  ;;
# Longer than it takes to give up a silent NIC.
drop) sleep 3.5 ;;
*) sleep 1.5 ;;
esac
scrape
before=$(carried eth2)
ends
began=$(now) took=never
while alive; do
  scrape
  if [ $(($(carried eth2) - before)) -gt 2000000 ]; then
    took=$(($(now) - began))
    break
  fi
  sleep 0.1
done
rc=0
observed_end || rc=$?
verdict=OK
[ $rc = 0 ] || { failed=1 verdict="FAILED: $(grep -aE 'ERROR|error' "$scratch/client" | head -1)"; }
if [ $took = never ]; then
  failed=1 verdict="$verdict, eth2 carries nothing"
else
  late=$(lateness "$began" $((began + took)))
  [ $took -le $((5000 + late)) ] || { failed=1; verdict="$verdict, asked: at most 5000 ms, and $late ms for the lateness of this machine"; }
fi
[ "$(back)" -gt 0 ] || { failed=1; verdict="$verdict, no line says that channels are back"; }
grep -aiE 'mismatch|wrong|differ' "$scratch/client" "$scratch/server" && { failed=1; verdict="$verdict, WRONG BYTES"; }
kill -0 $server 2>/dev/null || { failed=1; verdict="$verdict, the server has ended"; }
echo "$name: $fault, $op: $verdict; data on eth2 again after $took ms, $(back) lines of channels that are back"
[ $failed = 0 ] || { echo "$name: the client:"; grep -av 'GB/s' "$scratch/client" | tail -30; echo "$name: the server:"; tail -30 "$scratch/server"; }
exit $failed
