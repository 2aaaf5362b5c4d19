#!/usr/bin/env bash
# The wheel in a fresh environment of each Python: every test of wheel.sh beside the newest NIXL, the brief ones beside the others. Exit
# status 77: no combination could be tested. Those that cannot be had are listed.
#   wheel_matrix.sh WHEEL
#   PYTHONS="3.10 3.11 3.12 3.13"   NIXLS="1.5.1 1.4.1 1.3.2 1.2.0 1.0.0", the newest first
set -uo pipefail
[ $# = 1 ] || { sed -n '2,5p' "$0"; exit 2; }
wheel=$(readlink -f "$1")
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
read -ra pythons <<<"${PYTHONS:-3.10 3.11 3.12 3.13}"
read -ra nixls <<<"${NIXLS:-1.5.1 1.4.1 1.3.2 1.2.0 1.0.0}"
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

fits() { [ "$("$1" -c 'import sys, venv, ensurepip; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)" = "$2" ]; }

# interpreter VERSION: the path of a CPython of this version: on PATH, of pyenv, or one that uv downloads
interpreter() {
  local candidate
  for candidate in "python$1" python3 "${PYENV_ROOT:-$HOME/.pyenv}/versions/$1".*/bin/python3; do
    fits "$candidate" "$1" && command -v "$candidate" && return
  done
  [ -x "$scratch/uv/bin/uv" ] || { python3 -m venv "$scratch/uv" && "$scratch/uv/bin/pip" install --quiet --disable-pip-version-check uv; } >&2 || return
  "$scratch/uv/bin/uv" python install --quiet --install-dir "$scratch/pythons" "$1" >&2 || return
  candidate=$(echo "$scratch/pythons/cpython-$1".*/bin/python3)
  fits "$candidate" "$1" && echo "$candidate"
}

ran=0 failed=() skipped=()
for python in "${pythons[@]}"; do
  if ! path=$(interpreter "$python"); then
    skipped+=("CPython $python: not here, and uv could not download it")
    continue
  fi
  tests=all
  for nixl in "${nixls[@]}"; do
    rc=0
    NIXL_VERSION=$nixl PYTHON=$path WHEEL_TESTS=$tests "$here/wheel.sh" "$wheel" >"$scratch/log" 2>&1 || rc=$?
    echo "== CPython $python, NIXL $nixl, tests: $tests: $(grep -cE '^(ok|passed) ' "$scratch/log") passed, status $rc"
    case $rc in
      0) ran=$((ran + 1)) && grep -E '^(SKIPPED|note)' "$scratch/log" ;;
      77) skipped+=("CPython $python, NIXL $nixl: $(grep SKIPPED "$scratch/log")") ;;
      *) failed+=("CPython $python, NIXL $nixl") && cat "$scratch/log" ;;
    esac
    tests=brief
  done
done
[ ${#skipped[@]} = 0 ] || printf 'SKIPPED: %s\n' "${skipped[@]}"
[ ${#failed[@]} = 0 ] || { printf 'FAILED: %s\n' "${failed[@]}"; exit 1; }
[ $ran -gt 0 ] || exit 77
