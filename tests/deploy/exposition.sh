#!/usr/bin/env bash
# What a running engine exports, in both formats, as Prometheus' own checker reads it. Exit status 77: skipped.
# usage: exposition.sh TCPX_PERF
set -euo pipefail
cd "$(dirname "$0")/../.."
perf=${1:?usage: $0 TCPX_PERF}
promtool=$(command -v promtool || echo .venv/prometheus/usr/bin/promtool)
[ -x "$promtool" ] || { echo "SKIPPED: promtool is not installed (Debian's package prometheus; scripts/lint deploy unpacks it)"; exit 77; }
work=$(mktemp -d)
export UCCL_TCPX_PLUGIN=soft NCCL_SOCKET_IFNAME=lo NCCL_GPUDIRECTTCPX_SOCKET_IFNAME=lo UCCL_P2P_DISABLE_IPC=1
UCCL_TCPX_METRICS=unix:$work/metrics.sock "$perf" server --bind 127.0.0.1 --memory host >"$work/address" &
server=$!
trap 'kill $server 2>/dev/null; rm -rf "$work"' EXIT
# soon COMMAND...: repeats it until it succeeds, for a minute at most
soon() { until "$@"; do [ $SECONDS -lt 60 ] || { echo "nothing came of: $*"; exit 1; }; sleep 0.2; done; }
soon test -s "$work/address"
"$perf" client "$(head -1 "$work/address")" --memory host --total 1M --time 30 >/dev/null 2>&1 &
client=$!
trap 'kill $server $client 2>/dev/null; rm -rf "$work"' EXIT

# scrape ACCEPT FILE
scrape() {
  python3 - "$work/metrics.sock" "$1" >"$2" <<'PYTHON'
import socket, sys
with socket.socket(socket.AF_UNIX) as sock:
    sock.connect(sys.argv[1])
    sock.sendall(f"GET /metrics HTTP/1.1\r\nHost: engine\r\nAccept: {sys.argv[2]}\r\n\r\n".encode())
    answer = b"".join(iter(lambda: sock.recv(65536), b"")).decode()
head, body = answer.split("\r\n\r\n", 1)
wanted = sys.argv[2].split(";")[0]
assert head.startswith("HTTP/1.1 200 OK") and f"Content-Type: {wanted};" in head, head
assert body.endswith("# EOF\n"), body[-200:]
print(body, end="")
PYTHON
}
moving() { scrape "text/plain;version=0.0.4" "$work/plain" && grep -q '^uccl_tcpx_channel_received_bytes_total{.*} [1-9]' "$work/plain"; }
soon moving
scrape "application/openmetrics-text;version=1.0.0" "$work/open"
said=$("$promtool" check metrics <"$work/plain" 2>&1) && [ -z "$said" ] || { echo "$said"; exit 1; }
grep -q '^# TYPE uccl_tcpx_engine info$' "$work/open"
echo "$(grep -c '^# TYPE' "$work/plain") metrics, $(grep -vc '^#' "$work/plain") series"
