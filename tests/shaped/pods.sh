#!/usr/bin/env bash
# Two pods of one node: nothing in common but the kernel and a directory on tmpfs. Host memory is staged in shared areas, every way, and faster
# than channels over TCP between the same pods. Exit status 77: skipped.
#
# usage: pods.sh TCPX_PERF
. "$(dirname "$0")/lib.sh"
container="unshare --pid --ipc --uts --mount --fork --kill-child --mount-proc"
# shellcheck disable=SC2086  # words
$container true 2>/dev/null || skip "$name needs PID, IPC and mount namespaces"
hosts
# Not shaped: the channels get what the machine can do.
ip link add "pv-$$" netns $a type veth peer name "pw-$$" netns $b
for end in "$a pv 1" "$b pw 2"; do
  read -r host nic number <<<"$end"
  ip -n "$host" link set "$nic-$$" name eth1
  ip -n "$host" addr add "10.78.1.$number/24" dev eth1
  ip -n "$host" link set eth1 up
done
for host in $a $b; do
  timeout 10 bash -c "until ip -n $host link show dev eth1 | grep -q LOWER_UP; do sleep 0.05; done" || skip "$name: eth1 gets no carrier"
done
common=$scratch/common
mkdir "$common"
mount -t tmpfs tmpfs "$common" || skip "$name needs tmpfs"
trap 'umount -l "$common"; cleanup' EXIT
export UCCL_TCPX_LOCAL_DIR=$common UCCL_P2P_LOG_LEVEL=info

# The pod on host b. The server is the namespace's first process, which dies with unshare.
: >"$scratch/server"
# shellcheck disable=SC2086  # words
ip netns exec $b $container "$perf" server >>"$scratch/server" 2>&1 &
server=$!
for _ in $(seq 100); do
  address=$(grep -aoE '10\.78\.1\.2:[0-9]+' "$scratch/server" | head -1 || true)
  [ -z "$address" ] || break
  sleep 0.1
done
[ -n "$address" ] || { echo "$name: the server did not start:"; cat "$scratch/server"; exit 1; }

measure() { # measure PATH [VARIABLE=VALUE...] -- OPTIONS: the rate of a client in the pod on host a, all of whose bytes took this path
  local path=$1
  shift
  local environment=()
  while [ "$1" != -- ]; do environment+=("$1"); shift; done
  shift
  # shellcheck disable=SC2086  # words
  timeout 55 ip netns exec $a $container env "${environment[@]}" "$perf" client "$address" --require "$path" --json "$scratch/row.json" "$@" >"$scratch/client" 2>&1 ||
    { echo "$name: $* over $path failed:" >&2; cat "$scratch/client" "$scratch/server" >&2; return 1; }
  gbytes
}

for op in write read send; do
  measure direct -- --op $op --total 24M --block 8M --iters 6 --warmup 4 --verify >/dev/null || failed=1
done
measure direct -- --op write --total 4M --block 512 --iters 4 --verify >/dev/null || failed=1
grep -aq 'staged in shared areas because process_vm_readv does not work here' "$scratch/server" || { echo "$name: no line says why"; failed=1; }

for op in write read; do
  best=0
  # Other load on the machine lowers single results.
  for _ in 1 2 3; do
    areas=$(measure direct -- --op $op --total 64M --time 2) && channels=$(measure tcp UCCL_P2P_DISABLE_IPC=1 -- --op $op --total 64M --time 2) || { failed=1; break; }
    best=$(awk -v a="$areas" -v c="$channels" -v best=$best -v what="$name: $op" 'BEGIN {
      printf "%s: areas %.2f GB/s, channels %.2f GB/s: %.2f times as fast\n", what, a, c, a / c > "/dev/stderr"
      print a / c > best ? a / c : best }')
    ! awk -v best="$best" 'BEGIN { exit !(best > 1) }' || break
  done
  awk -v best="$best" 'BEGIN { exit !(best > 1) }' || { echo "$name: $op: areas are no faster than channels"; failed=1; }
done
exit $failed
