#!/usr/bin/env bash
# The NIC of the control connection is lost in the middle of a transfer, and another NIC is left: packets dropped both ways, link down at
# either host, address removed, the connection reset; writes, reads and messages over channels, and small ones inside of the control
# connection. The control connection is made again over the other NIC, and everything ends in OK with every byte right, and without a long
# pause. A peer that is killed is noticed at once all the same. Exit status 77: skipped.
#
# usage: lost_control.sh TCPX_PERF [FAULT OP]
here=$0
CONTROL_NIC=eth
. "$(dirname "$0")/lib.sh"
command -v iptables >/dev/null || skip "$name needs iptables"
command -v ss >/dev/null || skip "$name needs ss"

if [ $# -eq 1 ]; then
  status=0
  for fault in drop down near address reset kill; do
    pids=()
    for op in write read send small; do
      "$here" "$perf" $fault $op >"$scratch/$fault-$op" 2>&1 &
      pids+=($!)
    done
    for i in 0 1 2 3; do
      wait "${pids[$i]}" || { rc=$?; [ $rc = 77 ] && [ $status = 0 ] && status=77 || status=1; }
    done
    cat "$scratch/$fault"-*
  done
  exit $status
fi

fault=$2 op=$3
export UCCL_P2P_LOG_LEVEL=info
hosts
nics 100 100
serve '10\.78\.1\.2:[0-9]+'
port=${address##*:}

wrong() { grep -aiE 'mismatch|wrong|differ' "$scratch/client" "$scratch/server"; }

# Long enough to be in the middle of it.
case $op in
small) observed --verify --warmup 0 --op write --total 16K --inflight 16 --iters 400 --channels 4 ;;
*) observed --verify --warmup 0 --op "$op" --total 48M --iters 1 --channels 4 ;;
esac
under_way 4000000
alive || { echo "$name: $fault, $op: the transfer did not begin, or ended too soon:"; grep -av 'GB/s' "$scratch/client"; exit 1; }
began=$(now)
case $fault in
drop) for host in $a $b; do ip netns exec $host iptables -A INPUT -i eth1 -j DROP; done ;;
down) ip -n $b link set eth1 down ;;
near) ip -n $a link set eth1 down ;;
address) ip -n $b addr flush dev eth1 ;;
reset) ip netns exec $b ss -K -t state established sport = ":$port" >"$scratch/ss" 2>&1 ;;
kill) kill -KILL $server ;;
esac
if [ $fault = kill ]; then
  rc=0
  wait $client || rc=$?
  took=$(($(now) - began))
  [ $rc != 0 ] && [ $took -lt 2500 ] || failed=1
  echo "$name: $fault, $op: the client ended with status $rc after $took ms"
  [ $failed = 0 ] || tail -20 "$scratch/client"
  exit $failed
fi
rc=0
observed_end || rc=$?
[ $rc = 0 ] && verdict=OK || { failed=1 verdict="FAILED: $(grep -aE 'ERROR|error' "$scratch/client" | head -1)"; }
# After a reset both NICs do. What happens at the listener's NIC is silence for the connector.
case $fault in
reset) asked=300 to='10\.78\.[12]\.' ;;
near) asked=300 to='10\.78\.2\.' ;;
*) asked=3000 to='10\.78\.2\.' ;;
esac
judge_stalls "$began" $asked
[ -z "$too_long" ] || { failed=1; verdict="$verdict, $too_long"; }
wrong && { failed=1; verdict="$verdict, WRONG BYTES"; }
for side in client server; do
  lines=$(grep -ac "the control connection with .* moved from .* to $to" "$scratch/$side" || true)
  [ "$lines" = 1 ] || { failed=1 verdict="$verdict, $lines lines of the $side say that the control connection moved"; }
done
kill -0 $server 2>/dev/null || { failed=1; verdict="$verdict, the server has ended"; }
echo "$name: $fault, $op: $verdict; longest stall $longest ms; $(grep -ao 'moved from .*' "$scratch/client" | head -1)"
[ $failed = 0 ] || { echo "$name: the client:"; grep -av 'GB/s' "$scratch/client" | tail -20; echo "$name: its stalls, from $began on:"; parted_stalls; echo "$name: the server:"; tail -20 "$scratch/server"; }
exit $failed
