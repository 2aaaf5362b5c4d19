#!/usr/bin/env bash
# The newcomer's path: a fresh file system of a distribution (debootstrap), the tracked files of this repository, scripts/demo. Nothing of
# this machine is used but its network, its certificates and its kernel. Exit status 77: skipped.
#
# usage: run.sh debian-12|debian-13|ubuntu-24.04 [FOLDER]     FOLDER: where the file system is made and kept; default: a temporary one
#
# If the folder is kept, the next run reuses the installed packages. UBUNTU_KEYRING names the keyring of Ubuntu's archive
# if the system has none. The log, without the progress of packages, goes to standard output.
set -euo pipefail
distribution=${1:?usage: $0 debian-12|debian-13|ubuntu-24.04 [FOLDER]}
here=$(cd "$(dirname "$0")" && pwd)
skip() { echo "SKIPPED: $*"; exit 77; }
[ "$(id -u)" = 0 ] || skip "$distribution needs root"
command -v debootstrap >/dev/null || skip "$distribution needs debootstrap"

options=(--variant=minbase)
case $distribution in
  debian-12) suite=bookworm mirror=http://deb.debian.org/debian ;;
  debian-13) suite=trixie mirror=http://deb.debian.org/debian ;;
  ubuntu-24.04)
    suite=noble mirror=http://archive.ubuntu.com/ubuntu
    options+=("--components=main,universe")
    # Without the keyring debootstrap warns and continues.
    keyring=${UBUNTU_KEYRING:-/usr/share/keyrings/ubuntu-archive-keyring.gpg}
    [ ! -e "$keyring" ] || options+=("--keyring=$keyring")
    ;;
  *) echo "unknown: $distribution" >&2; exit 2 ;;
esac

made=
folder=${2:-}
[ -n "$folder" ] || { folder=$(mktemp -d); made=1; }
root=$folder/$distribution
mounted=()
cleanup() {
  local i
  for ((i = ${#mounted[@]} - 1; i >= 0; i--)); do umount "${mounted[i]}"; done
  [ -z "$made" ] || rm -rf --one-file-system "$folder"
}
trap cleanup EXIT
trap 'exit 1' INT TERM
bind() { mount --bind "/$1" "$root/$1" && mounted+=("$root/$1"); }

if [ ! -e "$root/etc/os-release" ]; then
  mkdir -p "$root"
  debootstrap "${options[@]}" "$suite" "$root" "$mirror" >"$folder/$distribution.debootstrap" 2>&1 ||
    skip "$distribution: debootstrap failed: $(tail -1 "$folder/$distribution.debootstrap")"
fi
# The suites of corrections, which every installation has: the newer Rust of Debian 12 and of Ubuntu is there.
case $suite in
  bookworm) echo "deb http://deb.debian.org/debian-security bookworm-security main" ;;
  noble) printf 'deb %s noble-%s main universe\n' "$mirror" updates "$mirror" security ;;
esac >"$root/etc/apt/sources.list.d/corrections.list"
rm -rf "$root/src"
mkdir "$root/src"
git -C "$here/../.." archive HEAD | tar -x -C "$root/src"
for name in proc sys dev dev/pts; do bind "$name"; done
cp /etc/resolv.conf "$root/etc/resolv.conf"
# A network with its own certificate authority: the machine's administrator has installed it.
mkdir -p "$root/usr/local/share/ca-certificates"
cp /usr/local/share/ca-certificates/*.crt "$root/usr/local/share/ca-certificates/" 2>/dev/null || true
[ ! -x "$root/usr/sbin/update-ca-certificates" ] || chroot "$root" update-ca-certificates >/dev/null 2>&1

commit=$(git -C "$here" rev-parse --short HEAD)
echo "== $(. "$root/etc/os-release" && echo "$PRETTY_NAME"), revision $commit, $(date -u +%F)"
begun=$SECONDS
status=0
chroot "$root" env -i HOME=/root LC_ALL=C PATH=/usr/sbin:/usr/bin:/sbin:/bin ${CARGO_BUILD_JOBS:+CARGO_BUILD_JOBS=$CARGO_BUILD_JOBS} \
  bash -c 'cd /src && ./scripts/demo && echo "== $(rustc --version 2>/dev/null || echo "rustc is not in PATH: the script chose one of /usr/lib/rust-*")"' || status=$?
echo "== ./scripts/demo: exit status $status after $((SECONDS - begun)) s"
exit $status
