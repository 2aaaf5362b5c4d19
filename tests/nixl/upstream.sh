#!/usr/bin/env bash
# NIXL's own failure tests (test/gtest/error_handling.cpp) with the backend TCPX in the place of UCX: a peer that ends before, during and
# after a transfer, and comes back. Needs NIXL's sources of a version whose wheel is installed, and googletest. Exit status 77: skipped.
#   NIXL_SOURCE=DIR upstream.sh LIBDIR PLUGINDIR [REPEAT]
#   NIXL_VERSION=1.4.1   NIXL_CUDA=12   version of the wheel that tests/nixl/run.sh has installed in .venv
set -euo pipefail
[ $# -ge 2 ] || { sed -n '2,5p' "$0"; exit 2; }
libdir=$(cd "$1" && pwd) plugindir=$(cd "$2" && pwd) repeat=${3:-25}
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
source=${NIXL_SOURCE:-}
version=${NIXL_VERSION:-1.4.1} cuda=${NIXL_CUDA:-12}
[ -e "$source/test/gtest/error_handling.cpp" ] || { echo "SKIPPED: NIXL_SOURCE does not name NIXL's sources (git clone https://github.com/ai-dynamo/nixl)"; exit 77; }
echo '#include <gtest/gtest.h>' | g++ -E -x c++ - >/dev/null 2>&1 || { echo "SKIPPED: googletest is not installed"; exit 77; }
site=$(echo "$here/../../.venv/nixl-$version-cu$cuda"/lib/python3*/site-packages)
libs=$site/.nixl_cu$cuda.mesonpy.libs
[ -e "$libs/libnixl.so" ] || { echo "SKIPPED: NIXL $version is not installed in .venv; run tests/nixl/matrix.sh first"; exit 77; }
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

# The name of the NIXL backend, and the parameters that only UCX has.
sed -e 's/std::make_tuple("UCX", [0-9], [0-9])/std::make_tuple("TCPX", 1, 0)/' -e '/EXPECT_EQ(ucx_/d' -e '/^#ifdef HAVE_UCX_BACKEND/,/^#endif/d' \
  -e 's/params\["num_workers"\] = .*/(void)num_workers;/; s/params\["num_threads"\] = .*/(void)num_threads;/' \
  -e '/params\["split_batch_size"\]/d' "$source/test/gtest/error_handling.cpp" >"$scratch/error_handling.cpp"
g++ -std=c++20 -O1 -w -DBUILD_DIR='""' -I"$here/upstream" -I"$source"/src/{api/cpp,infra,core,utils} "$scratch/error_handling.cpp" -o "$scratch/tests" \
  -L"$libs" -lnixl -lnixl_common -lnixl_build -lserdes -Wl,-rpath,"$libs:$site/nixl_cu$cuda.libs" -Wl,--disable-new-dtags \
  -Wl,--allow-shlib-undefined -lgtest -lgtest_main -lpthread
ln -s "$libdir/libuccl_p2p.so" "$scratch/libuccl_p2p.so.0"
export NIXL_PLUGIN_DIR=$plugindir LD_LIBRARY_PATH=$scratch NIXL_LOG_LEVEL=${NIXL_LOG_LEVEL:-FATAL}
export UCCL_TCPX_PLUGIN=${UCCL_TCPX_PLUGIN:-soft} NCCL_SOCKET_IFNAME=${NCCL_SOCKET_IFNAME:-lo}
export NCCL_GPUDIRECTTCPX_SOCKET_IFNAME=${NCCL_GPUDIRECTTCPX_SOCKET_IFNAME:-lo}
failed=0
"$scratch/tests" --gtest_filter='ucx/*' --gtest_repeat="$repeat" >"$scratch/log" 2>&1 || failed=$?
grep -aE '^\[ +(OK|FAILED) +\] ucx/' "$scratch/log" | sed 's/ (.*//; s/, where.*//' | sort | uniq -c
[ $failed = 0 ] || tail -n 40 "$scratch/log"
exit $failed
