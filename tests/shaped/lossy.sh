#!/usr/bin/env bash
# Which congestion control pays on which path: the rate of one connection over paths of two delays and three rates of loss, under cubic,
# bbr, and the library's own choice when the system's is either. Prints the table. Target: the own choice reaches at least
# 40 % of the better rate on every compared path, in one of three attempts. Losses hit single packets, in both directions.
# Exit status 77: skipped.
#
# usage: lossy.sh TCPX_PERF      LOSSES, RELAY_MBIT, RELAY_DELAY_MS, RELAY_QUEUE_BYTES
. "$(dirname "$0")/lib.sh"
command -v iptables >/dev/null || skip "$name needs iptables"
losses=${LOSSES:-0 0.001 0.01}
export UCCL_P2P_LOG_LEVEL=error
hosts
for c in cubic bbr; do
  for host in $a $b; do
    ip netns exec $host sh -c "echo $c >/proc/sys/net/ipv4/tcp_congestion_control" 2>/dev/null || skip "$name needs the congestion control $c"
  done
done
ip netns exec $a iptables -A INPUT -p tcp -m statistic --mode random --probability 0.5 -j ACCEPT 2>"$scratch/iptables" ||
  skip "$name needs iptables with statistic: $(head -1 "$scratch/iptables")"

ip link add "sa1-$$" type veth peer name "sb1-$$"
ip link set "sa1-$$" netns $a name eth1
ip link set "sb1-$$" netns $b name eth1
wire "${RELAY_MBIT:-1000}" "${RELAY_DELAY_MS:-10}" "${RELAY_QUEUE_BYTES:-3000000}"
subnet=0
for nic in eth1 wire0; do
  subnet=$((subnet + 1))
  ip -n $a addr add 10.78.$subnet.1/24 dev $nic
  ip -n $b addr add 10.78.$subnet.2/24 dev $nic
  # One segment per packet, so that each lost packet counts once.
  for host in $a $b; do ip -n $host link set $nic mtu 1500 txqueuelen 10000 gso_max_segs 1 up; done
done

# rate NIC SYSTEM CHOICE [tcpx-perf options]: GB/s of writes; 0 when they did not end in time
rate() {
  local nic=$1 system=$2 choice=$3
  shift 3
  for host in $a $b; do ip netns exec $host sh -c "echo $system >/proc/sys/net/ipv4/tcp_congestion_control"; done
  export UCCL_SOCKET_IFNAME=$nic NCCL_GPUDIRECTTCPX_SOCKET_IFNAME=$nic
  if [ "$choice" = own ]; then unset UCCL_TCPX_SOFT_CONGESTION; else export UCCL_TCPX_SOFT_CONGESTION=$choice; fi
  serve
  rm -f "$scratch/row.json"
  timeout 20 ip netns exec $a "$perf" client "$address" --op write --json "$scratch/row.json" "$@" >"$scratch/client" 2>&1 || true
  kill $server && wait $server 2>/dev/null || true
  server=
  [ -s "$scratch/row.json" ] && gbytes || echo 0
}

echo "| path | loss | cubic, GB/s | bbr, GB/s | own choice, system bbr | own choice, system cubic |"
echo "|---|---|---|---|---|---|"
for nic in eth1 wire0; do
  if [ $nic = eth1 ]; then path="veth, 1500 bytes" options="--total 16M --warmup 1 --iters 7"
  else path="${RELAY_MBIT:-1000} Mbit/s, $((2 * ${RELAY_DELAY_MS:-10})) ms round trip" options="--total 8M --warmup 1 --iters 3"; fi
  for loss in $losses; do
    for host in $a $b; do
      ip netns exec $host iptables -F INPUT
      [ "$loss" = 0 ] || ip netns exec $host iptables -A INPUT -p tcp -m statistic --mode random --probability "$loss" -j DROP
    done
    judged=1
    case $nic-$loss in
    # A loss-based control is very slow on the long path: move less.
    wire0-0.01) options="--total 2M --warmup 1 --iters 3" ;;
    # Retransmission time-outs of 200 ms dominate, whatever the control: shown only.
    eth1-0.01) judged=0 ;;
    esac
    # Random losses make single results differ by half: a row that misses is measured again, twice at most.
    for attempt in 1 2 3; do
      rates=
      for kind in "cubic cubic" "bbr bbr" "bbr own" "cubic own"; do
        # Single words: the options of one path.
        # shellcheck disable=SC2086
        rates="$rates $(rate $nic $kind $options)"
      done
      missed=0
      awk -v path="$path" -v loss="$loss" -v rates="$rates" -v judged=$judged -v attempt=$attempt 'BEGIN {
        split(rates, r, " ")
        best = r[1] > r[2] ? r[1] : r[2]
        good = !judged || (r[3] >= 0.4 * best && r[4] >= 0.4 * best)
        printf "| %s | %.1f %% | %.4f | %.4f | %.4f | %.4f |%s\n", path, 100 * loss, r[1], r[2], r[3], r[4], good ? "" : " missed, attempt " attempt
        exit !good
      }' || missed=1
      [ $missed = 1 ] || break
    done
    [ $missed = 0 ] || failed=1
  done
done
unwire
exit $failed
