#!/bin/bash
# deb.sh CARGO_TARGET_DIR: builds the Debian package, installs it into an empty folder with a separate dpkg database, uses it,
# and removes it again.
# Exit status: 0 all passed, 77 no dpkg here, else something failed.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../.." && pwd)
command -v dpkg-deb >/dev/null || { echo "SKIPPED: no dpkg-deb here"; exit 77; }
work=$(mktemp -d "${TMPDIR:-/tmp}/uccl-deb-test.XXXXXX")
trap 'rm -rf "$work"' EXIT
export UCCL_TCPX_PLUGIN=soft UCCL_TCPX_SOFT_STRICT=1 NCCL_SOCKET_IFNAME=lo NCCL_GPUDIRECTTCPX_SOCKET_IFNAME=lo
fail() { echo "FAILED: $*" >&2; exit 1; }

deb=$(CARGO_TARGET_DIR=$1 PREBUILT=1 "$root/scripts/build-deb" "$work/out" 2>"$work/log") || { cat "$work/log"; exit 1; }
version=$(dpkg-deb -f "$deb" Version)
multiarch=$(gcc -print-multiarch)
dpkg-deb -f "$deb" Depends | grep -E 'libc6 \(>= 2\.[0-9]+\)' || fail "no version of libc6 among the dependencies"

if command -v lintian >/dev/null; then
    lintian --allow-root --fail-on error,warning "$deb" || fail "lintian"
else
    echo "SKIPPED: lintian is not installed"
fi

system=$work/system
mkdir -p "$system/var/lib/dpkg/"{updates,info,triggers}
touch "$system/var/lib/dpkg/"{status,available}
# The empty folder has none of the libraries that the package depends on.
as_package() {
    dpkg --root="$system" --force-not-root --force-depends --log="$work/dpkg.log" "$@" >"$work/log" 2>&1 || { cat "$work/log"; fail "dpkg $1"; }
}
# Everything but dpkg's own database.
files() { (cd "$system" && find . -path ./var -prune -o -type f -print -o -type l -print | sort); }
as_package --install "$deb"
[ "$(dpkg-query --admindir="$system/var/lib/dpkg" --show --showformat='${db:Status-Status}' uccl-tcpx)" = installed ] || fail "not installed"
(cd "$system" && md5sum --quiet -c "$system/var/lib/dpkg/info/uccl-tcpx.md5sums")
[ -s "$system/usr/share/doc/uccl-tcpx/copyright" ] && [ -s "$system/usr/share/doc/uccl-tcpx/THIRD-PARTY-NOTICES.txt" ] || fail "no licences"
# A page for each function, tool and for the library, and each can be shown without a warning.
for page in $(sed 's/$/.3/' "$root/cmake/exported-symbols.txt") tcpx-info.1 tcpx-perf.1 tcpx-top.1 uccl-devmem-agent.1 uccl_p2p.7; do
    [ -s "$system/usr/share/man/man${page##*.}/$page.gz" ] || fail "no manual page $page"
done
if command -v man >/dev/null; then
    for page in "$system"/usr/share/man/man?/*; do
        warnings=$(MANWIDTH=80 man --warnings -l "$page" 2>&1 >"$work/page") && [ -z "$warnings" ] && grep -q '^NAME' "$work/page" || fail "$page: $warnings"
    done
else
    echo "SKIPPED: man is not installed"
fi
[ -s "$system/usr/share/doc/uccl-tcpx/docs/README.md" ] || fail "no documentation"
gcc -Wall -Wextra -Werror -fsyntax-only -I"$system/usr/include" "$system/usr/share/doc/uccl-tcpx/examples/two_processes.c" || fail "the example does not compile"

lib=$system/usr/lib/$multiarch
export PKG_CONFIG_PATH=$lib/pkgconfig
read -ra flags < <(pkg-config --cflags --libs uccl_p2p)
gcc -Wall -Wextra -Werror -o "$work/consumer" "$here/consumer.c" "${flags[@]}" -Wl,-rpath,"$lib"
timeout 120 "$work/consumer" "$version"
timeout 120 "$system/usr/bin/tcpx-info" --no-probe >"$work/info" || { cat "$work/info"; fail "tcpx-info"; }

# The agent of device memory TCP, where its unit looks for it.
for program in $(sed -nE 's|^Exec[A-Za-z]*=\+?(/[^ ]+).*|\1|p' "$system/usr/lib/systemd/system/uccl-devmem-agent.service"); do
    [ -x "$system$program" ] || fail "no program $program of uccl-devmem-agent.service"
done
"$system/usr/bin/uccl-devmem-agent" 2>"$work/usage" && fail "uccl-devmem-agent without a NIC"
grep -q '^usage: uccl-devmem-agent' "$work/usage" || { cat "$work/usage"; fail "uccl-devmem-agent"; }

as_package --purge uccl-tcpx
[ -z "$(files)" ] || { files; fail "files stay after the removal"; }
echo "the package installs, works, and removes all its files"
