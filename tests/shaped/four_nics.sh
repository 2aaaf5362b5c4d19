#!/usr/bin/env bash
# Four NIC pairs of 1 Gbit/s each: one connection reaches at least 95 % of their sum, in both directions. Exit status 77: skipped.
#
# usage: four_nics.sh TCPX_PERF
. "$(dirname "$0")/lib.sh"
hosts
nics 1000 1000 1000 1000
serve
for op in write read; do
  judge $op 95 4000 1448 1514 --total 256M --warmup 1 --iters 5
done
finish
