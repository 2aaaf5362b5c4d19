#!/usr/bin/env bash
# Which interfaces are used when no setting names one. Hosts with only IPv6: control and data go over their global addresses. Hosts full of
# interfaces of pods, containers and tunnels, without a carrier, with tentative and with link-local addresses: control and data use the one
# good NIC, and nothing waits for the others. An unknown speed is reported as unknown. Exit status 77: skipped.
#
# usage: interfaces.sh TCPX_PERF
. "$(dirname "$0")/lib.sh"
info=$(dirname "$perf")/tcpx-info
unset UCCL_SOCKET_IFNAME NCCL_GPUDIRECTTCPX_SOCKET_IFNAME
export UCCL_TCPX_NUM_CHANNELS=4
hosts
ip link add "sa1-$$" type veth peer name "sb1-$$"
ip link set "sa1-$$" netns $a name eth1
ip link set "sb1-$$" netns $b name eth1

moves() { # moves WHAT ADDRESSES: both operations, quickly; every connection between the hosts has such an address at the listening one
  for op in write read; do
    SECONDS=0
    timeout 30 ip netns exec $a "$perf" client "$address" --op $op --verify --total 4M --iters 2 >"$scratch/client" 2>&1 ||
      { echo "$name: $1: $op failed:"; cat "$scratch/client" "$scratch/server"; failed=1; }
    [ $SECONDS -le 10 ] || { echo "$name: $1: that took $SECONDS s"; failed=1; }
  done
  timeout 30 ip netns exec $a "$perf" client "$address" --op write --total 1M --time 4 >"$scratch/client" 2>&1 &
  client=$!
  for _ in $(seq 50); do
    ip netns exec $b ss -Htn state established | awk '{ print $3 }' >"$scratch/ss"
    [ "$(wc -l <"$scratch/ss")" -ge 9 ] && break
    sleep 0.05
  done
  wait $client || { echo "$name: $1: the client failed:"; cat "$scratch/client"; failed=1; }
  if [ "$(wc -l <"$scratch/ss")" -lt 9 ] || grep -vqE "$2" "$scratch/ss"; then
    echo "$name: $1: connections elsewhere:"
    cat "$scratch/ss"
    failed=1
  fi
  echo "$name: $1: control and 4 channels at $(sed 's/:[0-9]*$//' "$scratch/ss" | sort | uniq -c | tr -s ' ' | tr '\n' ',')"
  kill $server && wait $server 2>/dev/null || true
  server=
}

ip -n $a -6 addr add fd78:1::1/64 dev eth1 nodad
ip -n $b -6 addr add fd78:1::2/64 dev eth1 nodad
for host in $a $b; do ip -n $host link set eth1 up; done
for _ in $(seq 50); do ip netns exec $a ping -6 -c1 -W1 fd78:1::2 >/dev/null 2>&1 && break; sleep 0.1; done
serve '\[fd78:1::2\]:[0-9]+'
moves "IPv6 alone" '^\[fd78:1::2\]:'

i=0
for host in $a $b; do
  i=$((i + 1))
  ip -n $host addr add 10.78.1.$i/24 dev eth1
  for pair in "cali7f9 169.254.1.1/32" "gke52f7 10.4.0.1/32" "vethb01 10.5.0.1/24" "docker0 172.17.0.1/16" "podman1 10.88.0.1/16" "tun7 10.8.0.2/24" "eth0 169.254.9.9/16"; do
    read -r nic net <<<"$pair"
    ip -n $host link add "$nic" type veth peer name "p-$nic"
    ip -n $host addr add "$net" dev "$nic"
    ip -n $host link set "$nic" up
    ip -n $host link set "p-$nic" up
  done
  # A bridge without a physical port, a NIC without a carrier, and one with a tentative address.
  ip -n $host link add lab0 type bridge
  ip -n $host addr add 192.168.50.1/24 dev lab0
  ip -n $host link set lab0 up
  ip -n $host link add eth2 type veth peer name p-eth2
  ip -n $host addr add 10.78.2.$i/24 dev eth2
  ip -n $host link set eth2 up
  ip -n $host link add eth3 type veth peer name p-eth3
  ip netns exec $host sh -c 'echo 100000 >/proc/sys/net/ipv6/conf/eth3/dad_transmits'
  ip -n $host link set p-eth3 up
  ip -n $host link set eth3 up
  ip -n $host addr add fd78:3::$i/64 dev eth3
done
serve '10\.78\.1\.2:[0-9]+'
moves "a host of pods" '^10\.78\.1\.2:'
ip netns exec $a "$info" --no-probe >"$scratch/info" 2>&1 || { failed=1; cat "$scratch/info"; }
grep -A1 '^network devices *1$' "$scratch/info" | grep -q 'eth1: 10000 Mbit/s' || { echo "$name: not eth1 alone:"; cat "$scratch/info"; failed=1; }

NCCL_GPUDIRECTTCPX_SOCKET_IFNAME=lo UCCL_TCPX_PORT_RANGE=42000-42001 ip netns exec $a "$info" >"$scratch/info" 2>&1 || { failed=1; cat "$scratch/info"; }
grep -q 'lo: speed unknown' "$scratch/info" && grep -qE '^data ports +42000-42001 ' "$scratch/info" ||
  { echo "$name: nothing of an unknown speed, or of the data ports:"; cat "$scratch/info"; failed=1; }
[ $failed = 0 ] && echo "$name: an unknown speed is reported as unknown, and the range of data ports is shown"
exit $failed
