#!/bin/bash
# The library over links that delay, lose, reorder, duplicate and damage packets (netem), with a kernel of its own: tcpx-perf between two
# hosts, the software plugin, every byte verified.
# usage: links.sh [ROW...]     rows by the names of their functions, below; default: all
. /vm/lib.sh
export UCCL_TCPX_PLUGIN=soft UCCL_TCPX_SOFT_STRICT=1 UCCL_SOCKET_IFNAME=eth1 NCCL_GPUDIRECTTCPX_SOCKET_IFNAME=eth1 UCCL_P2P_LOG_LEVEL=warn
total=2097152

# crossed: bytes that have passed the NIC of host a
crossed() { on $a cat /sys/class/net/eth1/statistics/rx_bytes /sys/class/net/eth1/statistics/tx_bytes | awk '{n += $1} END {print n}'; }

# verified OPERATION [OPTION...]: tcpx-perf's transfers of one kind; they must have crossed the link
verified() {
  local server address before status=0
  before=$(crossed)
  on $b tcpx-perf server >$out/server 2>&1 &
  server=$!
  until address=$(grep -oE '10\.78\.1\.2:[0-9]+' $out/server | head -1) && [ -n "$address" ]; do
    kill -0 $server 2>/dev/null || return 1
    sleep 0.1
  done
  timeout 60 ip netns exec $a tcpx-perf client "$address" --op "$1" --verify --total $total --iters 2 --warmup 1 "${@:2}" >$out/client 2>&1 || status=1
  kill $server && wait $server 2>/dev/null
  before=$(($(crossed) - before))
  echo "note: $1: $before bytes crossed the link"
  [ $before -ge $((3 * total)) ] || status=1
  return $status
}

# link OPTION...: netem with these options on either host
link() {
  local host
  veth
  for host in $a $b; do tc -n $host qdisc add dev eth1 root netem "$@" limit 20000 || return 1; done
}

plain() { veth && verified write && verified read; }
delay() { link delay 5ms && verified write && verified read; }
loss() { link delay 2ms loss 1% && verified write && verified read; }
reorder() { link delay 2ms reorder 75% 50% && verified write && verified read; }
duplicate() { link duplicate 5% && verified write && verified read; }
corrupt() { link corrupt 1% && verified write && verified read; }
everything() { link delay 2ms 1ms loss 0.5% duplicate 1% corrupt 0.5% && verified write && verified read; }
encrypted() {
  local total=262144
  UCCL_TCPX_PROTECT=encrypt everything
}
test_nics() {
  pair
  ip -n $a link set vmnic0 down
  ip -n $b link set vmnic1 down
  ip -n $a link set vmnic0 name eth1 up && ip -n $b link set vmnic1 name eth1 up && sleep 1 && verified write && verified read
}

rows=(plain delay loss reorder duplicate corrupt everything encrypted test_nics)
# Kernels that the module is not written for.
[ -e /vm/uccl_vmnic.ko ] || unset 'rows[-1]'
[ $# = 0 ] || rows=("$@")
for name in "${rows[@]}"; do row "${name//_/ }" "$name"; done
conclude
