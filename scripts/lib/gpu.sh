# shellcheck shell=bash disable=SC2034
# Sourced by gpu-test, gpu-bench and gpu-bench-local in the repository's root: the bundle of scripts/gpu-bundle, the GPUs, and NIXL where it was bundled.
bin=$PWD/build/gpu
gpus=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU')
if [ -e "$bin/nixl-site.tgz" ]; then
  nixl_site=$(mktemp -d)
  trap 'rm -rf "$nixl_site"' EXIT
  tar -xzf "$bin/nixl-site.tgz" -C "$nixl_site"
  export PYTHONPATH=$nixl_site${PYTHONPATH:+:$PYTHONPATH}
fi
has() { python3 -c "import $1" 2>/dev/null; } # has PYTHON_MODULE
nixl_package() { # the package of NIXL's wheel that is there, if any
  local package
  for package in nixl_cu13 nixl_cu12 nixl; do has $package && echo $package && return; done
}
