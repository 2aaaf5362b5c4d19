#!/usr/bin/env bash
# Builds the examples against a library and runs them. usage: examples/run.sh LIBRARY_FILE INCLUDE_DIR BUILD_DIR
set -euo pipefail
library=$(readlink -f "$1") include=$(readlink -f "$2") build=$3
here=$(dirname "$(readlink -f "$0")")
mkdir -p "$build"
# Programs load the library by its SONAME, and a library that is not installed has no file of that name.
ln -sf "$library" "$build/libuccl_p2p.so.0"
ln -sf "$library" "$build/libuccl_p2p.so"
flags=(-O1 -g -Wall -Wextra -Wpedantic -Werror "-I$include")
link=("-L$build" -luccl_p2p "-Wl,-rpath,$(readlink -f "$build")")
"${CC:-cc}" -std=c11 -D_DEFAULT_SOURCE "${flags[@]}" "$here/two_processes.c" "${link[@]}" -o "$build/two_processes"
"${CXX:-c++}" -std=c++17 "${flags[@]}" "$here/vectors.cpp" "${link[@]}" -o "$build/vectors"
# A hang is a failure.
timeout 60 "$build/two_processes"
timeout 60 "$build/vectors"
timeout 60 python3 "$here/read_remote.py" "$build/libuccl_p2p.so.0"
