# shellcheck shell=bash
# The steps of scripts/test. Sourced by it, with `target`, `release` and `work`: the folders of cargo, of the build, and of logs and
# the steps' own builds. Status 77: skipped.

# rust_tests SELECTION...: in cargo nextest if installed: a process for each test, and the test programs side by side.
rust_tests() {
  if cargo nextest --version >/dev/null 2>&1; then
    cargo nextest run --release --no-fail-fast --success-output final "$@"
  else
    cargo test --release --no-fail-fast "$@" -- --show-output
  fi
}

# matrix TIER: the engine suite in the environments of tests/matrix.txt
matrix() {
  local tier name environment
  while IFS='|' read -r tier name environment; do
    [ "$tier" = "$1 " ] || continue
    read -ra environment <<<"${environment//RELEASE/$release}"
    step "rust: engine over${name% }" env "${environment[@]}" bash -c 'rust_tests --test engine'
  done <tests/matrix.txt
}

# The C tests over the library of this build.
c_tests() {
  cmake -S c_tests -B "$work/c_tests" -DCMAKE_BUILD_TYPE=Debug -DUCCL_P2P_LIBRARY="$release/libuccl_p2p.so" -DUCCL_P2P_INCLUDE="$PWD/include" &&
    cmake --build "$work/c_tests" -j 2 && ctest --test-dir "$work/c_tests" -j 3 --output-on-failure
}

nixl_plugin() {
  cmake -S nixl -B "$work/nixl" -DCMAKE_BUILD_TYPE=Release -DUCCL_P2P_LIBRARY="$release/libuccl_p2p.so" -DUCCL_P2P_INCLUDE_DIR="$PWD/include" &&
    cmake --build "$work/nixl" -j 2 && ctest --test-dir "$work/nixl" --output-on-failure
}

# nixl PROGRAM [JOBS [CASE...]]: one of the test programs in tests/nixl
nixl() { nixl_plugin && NIXL_TEST=$1 NIXL_JOBS=${2:-1} tests/nixl/run.sh "$release" "$work/nixl" "${@:3}"; }
nixl_matrix() { nixl_plugin && tests/nixl/matrix.sh "$release" "$work/nixl" 1.0.0 1.2.0 1.3.2 1.4.1; }
# With NIXL_SOURCE, after the step with older versions, one of which it takes.
nixl_upstream() { nixl_plugin && tests/nixl/upstream.sh "$release" "$work/nixl"; }
# Every test in the newest NIXL with each Python, and briefly every NIXL with each Python.
wheel() {
  rm -rf "$work/wheel"
  CARGO_TARGET_DIR=$target scripts/build-wheel "$work/wheel" && tests/nixl/wheel_matrix.sh "$work"/wheel/*.whl
}

# With NIXL_SOURCE. After the step with the wheel, which it takes.
nixlbench() { tests/nixl/nixlbench.sh "$work"/wheel/*.whl; }

installable() {
  cmake -S . -B "$work/cmake" -DUCCL_P2P_CARGO_TARGET_DIR="$target" -DUCCL_P2P_PREBUILT=ON -DCMAKE_BUILD_TYPE=Debug &&
    cmake --build "$work/cmake" -j 2
}

# The C++ interface, the endpoint, the headers alone with gcc and clang, an installation that was moved and its consumers, exported
# symbols and SONAME of the installed files.
installation() { installable && ctest --test-dir "$work/cmake" -j 2 --output-on-failure; }

# Every gate of the installation is shown to fail on a copy that breaks it.
gates() {
  installable || return 1
  rm -rf "$work/prefix"
  cmake --install "$work/cmake" --prefix "$work/prefix" >/dev/null && tests/packaging/gates_fail.sh "$work/prefix"
}

# An old clippy has lints with false positives that newer ones fixed.
clippy() {
  local version
  version=$(cargo clippy --version 2>/dev/null | sed -n 's/^clippy 0\.\([0-9.]*\).*/\1/p')
  [ -n "$version" ] || { echo "SKIPPED: this toolchain has no cargo clippy"; return 77; }
  at_least "$version" 1.95 || { echo "SKIPPED: clippy $version is older than 1.95, the oldest supported version"; return 77; }
  CARGO_TARGET_DIR=$work/check cargo clippy --workspace --all-targets -- -D warnings
}

# The oldest Rust that Cargo.toml promises builds everything, tests and benches too, from the committed Cargo.lock.
minimum_rust() {
  local cargo=(cargo)
  if [[ $(cargo --version) != "cargo $required_rust."* ]]; then
    if command -v rustup >/dev/null; then
      rustup run "$required_rust" cargo --version || rustup toolchain install "$required_rust" --profile minimal --no-self-update ||
        { echo "SKIPPED: rustup cannot install Rust $required_rust"; return 77; }
      cargo=(rustup run "$required_rust" cargo)
    elif [ -x "/usr/lib/rust-$required_rust/bin/cargo" ]; then
      cargo=(env PATH="/usr/lib/rust-$required_rust/bin:$PATH" cargo)
    else
      echo "SKIPPED: there is no Rust $required_rust here, and no rustup to install it"; return 77
    fi
  fi
  "${cargo[@]}" --version && CARGO_TARGET_DIR=$work/minimum_rust "${cargo[@]}" check --workspace --all-targets --locked
}

