#!/usr/bin/env bash
# Random faults of NICs while transfers and notifications run: hundreds of schedules, each with hosts, a connection and transfers of its own. No
# transfer fails, every byte is right, notifications come in order, nothing stands longer than its faults explain, no warning names a NIC that no fault
# touched, and after the faults every NIC carries data again, by the counters of the channels over the plugin under test. One NIC is spared at a
# time; the control connection has a NIC of its own that no fault touches. Default settings.
# Exit status 77: skipped.
#
# usage: fault_schedules.sh TCPX_PERF [--seed N] [--schedules N] [--beside N] [--only K] [--control] [--emulated] [--foreign PLUGIN] [--keep DIR]
#   --seed        numbers the run; the same seed gives the same schedules (default: random, and printed)
#   --schedules   how many (200)
#   --beside      how many side by side (four times the cores, at most 16: all namespaces share one lock of the kernel)
#   --only        schedule K of the seed alone, with its log
#   --control     the control connection begins on eth1 and may move to the other NICs, and faults touch it too
#   --emulated    with emulated GPU memory, over the software plugin
#   --foreign     over this plugin, with emulated GPU memory: the strict foreign plugin
#   --keep        the logs of schedules that fail go there
here=$0
. "$(dirname "$0")/lib.sh"
command -v iptables >/dev/null || skip "$name needs iptables"
command -v ss >/dev/null || skip "$name needs ss"

shift
seed=$((SRANDOM % 1000000)) schedules=200 beside=$((4 * $(nproc) < 16 ? 4 * $(nproc) : 16)) only='' control='' emulated='' foreign='' keep=''
options=()
while [ $# -gt 0 ]; do
  case $1 in
  --seed) seed=$2 && shift ;;
  --schedules) schedules=$2 && shift ;;
  --beside) beside=$2 && shift ;;
  --only) only=$2 && shift ;;
  --control) control=1 && options+=("$1") ;;
  --emulated) emulated=1 && options+=("$1") ;;
  --foreign) foreign=$2 && options+=("$1" "$2") && shift ;;
  --keep) keep=$2 && shift ;;
  *) sed -n '/^# usage/,/^[^#]/p' "$here" | grep '^#' && exit 2 ;;
  esac
  shift
done

if [ -z "$only" ]; then
  echo "$name: $schedules schedules of seed $seed, $beside side by side${options[*]:+, ${options[*]}}"
  # Namespaces that others make and remove at the same moment can make a command of ip fail: a schedule that did not begin is tried again.
  one() {
    local rc
    for _ in 1 2 3; do
      rc=0
      "$here" "$perf" --seed "$seed" --only "$1" "${options[@]}" >"$scratch/schedule-$1" 2>&1 || rc=$?
      ! grep -q "^$name: schedule" "$scratch/schedule-$1" && [ $rc != 0 ] && [ $rc != 77 ] || break
    done
    echo $rc >"$scratch/status-$1"
  }
  running=0
  for k in $(seq "$schedules"); do
    one "$k" &
    running=$((running + 1))
    [ $running -lt "$beside" ] || { wait -n && running=$((running - 1)); }
  done
  wait
  good=0
  for k in $(seq "$schedules"); do
    case $(cat "$scratch/status-$k") in
    0) good=$((good + 1)) ;;
    77) cat "$scratch/schedule-$k" && exit 77 ;;
    *)
      failed=1
      [ -z "$keep" ] || { mkdir -p "$keep" && cp "$scratch/schedule-$k" "$keep/$seed-$k"; }
      ;;
    esac
  done
  grep -h "^$name: schedule" "$scratch"/schedule-* | sort -t ' ' -k 3n
  for k in $(seq "$schedules"); do
    [ "$(cat "$scratch/status-$k")" = 0 ] || { echo "$name: schedule $k of seed $seed failed:" && tail -60 "$scratch/schedule-$k"; }
  done
  echo "$name: $good of $schedules schedules of seed $seed are good"
  exit $failed
fi

