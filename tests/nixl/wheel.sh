#!/usr/bin/env bash
# Installs the wheel in a fresh environment beside NIXL from PyPI and tests its features. Exit status 77: skipped.
#   wheel.sh WHEEL
#   NIXL_VERSION=1.5.1   NIXL_CUDA=12
#   PYTHON=python3       the interpreter of the environment
#   WHEEL_TESTS=all      or brief: only that agents find the plugin and move data over it, and what uninstalling leaves
set -euo pipefail
[ $# = 1 ] || { sed -n '2,6p' "$0"; exit 2; }
wheel=$(readlink -f "$1")
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
version=${NIXL_VERSION:-1.5.1}
cuda=${NIXL_CUDA:-12}
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
export WHEEL_SCRATCH=$scratch XDG_CACHE_HOME=$scratch/cache
unset NIXL_PLUGIN_DIR LD_LIBRARY_PATH

"${PYTHON:-python3}" -m venv "$scratch/venv"
pip() { "$scratch/venv/bin/pip" --quiet --disable-pip-version-check "$@"; }
pip install "$wheel"
if ! pip install numpy || ! pip install --no-deps "nixl==$version" "nixl-cu$cuda==$version"; then
  echo "SKIPPED: NIXL $version could not be downloaded"
  exit 77
fi
if pip install auditwheel && command -v patchelf >/dev/null; then
  tag=$("$scratch/venv/bin/auditwheel" show "$wheel" | tr '\n' ' ')
  name=$(basename "$wheel" .whl)
  case $tag in
    *"\"${name##*-}\""*) echo "auditwheel agrees with the tag ${name##*-}" ;;
    *) echo "auditwheel does not agree with the tag ${name##*-}: $tag"; exit 1 ;;
  esac
else
  echo "note: auditwheel is not here; build-wheel has checked the symbols"
fi

python=$scratch/venv/bin/python
# NIXL before 1.4 does not load without torch.
if ! "$python" -c "import nixl_cu$cuda._api" 2>/dev/null; then
  export PYTHONPATH=$here/torch_stub
fi
export NIXL_PACKAGE=nixl_cu$cuda NIXL_LOG_LEVEL=${NIXL_LOG_LEVEL:-WARN}
export UCCL_TCPX_PLUGIN=${UCCL_TCPX_PLUGIN:-soft} NCCL_SOCKET_IFNAME=${NCCL_SOCKET_IFNAME:-lo}
export NCCL_GPUDIRECTTCPX_SOCKET_IFNAME=${NCCL_GPUDIRECTTCPX_SOCKET_IFNAME:-lo}
if [ "${WHEEL_TESTS:-all}" = all ]; then
  "$python" "$here/test_wheel.py"
  # The package uccl_tcpx, installed: nothing here names its library.
  (cd / && env -u PYTHONPATH -u LIBUCCL_P2P "$python" "$here/../python/test_uccl_tcpx.py")
  "$python" "$here/test_nixl_as_ucx.py"
else
  "$python" "$here/test_wheel.py" directory_has_both doctor_is_content tools_run
  "$python" "$here/test_nixl_as_ucx.py" default_agents_move_bytes_over_this_library
fi
# Agents in two processes over the installed plugin.
NIXL_PLUGIN_DIR=$("$python" -m nixl_tcpx plugin-dir)
export NIXL_PLUGIN_DIR
"$python" "$here/test_nixl_tcpx.py" write_64_mib_unaligned read_64_mib_unaligned notification_after_the_data_of_its_transfer \
  prepared_descriptor_lists peer_ended_and_started_again

# Uninstalling leaves nothing that NIXL would find.
"$python" -m nixl_tcpx as-ucx --dir >/dev/null
pip uninstall --yes nixl-tcpx
rest=$(find "$scratch/venv" "$XDG_CACHE_HOME" -iname '*nixl*tcpx*' -o -name '*plugin_TCPX*' 2>/dev/null || true)
[ -z "$rest" ] || { printf 'left behind by the wheel:\n%s\n' "$rest"; exit 1; }
echo "uninstalled without a rest"
