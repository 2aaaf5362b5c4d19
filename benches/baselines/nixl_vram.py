"""NIXL with a backend (UCX by default) between two processes over loopback, from the first GPU to the last. Needs torch and a nixl wheel.

usage: nixl_vram.py SECONDS [ROW...]    variables: see nixl_pair.py; UCX_TLS=tcp,cuda_copy, which is what a cluster without RDMA has
"""
import os
import sys

os.environ.setdefault("UCX_TLS", "tcp,cuda_copy")
os.environ.setdefault("NIXL_LOG_LEVEL", "WARN")
import nixl_pair  # noqa: E402

TOTAL = 64 << 20
ROWS = [f"{op}:{total}:{block}" for total, block in ((TOTAL, TOTAL), (TOTAL, 32 << 10), (TOTAL, 4 << 10), (4096, 4096)) for op in ("WRITE", "READ")]


class GpuBuffer:
    def __init__(self, device, total, value):
        import torch

        self.tensor = torch.full((max(total, 4096),), value, dtype=torch.uint8, device=f"cuda:{device}")
        # NIXL moves the memory's content at the time of the post; it knows nothing of streams.
        torch.cuda.synchronize(device)
        self.address, self.nbytes, self.device = self.tensor.data_ptr(), self.tensor.numel(), device

    def all_equal(self, value, end, start=0):
        return bool((self.tensor[start:end] == value).all().item())


class Vram:
    kind = "VRAM"

    def buffer(self, side, total, value):
        import torch

        device = 0 if side == 0 else torch.cuda.device_count() - 1
        torch.cuda.set_device(device)
        return GpuBuffer(device, total, value)


if __name__ == "__main__":
    nixl_pair.main(Vram(), sys.argv[1], sys.argv[2:] or ROWS)
