# shellcheck shell=bash
# For the tests of programs above NIXL: an environment of Python with one of them from PyPI, NIXL beside it and this tree's wheel in it, and the variables
# that all of them need. Sourced. Knows no program by name.
#   client_python NAME PACKAGE...   sets `python`; exit status 77, loudly, when the packages cannot be installed
#   NAME_PYTHON=python3     (NAME in capitals) an interpreter that has everything already; nothing is installed then
#   overrides="A>=1 B<2"    (a variable of the caller's) overrides of version constraints between packages, for uv
#   CLIENT_VENVS=DIR        where environments are kept; default .venv. Each takes up to 10 GB.
#   NIXL_VERSION=1.5.1
#   NIXL_PLUGIN_DIR=DIR     other plugins, such as those of `as-ucx --dir`
repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)

client_python() {
  local name=$1 nixl=${NIXL_VERSION:-1.5.1} ready=${1^^}_PYTHON venv wheel
  shift
  python=${!ready:-}
  if [ -z "$python" ]; then
    venv=${CLIENT_VENVS:-$repo/.venv}/$name python=${CLIENT_VENVS:-$repo/.venv}/$name/bin/python
    if [ "$(cat "$venv/complete" 2>/dev/null)" != "$* $nixl" ]; then
      rm -rf "$venv"
      python3 -m venv "$venv"
      "$python" -m pip install --quiet --disable-pip-version-check uv || { echo "SKIPPED: uv could not be installed"; exit 77; }
      # shellcheck disable=SC2086  # a word each
      printf '%s\n' ${overrides:-} >"$venv/overrides"
      if ! "$venv/bin/uv" pip install --quiet --no-cache --python "$python" --overrides "$venv/overrides" "$@" "nixl==$nixl" "nixl-cu12==$nixl"; then
        echo "SKIPPED: $* could not be installed"
        exit 77
      fi
      echo "$* $nixl" >"$venv/complete"
    fi
    wheel=$("$repo/scripts/build-wheel")
    "$python" -m pip install --quiet --disable-pip-version-check --force-reinstall --no-deps "$wheel"
  fi
  NIXL_PLUGIN_DIR=${NIXL_PLUGIN_DIR:-$("$python" -m nixl_tcpx plugin-dir)}
  export NIXL_PLUGIN_DIR NIXL_LOG_LEVEL=${NIXL_LOG_LEVEL:-WARN}
  export UCCL_TCPX_PLUGIN=${UCCL_TCPX_PLUGIN:-soft} NCCL_SOCKET_IFNAME=${NCCL_SOCKET_IFNAME:-lo}
  export NCCL_GPUDIRECTTCPX_SOCKET_IFNAME=${NCCL_GPUDIRECTTCPX_SOCKET_IFNAME:-lo}
  export PYTHONPATH=$repo/tests/clients${PYTHONPATH:+:$PYTHONPATH}
}
