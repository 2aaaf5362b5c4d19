#!/usr/bin/env bash
# NICs become slow, or lose packets, in the middle of a run: from 2 s after the change on, one connection carries at least 90 % of what the
# best subset of its NICs does. The rate of the fast NICs alone is measured before and after, with the same settings. Prints one row of a table for
# each case: the rates, the time until the rate is there, and the worst second from 2 s on. Exit status 77: skipped.
#
# usage: slow_change.sh TCPX_PERF [matrix | CASE...]      a case: FAST,SLOW[,OP[,CONGESTION[,NICS[,BYTES]]]]
#        FAST: Mbit/s of all NICs at first, or "veth" (not shaped); SLOW: Mbit/s, or "N%" packets lost, of the last NIC (of 4: of the last two)
#        OP: write, read, send; CONGESTION: cubic, bbr; NICS: 2, 4; BYTES of a transfer: 8M
# With TABLE=FILE the table goes to FILE too. SECONDS_AFTER=12: how long it looks after the change: three pauses between probes of a slow NIC.
. "$(dirname "$0")/lib.sh"
command -v iptables >/dev/null || skip "$name needs iptables"
cases=("${@:2}")
[ ${#cases[@]} != 0 ] || cases=("veth,20")
if [ "${cases[*]}" = matrix ]; then
  # Every pair of speeds, then every operation, congestion control, number of NICs and size with the speeds that tell most.
  cases=()
  for slow in 1 5 20 100 1% 5%; do
    for fast in 1000 5000 10000 veth; do cases+=("$fast,$slow"); done
    for fast in 1000 10000 veth; do cases+=("$fast,$slow,read" "$fast,$slow,send"); done
    for fast in 1000 5000 10000 veth; do cases+=("$fast,$slow,write,bbr"); done
    for fast in 1000 veth; do cases+=("$fast,$slow,read,cubic,4"); done
    for fast in 10000 veth; do cases+=("$fast,$slow,send,bbr,4"); done
    cases+=("veth,$slow,write,cubic,2,1M" "veth,$slow,write,cubic,2,64M")
  done
fi
after=${SECONDS_AFTER:-12} before=3
table=${TABLE:-/dev/null}
hosts
nics 1000 1000 1000 1000
for host in $a $b; do
  ip netns exec $host iptables -A INPUT -p tcp -m statistic --mode random --probability 0.5 -j ACCEPT 2>"$scratch/iptables" ||
    skip "$name needs iptables with statistic: $(head -1 "$scratch/iptables")"
done

# shape NIC SPEED: SPEED as in a case; "veth": as it comes
shape() {
  local host burst
  for host in $a $b; do
    case $2 in
    veth) tc -n $host qdisc del dev "$1" root 2>/dev/null || true ;;
    *%) ip netns exec $host iptables -A INPUT -i "$1" -p tcp -m statistic --mode random --probability "$(awk "BEGIN { print ${2%\%} / 100 }")" -j DROP ;;
    *)
      burst=$(($2 * 125 / 2 > 131072 ? $2 * 125 / 2 : 131072)) # half a millisecond
      tc -n $host qdisc replace dev "$1" root tbf rate "${2}mbit" burst $burst latency 20ms
      ;;
    esac
  done
}

only() { # only NIC...: the data NICs of both hosts
  NCCL_GPUDIRECTTCPX_SOCKET_IFNAME="=$(echo "$@" | tr ' ' ,)"
  export NCCL_GPUDIRECTTCPX_SOCKET_IFNAME
}

# Starts a client for SECONDS; its intervals go to $scratch/intervals.
client() {
  : >"$scratch/intervals"
  ip netns exec $a "$perf" client "$address" --op "$op" --total "$bytes" --warmup 1 --time "$1" --interval 0.1 --json "$scratch/row.json" >"$scratch/client" 2>"$scratch/intervals" &
  client=$!
}
finished() {
  wait $client || { echo "$name: the transfers failed:"; cat "$scratch/client" "$scratch/intervals" "$scratch/server"; exit 1; }
}
restart() {
  [ -z "$server" ] || { kill "$server" && wait "$server" 2>/dev/null || true; }
  serve
}
# From lines "seconds rate", the average rate between two times. A line covers the time since the one before.
average() {
  awk -v from="$1" -v to="$2" '/^ *[0-9.]+ s .*GB\/s/ {
    begin = last > from ? last : from; end = $1 < to ? $1 : to
    if (end > begin) { sum += $3 * (end - begin); time += end - begin }
    last = $1
  } END { printf "%.4f", time ? sum / time : 0 }' "$scratch/intervals"
}

