#!/usr/bin/env bash
# Runs a command on a machine that looks like an A3 Mega to the library: the GPUs' PCI device is an H100's, and a simulated receive
# manager of TCPXO answers. All of it is simulated, for the strict foreign plugin over the memory of real GPUs, or over emulated memory
# beside two simulated GPUs where nvidia-smi is not there. Exit status 77: skipped.
# usage: as_a3_mega.sh COMMAND...
set -euo pipefail
if [ "${1:-}" != --inside ]; then
  unshare -m true 2>/dev/null || { echo "SKIPPED: no mount namespace can be made"; exit 77; }
  exec unshare -m "$0" --inside "$@"
fi
shift
folder=$(mktemp -d)
if command -v nvidia-smi >/dev/null; then
  gpus=$(nvidia-smi --query-gpu=pci.bus_id --format=csv,noheader)
  echo 0x2330 >"$folder/device"
  while read -r gpu; do
    device=/sys/bus/pci/devices/${gpu: -12}/device
    mount --bind "$folder/device" "${device,,}" || { echo "SKIPPED: $device cannot be replaced"; exit 77; }
  done <<<"$gpus"
else
  gpus=$(printf '%s\n' 00000000:90:00.0 00000000:91:00.0)
  for place in /sys/bus/pci/devices /proc/driver; do
    mount -t tmpfs simulated $place || { echo "SKIPPED: $place cannot be replaced"; exit 77; }
  done
  while read -r gpu; do
    mkdir -p "/sys/bus/pci/devices/${gpu: -12}" "/proc/driver/nvidia/gpus/${gpu: -12}"
    echo 0x10de >"/sys/bus/pci/devices/${gpu: -12}/vendor"
    echo 0x2330 >"/sys/bus/pci/devices/${gpu: -12}/device"
    echo "Model: simulated" >"/proc/driver/nvidia/gpus/${gpu: -12}/information"
  done <<<"$gpus"
fi
# The simulated manager: each GPU has the loopback interface as its closest NIC.
python3 -c '
import socket, sys, threading
def field(number, content):
    return bytes([number << 3 | 2, len(content)]) + content
nic = field(1, b"127.0.0.1")
gpus = [line.strip()[-12:].lower().encode() for line in sys.stdin]
nics = b"".join(field(1, field(1, gpu) + field(2, nic)) for gpu in gpus)
def serve(name, answer):
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(sys.argv[1] + "/" + name)
        listener.listen(1024)
        while True:
            with listener.accept()[0] as peer:
                try:
                    if peer.recv(2):
                        peer.sendall(answer)
                except OSError:
                    pass
threading.Thread(target=serve, args=("rxdm_uds_buf_op:127.0.0.1", b""), daemon=True).start()
serve("rxdm_uds_nic_mapping", len(nics).to_bytes(2, "big") + nics)' "$folder" <<<"$gpus" &
trap 'kill $! 2>/dev/null; rm -rf "$folder"' EXIT
for _ in $(seq 50); do [ -S "$folder/rxdm_uds_nic_mapping" ] && [ -S "$folder/rxdm_uds_buf_op:127.0.0.1" ] && break; sleep 0.1; done
export FILE_BASED_UDS_PATH_PREFIX=$folder NCCL_FASTRAK_ALLOW_NIC_SUBSET=1 NCCL_FASTRAK_CTRL_DEV=lo
"$@"
