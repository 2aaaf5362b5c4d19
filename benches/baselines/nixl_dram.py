"""NIXL with a backend (UCX by default) between two processes over loopback, DRAM to DRAM.

usage: nixl_dram.py SECONDS ROW...      variables: see nixl_pair.py; UCX_TLS=tcp
"""
import os
import sys

os.environ.setdefault("UCX_TLS", "tcp")
os.environ.setdefault("NIXL_LOG_LEVEL", "WARN")
import nixl_pair  # noqa: E402
import numpy as np  # noqa: E402


class HostBuffer:
    device = 0

    def __init__(self, total, value):
        self.array = np.full(max(total, 4096), value, dtype=np.uint8)
        self.address, self.nbytes = self.array.ctypes.data, self.array.nbytes

    def all_equal(self, value, end, start=0):
        return bool((self.array[start:end] == value).all())


class Dram:
    kind = "DRAM"

    def buffer(self, side, total, value):
        return HostBuffer(total, value)


if __name__ == "__main__":
    nixl_pair.main(Dram(), sys.argv[1], sys.argv[2:])
