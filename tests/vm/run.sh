#!/usr/bin/env bash
# Boots a kernel of Debian in QEMU, without hardware support, runs a test inside, and ends with the test's output and exit status.
# Exit status 77: skipped; 124: the machine did not end in time.
#
# usage: run.sh [--kernel SERIES] [--program FILE]... [--seconds N] TEST [ARGUMENT...]
#   --kernel    7.3: Debian's newest kernel of that series; default: $UCCL_VM_KERNEL or 7.3
#   --program   a program of this machine, with its shared libraries: inside it is a command
#   TEST        tests/vm/guest/TEST.sh; or `sh`, with a command line as its argument
# The kernel's log stays in $UCCL_VM_LOG, if set.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
. "$here/lib.sh"

series=${UCCL_VM_KERNEL:-7.3} programs=() seconds=300
while [[ ${1:-} == --* ]]; do
  case $1 in
    --kernel) series=$2 ;;
    --program) programs+=("$2") ;;
    --seconds) seconds=$2 ;;
    *) sed -n '2,10s/^# \?//p' "$0" >&2; exit 2 ;;
  esac
  shift 2
done
[ $# -gt 0 ] || { sed -n '2,10s/^# \?//p' "$0" >&2; exit 2; }
[ "$(uname -m)" = x86_64 ] || skip "virtual machines are made for x86_64"
[ "$1" = sh ] || [ -e "$here/guest/$1.sh" ] || { echo "no test $here/guest/$1.sh" >&2; exit 2; }

mkdir -p "$cache"
# One run at a time fetches and builds.
exec 9>"$cache/lock"
flock 9
"${namespace[@]}" true 2>/dev/null || skip "virtual machines need a mount namespace of their own"
fetch_tools
fetch_kernel "$series"

case $1 in devmem | path | suite) false ;; esac || [ "${kernel%%.*}" -ge 7 ] || skip "the test NIC is written for kernels from 7.0 on, not for $kernel"

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
trap 'exit 1' INT TERM
. "$here/pack.sh"
pack_base
pack_test "$@"
exec 9>&-

vmlinuz=$root/usr/lib/modules/$kernel/vmlinuz
[ -e "$vmlinuz" ] || vmlinuz=$root/boot/vmlinuz-$kernel
cp "$vmlinuz" "$work/vmlinuz"
: >"$work/output"
started=$SECONDS
status=0
# Two processors show races; no more, since each takes one of this machine.
in_root timeout --foreground "$seconds" nice -n 10 qemu-system-x86_64 -accel tcg,thread=multi -cpu Nehalem -smp 2 -m 1024 -nodefaults -no-user-config \
  -display none -no-reboot -serial file:/work/console -serial file:/work/output -kernel /work/vmlinuz -initrd /work/initrd \
  -append "console=ttyS0 panic=-1 mitigations=off oops=panic quiet random.trust_cpu=on loglevel=6" >"$work/qemu" 2>&1 || status=$?
[ -z "${UCCL_VM_LOG:-}" ] || cp "$work/console" "$UCCL_VM_LOG"
grep -av '^vm: exit status' "$work/output" || true
told=$(sed -n 's/^vm: exit status \([0-9]*\)\r*$/\1/p' "$work/output" | tail -1)
echo "vm: kernel $kernel, $((SECONDS - started)) s"
if [ -z "$told" ]; then
  echo "vm: the machine ended without a result (status $status), end of the kernel's log:"
  cat "$work/qemu"
  tail -n 40 "$work/console" 2>/dev/null || true
  [ "$status" = 124 ] && exit 124
  exit 1
fi
exit "$told"
