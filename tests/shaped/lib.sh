# Sourced by the tests of this directory: two hosts as network namespaces, shaped NICs, measuring with tcpx-perf, cleaning up.
#
# Rates are compared as goodput. tc counts Ethernet frames: of a full frame's 1514 bytes, 14 are Ethernet's, 20 IPv4's and 32 TCP's
# (with timestamps), so 1448 of 1514 bytes are payload and a 1 Gbit/s shaper lets 119.55 MB/s of payload through. A figure of 95 %
# means 95 % of that. A token bucket of 128 KiB a NIC adds at most 0.2 % to a transfer of 256 MiB over four NICs.
set -euo pipefail

skip() {
  echo "SKIPPED: $*"
  exit 77
}

perf=${1:?usage: $0 TCPX_PERF}
name=$(basename "$0" .sh)
[ "$(id -u)" = 0 ] || skip "$name needs root"
command -v tc >/dev/null && command -v ip >/dev/null || skip "$name needs ip and tc"
ip netns add "uccl-p-$$" 2>/dev/null || skip "$name needs network namespaces"
ip netns del "uccl-p-$$"

a=uccl-sa-$$ b=uccl-sb-$$
scratch=$(mktemp -d)
server= relay= client= failed=0
cleanup() {
  # They write into the scratch directory until they end.
  [ -z "$client" ] || { kill "$client" && wait "$client"; } 2>/dev/null || true
  [ -z "$server" ] || { kill "$server" && wait "$server"; } 2>/dev/null || true
  [ -z "$relay" ] || kill "$relay" 2>/dev/null || true
  ip netns del $a 2>/dev/null || true
  ip netns del $b 2>/dev/null || true
  rm -rf "$scratch"
}
trap cleanup EXIT
trap 'exit 1' INT TERM
hosts() {
  ip netns add $a
  ip netns add $b
  ip -n $a link set lo up
  ip -n $b link set lo up
}

# nic NUMBER MBIT: a NIC pair, its own subnet, the egress of both ends shaped to that rate
nic() {
  ip link add "sa$1-$$" type veth peer name "sb$1-$$"
  ip link set "sa$1-$$" netns $a name eth$1
  ip link set "sb$1-$$" netns $b name eth$1
  ip -n $a addr add 10.78.$1.1/24 dev eth$1
  ip -n $b addr add 10.78.$1.2/24 dev eth$1
  for host in $a $b; do
    ip -n $host link set eth$1 mtu 1500 up
    tc -n $host qdisc add dev eth$1 root tbf rate "$2mbit" burst 128k latency 20ms 2>"$scratch/tc" ||
      skip "$name needs the qdisc tbf: $(head -1 "$scratch/tc")"
  done
}

