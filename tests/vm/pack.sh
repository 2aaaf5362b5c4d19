# shellcheck shell=bash
# The file systems of the machines: what is the same for every test of a kernel, kept in the cache, and what a test adds. Sourced by run.sh.
guest_programs=(bash ip tc ss nstat ethtool timeout)
# In the kernel's packages, not in the kernel.
guest_modules=(veth sch_netem sch_tbf tcp_bbr tls)

# needs_of LOADER PROGRAM: the shared libraries of a program, as the loader finds them
needs_of() { "$@" | sed -nE 's/.* => (\/[^ ]+) .*/\1/p; s/^[[:space:]]*(\/[^ ]+) \(.*/\1/p'; }

# archive FOLDER: its files as an archive of the kernel's boot, to standard output
archive() { (cd "$1" && find . -print0) | work=$1 in_root sh -c 'cd /work && cpio --null --create --format=newc --quiet --owner=0:0'; }

pack_base() {
  local base=$cache/base-$kernel.cpio tree=$work/base program file number=0
  if [ "$base" -nt "$here/pack.sh" ]; then return; fi
  mkdir -p "$tree"/{bin,vm/modules,usr/bin,usr/lib,usr/lib64,lib64}
  cp "$root/usr/bin/busybox" "$tree/bin/"
  for program in "${guest_programs[@]}"; do
    file=$(in_root sh -c "readlink -f \$(command -v $program)")
    cp "$root$file" "$tree/usr/bin/$program"
    for file in $(needs_of in_root /lib64/ld-linux-x86-64.so.2 --list "$file") /lib64/ld-linux-x86-64.so.2; do
      mkdir -p "$tree/${file%/*}"
      cp -L "$root$file" "$tree$file"
    done
  done
  for module in "${guest_modules[@]}"; do
    for file in $(in_root modprobe --set-version "$kernel" --show-depends "$module" | sed -n 's/^insmod \([^ ]*\).*/\1/p'); do
      program=${file##*/}
      program=${program%%.ko*}
      compgen -G "$tree/vm/modules/*-$program.ko" >/dev/null && continue
      number=$((number + 1))
      case $file in
        *.xz) xz -dc "$root$file" ;;
        *) cat "$root$file" ;;
      esac >"$tree/vm/modules/$(printf %02d $number)-$program.ko"
    done
  done
  archive "$tree" >"$base.new"
  mv "$base.new" "$base"
}

# pack_test TEST [ARGUMENT...]: the archive of this run, after that of every run
pack_test() {
  local tree=$work/test program file name
  mkdir -p "$tree"/vm/{bin,host}
  # What the module calls is there since 7.0.
  if [ "${kernel%%.*}" -ge 7 ]; then
    compile_module "$here/module/uccl_vmnic"
    cp "$module.ko" "$tree/vm/"
  fi
  compile_program "$here/devmem.c" "$cache/devmem"
  cp "$cache/devmem" "$tree/vm/bin/"
  cp "$here/guest/init" "$tree/init"
  chmod +x "$tree/init"
  cp -r "$here/guest/." "$tree/vm/"
  cp "$here/../../deploy/devmem/uccl-devmem-prepare" "$tree/vm/bin/"
  for program in "${programs[@]}"; do
    [ -x "$program" ] || { echo "no program $program" >&2; exit 2; }
    name=${program##*/}
    cp "$program" "$tree/vm/host/$name"
    # It runs over the libraries that it was linked with: the machine's own C library may be older.
    for file in $(needs_of /lib64/ld-linux-x86-64.so.2 --list "$program") /lib64/ld-linux-x86-64.so.2; do cp -L "$file" "$tree/vm/host/"; done
    printf '#!/bin/busybox sh\nexec /vm/host/ld-linux-x86-64.so.2 --library-path /vm/host /vm/host/%s "$@"\n' "$name" >"$tree/vm/bin/$name"
    chmod +x "$tree/vm/bin/$name"
  done
  if [ "$1" = sh ]; then
    printf '%s\n' "$2" >"$tree/vm/command"
  else
    file=$1
    shift
    { printf 'bash /vm/%s.sh' "$file"; [ $# = 0 ] || printf ' %q' "$@"; echo; } >"$tree/vm/command"
  fi
  { cat "$cache/base-$kernel.cpio"; archive "$tree"; } >"$work/initrd"
}
