#!/bin/sh
# check_headers.sh gcc|clang INCLUDE_DIR: compiles each header of the folder alone, in every language and standard that it serves.
# Exit status: 0 all compile, 1 one does not.
set -u
compiler=$1
include=$2
case $compiler in
    gcc) cc=gcc cxx=g++ ;;
    clang) cc=clang cxx=clang++ ;;
    *) echo "unknown compiler $compiler" >&2; exit 1 ;;
esac
flags="-Wall -Wextra -Wpedantic -Werror -I$include"
# Compiled in full: some warnings come only with code.
failed=0 count=0
check() { # language compiler standard header
    # Twice: a header must also allow a second inclusion.
    try "$1" "$2" "$3" "$4" "#include \"$4\"\n#include \"$4\"\n"
}
try() { # language compiler standard header source
    count=$((count + 1))
    if ! printf "$5" | $2 -x $1 -std=$3 $flags -c -o /dev/null -; then
        echo "FAILED: $2 -std=$3 $4" >&2
        failed=1
    fi
}
# A program may define these names itself.
try c $cc c11 "uccl_engine.h without short names" '#define UCCL_P2P_NO_SHORT_NAMES\nenum { MSG_SIZE, FIFO_SIZE, IPC_INFO_SIZE };\n#include "uccl_engine.h"\n'
# A program may do without exceptions.
try c++ "$cxx -fno-exceptions -fno-rtti" c++17 "uccl_engine.h without exceptions" '#include "uccl_engine.h"\nsize_t f() { return uccl_engine_get_notifs().size() + uccl_engine_get_notifs_v().size(); }\n'
for header in "$include"/*.h "$include"/*.hpp; do
    [ -e "$header" ] || { echo "no headers in $include" >&2; exit 1; }
    name=${header##*/}
    case $name in
        *.h) for standard in c11 c17; do check c $cc $standard "$name"; done ;;
    esac
    # The endpoint is for an engine in C++17.
    case $name in
        *endpoint*) standards="c++17 c++20" ;;
        *) standards="c++11 c++14 c++17 c++20" ;;
    esac
    for standard in $standards; do
        check c++ $cxx $standard "$name"
        # As C++ programs include C headers without C++ guards.
        case $name in
            *.h) try c++ $cxx $standard "$name in extern C" "extern \"C\" {\n#include \"$name\"\n}\n" ;;
        esac
    done
done
[ $failed = 0 ] && echo "$compiler: $count compilations"
exit $failed
