#!/usr/bin/env bash
# The library for aarch64, cross-compiled and run under qemu-user: the engine suite, the C tests, and the wheel with Debian's Python and NIXL's wheel for
# aarch64. Exit status 77: nothing could be run. What qemu-user lacks is not tested by this: docs/compatibility.md lists it.
#   run.sh FOLDER        where it is built, and kept
#   NIXL_VERSION=1.5.1   NIXL_CUDA=12
set -euo pipefail
[ $# = 1 ] || { sed -n '2,5p' "$0"; exit 2; }
mkdir -p "$1"
work=$(cd "$1" && pwd)
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
cd "$root"
triple=aarch64-unknown-linux-gnu sysroot=/usr/aarch64-linux-gnu
skip() { echo "SKIPPED: $*"; exit 77; }

missing=()
command -v qemu-aarch64 >/dev/null || missing+=(qemu-user)
command -v aarch64-linux-gnu-gcc >/dev/null || missing+=(gcc-aarch64-linux-gnu)
command -v aarch64-linux-gnu-g++ >/dev/null || missing+=(g++-aarch64-linux-gnu)
[ -e $sysroot/lib/ld-linux-aarch64.so.1 ] || missing+=(libc6-dev-arm64-cross)
if [ ${#missing[@]} -gt 0 ]; then
  [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null && apt-get update -qq && apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null ||
    skip "aarch64: ${missing[*]} cannot be installed here"
fi
rustc --print target-libdir --target $triple 2>/dev/null | xargs -r ls >/dev/null 2>&1 || { command -v rustup >/dev/null && rustup target add $triple; } ||
  skip "aarch64: no Rust standard library for $triple here"

export CARGO_TARGET_DIR=$work CARGO_PROFILE_RELEASE_DEBUG=false
export CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_LINKER=aarch64-linux-gnu-gcc CC_aarch64_unknown_linux_gnu=aarch64-linux-gnu-gcc
export CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_RUNNER="qemu-aarch64 -L $sysroot"
export UCCL_TCPX_PLUGIN=soft UCCL_TCPX_SOFT_STRICT=1 UCCL_P2P_LOG_LEVEL=off NCCL_SOCKET_IFNAME=lo NCCL_GPUDIRECTTCPX_SOCKET_IFNAME=lo
unset LD_LIBRARY_PATH

echo "== engine suite"
cargo test --release --locked --target $triple --test engine -- --test-threads 1
scripts/build --target $triple

echo "== C tests"
# Left out: what qemu-user does not imitate (statistics of TCP, a limit of the address space, threads in the child of a process with threads), what takes
# minutes there, and a comparison with the header that is the same everywhere.
cmake -S c_tests -B "$work/c_tests" -DCMAKE_BUILD_TYPE=Debug -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 \
  -DCMAKE_C_COMPILER=aarch64-linux-gnu-gcc -DCMAKE_CROSSCOMPILING_EMULATOR="qemu-aarch64;-L;$sysroot" \
  -DUCCL_P2P_LIBRARY="$work/$triple/release/libuccl_p2p.so" -DUCCL_P2P_INCLUDE="$root/include" >/dev/null
cmake --build "$work/c_tests" -j 2 >/dev/null
ctest --test-dir "$work/c_tests" -j 3 --output-on-failure \
  -E '\.emulated$|uccl_engine_channel_stats$|no_memory_for_a_large_one$|^forked\.|^peer_killed\.([^k]|killed_(during_read|while))|every_function_has'


echo "== wheel"
rm -rf "$work/wheel" "$work/python"
wheel=$(WHEEL_ARCH=aarch64 scripts/build-wheel "$work/wheel")
qemu-aarch64 -L $sysroot "$work/$triple/release/tcpx-info" --no-probe >/dev/null
# Debian's Python for arm64, unpacked, without an installation: apt with a database of its own.
python=$work/python
mkdir -p "$python"/{lists,cache/archives}/partial "$python"/{state,system,site}
touch "$python/status"
arm64() {
  apt-get -qq -o APT::Architecture=arm64 -o APT::Architectures::=arm64 -o APT::Install-Recommends=0 -o Dir::State="$python/state" \
    -o Dir::State::lists="$python/lists" -o Dir::State::status="$python/status" -o Dir::Cache="$python/cache" -o Debug::NoLocking=1 "$@" >/dev/null
}
if ! command -v apt-get >/dev/null || ! arm64 update || ! arm64 install -y --download-only python3 libstdc++6; then
  echo "SKIPPED: the wheel for aarch64: no Python for arm64 could be downloaded"
  exit 0
fi
for package in "$python"/cache/archives/*.deb; do dpkg-deb -x "$package" "$python/system"; done
number=$(basename "$(echo "$python"/system/usr/bin/python3.*[0-9])")
# Processes that Python starts need the emulator too.
cat >"$python/python3" <<COMMAND
#!/bin/sh
exec qemu-aarch64 -L "$python/system" "$python/system/usr/bin/$number" "\$@"
COMMAND
chmod +x "$python/python3"
printf 'import os\nimport sys\n\nsys.executable = os.environ["PYTHON_COMMAND"]\n' >"$python/site/sitecustomize.py"
export UCCL_TEST_EMULATED=1 PYTHON_COMMAND=$python/python3 PYTHONPATH=$python/site NIXL_TCPX_CACHE=$python/links
nixl=${NIXL_VERSION:-1.5.1} cuda=${NIXL_CUDA:-12}
install() {
  PYTHONPATH='' python3 -m pip install --quiet --disable-pip-version-check --no-deps --only-binary=:all: --implementation cp --python-version "${number#python}" \
    --platform manylinux_2_34_aarch64 --platform manylinux_2_28_aarch64 --platform manylinux_2_27_aarch64 --platform manylinux2014_aarch64 \
    --target "$python/site" "$@"
}
install "$wheel"
(cd / && "$PYTHON_COMMAND" "$root/tests/python/test_uccl_tcpx.py")
if ! install numpy "nixl==$nixl" "nixl-cu$cuda==$nixl"; then
  echo "SKIPPED: the wheel for aarch64 beside NIXL: NIXL $nixl for aarch64 could not be downloaded"
  exit 0
fi
export NIXL_PACKAGE=nixl_cu$cuda NIXL_LOG_LEVEL=${NIXL_LOG_LEVEL:-WARN}
(cd / && "$PYTHON_COMMAND" -m nixl_tcpx doctor)
NIXL_PLUGIN_DIR=$("$PYTHON_COMMAND" -m nixl_tcpx plugin-dir)
export NIXL_PLUGIN_DIR
"$PYTHON_COMMAND" tests/nixl/test_nixl_tcpx.py notification_after_the_data_of_its_transfer prepared_descriptor_lists
