#!/bin/bash
# Device memory TCP over the pair of test NICs, by its raw interface: what the kernel promises, and what it does when something breaks.
# usage: devmem.sh [ROW...]     rows by the names of their functions, below; default: all
. /vm/lib.sh
port=5000 queue=3 size=12000000

# prepare [PARAMETER=VALUE...]: the pair, host b ready for a binding: header split, and no flow on our queue but by a rule
prepare() {
  pair "$@" || return 1
  on $b ethtool -G vmnic1 tcp-data-split on || return 1
  on $b ethtool -K vmnic1 ntuple on && on $b ethtool -X vmnic1 equal $queue || return 1
  rule=$(steer) || return 1
}

steer() { on $b ethtool -N vmnic1 flow-type tcp4 dst-port $port action $queue | sed -n 's/.*ID //p'; }
unsteer() { on $b ethtool -N vmnic1 delete "$rule"; }

receive() { on $b devmem receive --nic vmnic1 --queue $queue --port $port "$@" >$out/receive 2>&1; }
send() { on $a devmem send --to 10.78.1.2 --port $port "$@" >$out/send 2>&1; }

# transfer [-r 'OPTION...'] OPTION...: a sender with these options and a receiver; both must be content
transfer() {
  local receiver status=0 options=()
  if [ "${1:-}" = -r ]; then
    read -ra options <<<"$2"
    shift 2
  fi
  receive --bytes $size "${options[@]}" &
  receiver=$!
  until grep -q bound $out/receive 2>/dev/null; do kill -0 $receiver 2>/dev/null || break; sleep 0.05; done
  send --bytes $size "$@" || status=1
  wait $receiver || status=1
  grep -E '^(stream|the owner|refused)' $out/receive
  return $status
}

# bytes KIND: what the receiver counted as device, linear or plain
bytes() { sed -n "s/.*[ ;:]$1 \([0-9]*\).*/\1/p" $out/receive | awk '{n += $1} END {print n + 0}'; }
all_device() { [ "$(bytes device)" = $size ] && [ "$(bytes plain)" = 0 ] && [ "$(bytes linear)" = 0 ]; }
mixed() { [ "$(bytes device)" -gt 0 ] && [ "$(bytes plain)" -gt 0 ]; }

# midway COMMAND...: runs it when a quarter of the bytes has arrived, the rest being held back until the command has ended
midway() {
  until [ "$(counter $b vmnic1 rx${queue}_bytes)" -ge $((size / 4)) ]; do sleep 0.05; done
  "$@"
  touch $out/go
}
pausing=(--pause-at $((size / 4)) --go "$out/go")