# Another architecture and another C library: type-checked, not run. One C compiler serves for both, since nothing is linked.
other_target() {
  local triple=aarch64-unknown-linux-musl
  command -v aarch64-linux-gnu-gcc >/dev/null || { echo "SKIPPED: no aarch64-linux-gnu-gcc here"; return 77; }
  if ! rustc --print target-libdir --target $triple 2>/dev/null | xargs -r ls >/dev/null 2>&1; then
    command -v rustup >/dev/null && rustup target add $triple || { echo "SKIPPED: no Rust standard library for $triple here"; return 77; }
  fi
  CC_aarch64_unknown_linux_musl=aarch64-linux-gnu-gcc CARGO_TARGET_DIR=$work/check cargo check --all-targets --locked --target $triple
}

# Every crate as crates.io would get it, built from its package. Cargo orders the crates of a workspace since 1.90. It unpacks them below
# its home by name and version, and would reuse those of an earlier run: so it gets a home without unpacked crates.
publishable() {
  local users=${CARGO_HOME:-$HOME/.cargo} home=$work/publish-home part
  at_least "$(cargo --version | sed 's/cargo \([0-9.]*\).*/\1/')" 1.90 || { echo "SKIPPED: this cargo cannot publish a workspace"; return 77; }
  rm -rf "$home" "$work/publish/package"
  mkdir -p "$home/registry"
  for part in config config.toml registry/index registry/cache; do
    [ ! -e "$users/$part" ] || ln -s "$users/$part" "$home/$part"
  done
  # They only have to compile.
  CARGO_PROFILE_DEV_OPT_LEVEL=0 CARGO_PROFILE_DEV_DEBUG=false CARGO_HOME=$home CARGO_TARGET_DIR=$work/publish \
    cargo publish --dry-run --workspace --locked --allow-dirty
}

# sanitized KIND CARGO_OPTION... TARGET...: tests under a sanitizer of nightly Rust. The system's libraries are not instrumented, so leaks are not reported.
# Other crates are compiled without optimisation, which takes a third off the time.
sanitized() {
  local kind=$1 triple=x86_64-unknown-linux-gnu
  shift
  command -v rustup >/dev/null && cargo +nightly --version >/dev/null 2>&1 || { echo "SKIPPED: no nightly Rust for sanitizers"; return 77; }
  rustc +nightly --print target-libdir --target $triple | xargs -r ls 2>/dev/null | grep -q "rustc.*rt\.${kind:0:1}san\.a$" ||
    { echo "SKIPPED: this nightly Rust has no $kind sanitizer for $triple"; return 77; }
  RUSTFLAGS=-Zsanitizer=$kind CARGO_PROFILE_RELEASE_OPT_LEVEL=1 CARGO_TARGET_DIR=$work/sanitized ASAN_OPTIONS=detect_leaks=0:halt_on_error=1 \
    UCCL_TEST_SANITIZED=1 UCCL_TEST_STORMS=15 \
    cargo +nightly test --release --locked -p uccl-tcpx --target $triple --config 'profile.release.package."*".opt-level=0' "$@"
}

# ThreadSanitizer reports false races in the standard library unless that is instrumented too: this needs its sources.
thread_sanitized() {
  [ -e "$(rustc +nightly --print sysroot 2>/dev/null)/lib/rustlib/src/rust/library/Cargo.lock" ] ||
    { echo "SKIPPED: no nightly Rust with its sources (rustup component add rust-src --toolchain nightly)"; return 77; }
  sanitized thread -Zbuild-std --test engine
}

# device_memory OPTION...: the kernel's interface by a program in C and by our crate, in a virtual machine
device_memory() {
  cargo build --release --locked -p tcpx-devmem --example devmem_transfer && tests/vm/run.sh "$@" --program "$release/examples/devmem_transfer" devmem
}

# device_memory_path OPTION... -- GROUP...: the library over device memory TCP, between two hosts of a virtual machine
device_memory_path() {
  local program programs=()
  cargo build --release --locked -p tcpx-tools -p tcpx-devmem && cargo build --release --locked -p soft-plugin -p tcpx-devmem --examples || return
  for program in tcpx-perf tcpx-info uccl-devmem-agent examples/agent_liar examples/devmem_neighbour; do programs+=(--program "$release/$program"); done
  while [ "$1" != -- ]; do
    programs+=("$1")
    shift
  done
  tests/vm/run.sh --seconds 900 "${programs[@]}" path "${@:2}"
}

# device_memory_suite OPTION...: the engine suite and the contract probe over device memory TCP, in a virtual machine
device_memory_suite() {
  local folder=$work/device_memory suite
  mkdir -p "$folder"
  cargo build --release --locked -p soft-plugin --example devmem_plugin &&
    gcc -O2 -o "$folder/contract_probe" tests/gpu/contract_probe/*.c -ldl -lpthread || return
  suite=$(cargo test --release --locked --no-run --message-format=json --test engine | sed -nE 's/.*"executable":"([^"]*\/engine-[^"]*)".*/\1/p' | tail -1)
  strip -g -o "$folder/engine_suite" "$suite" &&
    tests/vm/run.sh "$@" --program "$folder/engine_suite" --program "$folder/contract_probe" --program "$release/examples/libdevmem_plugin.so" suite
}

# The functions behind the targets in fuzz/; the targets themselves need cargo-fuzz.
fuzzing() { CARGO_TARGET_DIR=$work/check cargo rustc --locked -p uccl-tcpx --lib --profile check -- --cfg fuzzing; }

# The tables and plots of docs/performance.d again, from their rows.
bench_tables() {
  rm -rf "$work/bench"
  scripts/bench --from docs/performance.d/dram-2cores.json --out "$work/bench" && scripts/gpu-report --from docs/performance.d/vram.json --out "$work/bench" ||
    return 1
  local file
  # Without the line of an old page, which scripts/figures adds.
  for file in "$work"/bench/*; do diff "$file" <(sed '/^\*\*Older than the present code/,+1d' "docs/performance.d/${file##*/}") || return 1; done
}
