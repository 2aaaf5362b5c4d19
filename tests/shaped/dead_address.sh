#!/usr/bin/env bash
# The first address of a listener cannot be reached when a peer connects: packets are dropped, the address is gone, or the link is down. With the other
# addresses of its metadata the connect succeeds, and bytes are right; with the first one alone it fails. Exit status 77: skipped.
#
# usage: dead_address.sh TCPX_PERF
CONTROL_NIC=eth
. "$(dirname "$0")/lib.sh"
command -v iptables >/dev/null || skip "$name needs iptables"

hosts
nics 100 100
serve '10\.78\.1\.2:[0-9]+'
metadata=
for _ in $(seq 50); do
  metadata=$(grep -aoE '10\.78\.1\.2:[0-9]+\?[^ ]*,10\.78\.2\.2$' "$scratch/server" || true)
  [ -z "$metadata" ] || break
  sleep 0.1
done
[ -n "$metadata" ] || { echo "$name: no metadata with both addresses:" && cat "$scratch/server" && exit 1; }

client() { # client ADDRESS: the status of a transfer, and how long it took with the connect, ms
  local began rc=0
  began=$(now)
  UCCL_TCPX_CONNECT_TIMEOUT_MS=8000 timeout 60 ip netns exec $a "$perf" client "$1" --verify --total 1M --iters 2 --op write >"$scratch/client" 2>&1 || rc=$?
  took=$(($(now) - began))
  return $rc
}
for fault in drop address down; do
  case $fault in
  drop) ip netns exec $b iptables -A INPUT -i eth1 -j DROP ;;
  address) ip -n $b addr flush dev eth1 ;;
  down) ip -n $b link set eth1 down ;;
  esac
  if client "$metadata"; then
    echo "$name: $fault: connected over the other address, and verified, after $took ms"
    grep -aqiE 'mismatch|wrong data' "$scratch/client" && failed=1
  else
    failed=1
    echo "$name: $fault: no connection, after $took ms:"
    cat "$scratch/client"
  fi
  if client "$address"; then
    failed=1
    echo "$name: $fault: there is no fault"
  fi
  case $fault in
  drop) ip netns exec $b iptables -D INPUT -i eth1 -j DROP ;;
  address) ip -n $b addr add 10.78.1.2/24 dev eth1 ;;
  esac
done
[ $failed = 0 ] || { echo "$name: the server:" && cat "$scratch/server"; }
finish