# ---- the plan, from the seed alone ----
RANDOM=$(((seed * 1009 + only) % 32768))
pick() { # pick WORD...
  shift $((RANDOM % $#))
  picked=$1
}
between() { number=$(($1 + (RANDOM * 32768 + RANDOM) % ($2 - $1 + 1))); } # between FROM TO
pick 2 4 && count=$picked
pick write read send both && op=$picked
pick 1 2 && inflight=$picked
between 1 2 && phases=$number
kinds=(drop drop-one-way down address delete reset rate flap slow-flap)

plan=() phase=0
event() { plan+=("$phase $1 $2 $3 $4 $5"); } # event MS begin|end KIND NIC HOST
fault() { # fault KIND NIC MS LENGTH: its events
  local at host
  pick $a $b && host=$picked
  case $1 in
  reset) event "$3" begin reset "$2" $host ;;
  # Down and up for half a second each, or for three.
  flap | slow-flap)
    local half=500
    [ "$1" = flap ] || half=3000
    for ((at = $3; at < $3 + $4; at += 2 * half)); do
      event $at begin "$1" "$2" $host
      event $((at + half)) end "$1" "$2" $host
    done
    ;;
  *)
    event "$3" begin "$1" "$2" $host
    event $(($3 + $4)) end "$1" "$2" $host
    ;;
  esac
}
# lasts FROM TO: sets number, how long a fault of this kind lasts, in ms
lasts() {
  between "$1" "$2"
  # Twice down.
  [ $kind != slow-flap ] || number=9000
  # Longer than the transfer timeout: TCP's own recovery does not hide a plugin whose silence is not noticed.
  [ -z "$foreign" ] || [[ $kind != drop* ]] || [ $shape != single ] || number=12000
}
for ((phase = 0; phase < phases; phase++)); do
  others=()
  between 1 "$count" && spared=$number
  for i in $(seq "$count"); do [ "$i" = "$spared" ] || others+=("$i"); done
  pick single single all turns && shape=$picked
  case $shape in
  single)
    between 1 3 && faults=$number
    for _ in $(seq "$faults"); do
      pick "${kinds[@]}" && kind=$picked
      pick "${others[@]}" && nic=$picked
      between 0 2000 && at=$number
      lasts 200 3000
      fault "$kind" "$nic" "$at" "$number"
    done
    ;;
  all)
    pick "${kinds[@]}" && kind=$picked
    lasts 500 3000 && length=$number
    for nic in "${others[@]}"; do fault "$kind" "$nic" 300 "$length"; done
    ;;
  turns)
    at=0
    for nic in "${others[@]}"; do
      pick "${kinds[@]}" && kind=$picked
      lasts 300 1200 && length=$number
      fault "$kind" "$nic" $at "$length"
      between 0 300 && at=$((at + length + number))
    done
    ;;
  esac
done
# When the faults of a phase end, ms.
duration() { printf '%s\n' "${plan[@]}" | awk -v phase="$1" '$1 == phase && $2 > last { last = $2 } END { print last + 0 }'; }
# After the faults, each NIC must carry data within this time. Twice that is for transfers, as commands take their time on a busy machine.
back=5000
total=0
for ((phase = 0; phase < phases; phase++)); do total=$((total + $(duration $phase) + 2 * back)); done

# ---- hosts and transfers ----
mbit=50
export UCCL_P2P_LOG_LEVEL=info UCCL_TCPX_METRICS=9400
hosts
# shellcheck disable=SC2046  # numbers
nics $(yes $mbit | head -$count)
pattern='10\.78\.1\.2:[0-9]+'
if [ -z "$control" ]; then
  ip link add "sac-$$" type veth peer name "sbc-$$"
  ip link set "sac-$$" netns $a name ctl0
  ip link set "sbc-$$" netns $b name ctl0
  ip -n $a addr add 10.79.0.1/24 dev ctl0
  ip -n $b addr add 10.79.0.2/24 dev ctl0
  for host in $a $b; do ip -n $host link set ctl0 up; done
  for host in $a $b; do timeout 10 bash -c "until ip -n $host link show dev ctl0 | grep -q LOWER_UP; do sleep 0.05; done"; done
  export UCCL_SOCKET_IFNAME=ctl0
  pattern='10\.79\.0\.2:[0-9]+'
else
  # With one address it could not move.
  export UCCL_SOCKET_IFNAME=eth