# one FAST SLOW OP CONGESTION NICS BYTES: one row; fails when it misses
one() {
  local fast=$1 slow=$2 cc=$4 nics=$5 i alone was rate worst ready host changed
  op=$3 bytes=$6
  local all=() good=() bad=()
  for i in $(seq "$nics"); do
    all+=("eth$i")
    if [ "$i" -le $((nics / 2)) ]; then good+=("eth$i"); else bad+=("eth$i"); fi
  done
  for host in $a $b; do
    ip netns exec $host iptables -F INPUT
    # Each lost packet counts once: one segment for each packet.
    for i in 1 2 3 4; do ip -n $host link set eth$i txqueuelen 10000 gso_max_segs "$([[ $slow == *% ]] && [[ " ${bad[*]} " == *" eth$i "* ]] && echo 1 || echo 65535)"; done
  done
  for i in "${all[@]}"; do shape "$i" "$fast"; done
  export UCCL_TCPX_SOFT_CONGESTION=$cc
  only "${good[@]}"
  restart
  client 3
  finished
  alone=$(average 0.5 3)
  only "${all[@]}"
  restart
  client $((before + after + 1))
  # The first line comes when the measurement has begun.
  for _ in $(seq 100); do [ -s "$scratch/intervals" ] && break; sleep 0.05; done
  sleep $before
  changed=$(awk '/^ *[0-9.]+ s .*GB\/s/ { last = $1 } END { print last }' "$scratch/intervals")
  for i in "${bad[@]}"; do shape "$i" "$slow"; done
  finished
  was=$(average 1 "$changed")
  rate=$(average "$(awk "BEGIN { print $changed + 2 }")" 1000)
  # The first moment from which on half a second reaches 90 %, and the worst second from 2 s on.
  ready=$(awk -v changed="$changed" -v goal="$(awk "BEGIN { print 0.9 * $alone }")" '/^ *[0-9.]+ s .*GB\/s/ {
    if (last >= changed) { n++; at[n] = last; till[n] = $1; rate[n] = $3 }
    last = $1
  } END {
    for (i = 1; i <= n; i++) {
      sum = 0; time = 0
      for (j = i; j <= n && time < 0.5; j++) { sum += rate[j] * (till[j] - at[j]); time += till[j] - at[j] }
      if (time >= 0.5 && sum / time >= goal) { printf "%.1f", at[i] - changed; exit }
    }
    printf "never"
  }' "$scratch/intervals")
  worst=$(for i in $(seq 2 $((after - 1))); do
    echo "$(average "$(awk "BEGIN { print $changed + $i }")" "$(awk "BEGIN { print $changed + $i + 1 }")")"
  done | sort -n | head -1)
  # Other load on the machine changes: the fast NICs alone, before and after.
  only "${good[@]}"
  restart
  client 3
  finished
  alone=$(awk "BEGIN { print ($alone + $(average 0.5 3)) / 2 }")
  # What shaped slow NICs add; lost packets count as no addition.
  local best=$alone
  [[ $slow == *% || $fast == veth ]] || best=$(awk "BEGIN { print $alone * ($fast + $slow) / $fast }")
  awk -v fast="$fast" -v slow="$slow" -v op="$op" -v cc="$cc" -v nics="$nics" -v bytes="$bytes" -v alone="$alone" -v was="$was" -v rate="$rate" -v worst="$worst" -v ready="$ready" -v best="$best" -v verdict=1 'BEGIN {
    printf "| %d | %s | %s | %s | %s | %s | %.3f | %.3f | %s | %.3f | %.0f %% | %.3f |%s\n", nics, fast, slow, cc, op, bytes, alone, was, ready, rate, 100 * rate / best, worst, (rate >= 0.9 * best) ? "" : " missed"
    exit !(rate >= 0.9 * best)
  }' | tee -a "$table"
}

{
  echo "Written by tests/shaped/slow_change.sh: revision $(git -C "$(dirname "$0")" rev-parse --short HEAD 2>/dev/null || echo unknown), $(nproc) cores, Linux $(uname -r), $(date +%F)."
  echo
  echo "| NICs | fast, Mbit/s | slow, Mbit/s | congestion control | op | bytes | fast alone, GB/s | before, GB/s | 90 % again after, s | from 2 s on, GB/s | of the best | worst second, GB/s |"
  echo "|---|---|---|---|---|---|---|---|---|---|---|---|"
} | tee "$table"
for case in "${cases[@]}"; do
  IFS=, read -r fast slow op cc nics bytes <<<"$case"
  # Other load on the machine lowers single results: measured again, twice at most.
  attempt=1
  until one "$fast" "$slow" "${op:-write}" "${cc:-cubic}" "${nics:-2}" "${bytes:-8M}"; do
    attempt=$((attempt + 1))
    [ $attempt -le "${ATTEMPTS:-3}" ] || { failed=1; break; }
  done
done
exit $failed
