#!/usr/bin/env bash
# One of two NICs is lost in the middle of a transfer: packets dropped, link down (also of NICs that nothing limits: fast), address removed, device
# deleted, connections reset; or from the start packets of full size are dropped (mtu); writes, reads and messages; default settings. The log names
# the NIC and the cause. The transfer ends in OK over the other NIC with every byte right, and stands for at most 0.3 s (fast: 0.1 s) after a loss that
# the kernel announces, 3 s after silence. A NIC that falls to 1 Mbit/s is not taken for a silent one, and holds the transfer up for at most 2 s.
# Of four NICs all but one fall silent at once (all), or go down one after the other (turns). Exit status 77: skipped.
#
# usage: lost_nic.sh TCPX_PERF [long | FAULT OP]     without long: three faults at a time, each with one operation
here=$0
. "$(dirname "$0")/lib.sh"
command -v iptables >/dev/null || skip "$name needs iptables"
command -v ss >/dev/null || skip "$name needs ss"

# several FAULT:OP...: these at the same time
several() {
  local one pids=() rc
  for one in "$@"; do
    "$here" "$perf" "${one%:*}" "${one#*:}" >"$scratch/$one" 2>&1 &
    pids+=($!)
  done
  for one in "$@"; do
    wait "${pids[0]}" || { rc=$?; [ $rc = 77 ] && [ $status = 0 ] && status=77 || status=1; }
    pids=("${pids[@]:1}")
    cat "$scratch/$one"
  done
}

once() { (
  status=0
  several "$@"
  exit $status
); }

status=0
case ${2-} in
'')
  several drop:write down:read address:send
  several delete:write reset:read mtu:send
  several rate:write all:read turns:send
  # A figure that a busy machine misses is measured again, twice at most.
  once fast:write || once fast:write || once fast:write || status=$?
  exit $status
  ;;
long)
  for fault in drop down address delete reset mtu rate all turns fast; do several $fault:write $fault:read $fault:send; done
  exit $status
  ;;
esac

fault=$2 op=$3
export UCCL_P2P_LOG_LEVEL=info
hosts
case $fault in
all | turns) nics 50 50 50 50 ;;
fast)
  nics 1000 1000
  for host in $a $b; do for nic in eth1 eth2; do tc -n $host qdisc del dev $nic root; done; done
  ;;
*) nics 100 100 ;;
esac
serve

wrong() { grep -aiE 'mismatch|wrong|differ' "$scratch/client" "$scratch/server"; }

case $fault in
mtu) for host in $a $b; do ip netns exec $host iptables -A INPUT -i eth2 -m length --length 1000:65535 -j DROP; done ;;
esac
# Long enough to be in the middle of one transfer, or of many where that would be too short.
length=(--total 64M --iters 1)
[ $fault != fast ] || length=(--total 8M --time 5)
observed --op "$op" --verify --warmup 0 --channels 4 "${length[@]}"
least=4000000
[ $fault != mtu ] || least=4000 # full packets do not pass
under_way $least eth2
alive || { echo "$name: $fault, $op: the transfer did not begin:"; cat "$scratch/client"; exit 1; }
began=$(now)
case $fault in
drop) for host in $a $b; do ip netns exec $host iptables -A INPUT -i eth2 -j DROP; done ;;
down | fast) ip -n $b link set eth2 down ;;
address) ip -n $b addr flush dev eth2 ;;
delete) ip -n $b link del eth2 ;;
reset) ip netns exec $b ss -K -t state established src 10.78.2.2 >"$scratch/ss" 2>&1 ;;
rate) for host in $a $b; do tc -n $host qdisc change dev eth2 root tbf rate 1mbit burst 128k latency 20ms; done ;;
all) for host in $a $b; do for nic in eth2 eth3 eth4; do ip netns exec $host iptables -A INPUT -i $nic -j DROP; done; done ;;
turns)
  {
    for nic in eth2 eth3 eth4; do ip -n $b link set $nic down && sleep 0.5; done
  } &
  ;;
esac
rc=0
observed_end || rc=$?
[ $rc = 0 ] && verdict=OK || { failed=1 verdict="FAILED: $(grep -aE 'ERROR|error' "$scratch/client" | head -1)"; }
case $fault in
drop | all) asked=3000 ;;
mtu) asked=3000 began=0 ;;
rate) asked=2000 ;;
fast) asked=100 ;;
*) asked=300 ;;
esac
judge_stalls "$began" $asked
[ -z "$too_long" ] || { failed=1; verdict="$verdict, $too_long"; }
wrong && { failed=1; verdict="$verdict, WRONG BYTES"; }
lost=$(cat "$scratch/client" "$scratch/server" | grep -ac ' is lost: ' || true)
case $fault-$lost in
# What waits on it for a second or longer may be sent again elsewhere.
rate-*) if grep -a ' is lost: ' "$scratch/client" "$scratch/server" | grep -av 'has become slow'; then failed=1 verdict="$verdict, a slow NIC was given up"; fi ;;
*-0) failed=1 verdict="$verdict, no line says what was lost" ;;
*) if grep -a ' is lost: ' "$scratch/client" "$scratch/server" | sed 's, go over .*,,' | grep -a 'channel [0-9]* is lost: .*eth1'; then failed=1 verdict="$verdict, NAMES eth1"; fi ;;
esac
# At both engines, in the words of the one that knows.
case $fault in
drop | all) cause='eth2 is silent: the peer has acknowledged nothing for' ;;
mtu) cause='no packet of [0-9]* bytes has passed yet: MTU?' ;;
down | turns | fast) cause='eth2 is down on this host' ;;
address) cause='eth2 has no address on this host' ;;
delete) cause='eth2 was removed on this host' ;;
# The host whose sockets were destroyed says "connection abort", the other one "reset": the first to notice tells both.
reset) cause='Connection reset by peer\|the peer closed the connection\|Software caused connection abort' ;;
*) cause= ;;
esac
for log in client server; do
  [ -z "$cause" ] || grep -a ' is lost: channel 10\.78\.2\.[12]:.* -> 10\.78\.2\.[12]:.* on eth2' "$scratch/$log" | grep -aq "$cause" ||
    { failed=1; verdict="$verdict, the $log's log does not say the cause"; }
done
kill -0 $server 2>/dev/null || { failed=1; verdict="$verdict, the server has ended"; }
echo "$name: $fault, $op: $verdict; longest stall $longest ms, $lost lines of lost channels"
[ $failed = 0 ] || { echo "$name: the client:"; grep -av 'GB/s' "$scratch/client" | tail -20; echo "$name: its stalls, from $began on:"; parted_stalls; echo "$name: the server:"; tail -20 "$scratch/server"; }
exit $failed
