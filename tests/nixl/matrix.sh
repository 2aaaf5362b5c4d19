#!/usr/bin/env bash
# The same plugin under every NIXL whose plugin interface it shares: wheels from PyPI. Exit status 77: no version could be downloaded.
# Versions that could not be downloaded are listed, and do not fail the rest. The recovery tests of all versions run at the same time: they mostly wait.
#   matrix.sh LIBDIR PLUGINDIR [VERSION...]
#   NIXL_JOBS=4   cases of the other tests that run side by side
set -uo pipefail
[ $# -ge 2 ] || { sed -n '2,5p' "$0"; exit 2; }
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
libdir=$1 plugindir=$2
shift 2
versions=("$@")
[ $# -gt 0 ] || versions=(1.0.0 1.2.0 1.3.2 1.4.1 1.5.1)
jobs=${NIXL_JOBS:-4}
results=$(mktemp -d)
trap 'rm -rf "$results"' EXIT

failed=() skipped=() ran=0
try() { # try VERSION PROGRAM JOBS [CASE...]: runs it; its output and its status become files
  local version=$1 program=$2 jobs=$3 rc=0
  shift 3
  NIXL_VERSION=$version NIXL_TEST=$program NIXL_JOBS=$jobs "$here/run.sh" "$libdir" "$plugindir" "$@" >"$results/$version.$program" 2>&1 || rc=$?
  echo $rc >"$results/$version.$program.status"
}
tell() { # tell VERSION PROGRAM: says and counts what it gave
  local rc
  rc=$(cat "$results/$1.$2.status")
  echo "== NIXL $1, $2"
  cat "$results/$1.$2"
  case $rc in
    0) ran=$((ran + 1)) ;;
    77) skipped+=("$1/$2") ;;
    *) failed+=("$1/$2") ;;
  esac
}

for version in "${versions[@]}"; do NIXL_INSTALL_ONLY=1 NIXL_VERSION=$version "$here/run.sh" "$libdir" "$plugindir" & done
wait
for version in "${versions[@]}"; do
  try "$version" test_nixl_recovery.py 8 silent_link_while_idle silent_link_while_busy peer_stands_still_for_15_s_while_busy \
    another_instance_is_refused_until_its_metadata_is_loaded unplugged_nic_costs_no_transfer silent_nic_costs_no_transfer &
done
for version in "${versions[@]}"; do
  try "$version" test_nixl_tcpx.py "$jobs"
  tell "$version" test_nixl_tcpx.py
  try "$version" test_nixl_as_ucx.py "$jobs"
  tell "$version" test_nixl_as_ucx.py
  # NIXL before 1.5 has no strided lists.
  try "$version" test_nixl_clients.py "$jobs" layers_pushed_to_more_ranks_in_slices_of_512_bytes blocks_read_from_more_ranks_in_slices_of_512_bytes
  tell "$version" test_nixl_clients.py
  try "$version" test_nixl_blocking.py "$jobs" release_of_a_stalled_read_returns_at_once silent_host_does_not_keep_the_caller \
    notifications_return_under_a_flood target_ends_in_good_order_during_a_small_write refused_memory_is_not_allowed another_key_is_not_allowed
  tell "$version" test_nixl_blocking.py
done
wait
for version in "${versions[@]}"; do tell "$version" test_nixl_recovery.py; done
[ ${#skipped[@]} = 0 ] || printf 'SKIPPED: %s\n' "${skipped[@]}"
[ ${#failed[@]} = 0 ] || { printf 'FAILED: %s\n' "${failed[@]}"; exit 1; }
[ $ran -gt 0 ] || exit 77
