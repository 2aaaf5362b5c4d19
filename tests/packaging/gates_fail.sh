#!/bin/bash
# gates_fail.sh PREFIX: shows that the checks of run.sh can fail. For each case a copy of the installed
# PREFIX is broken in one way, and run.sh must report the named check as failed.
# Exit status: 0 every gate failed as it must, 1 one let its case through.
set -uo pipefail
here=$(cd "$(dirname "$0")" && pwd)
[ $# = 1 ] && [ -d "$1" ] || { sed -n '2,3p' "$0" >&2; exit 1; }
given=$(cd "$1" && pwd)
version=$(basename "$(readlink -f "$given/lib/libuccl_p2p.so")" | sed 's/libuccl_p2p.so.//')
work=$(mktemp -d "${TMPDIR:-/tmp}/uccl-gates.XXXXXX")
trap 'rm -rf "$work"' EXIT
failed=0

# breaks CHECK COMMAND: COMMAND runs in a copy of the prefix.
breaks() {
    local name=$1 command=$2 output
    rm -rf "$work/prefix"
    cp -a "$given" "$work/prefix"
    if ! (cd "$work/prefix" && eval "$command") >"$work/log" 2>&1; then
        echo "cannot break: $command"
        cat "$work/log"
        failed=1
        return
    fi
    output=$(ONLY=$name "$here/run.sh" "$work/prefix" 2>&1)
    if [ $? != 0 ] && grep -qx "FAILED  $name" <<<"$output"; then
        echo "ok      '$name' fails after: $command"
    else
        echo "FAILED  '$name' passes after: $command"
        failed=1
    fi
}
so=lib/libuccl_p2p.so.$version
relink="gcc -shared -o $so -Wl,--whole-archive lib/libuccl_p2p.a -Wl,--no-whole-archive -lgcc_s -lutil -lrt -lpthread -lm -ldl -lc"
printf 'int uccl_engine_surplus(void) { return 0; }\n' >"$work/surplus.c"
printf '{ global: uccl_engine_*; local: *; };\n' >"$work/exports.map"

breaks "files" "rm lib/libuccl_p2p.so.0"
breaks "files" "rm include/uccl_tcpx_endpoint.hpp"
breaks "files" "rm bin/tcpx-perf"
breaks "files" "rm share/man/man1/tcpx-top.1"
breaks "files" "rm share/doc/uccl_p2p/LICENSE"
breaks "licences" "echo more >>share/doc/uccl_p2p/THIRD-PARTY-NOTICES.txt"
breaks "stripped" "$relink -Wl,-soname,libuccl_p2p.so.0 -Wl,--version-script=$work/exports.map"
breaks "exported symbols" "$relink -Wl,-soname,libuccl_p2p.so.0"
breaks "exported symbols" "$relink $work/surplus.c -Wl,-soname,libuccl_p2p.so.0 -Wl,--version-script=$work/exports.map"
breaks "symbols of the archive" "gcc -c $work/surplus.c -o $work/surplus.o && ar r lib/libuccl_p2p.a $work/surplus.o"
breaks "SONAME" "$relink -Wl,--version-script=$work/exports.map"
breaks "SONAME" "$relink -Wl,--version-script=$work/exports.map -Wl,-soname,libuccl_p2p.so.1"
breaks "needed libraries" "$relink -Wl,--version-script=$work/exports.map -Wl,-soname,libuccl_p2p.so.0 -Wl,--no-as-needed -lstdc++"
breaks "symbols of the software plugin" "cp $so lib/uccl/libnccl-net-tcpx-soft.so"
breaks "no absolute paths in package files" "sed -i 's|^prefix=.*|prefix=$work/prefix|' lib/pkgconfig/uccl_p2p.pc"
breaks "headers are those of the source" "echo '/* changed */' >>include/uccl_engine.h"
breaks "headers alone, gcc" "sed -i '/#include <stdint.h>/d; /#include <cstdint>/d; /#include <stddef.h>/d' include/uccl_engine.h"
breaks "headers alone, gcc" "echo 'inline int warned_about(int unused) { return 0; }' >>include/uccl_engine.hpp"
breaks "CMake package: build" "sed -i 's|PACKAGE_PREFIX_DIR}/include|PACKAGE_PREFIX_DIR}/headers|' lib/cmake/uccl_p2p/uccl_p2pConfig.cmake"
breaks "CMake package: build" "sed -i 's|$version|9.9.9|g' lib/cmake/uccl_p2p/uccl_p2pConfigVersion.cmake"
breaks "CMake package: build" "sed -i 's|gcc_s;util;rt;pthread;m;dl;c|no_such_library|' lib/cmake/uccl_p2p/uccl_p2pConfig.cmake"
breaks "pkg-config: version and prefix" "sed -i 's|^prefix=.*|prefix=/usr/nowhere|' lib/pkgconfig/uccl_p2p.pc"
breaks "pkg-config: shared" "sed -i 's|-luccl_p2p|-luccl_p3p|' lib/pkgconfig/uccl_p2p.pc"
breaks "plain C" "rm lib/libuccl_p2p.so"
breaks "the installed plugin, loaded" "cp $so lib/uccl/libnccl-net-tcpx-soft.so"
breaks "tcpx-info" "cp /bin/false bin/tcpx-info"
exit $failed
