#!/bin/bash
# Device memory TCP as a path of the library: tcpx-perf between two hosts over the pair of test NICs, memory of emulated GPUs, every byte
# verified by tcpx-perf, what carried it by the library's counters, and what the NICs counted.
# usage: path.sh [GROUP|ROW...]     groups of rows, or rows by the names of their functions, both below; default: all
. /vm/lib.sh
export UCCL_TCPX_PLUGIN=soft UCCL_TCPX_DEVMEM=auto UCCL_TCPX_EMULATE_DEVICE=1 UCCL_P2P_DISABLE_IPC=1 UCCL_P2P_LOG_LEVEL=info
export UCCL_TCPX_SOFT_DEVMEM_BYTES=48M UCCL_TCPX_NUM_CHANNELS=2 UCCL_TCPX_SOFT_THREADS=2
total=2097152 agents=() as=() nobody=(/vm/bin/devmem --user 65534 -- run)

# host HOST NIC QUEUES: header split, and so many queues for ordinary connections
host() {
  on "$1" ethtool -G "$2" tcp-data-split on && on "$1" ethtool -K "$2" ntuple on && on "$1" ethtool -X "$2" equal "$3"
}
prepare() {
  chmod 600 /dev/udmabuf
  as=() agents=()
  pair "$@" && host $a vmnic0 3 && host $b vmnic1 3
}

# written HOST NIC: bytes of payload that the NIC has written into device memory; taken HOST NIC: that it has read there
written() { on "$1" ethtool -S "$2" | awk '/rx[0-9]*_device_memory_bytes/ {n += $2} END {print n + 0}'; }
taken() { counter "$1" "$2" tx_device_memory_bytes; }
rules() { on "$1" ethtool -n "$2" | grep -c '^Filter:'; }
no_rules() { [ "$(rules $b vmnic1)" = 0 ]; }
unsteer() { local rule; for rule in $(on $b ethtool -n vmnic1 | sed -n 's/^Filter: //p'); do on $b ethtool -N vmnic1 delete "$rule"; done; }

