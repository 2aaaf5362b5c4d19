#!/usr/bin/env bash
# The peer's process stops in the middle of transfers (SIGSTOP): before the connection is closed the log and the statistics report
# that the peer is silent, and the error names the peer and the silence. Exit status 77: skipped.
#
# usage: stopped_peer.sh TCPX_PERF
. "$(dirname "$0")/lib.sh"
export UCCL_TCPX_PEER_TIMEOUT_MS=8000 UCCL_TCPX_TRANSFER_TIMEOUT_MS=20000
hosts
nics 1000
serve
client 120
moving
kill -STOP $server
reads 30 "WARN ${address}: nothing was received from the peer for [0-9.]+s, not even a heartbeat" log
reads 30 "${address}.*silent [0-9]+ s" statistics
end_client
kill -CONT $server
[ $status != 0 ] || { echo "$name: the client did not fail"; failed=1; }
reads 1 "^error: .*${address}: the peer has been silent for" log
finish
