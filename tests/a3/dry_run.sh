#!/usr/bin/env bash
# scripts/a3-acceptance on this machine. A dry run passes and leaves a report of both ends, in which no secret is; so does one over the strict
# foreign plugin, which simulates TCPXO; a run in which reads fail or a server ends fails and says so; a wrong command line is refused.
#
# usage: dry_run.sh FOLDER     with tcpx-perf, tcpx-info and libnccl_net_strict_foreign.so
set -uo pipefail
cd "$(dirname "$0")/../.." || exit
programs=$(realpath "$1")
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
failed=0
wrong() { echo "wrong: $*"; failed=1; }
unset UCCL_P2P_LOG_LEVEL

# dry NAME FOLDER OPTION...: a run over the programs of a folder, its status in $status and its report unpacked in $scratch/NAME
dry() {
  local file
  A3_ACCEPTANCE_BIN=$2 scripts/a3-acceptance --dry-run --out "$scratch/$1-out" "${@:3}" >"$scratch/$1.log" 2>&1
  status=$?
  cat "$scratch/$1.log"
  mkdir "$scratch/$1"
  for file in "$scratch/$1-out"/*-client-*.tar.gz; do tar -C "$scratch/$1" --strip-components=1 -xzf "$file"; done
  [ ! -s "$scratch/$1/server.tar.gz" ] || tar -C "$scratch/$1" -xzf "$scratch/$1/server.tar.gz"
}

# altered FOLDER CONDITION: programs like the real ones, but tcpx-perf fails where its arguments meet a condition of case
altered() {
  mkdir "$1"
  ln -s "$programs/tcpx-info" "$1/tcpx-info"
  # shellcheck disable=SC2016  # for the program
  printf '#!/bin/bash\ncase " $* " in %s) echo "failed on purpose"; exit 1 ;; esac\nexec %q "$@"\n' "$2" "$programs/tcpx-perf" >"$1/tcpx-perf"
  chmod +x "$1/tcpx-perf"
}

secret=$(head -c 24 /dev/urandom | base64)
(umask 077 && echo "$secret" >"$scratch/key")
UCCL_TCPX_AUTH_KEY_FILE=$scratch/key NCCL_SOME_TOKEN=$secret dry good "$programs"
[ $status = 0 ] || wrong "a dry run ended with $status"
grep -q '^DRY RUN' "$scratch/good/report.txt" || wrong "the report does not say that it is of a dry run"
[ "$(grep -c ' verified ' "$scratch/good/report.txt")" = 17 ] || wrong "the table has not a row for each measurement"
grep -q ' 0 failed' "$scratch"/good/*-server-*/report.txt || wrong "the server's report is not there"
grep -q '^NCCL_SOME_TOKEN=(set)' "$scratch/good/logs/machine.log" || wrong "the environment is not in the report"
! grep -raF "$secret" "$scratch/good" || wrong "a secret is in the report"

# As on A3 Mega: pairs of equal number must take the plugin, host memory must not, and the doctor examines TCPXO.
simulated=$programs/libnccl_net_strict_foreign.so
dry tcpxo "$programs" --simulated-tcpxo "$simulated"
[ $status = 0 ] || wrong "a dry run over simulated TCPXO ended with $status"
grep -q '^DRY RUN: a simulation of TCPXO' "$scratch/tcpxo/report.txt" || wrong "the report does not say that TCPXO is simulated"
[ "$(grep -c ' verified *tcpxo lo$' "$scratch/tcpxo/report.txt")" = 15 ] || wrong "the table has not a row over TCPXO for each measurement"
for logs in "$scratch"/tcpxo/logs "$scratch"/tcpxo/*-server-*/logs; do
  grep -q '^GPUDirect-TCPXO cannot work here, missing: receive manager' "$logs/doctor.log" || wrong "$logs: the doctor does not examine TCPXO"
done

altered "$scratch/no-reads" '*" --op read "*'
dry reads "$scratch/no-reads" --gpus 1
[ $status = 1 ] || wrong "with failing reads it ended with $status"
grep -q '^FAILED   GPU 0 to GPU 0' "$scratch/reads/report.txt" && grep -q '^0 -> 0  *FAILED' "$scratch/reads/report.txt" || wrong "failing reads are not reported"

# Without the server of GPU 0 both ends fail.
altered "$scratch/no-server" '*" server --port 7480 "*'
dry servers "$scratch/no-server" --gpus 1 --minutes 0
[ $status = 1 ] || wrong "without a server it ended with $status"
grep -q '^FAILED   the server listens' "$scratch/servers/report.txt" || wrong "the server that does not listen is not reported"
grep -q '^FAILED   serve every GPU' "$scratch"/servers/*-server-*/report.txt || wrong "the server that has ended is not reported"

refused() { "$@" >/dev/null 2>&1; [ $? = 2 ] || wrong "not refused: $*"; }
export A3_ACCEPTANCE_BIN=$programs
refused scripts/a3-acceptance
refused scripts/a3-acceptance client
refused scripts/a3-acceptance client --ssh
refused scripts/a3-acceptance --dry-run --gpus
refused scripts/a3-acceptance --dry-run --simulated-tcpxo "$scratch/nothing"
refused env UCCL_TCPX_PLUGIN=tcpxo scripts/a3-acceptance server --simulated-tcpxo "$simulated"
refused env UCCL_TCPX_PLUGIN=soft scripts/a3-acceptance server
[ $failed = 0 ] && echo "a3-acceptance: passes, fails and refuses as it should"
exit $failed
