# shellcheck shell=bash
# Installs missing packages for building and testing, and puts a recent enough Rust toolchain first in PATH.
# Sourced by demo and test; `MODE` is demo or test. Packages come from apt; on other systems it lists the missing ones.
set -euo pipefail

required_rust=$(sed -n 's/^rust-version = "\(.*\)"/\1/p' Cargo.toml | head -1)

# at_least VERSION MINIMUM
at_least() { [ "$(printf '%s\n' "$2" "$1" | sort -V | head -1)" = "$2" ]; }
rust_of() { "$1/rustc" --version 2>/dev/null | sed 's/rustc \([0-9.]*\).*/\1/'; }

# The first folder that holds cargo and a rustc of the required version. Ubuntu keeps newer ones beside its default.
find_rust() {
  local dir version
  for dir in "${HOME:-/root}/.cargo/bin" "$(dirname "$(command -v cargo || echo /usr/bin/cargo)")" /usr/lib/rust-*/bin; do
    [ -x "$dir/cargo" ] && [ -x "$dir/rustc" ] || continue
    version=$(rust_of "$dir")
    [ -n "$version" ] && at_least "$version" "$required_rust" && echo "$dir" && return 0
  done
  return 1
}

# The suffix of "rustc" in the package name of the oldest recent enough toolchain in apt: empty for the default
# one, -web for Debian's toolchain for browsers, the version for Ubuntu's.
rust_suffix() {
  local suffix version
  for suffix in "" -web $(apt-cache pkgnames rustc- | sed -n 's/^rustc\(-[0-9.]*\)$/\1/p' | sort -V); do
    version=$(apt-cache policy "rustc$suffix" | sed -n 's/^  Candidate: \([0-9.]*\).*/\1/p')
    [ -n "$version" ] && at_least "$version" "$required_rust" && echo "$suffix" && return 0
  done
  return 1
}

# rustfmt and clippy of that toolchain, as far as apt has them.
lint_packages() { # lint_packages SUFFIX
  local package
  for package in "rustfmt$1" "rust$1-clippy"; do
    apt-cache show "$package" >/dev/null 2>&1 && echo "$package"
  done
  return 0
}

need=()
want() { command -v "$1" >/dev/null 2>&1 || need+=("$2"); }
want gcc gcc
want g++ g++
want make make
[ -e /etc/ssl/certs/ca-certificates.crt ] || [ -e /etc/pki/tls/certs/ca-bundle.crt ] || need+=(ca-certificates)
if [ "${MODE:-test}" = test ]; then
  want cmake cmake
  want pkg-config pkg-config
  want ip iproute2
  want iptables iptables
  want clang++ clang
  # The C parts of dependencies are compiled even where Rust is only checked; other systems name these compilers otherwise.
  if command -v apt-get >/dev/null 2>&1; then
    want aarch64-linux-gnu-gcc gcc-aarch64-linux-gnu
  fi
  want python3 python3
  python3 -c 'import venv, ensurepip' 2>/dev/null || need+=(python3-venv)
fi
rust_bin=$(find_rust) || rust_bin=""
# A toolchain of the distribution, installed only for the demo.
if [ "${MODE:-test}" = test ] && [ -n "$rust_bin" ] && [ ! -x "$rust_bin/cargo-fmt" ] && owner=$(dpkg-query -S "$rust_bin/rustc" 2>/dev/null); then
  mapfile -t -O ${#need[@]} need < <(lint_packages "$(sed -n 's/^rustc\(-[^:]*\|\):.*/\1/p' <<<"$owner")")
fi
if [ ${#need[@]} -gt 0 ] || [ -z "$rust_bin" ]; then
  if ! command -v apt-get >/dev/null 2>&1; then
    [ -n "$rust_bin" ] || need+=("Rust $required_rust or newer (https://rustup.rs)")
    printf 'missing: %s\n' "${need[@]}" >&2
    exit 1
  fi
  sudo=""
  [ "$(id -u)" = 0 ] || sudo=sudo
  $sudo apt-get update -qq
  if [ -z "$rust_bin" ]; then
    suffix=$(rust_suffix) || {
      echo "apt offers no Rust $required_rust or newer: install it from https://rustup.rs" >&2
      exit 1
    }
    need+=("rustc$suffix" "cargo$suffix")
    [ "${MODE:-test}" = demo ] || mapfile -t -O ${#need[@]} need < <(lint_packages "$suffix")
  fi
  echo "== installing: ${need[*]}"
  $sudo env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq "${need[@]}" >/dev/null
  rust_bin=$(find_rust) || {
    echo "no cargo of version $required_rust or newer after the installation" >&2
    exit 1
  }
fi
PATH="$rust_bin:$PATH"
export PATH