fi
devices() { for i in $(seq $count); do printf '%s' "${2:-}eth$i@10.78.$i.$1" && set -- "$1" ,; done; }
[ -z "$emulated" ] || export UCCL_TCPX_EMULATE_DEVICE=1
tested=TCPX-soft
if [ -n "$foreign" ]; then
  tested=GPUDirect
  [ "${STRICT_FOREIGN_CONTRACT:-}" != tcpxo ] || tested=FasTrak
  unset UCCL_TCPX_PLUGIN
  export UCCL_TCPX_PLUGIN_PATH=$foreign UCCL_TCPX_EMULATE_DEVICE=1 STRICT_FOREIGN_CONNECT_MS=30 STRICT_FOREIGN_ACCEPT_MS=50
  STRICT_FOREIGN_DEVICES=$(devices 2) && export STRICT_FOREIGN_DEVICES
fi
serve "$pattern"
[ -z "$foreign" ] || { STRICT_FOREIGN_DEVICES=$(devices 1) && export STRICT_FOREIGN_DEVICES; }
words=(--op "$op")
[ $op != both ] || words=(--op write --bidirectional)
look=30
# Four rows, each with bytes that are compared; it blocks instead of polling, to leave the processor to others.
observed "${words[@]}" --inflight $inflight --sweep 1M..8M --time "$((total / 4000)).$((total % 4000 / 400))" --warmup 0 --wait --notify 8 --verify

complain() { failed=1 verdict="$verdict, $*"; }

begins() { # begins KIND NIC HOST; a NIC may lie under several faults, and an interface that is not there has no further ones
  case $1 in
  drop) for host in $a $b; do ip netns exec $host iptables -w -A INPUT -i eth$2 -j DROP; done ;;
  drop-one-way) ip netns exec $3 iptables -w -A INPUT -i eth$2 -j DROP ;;
  down | flap | slow-flap) ip -n $3 link set eth$2 down ;;
  address) ip -n $3 addr flush dev eth$2 ;;
  delete) ip -n $3 link del eth$2 ;;
  reset) ip netns exec $3 ss -K -t state established src "10.78.$2.$([ "$3" = $a ] && echo 1 || echo 2)" ;;
  rate) for host in $a $b; do tc -n $host qdisc change dev eth$2 root tbf rate 1mbit burst 128k latency 20ms; done ;;
  esac
}
ends() { # ends KIND NIC HOST
  case $1 in
  drop) for host in $a $b; do ip netns exec $host iptables -w -D INPUT -i eth$2 -j DROP; done ;;
  drop-one-way) ip netns exec $3 iptables -w -D INPUT -i eth$2 -j DROP ;;
  down | flap | slow-flap) ip -n $3 link set eth$2 up ;;
  address) ip -n $3 addr add "10.78.$2.$([ "$3" = $a ] && echo 1 || echo 2)/24" dev eth$2 ;;
  delete) [ -n "$(ip -n $a link show dev eth$2 2>/dev/null)" ] || nic "$2" $mbit ;;
  rate) for host in $a $b; do tc -n $host qdisc change dev eth$2 root tbf rate ${mbit}mbit burst 128k latency 20ms; done ;;
  esac
}
verdict=OK
for _ in $(seq 200); do
  alive || break
  scrape
  [ "$(carried eth1 $tested)" -gt 300000 ] && [ "$(carried eth$count $tested)" -gt 300000 ] && break
  sleep 0.1
done
alive || { echo "$name: schedule $only: the transfers did not begin:" && cat "$scratch/client" && exit 1; }
returned=()
for ((phase = 0; phase < phases; phase++)); do
  start=$(now)
  while read -r _ ms edge kind nic host; do
    until_ms $((start + ms))
    alive || break
    echo "$(now) $edge $kind $nic $host" >>"$scratch/events"
    ${edge}s "$kind" "$nic" "$host" >>"$scratch/commands" 2>&1 || true
  done < <(printf '%s\n' "${plan[@]}" | grep "^$phase " | sort -s -n -k 2)
  # A fault that ended while the interface was not there, or began on one that was made again meanwhile, is still there.
  for i in $(seq $count); do
    for host in $a $b; do
      ends down "$i" $host
      ends address "$i" $host
    done
    ends rate "$i" $a
  done >>"$scratch/commands" 2>&1 || true
  over=$(now)
  echo "$over over" >>"$scratch/events"
  before=()
  scrape
  for i in $(seq $count); do before[i]=$(carried eth$i $tested); done
  took=never missing=
  while alive && [ $(($(now) - over)) -lt $((back + 1500)) ]; do
    missing=
    scrape
    for i in $(seq $count); do [ $(($(carried eth$i $tested) - before[i])) -gt 200000 ] || missing="$missing eth$i"; done
    [ -n "$missing" ] || { took=$(($(now) - over)) && break; }
    sleep 0.1
  done
  returned+=("$took")
  if [ $took = never ]; then
    ! alive || complain "nothing over$missing within $((back + 1500)) ms in phase $phase"
  else
    late=$(lateness "$over" $((over + took)))
    [ $took -le $((back + late)) ] || complain "all NICs carry data after $took ms in phase $phase; asked: at most $back ms, and $late ms for the lateness of this machine"
  fi
