#!/usr/bin/env bash
# Two hosts joined by four NIC pairs, each its own subnet: transfers must run over all four NICs, each carrying its share, and the
# listener must see the peer's real address. Exit status 77: skipped.
#
# usage: two_hosts.sh TCPX_PERF
. "$(dirname "$0")/lib.sh"
hosts
# The NICs have a fixed speed, like real ones. An unshaped veth pair is as fast as the scheduler happens to run its threads, and on few
# cores the shares would show that and not the striping.
nics 2000 2000 2000 2000
export UCCL_TCPX_SOFT_STRICT=1 UCCL_TCPX_NUM_CHANNELS=4

sent() { ip netns exec $a cat /sys/class/net/eth$1/statistics/tx_bytes; }
received() { ip netns exec $a cat /sys/class/net/eth$1/statistics/rx_bytes; }
spread() { # spread NAME COUNTER COMMAND...: each NIC's counter must grow by a quarter of the sum, within 20 % of it
  local name=$1 counter=$2 attempt i share before grown sum even
  shift 2
  # On a busy machine a NIC whose first chunk waited long may be left out for a while, but not in three attempts.
  for attempt in 1 2 3; do
    before=() grown=() sum=0 even=1
    for i in 1 2 3 4; do before[i]=$($counter $i); done
    "$@"
    for i in 1 2 3 4; do grown[i]=$(($($counter $i) - before[i])) sum=$((sum + grown[i])); done
    for i in 1 2 3 4; do
      share=$((grown[i] * 1000 / sum))
      echo "$name, attempt $attempt: eth$i carried ${grown[i]} bytes, $((share / 10)).$((share % 10)) %"
      if [ $share -lt 200 ] || [ $share -gt 300 ]; then even=0; fi
    done
    [ $even = 0 ] || return 0
  done
  failed=1
}
run() { timeout 60 ip netns exec $a "$perf" client "$address" --total 64M --iters 8 --warmup 0 --verify "$@"; }

serve
spread write sent run --op write
spread read received run --op read
grep -aq 'client .* from 10\.78\.1\.1' "$scratch/server" || { echo "accept did not report the peer's address:"; cat "$scratch/server"; failed=1; }
[ $failed = 0 ] && echo "two hosts: all four NICs carry their share"
finish
