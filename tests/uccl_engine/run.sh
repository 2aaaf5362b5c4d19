#!/usr/bin/env bash
# UCCL's engine with docs/uccl-engine.md applied to it, between two processes over host memory, with a simulated CUDA runtime: a peer that
# is killed must not make transfers "done", and the speed is printed beside tcpx-perf's. Outside scripts/test: it needs UCCL's sources and the
# headers of CUDA, libibverbs and libfabric. Exit status 77: skipped.
#   UCCL_SOURCE=DIR run.sh [LIBDIR]      LIBDIR holds libuccl_p2p.a and tcpx-perf; default target/release
#   CUDA_INCLUDE=DIR   CUDA's headers; without it they are installed from PyPI into .venv/cuda
#   SECONDS_A_ROW=1   TURNS=3
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
repo=$(cd "$here/../.." && pwd)
libdir=$(cd "${1:-$repo/target/release}" && pwd)
work=$repo/build/uccl_engine
[ -e "${UCCL_SOURCE:-}/p2p/engine.cc" ] || { echo "SKIPPED: UCCL_SOURCE does not name UCCL's sources"; exit 77; }
for header in infiniband/efadv.h rdma/fabric.h libelf.h; do
  echo "#include <$header>" | g++ -E -x c++ - >/dev/null 2>&1 || { echo "SKIPPED: no <$header> (libibverbs-dev, libfabric-dev, libelf-dev)"; exit 77; }
done

headers=${CUDA_INCLUDE:-}
if [ -z "$headers" ]; then
  venv=$repo/.venv/cuda headers=$repo/.venv/cuda/include-cuda
  if [ ! -e "$headers/crt" ]; then
    python3 -m venv "$venv"
    "$venv/bin/pip" install --quiet --disable-pip-version-check "nvidia-cuda-runtime-cu12<12.9" "nvidia-cuda-nvcc-cu12<12.9" ||
      { echo "SKIPPED: CUDA's headers could not be downloaded"; exit 77; }
    mkdir -p "$headers"
    for package in cuda_runtime cuda_nvcc; do cp -rsf "$venv"/lib/python3*/site-packages/nvidia/$package/include/* "$headers/"; done
  fi
fi

rm -rf "$work"
mkdir -p "$work/cuda/lib64" "$work/prefix/lib"
cp -r "$UCCL_SOURCE/p2p" "$UCCL_SOURCE/include" "$work/"
ln -s "$headers" "$work/cuda/include"
ln -s "$repo/include" "$work/prefix/include"
ln -s "$libdir/libuccl_p2p.a" "$work/prefix/lib/"
python3 "$here/apply.py" "$repo/docs/uccl-engine.md" "$repo/cmake/README.md" "$work/p2p"
g++ -O1 -shared -fPIC -I"$headers" "$here/simulated_cuda.cpp" -o "$work/cuda/lib64/libcudart.so"
cp "$work/cuda/lib64/libcudart.so" "$work/cuda/lib64/libcuda.so"
make -C "$work/p2p" -j "${JOBS:-2}" libuccl_p2p.so CUDA_HOME="$work/cuda" UCCL_TCPX="$work/prefix" NB_DIR=/nonexistent >"$work/make.log" 2>&1 ||
  { tail -n 30 "$work/make.log"; exit 1; }
g++ -std=c++17 -O2 -Wall -I"$work/p2p" -I"$work/p2p/util" -I"$work/include" -I"$headers" "$here/pair.cpp" -o "$work/pair" \
  -L"$work/p2p" -luccl_p2p -L"$work/cuda/lib64" -lcudart -Wl,-rpath,"$work/p2p:$work/cuda/lib64"

export UCCL_P2P_DISABLE_IPC=1 UCCL_TCPX_PLUGIN=${UCCL_TCPX_PLUGIN:-soft} UCCL_P2P_LOG_LEVEL=${UCCL_P2P_LOG_LEVEL:-error}
export NCCL_SOCKET_IFNAME=${NCCL_SOCKET_IFNAME:-lo} NCCL_GPUDIRECTTCPX_SOCKET_IFNAME=${NCCL_GPUDIRECTTCPX_SOCKET_IFNAME:-lo}
export UCCL_SOCKET_IFNAME=$NCCL_SOCKET_IFNAME
unset UCCL_P2P_TRANSPORT
python3 "$here/compare.py" "$work/pair" "$libdir/tcpx-perf" "${SECONDS_A_ROW:-1}"