done
ended_early=
alive || ended_early=1
rc=0
observed_end || rc=$?
[ $rc = 0 ] || complain "FAILED: $(grep -aE 'ERROR|error' "$scratch/client" | tail -1)"
[ -z "$ended_early" ] || [ $rc != 0 ] || complain "the transfers ended before the faults"
! grep -qaiE 'mismatch|WRONG DATA|panicked' "$scratch/client" "$scratch/server" || complain "WRONG BYTES"
kill -0 $server 2>/dev/null || complain "the server has ended"

# How long bytes may stand, as asked. Silence: 2 s until a NIC is given up, then what was on it is sent again, which a next silent fault can hold up
# again; a NIC that becomes slow: no longer. Silence too is an address that the listener's host loses under the control connection: the listener knows, and
# cannot say so, and the connector is the one to dial. All else the kernel reports at once. Between rows bytes are compared. There, and where no fault is near,
# only a hang is too long.
longest=0 because='' silence=3000
# Where the plugin reports no bytes, half of the transfer timeout.
[ "${STRICT_FOREIGN_CONTRACT:-}" != tcpxo ] || silence=6500
while read -r from to late part; do
  # Of the faults that may have to do with it: silent and slow ones, others.
  read -r silent other < <(awk -v from="$from" -v to="$to" -v silence=$silence -v control="$control" -v listener=$b '
    $2 == "begin" && $1 <= to && $1 > from - silence && !seen[$3 $4 $1]++ { if ($3 ~ /^drop|^rate/ || (control && $3 == "address" && $5 == listener)) silent++; else other++ }
    END { print silent + 0, other + 0 }' "$scratch/events")
  length=$((to - from)) limit=300
  [ $((silent + other)) -gt 0 ] || limit=3000
  [ "$silent" = 0 ] || limit=$((silence * silent))
  [ $part = row ] || limit=$((limit + 3000))
  limit=$(allowed $limit "$late")
  [ $length -le "$limit" ] || complain "nothing moved for $length ms ($part, $silent silent and slow, $other other faults; at most $limit, with 4 x $late for the lateness of this machine)"
  [ $length -le $longest ] || { longest=$length && because="$part, $silent silent and slow, $other other"; }
done < <(parted_stalls)
# A NIC that no fault touches is never blamed. Lines begin with the address of the connection's peer, which may be that of any NIC.
for i in $(seq $count); do
  ! printf '%s\n' "${plan[@]}" | awk -v nic="$i" '$5 == nic { found = 1 } END { exit !found }' || continue
  line=$(grep -ahE 'WARN|ERROR' "$scratch/client" "$scratch/server" | sed 's, go over .*,,' | sed -E 's/(WARN|ERROR) [0-9.]+:[0-9]+: /\1 /' | grep -E "eth$i\b|10\.78\.$i\." | head -1 || true)
  [ -z "$line" ] || complain "eth$i, which no fault touched, is blamed: $line"
done
lost=$(cat "$scratch/client" "$scratch/server" | grep -ac ' is lost: ' || true)
echo "$name: schedule $only: $count NICs, $op x $inflight, $(printf '%s\n' "${plan[@]}" | awk '$3 == "begin" { print $4 }' | sort | uniq -c | awk '{ printf "%s%s x %s", sep, $1, $2; sep = ", " }'): $verdict; back after ${returned[*]} ms, longest stall $longest ms${because:+ ($because)}, $lost losses"
[ $failed = 0 ] || {
  echo "$name: the stalls (ms, lateness):" && parted_stalls
  echo "$name: the faults (ms, kind, NIC, host; $a is the client's):" && cat "$scratch/events"
  echo "$name: the client:" && grep -av 'GB/s' "$scratch/client"
  echo "$name: the server:" && cat "$scratch/server"
}
exit $failed