# nics MBIT...: one NIC pair for each
nics() {
  local i=0 rate
  for rate in "$@"; do
    i=$((i + 1))
    nic $i "$rate"
  done
  # The kernel reports a carrier a while after the other end is up, and a NIC without one is left out.
  for host in $a $b; do
    for i in $(seq $#); do
      timeout 10 bash -c "until ip -n $host link show dev eth$i | grep -q LOWER_UP; do sleep 0.05; done" || skip "$name: eth$i gets no carrier"
    done
  done
}

# wire MBIT DELAY_MS QUEUE_BYTES: joins the hosts by a relay with such a line each way: a device wire0 on either, yet without addresses
wire() {
  [ -c /dev/net/tun ] || skip "$name needs /dev/net/tun"
  command -v gcc >/dev/null || skip "$name needs gcc"
  gcc -O2 -o "$scratch/relay" "$(dirname "$0")/relay.c"
  "$scratch/relay" $a $b wire0 "$@" >"$scratch/ready" 2>"$scratch/relayed" &
  relay=$!
  for _ in $(seq 50); do
    grep -q ready "$scratch/ready" && break
    kill -0 $relay 2>/dev/null || skip "$name cannot make TUN devices: $(head -1 "$scratch/relayed")"
    sleep 0.1
  done
}

unwire() { # ends the relay, which then says what it did in $scratch/relayed
  kill $relay && wait $relay || true
  relay=
}

export UCCL_TCPX_PLUGIN=soft UCCL_SOCKET_IFNAME=${CONTROL_NIC:-eth1} NCCL_GPUDIRECTTCPX_SOCKET_IFNAME=${DATA_NICS:-eth}
export UCCL_P2P_LOG_LEVEL=warn # read here, whatever level the caller of the tests chose

serve() { # serve [PATTERN]: starts tcpx-perf's server on host b; sets address, which looks like this
  : >"$scratch/server"
  ip netns exec $b "$perf" server >>"$scratch/server" 2>&1 &
  server=$!
  address=
  for _ in $(seq 100); do
    address=$(grep -aoE "${1:-10\.78\.[0-9]+\.2:[0-9]+}" "$scratch/server" | head -1 || true)
    [ -n "$address" ] && return
    sleep 0.1
  done
  echo "$name: the server did not start, or has no such address${1:+ as $1}:"
  cat "$scratch/server"
  exit 1
}

# GB/s of the row that tcpx-perf wrote last: all its bytes by all its time
gbytes() { sed -n 's/.*"gbytes_per_s": \([0-9.]*\).*/\1/p' "$scratch/row.json"; }

# judge OP PERCENT MBIT PAYLOAD FRAME [tcpx-perf options]: measures, and compares with MBIT of which PAYLOAD of FRAME bytes are payload.
# Other load on the machine lowers single results: a miss is measured again, twice at most.
judge() {
  local op=$1 percent=$2 mbit=$3 payload=$4 frame=$5 rate
  shift 5
  for _ in 1 2 3; do
    timeout 55 ip netns exec $a "$perf" client "$address" --op "$op" --verify --json "$scratch/row.json" "$@" >"$scratch/client" 2>&1 ||
      { echo "$name: $op failed:"; cat "$scratch/client" "$scratch/server"; failed=1; return; }
    rate=$(gbytes)
    ! awk -v rate="$rate" -v mbit="$mbit" -v payload="$payload" -v frame="$frame" -v percent="$percent" -v what="$name: $op" 'BEGIN {
      line = mbit / 8000 * payload / frame
      printf "%s: %.4f GB/s of the %.4f that the lines carry as payload: %.1f %% (to reach: %d %%)\n", what, rate, line, 100 * rate / line, percent
      exit !(100 * rate / line >= percent)
    }' || return 0
  done
  failed=1
}

now() { local t=${EPOCHREALTIME/./}; echo $((t / 1000)); }
until_ms() { local t=$(($1 - $(now))); [ $t -le 0 ] || sleep "$(printf '%d.%03d' $((t / 1000)) $((t % 1000)))"; }

# observed [tcpx-perf client options]: runs a client in the background on host a. Sets client, its process; $scratch/client gets what it prints,
# each line after the time in ms; $scratch/stalls gets its stalls (see stalls).
observed() {
  mkfifo "$scratch/lines"
  while IFS= read -r line; do
    at=${EPOCHREALTIME/./}
    printf '%s %s\n' "${at%???}" "$line"
  done <"$scratch/lines" >"$scratch/client" &
  stamper=$!
  ip netns exec $a timeout 300 "$perf" client "$address" --interval 0.05 "$@" >"$scratch/lines" 2>&1 &
  client=$!
  stalls &
  sampler=$!
}
observed_end() { # the status of the client when it has ended
  local rc=0
  wait $client || rc=$?
  wait $stamper $sampler || true
  return $rc
}
alive() { kill -0 $client 2>/dev/null; }

# under_way BYTES [NIC]: waits until so many bytes have passed a NIC of host a, or all of its NICs eth*, or the client has ended. After 30 s
# it fails. One process: a busy machine starts others seconds late.
under_way() {
  ip netns exec $a bash -c '
    exec {nothing}<> <(:)
    for ((i = 0; i < 1500; i++)); do
      moved=0
      for file in /sys/class/net/$3/statistics/[rt]x_bytes; do
        { read -r value <"$file"; } 2>/dev/null && moved=$((moved + value))
      done
      [ $moved -le "$2" ] && kill -0 "$1" 2>/dev/null || exit 0
      read -r -t 0.02 -u $nothing
    done
    exit 1' - $client "$1" "${2:-eth*}" || { echo "$name: $1 bytes have not passed ${2:-the NICs} within 30 s"; return 1; }
}

