# shellcheck shell=bash disable=SC2034
# Sourced by gpu-test and gpu-bench in the repository's root: the bundle of scripts/gpu-bundle, the GPUs, and NIXL where it was bundled.
bin=$PWD/build/gpu
gpus=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU')
if [ -e "$bin/nixl-site.tgz" ]; then
  nixl_site=$(mktemp -d)
  trap 'rm -rf "$nixl_site"' EXIT
  tar -xzf "$bin/nixl-site.tgz" -C "$nixl_site"
  export PYTHONPATH=$nixl_site${PYTHONPATH:+:$PYTHONPATH}
fi
