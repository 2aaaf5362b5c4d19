"""LMCache's disaggregated prefill over TCPX between two processes: a sender's and a receiver's PDBackend, as its configuration makes them, with
pools in host memory. Real are LMCache's back end, its allocator, its NIXL channel and its side channels over ZeroMQ; NIXL's agent; the plugin.
Not there: an engine that fills the cache. The sender writes bytes that tell request and chunk, the receiver compares them.

    pair.py [--requests N] [--chunks N] [--stop-receiver SECONDS]
"""

import argparse
import socket
import time
from types import SimpleNamespace

from sides import Side, conclude, serve

LAYERS, TOKENS, HEADS, WIDTH = 32, 256, 1, 128


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=24)
    parser.add_argument("--chunks", type=int, default=8, help="chunks of 256 tokens, 4 MiB, in a request")
    parser.add_argument("--stop-receiver", type=float, default=0, metavar="SECONDS", help="stop the receiver half-way for so long")
    return parser.parse_args()


def free_ports(count):
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def backend(role, ports, chunks):
    """PDBackend as LMCache makes it from its configuration file, and torch."""
    import torch
    from lmcache.v1.config import LMCacheEngineConfig
    from lmcache.v1.metadata import LMCacheMetadata
    from lmcache.v1.storage_backend.pd_backend import PDBackend

    shape = (LAYERS, 2, TOKENS, HEADS, WIDTH)
    config = LMCacheEngineConfig.from_defaults(
        chunk_size=TOKENS, enable_pd=True, transfer_channel="nixl", pd_role=role, nixl_backends=["TCPX"], pd_buffer_device="cpu",
        pd_buffer_size=2 * chunks * 2 * LAYERS * 2 * TOKENS * HEADS * WIDTH, pd_skip_proxy_notification=True,
        pd_peer_host="127.0.0.1" if role == "receiver" else None,
        pd_peer_init_port=[ports[0]] if role == "receiver" else None, pd_peer_alloc_port=[ports[1]] if role == "receiver" else None)
    metadata = LMCacheMetadata(model_name="none", world_size=1, local_world_size=1, worker_id=0, local_worker_id=0, kv_dtype=torch.bfloat16, kv_shape=shape)
    return PDBackend(config, metadata), torch


def key_of(torch, request, chunk):
    from lmcache.utils import CacheEngineKey

    return CacheEngineKey("none", 1, 0, request * 1000 + chunk, torch.bfloat16)


def value_of(request, chunk):
    return (request * 31 + chunk * 7) % 251


def receive(pipe, ports, chunks):
    store, torch = backend("receiver", ports, chunks)

    def one(request):
        wrong = 0
        for chunk in range(chunks):
            key = key_of(torch, request, chunk)
            if not store.contains(key):
                wrong += 1
                continue
            found = store.get_blocking(key)
            wrong += not bool((found.tensor.view(torch.uint8) == value_of(request, chunk)).all())
            # As LMCache's engine does after it has loaded a chunk.
            store.remove(key)
            found.ref_count_down()
        return wrong

    serve(pipe, one)


def send(pipe, ports, chunks):
    store, torch = backend("sender", ports, chunks)

    def one(request):
        keys, objects = [], []
        for chunk in range(chunks):
            memory = store.allocate(torch.Size((LAYERS, 2, TOKENS, HEADS, WIDTH)), torch.bfloat16)
            memory.tensor.view(torch.uint8).fill_(value_of(request, chunk))
            keys.append(key_of(torch, request, chunk))
            objects.append(memory)
        spec = SimpleNamespace(receiver_host="127.0.0.1", receiver_init_port=[ports[0]], receiver_alloc_port=[ports[1]], is_last_prefill=True,
                               req_id=str(request))
        try:
            written = store.batched_submit_put_task(keys, objects, spec)[0].result(60)
        except Exception as error:
            written = f"{type(error).__name__}: {error}"
        for memory in objects:
            memory.ref_count_down()
        return written

    serve(pipe, one)


def main():
    options = arguments()
    ports = free_ports(2)
    receiver, sender = Side("receiver", receive, ports, options.chunks), Side("sender", send, ports, options.chunks)
    for side in (receiver, sender):
        side.answer()
    begin, failed = time.monotonic(), []
    for request in range(options.requests):
        if options.stop_receiver and request == options.requests // 2:
            receiver.stand_still(options.stop_receiver)
            begin += options.stop_receiver
        sender.send(request)
        written = sender.answer()
        receiver.send(request)
        wrong = receiver.answer()
        if written != options.chunks or wrong:
            failed.append(f"request {request}: written {written}, wrong or missing {wrong} of {options.chunks}")
    conclude([receiver, sender], options.requests, failed, 2 * LAYERS * 2 * TOKENS * HEADS * WIDTH * options.chunks, time.monotonic() - begin)


if __name__ == "__main__":
    main()