look=10 # ms between two looks at the counters
# Until the client ends, a line "FROM TO LATE" for each time of at least 90 ms in which less than 60 KB moved over the NICs eth* of host a, in ms: TO
# is the last look at which that was still so, and LATE how much later than asked this loop was woken meanwhile: what the machine's other load
# does to a thread. The counters of an interface that was made again begin at 0. $scratch/lateness gets the sum of all lateness so far, with its time.
stalls() {
  ip netns exec $a bash -c '
    exec {nothing}<> <(:)
    declare -A last=()
    moved=0 late=0 total=0 looks_left=0 mark=${EPOCHREALTIME/./}
    looks=$mark looked=$mark every=$(($2 * 1000))
    printf -v step "0.%03d" "$2"
    while kill -0 "$1" 2>/dev/null; do
      for file in /sys/class/net/eth*/statistics/[rt]x_bytes; do
        { read -r value <"$file"; } 2>/dev/null || continue
        was=${last[$file]:-$value}
        [ "$value" -ge "$was" ] || was=0
        moved=$((moved + value - was)) last[$file]=$value
      done
      if [ $moved -ge 60000 ]; then
        [ $((looked - mark)) -lt 90000 ] || echo "$((mark / 1000)) $((looked / 1000)) $((late / 1000))"
        moved=0 late=0 mark=$looks
      fi
      looked=$looks
      asked=${EPOCHREALTIME/./}
      read -r -t $step -u $nothing
      looks=${EPOCHREALTIME/./}
      [ $((looks - asked)) -le $every ] || late=$((late + looks - asked - every)) total=$((total + looks - asked - every))
      [ $((looks_left--)) -gt 0 ] || { looks_left=10 && echo "$((looks / 1000)) $((total / 1000))" >&3; }
    done' - $client $look >"$scratch/stalls" 3>"$scratch/lateness"
}
# lateness FROM TO: how much later than asked the loop above was woken between two times, in ms
lateness() { awk -v from="$1" -v to="$2" '$1 <= from { before = $2 } $1 <= to { after = $2 } END { print after - before }' "$scratch/lateness"; }

# The stalls as "FROM TO LATE PART": PART is "row" within the timed part of one row, and "between" where buffers are filled or compared, which
# takes time without a fault. tcpx-perf prints intervals in the timed part alone.
parted_stalls() {
  awk 'NR == FNR {
    if ($2 ~ /^[0-9.]+$/ && $3 == "s" && $5 == "GB/s") { n++; at[n] = $1; interval[n] = 1 } else if ($2 ~ /^(write|read|send)$/) { n++; at[n] = $1 }
    next
  } {
    while (i < n && at[i + 1] <= $1) i++
    for (j = i + 1; j <= n && at[j] < $2 && interval[j]; j++);
    print $0, (i > 0 && interval[i] && j <= n && interval[j]) ? "row" : "between"
  }' "$scratch/client" "$scratch/stalls"
}

# At most as long as asked, and what the machine adds: a byte passes through four threads, and each may be woken as late as the loop above.
allowed() { echo $(($1 + 4 * $2)); } # allowed ASKED LATE

# judge_stalls SINCE ASKED: sets longest, the longest stall within rows that ends after SINCE, in ms, and too_long, which says what is too long if
# something is
judge_stalls() {
  local from to late part
  longest=0 too_long=
  while read -r from to late part; do
    [ "$part" = row ] && [ "$to" -gt "$1" ] || continue
    [ "$from" -ge "$1" ] || from=$1
    [ $((to - from)) -le $longest ] || longest=$((to - from))
    [ $((to - from)) -le "$(allowed "$2" "$late")" ] ||
      too_long="nothing moved for $((to - from)) ms; asked: at most $2 ms, and 4 x $late ms for the lateness of this machine"
  done < <(parted_stalls)
}

# carried NIC [PLUGIN]: bytes that the client's channels on it had sent and received when scrape last asked, over any plugin or over that one
carried() {
  awk -v nic="nic=\"$1\"" -v plugin="plugin=\"${2-}" '/^uccl_tcpx_channel_(sent|received)_bytes_total/ && index($0, nic) && index($0, plugin) { sum += $NF }
    END { printf "%d\n", sum }' "$scratch/metrics"
}
scrape() { # needs UCCL_TCPX_METRICS=9400
  ip netns exec $a timeout 2 bash -c 'exec 3<>/dev/tcp/127.0.0.1/9400 && printf "GET /metrics HTTP/1.0\r\n\r\n" >&3 && cat <&3' >"$scratch/metrics" 2>/dev/null || true
}

finish() {
  [ $failed = 0 ] || { echo "$name: missed; the NICs:"; for h in $a $b; do tc -n $h -s qdisc 2>/dev/null | grep -E 'tbf|Sent' || true; done; }
  exit $failed
}
