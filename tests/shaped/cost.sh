#!/usr/bin/env bash
# The cost of an engine: idle with 8 connections it uses less than half a percent of a core, by the kernel's CPU clock of both processes.
# Time to connect and memory are printed, without limits. Exit status 77: skipped.
#
# usage: cost.sh [COST_BINARY]      without it, cargo builds the bench cost
set -euo pipefail
cd "$(dirname "$0")/../.."
[ -r /proc/self/smaps_rollup ] || { echo "SKIPPED: cost needs /proc/self/smaps_rollup"; exit 77; }
export UCCL_P2P_LOG_LEVEL=${UCCL_P2P_LOG_LEVEL:-warn}
if [ $# -gt 0 ]; then
  timeout 50 "$1" connect memory idle
else
  command -v cargo >/dev/null || { echo "SKIPPED: cost needs cargo, or the program as its argument"; exit 77; }
  cargo bench --quiet --no-run -p uccl-tcpx --bench cost
  timeout 50 cargo bench --quiet -p uccl-tcpx --bench cost -- connect memory idle
fi
