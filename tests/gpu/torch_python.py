#!/usr/bin/env python3
"""uccl_tcpx over GPU memory: two processes with torch write and read tensors, slices, lists of slices and arrays with
__cuda_array_interface__, and look at every byte, also beside what was transferred.

    LIBUCCL_P2P=libuccl_p2p.so PYTHONPATH=python torch_python.py
"""
import asyncio
import subprocess
import sys

import torch

from uccl_tcpx import p2p

SIZE = 3 << 20
BLOCK, BLOCKS = 4096, 256
LAST = f"cuda:{torch.cuda.device_count() - 1}"


def pattern(seed, size, device):
    """Bytes that depend on their offset, so that a misplaced block is detected."""
    n = torch.arange(size, dtype=torch.int64, device=device)
    return ((n * 131 + (n >> 8) * 17 + seed * 7) % 251).to(torch.uint8)


def same(tensor, expected, what):
    torch.cuda.synchronize()
    wrong = (tensor != expected).nonzero().flatten()
    assert wrong.numel() == 0, f"{what}: {wrong.numel()} of {tensor.numel()} bytes are wrong, the first at {wrong[0].item()}"


def other():
    """The target: a tensor whose FIFO item it prints; then it fills it or tells its content, as each line of standard input asks."""
    memory = torch.zeros(SIZE, dtype=torch.uint8, device=LAST)
    torch.cuda.synchronize()
    with p2p.Endpoint(torch.cuda.device_count() - 1) as endpoint:
        _, region = endpoint.reg(memory)
        slices = [memory[i * BLOCK : (i + 1) * BLOCK] for i in range(BLOCKS)]
        items = [endpoint.advertise(region, part)[1].hex() for part in [memory, *slices]]
        print(endpoint.get_metadata().hex(), *items, flush=True)
        for line in sys.stdin:
            what, seed, begin, end = line.split()
            expected = torch.zeros(SIZE, dtype=torch.uint8, device=LAST)
            expected[int(begin) : int(end)] = pattern(int(seed), int(end) - int(begin), LAST)
            if what == "fill":
                memory.copy_(expected)
                torch.cuda.synchronize()
            else:
                same(memory, expected, f"the target's bytes {begin} to {end}")
            print("ok", flush=True)


def main():
    process = subprocess.Popen([sys.executable, __file__, "other"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(*words):
        print(*words, file=process.stdin, flush=True)
        answer = process.stdout.readline().strip()
        assert answer == "ok", f"the target ended: {answer}"

    metadata, item, *items = (bytes.fromhex(word) for word in process.stdout.readline().split())
    with p2p.Endpoint(0) as endpoint:
        _, peer = endpoint.add_remote_endpoint(metadata)
        whole = torch.zeros(SIZE, dtype=torch.uint8, device="cuda:0")
        halves = torch.zeros((64, SIZE // 128), dtype=torch.float16, device="cuda:0")
        larger = torch.zeros(SIZE + 300, dtype=torch.uint8, device="cuda:0")
        buffers = [("a tensor", whole, whole), ("float16", halves, halves.view(torch.uint8).flatten()), ("a slice at an odd address", larger[101 : 101 + SIZE], larger[101 : 101 + SIZE])]
        try:
            import cupy

            array = cupy.zeros(SIZE, dtype=cupy.uint8)
            buffers.append(("an array of CuPy", array, torch.as_tensor(array, device="cuda:0")))
        except ImportError:
            print("note: without CuPy")
        for seed, (name, buffer, content) in enumerate(buffers, 1):
            _, region = endpoint.reg(buffer)
            content.copy_(pattern(seed, SIZE, "cuda:0"))
            torch.cuda.synchronize()
            assert endpoint.write(peer, region, buffer, None, item) is True
            ask("look", seed, 0, SIZE)
            ask("fill", seed + 50, 0, SIZE)
            assert endpoint.read(peer, region, buffer, None, item) is True
            same(content, pattern(seed + 50, SIZE, "cuda:0"), name)
            assert endpoint.dereg(region)
        assert int(larger[:101].sum()) + int(larger[101 + SIZE :].sum()) == 0, "bytes beside the slice were written"

        # A list of slices, in asyncio.
        _, region = endpoint.reg(whole)
        blocks = [whole[i * 2 * BLOCK : (2 * i + 1) * BLOCK] for i in range(BLOCKS)]
        ask("fill", 99, 0, SIZE)
        whole.zero_()
        torch.cuda.synchronize()

        async def read_all():
            _, transfer = endpoint.readv_async(peer, [region] * BLOCKS, blocks, None, items)
            await endpoint.aio.wait(transfer)

        asyncio.run(read_all())
        same(torch.cat(blocks), pattern(99, BLOCKS * BLOCK, "cuda:0"), f"{BLOCKS} blocks")
        assert all(int(whole[(2 * i + 1) * BLOCK : (2 * i + 2) * BLOCK].sum()) == 0 for i in range(BLOCKS)), "bytes beside the blocks were written"
        print(endpoint.stats_text().splitlines()[0])
    process.stdin.close()
    assert process.wait(30) == 0
    print(f"{len(buffers)} kinds of GPU memory")


if __name__ == "__main__":
    other() if sys.argv[1:] == ["other"] else main()
