#!/usr/bin/env bash
# Channels that cannot be set up: data ports that are dropped, refused, blocked outbound, all in use, or in the wrong network. At both
# ends the error or log line names NIC, address, port, direction and cause, in time. If another NIC works, the
# connection uses it, and the line says which NIC is left out. Exit status 77: skipped.
#
# usage: set_up_errors.sh TCPX_PERF
. "$(dirname "$0")/lib.sh"
command -v iptables >/dev/null || skip "$name needs iptables"
export UCCL_TCPX_CONNECT_TIMEOUT_MS=4000 UCCL_TCPX_NUM_CHANNELS=2 UCCL_TCPX_PORT_RANGE=21000-21999
hosts
nics 1000 1000
ip netns exec $b iptables -A INPUT -i lo -j ACCEPT 2>"$scratch/iptables" || skip "$name needs iptables: $(head -1 "$scratch/iptables")"
serve
port='21[0-9]{3}'
server_log() { cat "$scratch/server"; }

try() { # try WHAT: one transfer; sets $status and $took
  echo "$name: -- $1"
  : >"$scratch/server"
  SECONDS=0
  timeout 30 ip netns exec $a "$perf" client "$address" --op write --total 1M --iters 1 --warmup 0 >"$scratch/rows" 2>"$scratch/client" && status=0 || status=$?
  [ $SECONDS -le 12 ] || { echo "$name: that took $SECONDS s"; failed=1; }
}
fails() { [ $status != 0 ] || { echo "$name: the client did not fail"; failed=1; }; }
works() { [ $status = 0 ] || { echo "$name: the client failed:"; cat "$scratch/client" "$scratch/server"; failed=1; }; }
with() { # with HOST RULE...: an iptables rule until `clear`
  local host=$1
  shift
  ip netns exec "$host" iptables "$@"
}
clear() { for host in $a $b; do ip netns exec $host iptables -F; done; }

with $b -A INPUT -p tcp --dport 21000:21999 -j DROP
try "all data ports of the listening host are dropped"
fails
reads 1 "^error: .*2 of 2 channels did not come up in time: eth1: connect to 10\.78\.1\.2:$port \(eth1\), for both directions, eth2: connect to 10\.78\.2\.2:$port \(eth2\)" log
reads 5 "WARN .*eth1: wait at 10\.78\.1\.2:$port for a connection from the peer's eth1|WARN .*the peer: .*connect to 10\.78\.1\.2:$port" server_log
clear

with $b -A INPUT -i eth2 -p tcp --dport 21000:21999 -j DROP
try "those of one NIC are dropped"
works
reads 1 "WARN NIC eth2 is left out of a connection: eth2: connect to 10\.78\.2\.2:$port \(eth2\), for both directions: nothing after" log
reads 5 "WARN NIC eth2 is left out of a connection: eth2: wait at 10\.78\.2\.2:$port for a connection from the peer's eth2|1 of 2 channels are up on both sides" server_log
clear

with $a -A OUTPUT -p tcp --dport 21000:21999 -j DROP
try "the connecting host lets nothing out"
fails
reads 1 "^error: .*eth1: connect to 10\.78\.1\.2:$port \(eth1\), for both directions" log
clear

with $b -A INPUT -p tcp --dport 21000:21999 -j REJECT --reject-with tcp-reset
try "all data ports of the listening host refuse"
fails
reads 1 "^error: .*channel [01] on eth[12]: connect to 10\.78\.[12]\.2:$port \(eth[12]\), for data to the peer: .*Connection refused" log
reads 5 "WARN .*refused by the peer: channel [01] on eth[12]: connect to 10\.78\.[12]\.2:$port .*Connection refused" server_log
clear

ip -n $a addr flush dev eth2
ip -n $a addr add 10.99.2.1/24 dev eth2
ip -n $a route add unreachable 10.78.2.0/24
NCCL_GPUDIRECTTCPX_SOCKET_IFNAME="=eth2" try "the connecting host has its data NIC in another network, and reaches one NIC of the other by routing"
works
reads 1 "WARN NIC eth2 is left out .*channel [01] on eth2: connect to 10\.78\.2\.2:$port \(eth2\), for data to the peer: .*No route to host" log
reads 5 "WARN NIC eth2 is left out .*eth2: wait at 10\.78\.2\.2:$port for a connection from the peer's eth2" server_log
ip -n $a route del unreachable 10.78.2.0/24
ip -n $a addr flush dev eth2
ip -n $a addr add 10.78.2.1/24 dev eth2

kill $server && wait $server 2>/dev/null || true
NCCL_GPUDIRECTTCPX_SOCKET_IFNAME="=eth2" serve
ip -n $b addr flush dev eth2
ip -n $b addr add 10.99.2.2/24 dev eth2
NCCL_GPUDIRECTTCPX_SOCKET_IFNAME="=eth2" try "the listening host has its data NIC in another network"
fails
reads 1 "^error: .*on eth2: connect to 10\.99\.2\.2:$port \(eth2\).*Network is unreachable" log
reads 5 "WARN .*refused by the peer: .*on eth2: connect to 10\.99\.2\.2:$port .*Network is unreachable" server_log
ip -n $b addr flush dev eth2
ip -n $b addr add 10.78.2.2/24 dev eth2

# The only port of the range is the control port, on the address of eth1.
kill $server && wait $server 2>/dev/null || true
export UCCL_TCPX_PORT_RANGE=21000-21000
UCCL_TCPX_OOB_PORT=21000 NCCL_GPUDIRECTTCPX_SOCKET_IFNAME="=eth1" serve
try "no port of the range is free"
fails
reads 1 "^error: .*refused by the peer: listen on eth1: .*every port of UCCL_TCPX_PORT_RANGE=21000-21000 is in use" log
reads 5 "WARN .*listen on eth1: .*every port of UCCL_TCPX_PORT_RANGE=21000-21000 is in use" server_log
kill $server && wait $server 2>/dev/null || true
UCCL_TCPX_OOB_PORT=21000 serve
try "no port of the range is free on one NIC of two"
works
reads 5 "WARN .*eth1.*every port of UCCL_TCPX_PORT_RANGE=21000-21000 is in use" server_log

# An invalid setting, and an address that may not be dialled.
for range in 5 0-9 9-5 ports; do
  UCCL_TCPX_PORT_RANGE=$range try "UCCL_TCPX_PORT_RANGE=$range"
  fails
  reads 1 "^error: .*UCCL_TCPX_PORT_RANGE=$range: expected LOW-HIGH" log
done
kill $server && wait $server 2>/dev/null || true
UCCL_TCPX_OOB_PORT=7000 UCCL_TCPX_PORT_RANGE=21000-21999 serve
UCCL_TCPX_PORT_RANGE="" UCCL_TCPX_ALLOW=10.78.2.0/24 try "one data address of the peer is not in UCCL_TCPX_ALLOW"
works
reads 1 "WARN NIC eth1 is left out .*connect to 10\.78\.1\.2:$port .*not in UCCL_TCPX_ALLOW" log
finish