# agent HOST NIC: the agent of a host. Processes then run as nobody.
agent() {
  rm -f "/tmp/agent-$1"
  ip netns exec "$1" uccl-devmem-agent --socket "/tmp/agent-$1" --group 65534 "$2" >"$out/agent-$1" 2>&1 &
  agents+=($!)
  until_true test -S "/tmp/agent-$1" || return 1
  chmod 666 /dev/udmabuf
  as=("${nobody[@]}")
}
# of HOST COMMAND...: makes the command one of a host, which finds the agent of its host, if it has one. Run it by "${command[@]}": then $! is it.
of() {
  local host=$1
  shift
  [ ${#as[@]} = 0 ] || set -- env "UCCL_TCPX_SOFT_DEVMEM_AGENT=/tmp/agent-$host" "${as[@]}" "$@"
  command=(ip netns exec "$host" "$@")
}

start_server() { # start_server [VARIABLE=VALUE...]
  of $b env "$@" tcpx-perf server
  serve "${command[@]}"
}
# serve COMMAND...: a server, until it says where
serve() {
  "$@" >$out/server 2>&1 &
  server=$!
  until address=$(grep -oE '^10\.78\.1\.2:[0-9]+' $out/server | head -1) && [ -n "$address" ]; do
    kill -0 $server 2>/dev/null || return 1
    sleep 0.1
  done
}
# until_true COMMAND...: at most half a minute
until_true() {
  local tries
  for tries in $(seq 300); do
    "$@" && return
    sleep 0.1
  done
  echo "not in time: $*"
  return 1
}
flowing() { [ "$(written $b vmnic1)" -gt $((4 * total)) ]; }
client() {
  of $a timeout 90 tcpx-perf client "$address" --verify --total $total --iters 3 --warmup 1 "$@"
  "${command[@]}" >$out/client 2>&1
}
# long ITERATIONS: a client in the background, $client
long() {
  of $a timeout 120 tcpx-perf client "$address" --verify --total $total --iters "$1" --warmup 1 --op write
  "${command[@]}" >$out/client 2>&1 &
  client=$!
}
stop_server() {
  kill $server
  wait $server 2>/dev/null
  true
}
# moved OPTION...: a server, and a client's verified transfers with these options
moved() { start_server && client "$@" && stop_server; }

by() { grep -A3 'GB/s' $out/client | grep -qw "$1"; }
over_devmem() { moved --require devmem "$@" && all_by_device; }
over_tcp() { moved --require tcp "$@" && [ "$(taken $a vmnic0)" -lt $total ]; }
# Every byte was read from and written into device memory; patterns come on top.
all_by_device() {
  local bytes=$((4 * total))
  echo "note: device memory: $(taken $a vmnic0) bytes read and $(written $a vmnic0) written by the client's NIC, $(taken $b vmnic1) and $(written $b vmnic1) by the server's"
  [ $(($(taken $a vmnic0) + $(taken $b vmnic1))) -ge $bytes ] && [ $(($(written $a vmnic0) + $(written $b vmnic1))) -ge $bytes ]
}
# says TEXT: a log has it
says() {
  touch $out/server $out/client
  grep -hom1 ".*$1.*" $out/server $out/client | head -1 | sed 's/^/note: /'
  grep -q "$1" $out/server $out/client
}

write() { prepare && over_devmem --op write; }
read_back() { prepare && over_devmem --op read; }
messages() { prepare && over_devmem --op send; }
both_ways() { prepare && over_devmem --op write --bidirectional; }
scattered() { prepare && over_devmem --op write --block 1000; }
many_at_once() { prepare && over_devmem --op write --inflight 8; }
fragments_of_a_packet() { prepare fragment=1448 offset=64 && over_devmem --op write; }
odd_offsets() { prepare fragment=1448 offset=1235 && over_devmem --op read --block 3333; }
lost_packets() { prepare drop_every=50 && over_devmem --op write; }
delay() { prepare && on $a tc qdisc add dev vmnic0 root netem delay 5ms limit 20000 && over_devmem --op write && over_devmem --op read; }
# netem on both hosts. Of device memory it can damage headers alone, and drops what it cannot copy.
netem() {
  prepare && on $a tc qdisc add dev vmnic0 root netem "$@" limit 20000 && on $b tc qdisc add dev vmnic1 root netem "$@" limit 20000 &&
    over_devmem --op write && over_devmem --op read
}
netem_loss() { netem delay 2ms loss 1%; }
netem_reorder() { netem delay 2ms reorder 75% 50%; }
netem_duplicate() { netem duplicate 5%; }
netem_corrupt() { netem corrupt 1%; }
# Payload that the NIC leaves in the linear part is copied.
unsplit() { prepare unsplit_every=3 && moved --op write --require devmem && says 'was copied to device memory' && [ "$(counter $b vmnic1 rx_left_unsplit)" -gt 0 ]; }
unsplit_fragments() { prepare fragment=1448 offset=64 unsplit_every=7 unsplit_bytes=99 && moved --op read --require devmem && says 'was copied to device memory'; }
# 4 MiB at 400,000 bytes a second, over both channels together.
paced() {
  local total=1048576 begun
  prepare && start_server UCCL_TCPX_PEER_RATE=400000 || return 1
  begun=${EPOCHREALTIME/./}
  UCCL_TCPX_PEER_RATE=400000 client --op write --require devmem && stop_server || return 1
  begun=$(((${EPOCHREALTIME/./} - begun) / 1000))
  echo "note: 4 MiB took $begun ms"
  [ $begun -ge 8000 ] && all_by_device
}
large() {
  local total=33554432
  prepare fragment=1448 offset=64 && over_devmem --op write
}

# Where it is not asked for, or something is missing, ordinary TCP carries the same bytes, and the log says why.
switched_off() { prepare && UCCL_TCPX_DEVMEM=off over_tcp --op write && [ "$(written $b vmnic1)" = 0 ]; }
peer_without() { prepare && start_server UCCL_TCPX_DEVMEM=off && client --op write --require tcp && stop_server; }
protected() { prepare && UCCL_TCPX_PROTECT=encrypt over_tcp --op write && [ "$(taken $a vmnic0)" = 0 ]; }
no_header_split() { prepare && on $b ethtool -G vmnic1 tcp-data-split off && over_tcp --op write && says 'tcp-data-split is disabled'; }
# A NIC that splits only packets from some size on is refused, and uccl-devmem-prepare sets it right. A NIC that cannot be prepared is said to be so.
split_threshold() { prepare split_threshold=1024 && over_tcp --op write && says 'hds-thresh'; }
prepared() {
  chmod 600 /dev/udmabuf
  as=() agents=()
  pair split_threshold=1024 && on $a sh /vm/bin/uccl-devmem-prepare vmnic0 1 && on $b sh /vm/bin/uccl-devmem-prepare vmnic1 1 && over_devmem --op write
}
not_prepared() {
  veth && ! on $b sh /vm/bin/uccl-devmem-prepare eth1 0 2>$out/refusal && sed 's/^/note: /' $out/refusal && grep -q 'header split of eth1 cannot be set on' $out/refusal
}
no_spare_queue() { prepare && on $b ethtool -X vmnic1 default && over_tcp --op write && says 'ordinary connections use every queue'; }
no_privileges() {
  prepare && chmod 666 /dev/udmabuf || return 1
  serve ip netns exec $b "${nobody[@]}" tcpx-perf server && client --op write --require tcp && stop_server && says 'Operation not permitted'
}
no_export() { prepare && mv /dev/udmabuf /dev/udmabuf.away && over_tcp --op write; local status=$?; mv /dev/udmabuf.away /dev/udmabuf; [ $status = 0 ] && says 'no dma-buf over device memory'; }
area_too_small() { prepare && UCCL_TCPX_SOFT_DEVMEM_BYTES=4M over_tcp --op write && says 'admits no connection'; }
not_steered() { prepare && on $b ethtool -K vmnic1 ntuple off && over_tcp --op write && says 'does not steer'; }
# A platform that loses what the NIC writes is found before any byte of a transfer passes.
lost_writes() { prepare unwritten_every=1 && over_tcp --op write && says 'came out wrong at byte'; }
# One seat more than the channels of a connection: of three connections only one has all.
area_is_full() {
  # Each client is a process that takes a queue.
  prepare && on $a ethtool -X vmnic0 equal 1 && start_server || return 1
  local number clients=()
  for number in 1 2 3; do
    of $a timeout 90 tcpx-perf client "$address" --verify --total $total --iters 20 --warmup 1 --op write
    "${command[@]}" >"$out/client$number" 2>&1 &
    clients+=($!)
  done
  local status=0
  for number in "${clients[@]}"; do wait "$number" || status=1; done
  cat $out/client? >$out/client
  stop_server
  [ $status = 0 ] && says 'that the area admits are there'
}
required() {
  prepare && on $b ethtool -G vmnic1 tcp-data-split off
  start_server UCCL_TCPX_DEVMEM=require && return 1
  says 'UCCL_TCPX_DEVMEM=require: .*tcp-data-split is disabled'
}
required_of_the_peer() {
  prepare && start_server UCCL_TCPX_DEVMEM=off || return 1
  UCCL_TCPX_DEVMEM=require client --op write && return 1
  stop_server
  says 'devmem.direct is required'
}

# What breaks in the middle of transfers costs speed, not bytes.
# during COMMAND...: long transfers, and the command once device memory was written
rounds=80 # enough for what is done to them to meet them
during() {
  start_server || return 1
  local status=0
  long $rounds
  until_true flowing || return 1
  "$@"
  wait $client || status=1
  stop_server
  echo "note: of $(((rounds + 1) * total)) bytes the receiver's NIC wrote $(written $b vmnic1) into device memory"
  return $status
}
rules_deleted() { prepare && during unsteer && [ "$(written $b vmnic1)" -lt $(((rounds + 1) * total)) ] && says 'was copied to device memory'; }
flap() {
  ip -n "$1" link set "$2" down
  sleep 1
  ip -n "$1" link set "$2" up
}
sender_down() { prepare && during flap $a vmnic0; }
receiver_down() { prepare && during flap $b vmnic1; }
server_killed() {
  prepare && start_server || return 1
  long 1000
  until_true flowing || return 1
  kill -9 $server
  wait $client && return 1
  # What it has left behind does not harm its successor.
  echo "note: $(rules $b vmnic1) rules are left behind"
  over_devmem --op write && [ "$(rules $b vmnic1)" -le 4 ]
}

# A sender that is killed takes nothing with it: its rules and its places in the area come back.
sender_killed() {
  prepare && start_server || return 1
  long 1000
  until_true flowing || return 1
  # The program below timeout.
  kill -9 "$(tr -d ' ' </proc/$client/task/$client/children)"
  wait $client && return 1
  until_true no_rules && client --op write --require devmem && stop_server
}
# Both processes end and start again.
restarted() { prepare && over_devmem --op write && until_true no_rules && over_devmem --op read && until_true no_rules; }
seated() { [ "$(rules $b vmnic1)" = "$1" ]; }
# As many connections as the area says, one more over ordinary TCP, and places that come back.
admission_limit() {
  local -x UCCL_TCPX_SOFT_DEVMEM_BYTES=30M UCCL_TCPX_NUM_CHANNELS=1
  local number clients=() status=0
  prepare && on $a ethtool -X vmnic0 equal 1 && start_server && says 'for 2 receiving connections' || return 1
  for number in 1 2; do
    of $a timeout 110 tcpx-perf client "$address" --verify --total $total --iters 40 --warmup 1 --op write --require devmem
    "${command[@]}" >"$out/client$number" 2>&1 &
    clients+=($!)
  done
  until_true seated 2 && client --op write --require tcp && says 'all 2 connections that the area admits are there' && seated 2 || status=1
  for number in "${clients[@]}"; do wait "$number" || status=1; done
  [ $status = 0 ] && client --op write --require devmem && stop_server
}

# Two processes that receive on one NIC, each on a queue of its own.
two_processes() {
  prepare && on $a ethtool -X vmnic0 equal 2 && on $b ethtool -X vmnic1 equal 2 && start_server || return 1
  local servers=("$server") addresses=("$address") clients=() status=0 number
  mv $out/server $out/server1
  start_server || return 1
  servers+=("$server") addresses+=("$address")
  for number in 0 1; do
    of $a timeout 90 tcpx-perf client "${addresses[number]}" --verify --total $total --iters 3 --warmup 1 --op write --require devmem
    "${command[@]}" >"$out/client$number" 2>&1 &
    clients+=($!)
  done
  for number in 0 1; do wait "${clients[number]}" || status=1; done
  for server in "${servers[@]}"; do stop_server; done
  for number in 2 3; do
    echo "note: queue $number wrote $(counter $b vmnic1 rx${number}_device_memory_bytes) bytes"
    [ "$(counter $b vmnic1 rx${number}_device_memory_bytes)" -ge $((4 * total)) ] || status=1
  done
  return $status
}
# Rules that lead to the queue of another process: its fragments are refused, and no wrong byte is taken for right.
foreign_binding() {
  prepare && on $a ethtool -X vmnic0 equal 2 && on $b ethtool -X vmnic1 equal 2 && start_server || return 1
  local first=$server first_address=$address rule ports
  mv $out/server $out/server1
  # The second process's queue is the next.
  start_server || return 1
  address=$first_address
  long 1000
  until_true flowing || return 1
  for rule in $(on $b ethtool -n vmnic1 | sed -n 's/^Filter: //p'); do
    ports=$(on $b ethtool -n vmnic1 rule "$rule" | sed -nE 's/.*Src port: ([0-9]+).*/src-port \1/p; s/.*Dest port: ([0-9]+).*/dst-port \1/p')
    on $b ethtool -n vmnic1 rule "$rule" | grep -q 'queue 3' || continue
    on $b ethtool -N vmnic1 delete "$rule"
    # shellcheck disable=SC2086  # words
    on $b ethtool -N vmnic1 flow-type tcp4 src-ip 10.78.1.1 dst-ip 10.78.1.2 $ports action 2
  done
  wait $client && echo "the transfers went on" && return 1
  stop_server
  server=$first
  stop_server
  cat $out/server1 >>$out/server
  says 'a fragment of binding' && ! grep -qi 'mismatch\|wrong byte' $out/client
}

# The agent: processes without privileges.
agents() { agent $a vmnic0 && agent $b vmnic1; }
unprivileged() { prepare && agents && over_devmem --op write && [ "$(rules $b vmnic1)" = 0 ]; }
unprivileged_both_ways() { prepare && agents && over_devmem --op read --bidirectional; }
agent_killed() {
  prepare && agents && during kill -9 "${agents[1]}" && [ "$(written $b vmnic1)" -lt $(((rounds + 1) * total)) ]
}
# A server does not ask an agent that has ended again; the next one asks its successor.
agent_restarted() {
  prepare && agents && start_server && client --op write --require devmem || return 1
  kill "${agents[1]}"
  wait "${agents[1]}"
  agent $b vmnic1 && client --op write --require tcp && stop_server && over_devmem --op write
}
# A frozen agent delays one set-up, and no transfer.
agent_frozen() {
  prepare && agents && start_server && kill -STOP "${agents[1]}" || return 1
  client --op write --require tcp && client --op read --require tcp && stop_server
  local status=$?
  kill -CONT "${agents[1]}"
  [ $status = 0 ] && says 'steering a connection to queue 3 of vmnic1: the agent'
}
agent_refuses() { prepare && agent $a vmnic0 && agent $b other && over_tcp --op write && says 'the agent does not serve this NIC'; }
client_of_agent_killed() {
  prepare && agents && start_server || return 1
  long 1000
  until_true flowing || return 1
  [ "$(rules $b vmnic1)" -gt 0 ] || return 1
  kill -9 $server
  wait $client && return 1
  until_true no_rules || return 1
  over_devmem --op write
}

# What a process of another network namespace may not ask for, and what is no connection at all. Honest clients go on.
agent_is_asked_for_too_much() {
  prepare && agents || return 1
  ip netns exec $a "${nobody[@]}" /vm/bin/agent_liar /tmp/agent-$b vmnic1 >$out/liar 2>&1 || { cat $out/liar; return 1; }
  sed 's/^/note: /' $out/liar
  over_devmem --op write
}

# The one danger: a neglected comm keeps pages of the area from others of its queue. neighbour HOW: the receiver posts no receive (unread), or
# consumes none (held).
neighbour() {
  prepare fragment=1448 offset=64 || return 1
  # Chunks of other plugins than this one may be longer than its messages.
  export NCCL_GPUDIRECTTCPX_SOCKET_IFNAME=vmnic UCCL_TCPX_CHUNK_BYTES=1M
  mkdir -p $out/meet
  ip netns exec $b devmem_neighbour receive $out/meet "$1" >$out/server 2>&1 &
  local receiver=$! status=0
  timeout 100 ip netns exec $a devmem_neighbour send $out/meet "$1" >$out/client 2>&1 || status=1
  [ $status = 0 ] || kill $receiver
  wait $receiver || status=1
  unset NCCL_GPUDIRECTTCPX_SOCKET_IFNAME UCCL_TCPX_CHUNK_BYTES
  grep -E '^(held|the neighbour)' $out/server | sed 's/^/note: /'
  echo "note: $(counter $b vmnic1 rx_starved) packets found no place"
  return $status
}
unread_neighbour() { neighbour unread; }
held_neighbour() { neighbour held; }

# The doctor.
doctor() {
  touch $out/server
  ip netns exec "$1" tcpx-info --doctor devmem --no-probe >$out/client 2>&1
}
doctor_content() { prepare && doctor $b && grep -q 'every precondition of device memory TCP is met' $out/client && says 'an engine receives into device memory on vmnic1'; }
doctor_names_faults() {
  prepare && on $b ethtool -G vmnic1 tcp-data-split off && { doctor $b; [ $? = 1 ]; } && says 'MISSING.*header split' && says 'ethtool -G vmnic1 tcp-data-split on' &&
    says 'MISSING.*trial.*tcp-data-split is disabled'
}

declare -A groups=(
  [transfers]="write read_back messages both_ways scattered many_at_once fragments_of_a_packet odd_offsets unsplit unsplit_fragments"
  [slow]="large paced"
  [links]="lost_packets delay netem_loss netem_reorder netem_duplicate netem_corrupt sender_down receiver_down"
  [fallback]="switched_off peer_without protected no_header_split split_threshold prepared not_prepared no_spare_queue no_privileges no_export area_too_small not_steered lost_writes
    required required_of_the_peer"
  [faults]="area_is_full rules_deleted server_killed sender_killed restarted admission_limit two_processes foreign_binding"
  [agent]="unprivileged unprivileged_both_ways agent_killed agent_restarted agent_frozen agent_refuses client_of_agent_killed agent_is_asked_for_too_much"
  [others]="unread_neighbour held_neighbour doctor_content doctor_names_faults"
)
# can ROW: the program that the row needs was given to run.sh
can() {
  case " ${groups[agent]} " in *" $1 "*) [ -e /vm/bin/uccl-devmem-agent ] || return ;; esac
  case $1 in
    prepared | not_prepared) [ -e /vm/bin/uccl-devmem-agent ] ;;
    agent_is_asked_for_too_much) [ -e /vm/bin/agent_liar ] ;;
    *_neighbour) [ -e /vm/bin/devmem_neighbour ] ;;
    doctor*) [ -e /vm/bin/tcpx-info ] ;;
  esac
}
rows=()
[ $# -gt 0 ] || set -- transfers slow links fallback faults agent others
for group in "$@"; do
  read -rd '' -a names <<<"${groups[$group]:-$group}"
  for name in "${names[@]}"; do can "$name" && rows+=("$name"); done
done
for name in "${rows[@]}"; do row "${name//_/ }" "$name"; done
unpair
conclude
