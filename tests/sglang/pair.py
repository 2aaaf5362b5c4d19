"""SGLang's disaggregated prefill over TCPX between two processes: NixlKVManager in both roles as the scheduler makes it, NixlKVSender,
NixlKVReceiver and the bootstrap server, over pages in host memory. Real are all of these, their side channels over ZeroMQ and HTTP, NIXL's agent and
the plugin. Not there: the model, its scheduler and HTTP front end. Prefill writes bytes that tell request, layer and page; decode compares
them.

    pair.py [--requests N] [--pages N] [--stop-decode SECONDS]
"""

import argparse
import socket
import time

from sides import Side, conclude, serve

LAYERS, PAGE_SIZE, PAGE_BYTES, POOL, AUX_BYTES = 32, 64, 64 * 128 * 2, 512, 4096
HOST = "127.0.0.1"


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=36)
    parser.add_argument("--pages", type=int, default=64, help="pages of 64 tokens in a request")
    parser.add_argument("--stop-decode", type=float, default=0, metavar="SECONDS", help="stop decode half-way for so long")
    return parser.parse_args()


def value_of(request, layer, page):
    return (request * 31 + layer * 7 + page * 3) % 251


class Pool:
    """Keys and values of all layers, POOL pages each, as SGLang's memory pools describe them."""

    def __init__(self):
        import numpy as np

        self.layers = [np.zeros((POOL, PAGE_BYTES), dtype=np.uint8) for _ in range(2 * LAYERS)]
        self.aux = np.zeros((64, AUX_BYTES), dtype=np.uint8)

    def arguments(self):
        from sglang.srt.disaggregation.base.conn import KVArgs

        args = KVArgs()
        args.engine_rank = args.gpu_id = args.pp_rank = args.prefill_start_layer = args.system_dp_rank = 0
        args.kv_data_ptrs = [one.ctypes.data for one in self.layers]
        args.kv_data_lens = [one.nbytes for one in self.layers]
        args.kv_item_lens = [PAGE_BYTES] * len(self.layers)
        args.kv_data_mem_kinds = ["DRAM"] * len(self.layers)
        args.kv_layer_ids = list(range(LAYERS)) * 2
        args.kv_cache_dtype_str = "bfloat16"
        args.aux_data_ptrs, args.aux_data_lens, args.aux_item_lens = [self.aux.ctypes.data], [self.aux.nbytes], [AUX_BYTES]
        args.state_types, args.state_data_ptrs, args.state_data_lens, args.state_item_lens = [], [], [], []
        args.state_layer_ids, args.state_dim_per_tensor, args.state_slice_outer_counts, args.state_conv_shard_groups = [], [], [], []
        args.ib_device, args.page_size, args.kv_head_num, args.total_kv_head_num = "", PAGE_SIZE, 1, 1
        args.is_hybrid_mla_backend, args.rust_http_port, args.prefill_end_layer, args.mla_compression_ratios = False, None, None, None
        args.swa_kv_cache_layout = None
        return args


def manager(role, port, pool):
    """NixlKVManager of one role, with the configuration published as SGLang's launcher does, one rank wide."""
    from sglang.srt.disaggregation.nixl.conn import NixlKVManager
    from sglang.srt.disaggregation.utils import DisaggregationMode
    from sglang.srt.runtime_context import get_context, get_parallel
    from sglang.srt.server_args import ServerArgs

    settings = ServerArgs(model_path="none", device="cpu", disaggregation_mode=role, disaggregation_transfer_backend="nixl", host=HOST, port=port + 1,
                          disaggregation_bootstrap_port=port)
    get_context().set_server_args(settings)
    get_parallel().override_permanently(attn_tp_rank=0, attn_cp_rank=0, attn_dcp_rank=0, attn_dp_rank=0, pp_group=None)
    return NixlKVManager(pool.arguments(), DisaggregationMode(role), settings)


def wait_for(what, wanted, seconds=60):
    """Polls a sender or a receiver until it is in a state; the state it is in at last."""
    from sglang.srt.disaggregation.base.conn import KVPoll

    until = time.monotonic() + seconds
    while (state := what.poll()) < wanted and state != KVPoll.Failed and time.monotonic() < until:
        time.sleep(0.0005)
    return state


def prefill(pipe, port, pages):
    import numpy as np
    from sglang.srt.disaggregation.base.conn import KVPoll
    from sglang.srt.disaggregation.nixl.conn import NixlKVBootstrapServer, NixlKVSender

    _server = NixlKVBootstrapServer(HOST, port)
    time.sleep(1)
    pool = Pool()
    kv = manager("prefill", port, pool)

    def one(request):
        mine = np.arange(pages, dtype=np.int32) + (request * pages) % (POOL - pages)
        for layer, memory in enumerate(pool.layers):
            memory[mine] = np.array([value_of(request, layer, page) for page in range(pages)], dtype=np.uint8)[:, None]
        pool.aux[0] = request % 251
        sender = NixlKVSender(kv, f"{HOST}:{port}", request)
        state = wait_for(sender, KVPoll.WaitingForInput)
        if state == KVPoll.WaitingForInput:
            sender.init(pages, 0)
            # Two chunks, as chunked prefill sends them.
            sender.send(mine[:pages // 2])
            sender.send(mine[pages // 2:])
            state = wait_for(sender, KVPoll.Success)
        sender.clear()
        return int(state)

    serve(pipe, one)


def decode(pipe, port, pages):
    import numpy as np
    from sglang.srt.disaggregation.base.conn import KVPoll
    from sglang.srt.disaggregation.nixl.conn import NixlKVReceiver

    pool, random = Pool(), np.random.default_rng(1)
    kv = manager("decode", port, pool)
    while not kv.try_ensure_parallel_info(f"{HOST}:{port}"):
        time.sleep(0.1)

    def one(request):
        mine = random.permutation(POOL)[:pages].astype(np.int32)
        receiver = NixlKVReceiver(kv, f"{HOST}:{port}", request)
        receiver.init(0)
        receiver.send_metadata(mine, 1)
        state = wait_for(receiver, KVPoll.Success)
        wrong = sum(not (memory[page] == value_of(request, layer, number)).all()
                    for layer, memory in enumerate(pool.layers) for number, page in enumerate(mine))
        wrong += not (pool.aux[1] == request % 251).all()
        receiver.clear()
        return int(state), int(wrong)

    serve(pipe, one)


def main():
    options = arguments()
    with socket.create_server((HOST, 0)) as one:
        port = one.getsockname()[1]
    sides = []
    for name, target in (("prefill", prefill), ("decode", decode)):
        sides.append(Side(name, target, port, options.pages))
        sides[-1].answer(400)
    first, second = sides
    begin, failed = time.monotonic(), []
    for request in range(options.requests):
        if options.stop_decode and request == options.requests // 2:
            second.stand_still(options.stop_decode)
            begin += options.stop_decode
        first.send(request)
        second.send(request)
        sent, (received, wrong) = first.answer(), second.answer()
        if (sent, received, wrong) != (4, 4, 0):
            failed.append(f"request {request}: states {sent} and {received} (4 is success), {wrong} pages wrong")
    conclude(sides, options.requests, failed, 2 * LAYERS * PAGE_BYTES * options.pages, time.monotonic() - begin)


if __name__ == "__main__":
    main()