host_to_device() { prepare && transfer && all_device; }
device_to_device() { prepare && transfer --nic vmnic0 && all_device && [ "$(counter $a vmnic0 tx_device_memory_bytes)" -ge $size ]; }
fragments_of_a_packet() { prepare fragment=1448 offset=64 && transfer --nic vmnic0 && all_device && grep -q 'to 1448, ' $out/receive; }
odd_offsets() { prepare fragment=1448 offset=1235 && transfer --nic vmnic0 --chunk 99991 && all_device && ! grep -q ', 0 of them unaligned' $out/receive; }
# A call ends at the end of its vector, in the middle of a fragment too, and when its control buffer is full. Nothing is lost.
short_vector() { prepare && transfer -r "--vector 1000" --nic vmnic0 && all_device && grep -q 'to 1000, ' $out/receive; }
short_control() { prepare && transfer -r "--fragments 3" --nic vmnic0 && all_device; }
no_control() {
  prepare && { transfer -r "--fragments 0"; true; }
  sed -n 's/^stream 0: recvmsg/note: recvmsg/p' $out/receive
  grep -q 'recvmsg after 0 bytes' $out/receive
}
no_flag() {
  prepare && { transfer -r --without-flag; true; }
  grep -q 'recvmsg after 0 bytes: Bad address' $out/receive
}
unsplit() { prepare unsplit_every=3 && transfer --nic vmnic0 && [ "$(bytes linear)" -gt 0 ] && [ "$(bytes device)" -gt 0 ]; }
unsplit_odd() { prepare fragment=1448 offset=64 unsplit_every=7 unsplit_bytes=99 && transfer && [ "$(bytes linear)" -gt 0 ]; }
# A linear part that is too large for the kernel's cache of small ones lies in a page. The kernel may merge its payload with device memory of
# other packets, and its own recvmsg() refuses what comes of it: ENODEV, for good. No byte may be wrong.
unsplit_merged() {
  prepare fragment=1448 offset=64 unsplit_every=7 unsplit_bytes=999 || return 1
  transfer && { echo "note: all bytes arrived"; return; }
  sed -n 's/^stream 0: recvmsg/note: recvmsg/p' $out/receive
  dmesg | grep -m 1 -o 'Found non-dmabuf.*' | sed 's/^/note: /'
  grep -q 'recvmsg after .*: No such device' $out/receive
}
lost_packets() { prepare drop_every=50 && transfer --nic vmnic0 && all_device && [ "$(counter $b vmnic1 rx_lost_on_purpose)" -gt 0 ]; }
# The check itself: writes that the platform loses must show.
lost_writes() {
  prepare unwritten_every=500
  transfer && return 1
  grep -q 'wrong byte at .* of device bytes' $out/receive
}
no_rule() { prepare && unsteer && transfer && [ "$(bytes plain)" = $size ]; }
rule_deleted() { prepare && { midway unsteer & } && transfer "${pausing[@]}" && mixed; }
rule_set_late() {
  prepare && unsteer
  { until grep -q bound $out/receive 2>/dev/null && [ "$(on $b ss -Htn state established "sport = :$port" | wc -l)" -gt 0 ]; do sleep 0.05; done; steer; } &
  transfer --late 1 && [ "$(bytes device)" -gt 0 ]
}
owner_killed() { prepare && transfer -r "--kill-owner-after 3000000" --nic vmnic0 && mixed; }
no_header_split() {
  prepare && on $b ethtool -G vmnic1 tcp-data-split off
  receive
  [ $? = 3 ] && cat $out/receive && grep -q '^refused: .*tcp-data-split' $out/receive
}
# A receiver that is waiting for a connection: killed at the end of its row.
waiting() {
  receive &
  until grep -q bound $out/receive 2>/dev/null; do sleep 0.05; done
}
split_stays_on() {
  prepare && waiting
  ! on $b ethtool -G vmnic1 tcp-data-split off 2>$out/refusal && sed 's/^/refused: /' $out/refusal
}
two_bindings() {
  prepare && waiting
  on $b devmem receive --nic vmnic1 --queue $queue --port 5001 >$out/second
  [ $? = 3 ] && cat $out/second
}
unprivileged_send() {
  prepare || return 1
  receive --bytes $size &
  until grep -q bound $out/receive 2>/dev/null; do sleep 0.05; done
  chmod 666 /dev/udmabuf
  on $a devmem send --user 65534 --to 10.78.1.2 --port $port --nic vmnic0 --bytes $size >$out/send && wait && all_device
}
# flap HOST NIC: down for 3 seconds, in which the sender goes on
flap() {
  ip -n "$1" link set "$2" down
  touch $out/go
  sleep 3
  ip -n "$1" link set "$2" up
}
# While its NIC is down the sender's calls are refused. Every byte leaves as device memory: the kernel copies none, whatever it says.
link_down() {
  prepare && { midway flap $a vmnic0 & } && transfer --nic vmnic0 "${pausing[@]}" && all_device && grep '^note' $out/send && ! grep -q ', 0 refused' $out/send &&
    [ "$(counter $a vmnic0 tx_device_memory_bytes)" -ge $size ]
}
receiver_down() { prepare && { midway flap $b vmnic1 & } && transfer "${pausing[@]}" && all_device; }

# The danger: fragments of a connection that is not read fill the area, and no packet of any other connection finds a place.
two_streams() { # two_streams RECEIVE_BUFFER SECONDS
  prepare fragment=1448 offset=64 || return 1
  receive --connections 2 --stall 1 --buffer "$1" --area 4194304 --seconds "$2" --bytes $size &
  until grep -q bound $out/receive 2>/dev/null; do sleep 0.05; done
  on $a devmem send --to 10.78.1.2 --port $port --stream 1 --bytes $size >$out/first &
  # By now the first has filled the area, or its buffer.
  sleep 2
  on $a devmem send --to 10.78.1.2 --port $port --stream 2 --bytes $size >$out/second &
  wait
}
starvation() {
  two_streams 16000000 7
  sed -n 's/^stream 2: \(.*\) when time was up/note: one connection is not read and may hold 32 MB; the other has got \1/p' $out/receive
  echo "note: $(counter $b vmnic1 rx_starved) packets found no place"
  [ "$(counter $b vmnic1 rx_starved)" -gt 0 ] && grep -q '^stream 2: 0 bytes when time was up' $out/receive
}
no_starvation() {
  two_streams 200000 60
  grep '^stream' $out/receive
  [ "$(grep -c "^stream [12]: $size bytes right" $out/receive)" = 2 ]
}

