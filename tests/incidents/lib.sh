# Sourced by the tests of this directory: two hosts as in tests/shaped, and what an operator can read: the log of the client, its
# error, and its statistics.
. "$(dirname "${BASH_SOURCE[0]}")/../shaped/lib.sh"
top=$(dirname "$perf")/tcpx-top
metrics=$scratch/metrics.sock

# client SECONDS [options]: measures in the background for that time; its log and error go to $scratch/client
client() {
  local seconds=$1
  shift
  UCCL_TCPX_METRICS=unix:$metrics ip netns exec $a "$perf" client "$address" --op write --total 8M --time "$seconds" --interval 0.5 \
    "$@" >"$scratch/rows" 2>"$scratch/client" &
  client=$!
}

# reads SECONDS WHAT COMMAND...: within this time the output of the command has a line that matches WHAT (an extended expression)
reads() {
  local until=$((SECONDS + $1)) what=$2
  shift 2
  while ! "$@" 2>&1 | grep -aqE "$what"; do
    if [ $SECONDS -ge $until ]; then
      echo "$name: nothing says '$what':"
      "$@" 2>&1 | tail -40
      failed=1
      return
    fi
    sleep 0.3
  done
  echo "$name: an operator reads: $("$@" 2>&1 | grep -aE "$what" | head -1)"
}

statistics() { "$top" --once "unix:$metrics"; }
log() { cat "$scratch/client"; }
moving() { reads 20 'GB/s  p50' log; }
end_client() { wait $client 2>/dev/null && status=0 || status=$?; }
