#!/usr/bin/env bash
# Three NICs of 1 Gbit/s and one of 250 Mbit/s: one connection reaches at least 85 % of their sum, so channels do not run in lockstep.
# Exit status 77: skipped.
#
# usage: slow_nic.sh TCPX_PERF
. "$(dirname "$0")/lib.sh"
hosts
nics 250 1000 1000 1000
serve
for op in write read; do
  judge $op 85 3250 1448 1514 --total 256M --warmup 1 --iters 5
done
finish
