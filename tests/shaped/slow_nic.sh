#!/usr/bin/env bash
# A slow NIC beside a fast one never makes transfers slower than leaving it out: after 64 MiB of learning one connection carries at least
# 90 % of what the best subset of its NICs would, on average, for 1000 + 100, + 20 and + 5 Mbit/s, writes and reads. When the slow NIC
# becomes fast again it is used again, and left alone when it becomes slow once more. Channels do not run in lockstep: three NICs of 1 Gbit/s
# and one of 250 Mbit/s carry at least 85 % of their sum. Exit status 77: skipped.
#
# usage: slow_nic.sh TCPX_PERF [CASE...]      cases: 100, 20, 5, recovers, lockstep
. "$(dirname "$0")/lib.sh"
cases=" ${*:2} "
[ "$cases" != "  " ] || cases=" 100 20 5 recovers lockstep "
hosts
nics 1000 1000 1000 1000
export DATA_NICS
only() { # only NIC...: the data NICs of both hosts
  NCCL_GPUDIRECTTCPX_SOCKET_IFNAME="=$(echo "$@" | tr ' ' ,)"
  export NCCL_GPUDIRECTTCPX_SOCKET_IFNAME
}
speed() { # speed NIC MBIT
  for host in $a $b; do tc -n $host qdisc change dev "$1" root tbf rate "${2}mbit" burst 128k latency 20ms; done
}
restart() {
  [ -z "$server" ] || { kill "$server" && wait "$server" 2>/dev/null || true; }
  serve
}
for mbit in 100 20 5; do
  [[ $cases == *" $mbit "* ]] || continue
  only eth1 eth2
  speed eth2 $mbit
  for channels in 2 8; do
    export UCCL_TCPX_NUM_CHANNELS=$channels
    # The rate of the fast NIC alone now: on a busy machine it is below its line rate.
    only eth1
    restart
    declare -A alone=()
    for op in write read; do
      judge $op 0 1000 1448 1514 --total 64M --warmup 1 --iters 6
      alone[$op]=$(gbytes)
    done
    only eth1 eth2
    restart
    for op in write read; do
      # Other load on the machine lowers single results: measured again, twice at most.
      for attempt in 1 2 3; do
        echo "$name: beside $mbit Mbit/s, $channels channels, attempt $attempt:"
        missed=0
        judge $op 0 $((1000 + mbit)) 1448 1514 --total 64M --warmup 1 --iters 10
        awk -v rate="$(gbytes)" -v alone="${alone[$op]}" -v mbit=$mbit -v what="$name: $op" 'BEGIN {
          best = alone * (1000 + mbit) / 1000
          printf "%s: %.1f %% of the best subset (to reach: 90 %%)\n", what, 100 * rate / best
          exit !(rate >= 0.9 * best)
        }' || missed=1
        [ $missed = 1 ] || break
      done
      [ $missed = 0 ] || failed=1
    done
  done
done

if [[ $cases == *" recovers "* ]]; then
  only eth1 eth2
  export UCCL_TCPX_NUM_CHANNELS=4
  recovers() { # recovers OP
    speed eth2 20
    restart
    timeout 60 ip netns exec $a "$perf" client "$address" --op "$1" --verify --total 64M --warmup 1 --time 42 --interval 1 >"$scratch/client" 2>"$scratch/intervals" &
    client=$!
    sleep 8
    speed eth2 1000
    sleep 21
    speed eth2 20
    wait $client || { echo "$name: $1 failed:"; cat "$scratch/client" "$scratch/intervals"; exit 1; }
    # GB/s around the ends of the three times; connecting and the warm-up take the first second or two.
    at() { awk -v from="$1" -v to="$2" '/GB\/s/ && $1 >= from && $1 <= to { sum += $3; n++ } END { printf "%.4f", n ? sum / n : 0 }' "$scratch/intervals"; }
    slow=$(at 3 6) fast=$(at 22 26) again=$(at 36 40)
    awk -v slow="$slow" -v fast="$fast" -v again="$again" -v what="$name: $1" 'BEGIN {
      line = 0.125 * 1448 / 1514
      printf "%s: %.4f GB/s beside 20 Mbit/s, %.4f beside 1000, %.4f beside 20 again (to reach: %.4f, %.4f, %.4f)\n", what, slow, fast, again, 0.9 * 1.02 * line, 0.9 * 2 * line, 0.9 * 1.02 * line
      exit !(slow >= 0.9 * 1.02 * line && fast >= 0.9 * 2 * line && again >= 0.9 * 1.02 * line)
    }'
  }
  for op in write read; do
    # CPU time taken by other work or the hypervisor lowers results: measured again, twice at most.
    recovers $op || recovers $op || recovers $op || { failed=1; cat "$scratch/intervals"; }
  done
fi

if [[ $cases == *" lockstep "* ]]; then
  only eth1 eth2 eth3 eth4
  unset UCCL_TCPX_NUM_CHANNELS
  speed eth2 250
  restart
  for op in write read; do
    judge $op 85 3250 1448 1514 --total 256M --warmup 1 --iters 5
  done
fi
finish
