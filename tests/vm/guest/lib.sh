# shellcheck shell=bash
# Sourced by the tests inside the machine: two hosts as network namespaces joined by the pair of test NICs or by veth, rows with names, and
# their count.
set -uo pipefail
a=hosta b=hostb passed=0 failed=0 out=/tmp/out
# An error of a script inside of a row is not lost with the row's output.
trap '[ -z "$in_row" ] || cat $out/*' EXIT
in_row=

# pair [PARAMETER=VALUE...]: the hosts a and b, joined by vmnic0 (10.78.1.1) and vmnic1 (10.78.1.2), loaded with these parameters
pair() {
  unpair || return 1
  insmod /vm/uccl_vmnic.ko "$@" || { echo "the module cannot be loaded with $*"; return 1; }
  join vmnic0 vmnic1
}

# veth: the hosts joined by eth1 in either
veth() {
  unpair || return 1
  ip link add veth0 type veth peer name veth1
  join veth0 veth1 eth1
}

# join NIC NIC [NAME]: gives each host its NIC, renamed if there is a name
join() {
  local host nic number=0 nics=("$1" "$2")
  for host in $a $b; do
    nic=${nics[number]}
    number=$((number + 1))
    ip netns add $host
    ip link set "$nic" netns $host
    ip -n $host link set lo up
    [ -z "${3:-}" ] || ip -n $host link set "$nic" name "$3"
    nic=${3:-$nic}
    ip -n $host addr add 10.78.1.$number/24 dev "$nic"
    ip -n $host link set "$nic" up
  done
  until ip -n $a link show "${3:-$1}" | grep -q LOWER_UP && ip -n $b link show "${3:-$2}" | grep -q LOWER_UP; do sleep 0.05; done
}

unpair() {
  local host
  # Other devices go with their namespace; those of the module move back.
  for host in $a $b; do ip netns del $host 2>/dev/null; done
  grep -q '^uccl_vmnic ' /proc/modules || return 0
  rmmod uccl_vmnic || { echo "the module cannot be removed"; return 1; }
}

on() { ip netns exec "$@"; }

# counter HOST NIC NAME: of ethtool -S
counter() { on "$1" ethtool -S "$2" | sed -n "s/^ *$3: //p"; }

# row NAME COMMAND...: one row of the table, with what it printed if it failed
row() {
  local name=$1 start=${EPOCHREALTIME/./}
  shift
  rm -rf $out && mkdir $out
  in_row=1
  if "$@" >$out/row 2>&1; then
    in_row=
    passed=$((passed + 1))
    printf 'ok      %s (%d ms)\n' "$name" $(((${EPOCHREALTIME/./} - start) / 1000))
    grep -E '^(note|stream|refused)' $out/row | sed 's/^/          /'
  else
    in_row=
    failed=$((failed + 1))
    printf 'FAILED  %s\n' "$name"
    tail -n 60 $out/*
  fi
  # What a failed row has left running.
  jobs -p | xargs -r kill 2>/dev/null
  wait
}

conclude() {
  # A warning of the kernel is a failure of the module or of what it tests.
  if dmesg | grep -E 'WARNING:|BUG:|Oops|refcount|stalled pool|hung task'; then
    failed=$((failed + 1))
    dmesg | grep -A 30 -m 1 -E 'WARNING:|BUG:|Oops|stalled pool|hung task'
  fi
  echo "$passed passed, $failed failed"
  [ $failed = 0 ] && [ $passed -gt 0 ]
}
