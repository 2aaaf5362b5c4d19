"""NCCL's send and receive between GPU 0 and GPU 1 in two processes, over only its socket transport. Needs torch and two GPUs.

A message goes there and comes back; its time is half of that, the median of the repetitions. Prints NCCL BYTES MICROSECONDS GB/S.

usage: nccl_sockets.py      NCCL_NSOCKS_PERTHREAD, NCCL_SOCKET_NTHREADS: as NCCL reads them
"""
import os
import sys
import tempfile
import time

import common

SIZES = [4 << 10, 1 << 20, 64 << 20, 256 << 20]
REPEATS = {4 << 10: 200, 1 << 20: 100}
FEW = 15
WARMUP = 5
ENVIRONMENT = {
    "NCCL_NET": "Socket",
    "NCCL_P2P_DISABLE": "1",
    "NCCL_SHM_DISABLE": "1",
    "NCCL_IB_DISABLE": "1",
    "NCCL_NVLS_ENABLE": "0",
    "NCCL_SOCKET_IFNAME": "lo",
}


def pattern(torch, size, device):
    """Bytes that depend on their offset."""
    return (torch.arange(size, device=device) * 2654435761 >> 13).to(torch.uint8)


def turn(dist, torch, tensor, rank):
    """One round trip."""
    for sender in (0, 1):
        if rank == sender:
            dist.send(tensor, 1 - rank)
        else:
            dist.recv(tensor, 1 - rank)
    torch.cuda.synchronize()


def measure(dist, torch, size, rank, device):
    want = pattern(torch, size, device)
    tensor = want.clone() if rank == 0 else torch.zeros_like(want)
    turn(dist, torch, tensor, rank)
    # Rank 0 could have kept its own bytes; rank 1 can only have received them.
    if not torch.equal(tensor, want):
        raise SystemExit(f"{size} bytes: other bytes arrived")
    del want
    times = []
    for i in range(WARMUP + REPEATS.get(size, FEW)):
        began = time.perf_counter()
        turn(dist, torch, tensor, rank)
        if i >= WARMUP:
            times.append((time.perf_counter() - began) / 2)
    return common.percentile(sorted(times), 50)


def side(rank, store):
    import torch
    import torch.distributed as dist

    os.environ.update(ENVIRONMENT)
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", init_method="file://" + store, rank=rank, world_size=2, device_id=device)
    for size in SIZES:
        seconds = measure(dist, torch, size, rank, device)
        if rank == 0:
            print(f"NCCL {size} {seconds * 1e6:.1f} {size / seconds / 1e9:.2f}", flush=True)
    dist.destroy_process_group()


def first(pipe, store):
    side(0, store)


def second(pipe, store):
    side(1, store)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        ended_well = common.run_pair(second, first, os.path.join(folder, "store"))
    sys.exit(not ended_well)
