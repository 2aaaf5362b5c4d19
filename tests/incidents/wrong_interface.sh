#!/usr/bin/env bash
# Data NICs that do not exist, and data NICs in unconnected networks: the error names the interface. Exit status 77: skipped.
#
# usage: wrong_interface.sh TCPX_PERF
. "$(dirname "$0")/lib.sh"
export UCCL_TCPX_CONNECT_TIMEOUT_MS=6000 UCCL_TCPX_NUM_CHANNELS=2
hosts
nics 1000 1000
serve

export NCCL_GPUDIRECTTCPX_SOCKET_IFNAME=eth9
client 5
end_client
[ $status != 0 ] || { echo "$name: the client did not fail without its interface"; failed=1; }
reads 1 '^error: .*eth9 .*\(there: .*eth1.*eth2' log

# One data NIC on each host, with this one's in another network: the peer cannot be reached over it.
export NCCL_GPUDIRECTTCPX_SOCKET_IFNAME="=eth2"
kill "$server" && wait "$server" 2>/dev/null || true
serve
ip -n $a addr flush dev eth2
ip -n $a addr add 10.99.2.1/24 dev eth2
client 5
end_client
[ $status != 0 ] || { echo "$name: the client did not fail over unconnected networks"; failed=1; }
reads 1 '^error: .*eth2.*Network is unreachable' log
reads 1 'WARN connect to 10\.78\.2\.2:[0-9]+ on eth2' log
finish
