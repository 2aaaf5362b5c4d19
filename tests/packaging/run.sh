#!/bin/bash
# run.sh PREFIX_OR_BUILD: tests an installed libuccl_p2p as its users do.
#
#   PREFIX_OR_BUILD  a folder that `cmake --install` filled, or a build folder of the root project, which is then installed first
#
# The installation is moved to another folder before anything uses it. Checks the files, exports, SONAME and headers, then builds and
# runs consumers: CMake (shared and static, C and C++), pkg-config (shared and static), the bare compiler, add_subdirectory and
# FetchContent. UCCL_P2P_CARGO_TARGET_DIR names a finished cargo build for the last two, when the argument is a prefix; without
# one they build the library. ONLY=NAME runs only the check of that name.
# Exit status: 0 all passed, 1 something failed, or there is no check of that name; every check runs either way.
set -uo pipefail
here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../.." && pwd)
[ $# = 1 ] && [ -d "$1" ] || { sed -n '2,4p' "$0" >&2; exit 1; }
given=$(cd "$1" && pwd)
work=$(mktemp -d "${TMPDIR:-/tmp}/uccl-packaging.XXXXXX")
trap 'rm -rf "$work"' EXIT
prefix=$work/moved/to/prefix
mkdir -p "$(dirname "$prefix")"
failed=0 ran=0

export UCCL_TCPX_PLUGIN=soft UCCL_TCPX_SOFT_STRICT=1 NCCL_SOCKET_IFNAME=lo NCCL_GPUDIRECTTCPX_SOCKET_IFNAME=lo
# The library must be found only through the moved prefix.
unset LD_LIBRARY_PATH LIBRARY_PATH CPATH CMAKE_PREFIX_PATH PKG_CONFIG_PATH

# check NAME COMMAND...: runs the command, if NAME is wanted, and shows its output when it fails.
check() {
    local name=$1 output
    shift
    [ "${ONLY:-$name}" = "$name" ] || return 0
    ran=$((ran + 1))
    if output=$("$@" 2>&1); then
        echo "ok      $name"
    else
        echo "FAILED  $name"
        sed 's/^/        /' <<<"$output"
        failed=1
    fi
}

if [ -e "$given/CMakeCache.txt" ]; then
    original=$work/installed
    cargo_target=$(sed -n 's/^UCCL_P2P_CARGO_TARGET_DIR:[A-Z]*=//p' "$given/CMakeCache.txt")
    cmake --install "$given" --prefix "$original" >"$work/install.log" || { cat "$work/install.log"; exit 1; }
    mv "$original" "$prefix"
else
    original=$given
    cargo_target=${UCCL_P2P_CARGO_TARGET_DIR:-}
    cp -a "$given" "$prefix"
fi
version=$(sed -n 's/^version = "\([0-9.]*\).*/\1/p' "$root/Cargo.toml" | head -1)
so=$prefix/lib/libuccl_p2p.so.$version
plugin=$prefix/lib/uccl/libnccl-net-tcpx-soft.so

# --- The files ---

files_present() {
    local file missing=0
    for file in "lib/libuccl_p2p.so.$version" lib/libuccl_p2p.a lib/uccl/libnccl-net-tcpx-soft.so include/uccl_engine.h \
        include/uccl_engine.hpp include/uccl_tcpx_endpoint.hpp lib/cmake/uccl_p2p/uccl_p2pConfig.cmake \
        lib/cmake/uccl_p2p/uccl_p2pConfigVersion.cmake lib/pkgconfig/uccl_p2p.pc bin/tcpx-info bin/tcpx-perf \
        bin/tcpx-top bin/uccl-devmem-agent share/man/man1/uccl-devmem-agent.1 share/man/man1/tcpx-info.1 share/man/man1/tcpx-perf.1 share/man/man1/tcpx-top.1 \
        share/man/man3/uccl_engine.3 share/man/man3/uccl_engine_write.3 share/man/man7/uccl_p2p.7 \
        share/doc/uccl_p2p/LICENSE share/doc/uccl_p2p/THIRD-PARTY-NOTICES.txt share/doc/uccl_p2p/docs/README.md \
        share/doc/uccl_p2p/examples/two_processes.c share/doc/uccl_p2p/deploy/grafana/uccl.json; do
        [ -f "$prefix/$file" ] && [ ! -L "$prefix/$file" ] || { echo "no file $file"; missing=1; }
    done
    [ "$(readlink "$prefix/lib/libuccl_p2p.so.0")" = "libuccl_p2p.so.$version" ] || { echo "lib/libuccl_p2p.so.0 is no link to it"; missing=1; }
    [ "$(readlink "$prefix/lib/libuccl_p2p.so")" = libuccl_p2p.so.0 ] || { echo "lib/libuccl_p2p.so is no link to .so.0"; missing=1; }
    [ -x "$prefix/bin/tcpx-info" ] && [ -x "$prefix/bin/tcpx-perf" ] && [ -x "$prefix/bin/tcpx-top" ] && [ -x "$prefix/bin/uccl-devmem-agent" ] || { echo "tools cannot be executed"; missing=1; }
    return $missing
}
exports() { nm -D --defined-only "$1" | awk '{print $3}' | LC_ALL=C sort; }
exported_symbols() { diff <(LC_ALL=C sort "$root/cmake/exported-symbols.txt") <(exports "$so"); }
# Other global symbols of the archive could clash with a program's names only under these prefixes.
archive_symbols() {
    diff <(LC_ALL=C sort "$root/cmake/exported-symbols.txt") \
        <(readelf -sW "$prefix/lib/libuccl_p2p.a" 2>/dev/null | awk '$5 != "LOCAL" && $6 != "HIDDEN" && $7 != "UND" && $8 ~ /^uccl_/ {print $8}' | LC_ALL=C sort -u)
}
soname() { local name; name=$(readelf -d "$so" | sed -n 's/.*(SONAME).*\[\(.*\)\]/\1/p'); echo "SONAME is '$name'"; [ "$name" = libuccl_p2p.so.0 ]; }
# CUDA and NCCL are looked for at run time; a link to them would keep the library from loading without them.
needed() {
    local libraries
    libraries=$(readelf -d "$so" && readelf -d "$plugin") || return 1
    ! grep NEEDED <<<"$libraries" | grep -Ev 'lib(c|m|dl|rt|util|pthread|gcc_s)\.so|ld-linux'
}
plugin_symbols() { exports "$plugin" | grep -x ncclNetPlugin_v7; }
no_paths() {
    [ -d "$prefix/lib/cmake" ] && [ -d "$prefix/lib/pkgconfig" ] && [ -d "$prefix/include" ] || return 1
    ! grep -rIl -e "$original" -e "$root" "$prefix/lib/cmake" "$prefix/lib/pkgconfig" "$prefix/include"
}
same_header() { diff -r "$root/include" "$prefix/include"; }
headers() { "$here/check_headers.sh" "$1" "$prefix/include"; }

licences() {
    local name
    for name in LICENSE THIRD-PARTY-NOTICES.txt; do cmp "$root/$name" "$prefix/share/doc/uccl_p2p/$name" || return 1; done
}
stripped() {
    local file sections rc=0
    for file in "$so" "$plugin" "$prefix/bin/tcpx-info" "$prefix/bin/tcpx-perf" "$prefix/bin/tcpx-top" "$prefix/bin/uccl-devmem-agent" "$prefix/lib/libuccl_p2p.a"; do
        sections=$(readelf -SW "$file") || return 1
        if grep -E '\.debug_(info|line)' <<<"$sections"; then echo "$file has debug information"; rc=1; fi
        # The symbols of an archive are what a linker reads.
        if [[ $file != *.a ]] && grep '\.symtab' <<<"$sections"; then echo "$file has a symbol table"; rc=1; fi
    done
    return $rc
}

check "files" files_present
check "licences" licences
check "stripped" stripped
check "exported symbols" exported_symbols
check "symbols of the archive" archive_symbols
check "SONAME" soname
check "needed libraries" needed
check "symbols of the software plugin" plugin_symbols
check "no absolute paths in package files" no_paths
check "headers are those of the source" same_header
for compiler in gcc clang; do
    command -v $compiler >/dev/null || { echo "SKIPPED headers with $compiler: not installed"; continue; }
    check "headers alone, $compiler" headers $compiler
done

# --- Consumers ---

run() { timeout 120 "$@"; }
# The library that a program loads must be the one of the moved prefix.
loads() { ldd "$1" | grep "libuccl_p2p.so.0 => $2" || { ldd "$1"; return 1; }; }
loads_none() { local libraries; libraries=$(ldd "$1") || return 1; ! grep libuccl_p2p <<<"$libraries"; }

cmake_package() {
    cmake -S "$here/cmake_consumer" -B "$work/cmake" -DCMAKE_PREFIX_PATH="$prefix" -DWANTED_VERSION="$version" &&
        cmake --build "$work/cmake"
}
check "CMake package: build" cmake_package
for language in c cpp; do
    check "CMake package: $language, shared" run "$work/cmake/${language}_p2p" "$version"
    check "CMake package: $language, shared, is the moved library" loads "$work/cmake/${language}_p2p" "$prefix/lib"
    check "CMake package: $language, static" run "$work/cmake/${language}_p2p_static" "$version"
    check "CMake package: $language, static, needs no library" loads_none "$work/cmake/${language}_p2p_static"
done

pkg() { PKG_CONFIG_PATH=$prefix/lib/pkgconfig pkg-config "$@" uccl_p2p; }
pkg_config_values() { [ "$(pkg --modversion)" = "$version" ] && [ "$(cd "$(pkg --variable=prefix)" && pwd)" = "$prefix" ]; }
# shellcheck disable=SC2046
pkg_config_shared() {
    gcc -std=c11 -Wall -Wextra -Werror "$here/consumer.c" -o "$work/pkg_shared" $(pkg --cflags --libs) -Wl,-rpath,"$prefix/lib" &&
        run "$work/pkg_shared" "$version" && loads "$work/pkg_shared" "$prefix/lib"
}
# shellcheck disable=SC2046
pkg_config_static() {
    # The archive by name: with both in the folder the linker prefers the shared library.
    gcc -std=c11 -Wall -Wextra -Werror "$here/consumer.c" -o "$work/pkg_static" \
        $(pkg --cflags --libs --static | sed 's/-luccl_p2p/-l:libuccl_p2p.a/') && run "$work/pkg_static" "$version" &&
        loads_none "$work/pkg_static"
}
if command -v pkg-config >/dev/null; then
    check "pkg-config: version and prefix" pkg_config_values
    check "pkg-config: shared" pkg_config_shared
    check "pkg-config: static" pkg_config_static
else
    echo "SKIPPED pkg-config: not installed"
fi

plain_c() {
    gcc -std=c11 -Wall -Wextra -Werror -I"$prefix/include" "$here/consumer.c" -o "$work/plain_c" -L"$prefix/lib" -luccl_p2p &&
        LD_LIBRARY_PATH=$prefix/lib run "$work/plain_c" "$version" && LD_LIBRARY_PATH=$prefix/lib loads "$work/plain_c" "$prefix/lib"
}
plain_cpp() {
    g++ -std=c++17 -Wall -Wextra -Werror -I"$prefix/include" "$here/consumer.cpp" -o "$work/plain_cpp" -L"$prefix/lib" -luccl_p2p &&
        LD_LIBRARY_PATH=$prefix/lib run "$work/plain_cpp" "$version" && LD_LIBRARY_PATH=$prefix/lib loads "$work/plain_cpp" "$prefix/lib"
}
# The software plugin as a shared object, like the TCPX plugin.
loaded_plugin() {
    [ -e "$work/plain_c" ] || plain_c || return 1
    LD_LIBRARY_PATH=$prefix/lib UCCL_TCPX_PLUGIN=tcpx UCCL_TCPX_PLUGIN_PATH=$plugin UCCL_TCPX_EMULATE_DEVICE=1 run "$work/plain_c" "$version"
}
check "plain C" plain_c
check "plain C++" plain_cpp
check "the installed plugin, loaded" loaded_plugin
check "tcpx-info" run "$prefix/bin/tcpx-info"
check "tcpx-perf --help" run "$prefix/bin/tcpx-perf" --help
check "tcpx-top --help" run "$prefix/bin/tcpx-top" --help

subdirectory() { # FETCH
    local build=$work/subdirectory_$1 target=${cargo_target:-$work/cargo} prebuilt=OFF
    # The build of the prefix is complete; cargo is not needed again.
    [ -e "$target/release/libuccl_p2p.a" ] && prebuilt=ON
    cmake -S "$here/subdirectory_consumer" -B "$build" -DUCCL_P2P_SOURCE="$root" -DFETCH="$1" \
        -DCARGO_TARGET="$target" -DPREBUILT=$prebuilt && cmake --build "$build" || return 1
    # The parent's settings count, and none of the default's folders is made.
    [ ! -e "$build/uccl_p2p/cargo" ] && [ ! -e "$build/_deps/uccl_p2p-build/cargo" ] || { echo "UCCL_P2P_CARGO_TARGET_DIR of the parent is ignored"; return 1; }
    local program
    for program in c_p2p c_p2p_static cpp_p2p cpp_p2p_static; do run "$build/$program" "$version" || return 1; done
}
check "add_subdirectory" subdirectory OFF
check "FetchContent" subdirectory ON
[ $ran -gt 0 ] || { echo "no check is called '$ONLY'" >&2; exit 1; }
exit $failed
