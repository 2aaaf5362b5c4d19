#!/usr/bin/env bash
# Two hosts: two network namespaces joined by four veth pairs, each its own subnet. Transfers must run over all four NICs, each
# carrying its share, and the listening side must see the peer's real address. Exit status 77: skipped.
#
# usage: two_hosts.sh TCPX_PERF
set -euo pipefail
perf=$1
if [ "$(id -u)" != 0 ] || ! ip netns add uccl-probe-$$ 2>/dev/null; then
  echo "SKIPPED: two_hosts needs root and network namespaces"
  exit 77
fi
ip netns del uccl-probe-$$
a=uccl-a-$$ b=uccl-b-$$
logs=$(mktemp -d)
server=
cleanup() {
  [ -z "$server" ] || kill "$server" 2>/dev/null || true
  ip netns del $a 2>/dev/null || true
  ip netns del $b 2>/dev/null || true
  rm -rf "$logs"
}
trap cleanup EXIT
ip netns add $a
ip netns add $b
for i in 1 2 3 4; do
  ip link add "ua$i-$$" type veth peer name "ub$i-$$"
  ip link set "ua$i-$$" netns $a name eth$i
  ip link set "ub$i-$$" netns $b name eth$i
  ip -n $a addr add 10.77.$i.1/24 dev eth$i
  ip -n $b addr add 10.77.$i.2/24 dev eth$i
  ip -n $a link set eth$i up
  ip -n $b link set eth$i up
  # A line has a speed, as with real NICs. Without one a veth pair is as fast as the scheduler happens to serve its threads, and on few
  # cores the spread would show that and not the striping.
  for ns in $a $b; do ip netns exec $ns tc qdisc add dev eth$i root tbf rate 2gbit burst 512k latency 50ms; done
done
ip -n $a link set lo up
ip -n $b link set lo up

export UCCL_TCPX_PLUGIN=soft UCCL_TCPX_SOFT_STRICT=1 UCCL_SOCKET_IFNAME=eth1 NCCL_GPUDIRECTTCPX_SOCKET_IFNAME=eth UCCL_TCPX_NUM_CHANNELS=4
sent() { ip netns exec $a cat /sys/class/net/eth$1/statistics/tx_bytes; }
received() { ip netns exec $a cat /sys/class/net/eth$1/statistics/rx_bytes; }
failed=0
spread() { # spread NAME COUNTER COMMAND...: each NIC's counter must grow by a quarter of the sum, within 20 % of it
  local name=$1 counter=$2 before=() sum=0 grown=()
  shift 2
  for i in 1 2 3 4; do before[$i]=$($counter $i); done
  "$@"
  for i in 1 2 3 4; do grown[$i]=$(($($counter $i) - before[$i])); sum=$((sum + grown[$i])); done
  for i in 1 2 3 4; do
    local share=$((grown[$i] * 1000 / sum))
    echo "$name: eth$i carried ${grown[$i]} bytes, $((share / 10)).$((share % 10)) %"
    if [ $share -lt 200 ] || [ $share -gt 300 ]; then failed=1; fi
  done
}
run() { timeout 60 ip netns exec $a "$perf" client "$address" --total 64M --iters 8 --warmup 0 --verify "$@"; }

for op in write read; do
  counter=sent
  [ $op = read ] && counter=received
  log=$logs/$op
  : >"$log"
  ip netns exec $b "$perf" server >"$log" 2>&1 &
  server=$!
  address=
  for _ in $(seq 100); do
    address=$(grep -aoE '10\.77\.[0-9]+\.2:[0-9]+' "$log" | head -1 || true)
    [ -n "$address" ] && break
    sleep 0.1
  done
  [ -n "$address" ] || { echo "the server did not start:"; cat "$log"; exit 1; }
  spread $op $counter run --op $op
  grep -aq 'client .* from 10\.77\.1\.1' "$log" || { echo "accept did not report the peer's address:"; cat "$log"; failed=1; }
  kill "$server" 2>/dev/null || true
  wait "$server" 2>/dev/null || true
done
[ $failed = 0 ] && echo "two hosts: all four NICs carry their share"
exit $failed
