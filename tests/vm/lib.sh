# shellcheck shell=bash
# The virtual machines of this folder: Debian's packages in a cache folder, and programs run from there. Nothing is installed on this
# machine. Sourced by run.sh; knows nothing of the tests.
#
# The cache holds a small Debian 13 (`root`): QEMU, a compiler, the tools of the guest, and the kernels, each with its headers.
# UCCL_VM_CACHE names the folder; delete it to fetch newer packages.
suite=trixie
# The programs of the machine, and those inside it.
tools=(base-files bash busybox-static coreutils cpio dash ethtool findutils gawk gcc-14 gcc-14-for-host grep iproute2 kmod libc6-dev make perl-base
  qemu-system-x86 sed xz-utils)
cache=${UCCL_VM_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/uccl-tcpx/vm}
root=$cache/root

skip() {
  echo "SKIPPED: $*"
  exit 77
}

# fetch_lists: a state of apt of our own, with the lists of packages
fetch_lists() {
  [ ! -e "$cache/apt/fetched" ] || return 0
  local keyring=/usr/share/keyrings/debian-archive-keyring.gpg archive=http://deb.debian.org pocket
  command -v apt-get >/dev/null && command -v dpkg >/dev/null || skip "virtual machines need apt-get and dpkg"
  [ -e $keyring ] || skip "virtual machines need Debian's keyring $keyring"
  mkdir -p "$cache/apt/lists/partial" "$cache/apt/archives/partial"
  : >"$cache/apt/status"
  for pocket in debian:$suite debian:$suite-updates debian:$suite-backports debian-security:$suite-security; do
    echo "deb [signed-by=$keyring] $archive/${pocket%:*} ${pocket#*:} main"
  done >"$cache/apt/sources.list"
  cat >"$cache/apt/conf" <<CONF
Dir::Etc::sourcelist "$cache/apt/sources.list";
Dir::Etc::sourceparts "/dev/null";
Dir::State::Lists "$cache/apt/lists";
Dir::State::status "$cache/apt/status";
Dir::Cache "$cache/apt";
APT::Architecture "amd64";
APT::Architectures "amd64";
APT::Sandbox::User "root";
APT::Install-Recommends "false";
Acquire::Languages "none";
Acquire::Retries "3";
CONF
  apt apt-get -o APT::Update::Error-Mode=any update >"$cache/apt/log" 2>&1 || skip "Debian's lists of packages cannot be fetched: $(grep -m1 '^[EW]:' "$cache/apt/log")"
  touch "$cache/apt/fetched"
}

# apt COMMAND...: a command of apt over our own state
apt() { APT_CONFIG=$cache/apt/conf "$@"; }

# unpack FILE.deb...: into root
unpack() {
  local package
  for package in "$@"; do dpkg -x "$package" "$root" || return 1; done
  rm -f "$@"
}

fetch_tools() {
  [ ! -e "$root/.tools" ] || return 0
  fetch_lists
  mkdir -p "$root"
  apt apt-get install --download-only --yes "${tools[@]}" >"$cache/apt/log" 2>&1 ||
    skip "Debian's packages cannot be fetched: $(grep -m1 '^E:' "$cache/apt/log")"
  # The first makes /bin, /lib and /sbin links into /usr.
  unpack "$cache"/apt/archives/base-files_*.deb && unpack "$cache"/apt/archives/*.deb || skip "a package cannot be unpacked in $root"
  [ -e "$root/usr/bin/awk" ] || ln -s gawk "$root/usr/bin/awk"
  touch "$root/.tools"
}

# fetch_kernel SERIES: sets `kernel` to the newest version of a series, such as 7.3, that is in the cache or that Debian has
fetch_kernel() {
  local series=${1//./\\.} name names=()
  mkdir -p "$root/.kernels"
  kernel=$(find "$root/.kernels" -name "$1.*" -printf '%f\n' | sort -V | tail -1)
  [ -z "$kernel" ] || return 0
  fetch_lists
  kernel=$(apt apt-cache search --names-only "^linux-headers-$series\.[0-9]+\+deb13-amd64\$" | sed 's/^linux-headers-\([^ ]*\) .*/\1/' | sort -V | tail -1)
  [ -n "$kernel" ] || skip "Debian has no kernel $1 with headers"
  # Older versions have the kernel and its modules in one package.
  for name in linux-{image,binary,modules,base,headers}-"$kernel" linux-{headers-"${kernel%-amd64}"-common,kbuild-"${kernel%-amd64}"}; do
    apt apt-cache show "$name" >/dev/null 2>&1 && names+=("$name")
  done
  mkdir -p "$cache/debs"
  (cd "$cache/debs" && apt apt-get download "${names[@]}") >"$cache/apt/log" 2>&1 ||
    skip "the packages of kernel $kernel cannot be fetched: $(grep -m1 '^E:' "$cache/apt/log")"
  unpack "$cache"/debs/*.deb || skip "a package of kernel $kernel cannot be unpacked in $root"
  in_root /sbin/depmod "$kernel" || skip "kernel $kernel: depmod failed"
  touch "$root/.kernels/$kernel"
}

# Every user may have a mount namespace in a user namespace, where that is allowed.
namespace=(unshare --mount --propagation private)
[ "$(id -u)" = 0 ] || namespace+=(--map-root-user)

# in_root COMMAND...: runs it with `root` as its file system and the folder `work` as /work
in_root() {
  mkdir -p "$root/dev" "$root/proc" "$root/work"
  # shellcheck disable=SC2016  # expanded inside
  "${namespace[@]}" bash -c 'mount --rbind /dev "$1/dev" && mount --rbind /proc "$1/proc" && mount --bind "$2" "$1/work" &&
    root=$1 && shift 2 && exec chroot "$root" env -i PATH=/usr/sbin:/usr/bin LC_ALL=C "$@"' _ "$root" "${work:-$cache}" "$@"
}

# compile_module SOURCE: a module of the kernel from the folder, for `kernel`, in the cache; sets `module`
compile_module() {
  local name
  name=$(basename "$1")
  module=$cache/modules-$kernel/$name
  [ "$module.ko" -nt "$1.c" ] && return 0
  rm -rf "$module.build" && mkdir -p "$module.build"
  cp "$1.c" "$(dirname "$1")/Kbuild" "$module.build/"
  work=$module.build in_root make -C "/lib/modules/$kernel/build" M=/work CONFIG_DEBUG_INFO_BTF_MODULES= modules >"$module.log" 2>&1 ||
    { cat "$module.log"; echo "the module $name cannot be compiled for kernel $kernel"; return 1; }
  mv "$module.build/$name.ko" "$module.ko"
}

# compile_program SOURCE.c TARGET: a static program for the machine
compile_program() {
  [ "$2" -nt "$1" ] && return 0
  local folder
  folder=$(mktemp -d) && cp "$(dirname "$1")"/*.[ch] "$folder/" &&
    work=$folder in_root gcc-14 -std=gnu17 -O2 -g -Wall -Wextra -Werror -static -pthread \
      -o /work/program "/work/${1##*/}" && mv "$folder/program" "$2" && rm -rf "$folder"
}
