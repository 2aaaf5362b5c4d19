#!/bin/bash
# Tests that have both ends in one process, or on one host, over device memory TCP: the engine suite (tests/engine.rs) and the contract probe
# (tests/gpu/contract_probe). The NIC receives what it sends itself, and the route to its own address leads through it: every packet crosses it.
# usage: suite.sh [ROW...]     rows by the names of their functions, below; default: all
. /vm/lib.sh
export UCCL_TCPX_DEVMEM=auto UCCL_TCPX_EMULATE_DEVICE=1 UCCL_P2P_DISABLE_IPC=1 UCCL_TCPX_SOFT_THREADS=2 UCCL_P2P_LOG_LEVEL=info RUST_BACKTRACE=0
export UCCL_TEST_NIC=vmnic0 NCCL_SOCKET_IFNAME=vmnic0 NCCL_GPUDIRECTTCPX_SOCKET_IFNAME=vmnic0 UCCL_TCPX_NUM_CHANNELS=2
address=10.78.1.1

# The limit of older kernels is less than an area.
[ ! -w /sys/module/udmabuf/parameters/size_limit_mb ] || echo 1024 >/sys/module/udmabuf/parameters/size_limit_mb

# mirror QUEUES [PARAMETER=VALUE...]: one host whose NIC is its own peer, with so many queues for ordinary connections
mirror() {
  local queues=$1 hardware
  shift
  unpair || return 1
  insmod /vm/uccl_vmnic.ko loop=1 "$@" || return 1
  ip netns add $a && ip link set vmnic0 netns $a && ip -n $a link set lo up && ip -n $a addr add $address/24 dev vmnic0 || return 1
  on $a ethtool -G vmnic0 tcp-data-split on && on $a ethtool -K vmnic0 ntuple on && on $a ethtool -X vmnic0 equal "$queues" || return 1
  # What comes in is for this host, and what goes out to its address leaves by the NIC.
  on $a sysctl -qw net.ipv4.conf.all.accept_local=1 net.ipv4.conf.all.rp_filter=0 net.ipv4.conf.vmnic0.rp_filter=0
  ip -n $a link set vmnic0 up
  hardware=$(on $a cat /sys/class/net/vmnic0/address)
  ip -n $a neigh replace $address lladdr "$hardware" dev vmnic0 nud permanent &&
    ip -n $a route add $address dev vmnic0 table 78 &&
    ip -n $a rule add pref 1 iif vmnic0 lookup local && ip -n $a rule add pref 2 lookup 78 && ip -n $a rule add pref 3 lookup local && ip -n $a rule del pref 0
}
written() { on $a ethtool -S vmnic0 | awk '/rx[0-9]*_device_memory_bytes/ {n += $2} END {print n + 0}'; }
taken() { counter $a vmnic0 tx_device_memory_bytes; }
# by_device BYTES: at least so many were read from and written into device memory
by_device() {
  echo "note: device memory: $(taken) bytes read and $(written) written by the NIC"
  [ "$(taken)" -ge "$1" ] && [ "$(written)" -ge "$1" ]
}

# The machine is slow: silence of some seconds is none.
patient=(UCCL_TCPX_CONNECT_TIMEOUT_MS=120000 UCCL_TCPX_HANDSHAKE_TIMEOUT_MS=60000 UCCL_TCPX_PEER_TIMEOUT_MS=100000 UCCL_TCPX_TRANSFER_TIMEOUT_MS=60000
  UCCL_TCPX_CLOSE_TIMEOUT_MS=60000 UCCL_TCPX_NIC_TIMEOUT_MS=30000)
# engine BYTES OPTION...: tests of the engine suite; so many bytes must have taken device memory
engine() {
  local least=$1
  shift
  # 64 connections with 3 comms for each direction.
  ulimit -n 16384
  mirror 3 && on $a env "${patient[@]}" engine_suite --test-threads 1 --nocapture "$@" >$out/suite 2>&1 || return 1
  sed -n 's/^test result: ok\. \([0-9]* passed\).*/note: \1/p' $out/suite
  grep -q '^test result: ok. [1-9]' $out/suite && by_device "$least"
}
# What a machine of 1 GB and of this speed cannot do: 5 GiB in one transfer, rates of up to 160 MB/s, and a set-up within 3 s.
unfit=(--skip five_gibibytes_in_one_transfer --skip a_rate_limits_what_an_engine_sends_to_a_peer
  --skip unauthenticated_connections_neither_crash_nor_delay)
many=sixty_four_connections_to_one_engine
engine_suite() { engine 80000000 "${unfit[@]}" --skip $many; }
# Of these connections the area admits a few at most; the others take ordinary TCP.
engine_many_connections() { engine 0 --exact $many; }

# probe BYTES SCENARIO...: scenarios of the contract probe over the table for device memory TCP, in two processes, each with a queue of its own
probe() {
  local least=$1
  shift
  ln -sf libdevmem_plugin.so /vm/host/libcuda.so.1
  mirror 1 && UCCL_TCPX_SOFT_DEVMEM_BYTES=48M UCCL_TCPX_SOFT_STRICT=1 on $a contract_probe "$@" /vm/host/libdevmem_plugin.so >$out/probe 2>&1 || return 1
  echo "note: $(grep -c '^PASS' $out/probe) checks passed"
  ! grep -q '^FAIL' $out/probe && by_device "$least"
}
contract_main() { probe 5000000 main && [ "$(grep -c '^PASS' $out/probe)" -ge 25 ]; }
contract_stress() { PROBE_MESSAGES=150 probe 15000000 stress && grep -q '^PASS .*150 of 150 messages' $out/probe; }
contract_sender_killed() { probe 16384 sender_killed && grep -q 'sender killed.*test FAILS' $out/probe; }
contract_receiver_killed() { probe 16384 receiver_killed && grep -q 'sender: test FAILS' $out/probe; }

rows=()
[ ! -e /vm/bin/engine_suite ] || rows+=(engine_suite engine_many_connections)
[ ! -e /vm/bin/contract_probe ] || rows+=(contract_main contract_stress contract_sender_killed contract_receiver_killed)
[ $# = 0 ] || rows=("$@")
for name in "${rows[@]}"; do row "${name//_/ }" "$name"; done
unpair
conclude