# streams COUNT RECEIVER_OPTION...: so many senders to one area
streams() {
  local count=$1 receiver stream
  shift
  prepare fragment=1448 offset=64 || return 1
  receive --connections "$count" --bytes $size "$@" &
  receiver=$!
  until grep -q bound $out/receive 2>/dev/null; do sleep 0.05; done
  for stream in $(seq "$count"); do
    on $a devmem send --to 10.78.1.2 --port $port --stream "$stream" --bytes $size >"$out/send$stream" 2>&1 &
  done
  wait $receiver
}
four_streams() { streams 4 --buffer 200000 && [ "$(grep -c "^stream [1-4]: $size bytes right" $out/receive)" = 4 ]; }
# A connection that keeps its fragments stops the others of its queue, until it is closed.
closed_with_fragments() {
  streams 2 --hoard 1 --area 2097152 || return 1
  grep -E '^(note|stream)' $out/receive
  grep -q '^note: stream 1 was closed' $out/receive && grep -q "^stream 2: $size bytes right" $out/receive
}

# netem OPTION...: on what host a sends
netem() {
  prepare && on $a tc qdisc add dev vmnic0 root netem "$@" && transfer --nic vmnic0 && all_device &&
    on $a tc -s qdisc show dev vmnic0 | grep -m 1 -o 'dropped [0-9]*' | sed 's/^/note: packets /' &&
    on $b nstat -asz TcpExtTCPDSACKOldSent TcpExtTCPOFOQueue | awk 'NR > 1 {print "note:", $1, $2}'
}
netem_delay() { netem delay 5ms limit 20000; }
netem_loss() { netem delay 2ms loss 5% limit 20000 && ! grep -q 'dropped 0 ' $out/row; }
netem_reorder() { netem delay 2ms reorder 75% 50% limit 20000; }
netem_duplicate() { netem duplicate 5% limit 20000; }
# netem damages headers of device memory and whole packets of the host.
netem_corrupt() {
  prepare && on $b tc qdisc add dev vmnic1 root netem corrupt 2% limit 20000 && on $a tc qdisc add dev vmnic0 root netem corrupt 1% limit 20000 && transfer &&
    echo "note: $(counter $b vmnic1 rx_bad_checksum) packets with a wrong checksum" && [ "$(counter $b vmnic1 rx_bad_checksum)" -gt 0 ]
}

# The library's own crate, where run.sh has been given its example.
library_receives() {
  prepare || return 1
  on $b devmem_transfer receive vmnic1 $queue $port $size >$out/receive 2>&1 &
  until grep -q bound $out/receive 2>/dev/null; do sleep 0.05; done
  send --nic vmnic0 --bytes $size && wait $! && cat $out/receive && all_device
}
library_sends() {
  prepare || return 1
  receive --bytes $size &
  until grep -q bound $out/receive 2>/dev/null; do sleep 0.05; done
  on $a devmem_transfer send vmnic0 10.78.1.2:$port $size >$out/send 2>&1 && wait $! && all_device
}
library_plain_and_linear() {
  prepare unsplit_every=3 fragment=1448 offset=64 || return 1
  on $b devmem_transfer receive vmnic1 $queue $port $size >$out/receive 2>&1 &
  { midway unsteer & } && send --bytes $size "${pausing[@]}" && wait && cat $out/receive && mixed && [ "$(bytes linear)" -gt 0 ]
}
library_is_refused() {
  prepare && on $b ethtool -G vmnic1 tcp-data-split off
  on $b devmem_transfer receive vmnic1 $queue $port $size >$out/receive 2>&1
  [ $? = 3 ] && cat $out/receive && grep -q '^refused: .*: tcp-data-split is disabled' $out/receive
}

rows=(host_to_device device_to_device fragments_of_a_packet odd_offsets short_vector short_control no_control no_flag unsplit unsplit_odd unsplit_merged
  lost_packets lost_writes no_rule rule_deleted rule_set_late owner_killed no_header_split split_stays_on two_bindings unprivileged_send link_down receiver_down starvation no_starvation four_streams closed_with_fragments
  netem_delay netem_loss netem_reorder netem_duplicate netem_corrupt)
[ ! -e /vm/bin/devmem_transfer ] || rows+=(library_receives library_sends library_plain_and_linear library_is_refused)
[ $# = 0 ] || rows=("$@")
for name in "${rows[@]}"; do row "${name//_/ }" "$name"; done
unpair
conclude
