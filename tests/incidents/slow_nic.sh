#!/usr/bin/env bash
# One NIC of two carries 20 Mbit/s: the log names it, and the statistics mark its channels and no others. Exit status 77: skipped.
#
# usage: slow_nic.sh TCPX_PERF
. "$(dirname "$0")/lib.sh"
export UCCL_TCPX_NUM_CHANNELS=4
hosts
nics 1000 20
serve
client 60 --wait
moving
reads 45 "WARN ${address}: channel [0-9]+ \(.*10\.78\.2\.2.*eth2\).*far below other NICs" log
reads 30 'eth2 .*SLOW$' statistics
if statistics | grep -E 'eth1 .*SLOW$'; then
  echo "$name: the good NIC is marked"
  failed=1
fi
kill -INT $client
end_client
finish
