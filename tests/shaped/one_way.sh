#!/usr/bin/env bash
# A firewall, or address translation: the listener's host may open no connection, and admits its control port and the data ports of
# UCCL_TCPX_PORT_RANGE. Connections are set up, and data moves both ways. Exit status 77: skipped.
#
# usage: one_way.sh TCPX_PERF
. "$(dirname "$0")/lib.sh"
command -v iptables >/dev/null || skip "$name needs iptables"
hosts
nics 1000 1000
export UCCL_TCPX_OOB_PORT=7000 UCCL_TCPX_PORT_RANGE=21000-21007 UCCL_TCPX_NUM_CHANNELS=4
ip netns exec $b iptables -A INPUT -i lo -j ACCEPT 2>"$scratch/iptables" || skip "$name needs iptables: $(head -1 "$scratch/iptables")"
ip netns exec $b sh -ec '
  iptables -A INPUT -p tcp --syn --dport 7000 -j ACCEPT
  iptables -A INPUT -p tcp --syn --dport 21000:21007 -j ACCEPT
  iptables -A INPUT -p tcp --syn -j DROP
  iptables -A OUTPUT -p tcp --syn -j DROP'
# The other host admits no incoming connection.
ip netns exec $a iptables -A INPUT -p tcp --syn ! -i lo -j DROP
serve
for op in write read; do
  for more in "" --bidirectional; do
    # Single words: an option or none.
    # shellcheck disable=SC2086
    timeout 55 ip netns exec $a "$perf" client "$address" --op $op $more --verify --total 8M --iters 3 --wait >"$scratch/client" 2>&1 &
    client=$!
    wait $client || { echo "$name: $op $more failed:"; cat "$scratch/client" "$scratch/server"; failed=1; }
  done
done
# The data connections of a client that runs: all of them lead from there to ports of the range.
timeout 55 ip netns exec $a "$perf" client "$address" --op write --total 1M --time 5 >"$scratch/client" 2>&1 &
client=$!
for _ in $(seq 100); do
  [ "$(ip netns exec $b ss -Htn state established | wc -l)" -ge 9 ] && break
  sleep 0.05
done
ip netns exec $b ss -Htn state established >"$scratch/ss"
awk '{ sub(/.*:/, "", $3); if ($3 != 7000 && ($3 < 21000 || $3 > 21007)) bad = 1; if ($3 != 7000) data++ } END { exit bad || data != 8 }' "$scratch/ss" ||
  { echo "$name: not 8 data connections to ports of the range:"; cat "$scratch/ss"; failed=1; }
echo "$name: established at the listening host, by port:$(sed 's/ \+/ /g' "$scratch/ss" | cut -d' ' -f3 | sed 's/.*://' | sort -n | uniq -c | tr -s ' ' | tr '\n' ',')"
wait $client || { echo "$name: the client failed:"; cat "$scratch/client"; failed=1; }
[ "$failed" = 0 ] || ip netns exec $b iptables -vnL
finish
