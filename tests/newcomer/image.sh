#!/usr/bin/env bash
# packaging/Dockerfile as buildah builds it, on a base that debootstrap makes: no daemon, no registry of images. The image runs its demo and
# prints the result. Exit status 77: skipped.
#
# usage: image.sh [FOLDER]     FOLDER: where the base is kept for the next run; default: a temporary one
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
skip() { echo "SKIPPED: $*"; exit 77; }
[ "$(id -u)" = 0 ] || skip "the image needs root"
for tool in buildah debootstrap; do command -v $tool >/dev/null || skip "the image needs $tool"; done
# Neither namespaces nor overlays are needed.
export BUILDAH_ISOLATION=chroot STORAGE_DRIVER=vfs

scratch=$(mktemp -d)
folder=${1:-$scratch}
base=uccl-newcomer-base image=uccl-newcomer
cleanup() {
  buildah rm ${container:-} >/dev/null 2>&1 || true
  buildah rmi $image $base >/dev/null 2>&1 || true
  rm -rf --one-file-system "$scratch"
}
trap cleanup EXIT
trap 'exit 1' INT TERM

if [ ! -e "$folder/base.tar" ]; then
  debootstrap --variant=minbase bookworm "$scratch/root" http://deb.debian.org/debian >"$scratch/log" 2>&1 ||
    skip "debootstrap failed: $(tail -1 "$scratch/log")"
  echo "deb http://deb.debian.org/debian-security bookworm-security main" >"$scratch/root/etc/apt/sources.list.d/corrections.list"
  # A network with its own certificate authority: the machine's administrator has installed it.
  mkdir -p "$scratch/root/usr/local/share/ca-certificates"
  cp /usr/local/share/ca-certificates/*.crt "$scratch/root/usr/local/share/ca-certificates/" 2>/dev/null || true
  mkdir -p "$folder"
  tar -C "$scratch/root" -cf "$folder/base.tar" .
fi
container=$(buildah from scratch)
buildah add "$container" "$folder/base.tar" / >/dev/null
buildah commit "$container" $base >/dev/null
buildah rm "$container" >/dev/null

mkdir "$scratch/context"
git -C "$here/../.." archive HEAD | tar -x -C "$scratch/context"
echo "== packaging/Dockerfile on Debian 12, revision $(git -C "$here" rev-parse --short HEAD), $(date -u +%F)"
begun=$SECONDS
buildah bud --network host -f "$scratch/context/packaging/Dockerfile" --build-arg BASE=localhost/$base -t $image "$scratch/context" >"$scratch/log" 2>&1 ||
  { tail -40 "$scratch/log"; exit 1; }
grep -E 'STEP|installing' "$scratch/log"
echo "== built after $((SECONDS - begun)) s"
container=$(buildah from localhost/$image)
buildah run --network host "$container" -- tcpx-perf demo
buildah run --network host "$container" -- tcpx-info
