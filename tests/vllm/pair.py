"""vLLM's NIXL connectors over the backend TCPX: a prefill and a decode instance in two processes, each with vLLM's own scheduler and both
roles of the connector, pulling (NixlConnector) or pushing (NixlPushConnector). Only the model is replaced: prefill writes bytes that depend on
request, layer, block and head where the model would write keys and values, decode compares what arrived. The ranks of tensor parallelism of an
instance are connectors in one process, each with an agent and a cache of its own. This program is the proxy between them. Run it with run.sh.

    pair.py [--requests 36] [--tokens 1024] [--layers 32] [--heads 8] [--head-size 128] [--backend TCPX] [--stop-prefill SECONDS]
            [--push [--overlap]] [--prefill-tp 1] [--decode-tp 1]
"""

import argparse
import contextlib
import copy
import json
import os
import random
import socket
import sys
import tempfile
import time
import unittest.mock

from sides import Side

# vLLM's attention on CPUs takes blocks of multiples of 32 tokens.
BLOCK = 32
EOS = 2


def free_port():
    """A port below the ephemeral ports."""
    for port in random.sample(range(15000, 30000), 100):
        with socket.socket() as listener:
            try:
                listener.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise SystemExit("no free port")


def describe_model(folder, options):
    """The few files from which vLLM learns a model's shape. It has no weights."""
    shape = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336,
        "num_hidden_layers": options.layers, "num_attention_heads": 32, "num_key_value_heads": options.heads, "head_dim": options.head_size,
        "vocab_size": 32000, "max_position_embeddings": 65536, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "torch_dtype": "bfloat16",
        "bos_token_id": 1, "eos_token_id": EOS,
    }
    with open(os.path.join(folder, "config.json"), "w", encoding="utf-8") as file:
        json.dump(shape, file)
    return folder


@contextlib.contextmanager
def rank_of(number, size):
    """What a connector sees as its place among the ranks of its instance while it is made."""
    from vllm.distributed.kv_transfer.kv_connector.v1.nixl import base_worker

    with unittest.mock.patch.multiple(base_worker, get_tensor_model_parallel_rank=lambda: number,
                                      get_tensor_model_parallel_world_size=lambda: size):
        yield


class Rank:
    """A rank of tensor parallelism: its connector, and its heads of the KV cache."""

    def __init__(self, number, config, layers, blocks):
        import torch
        from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
        from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole
        from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec, KVCacheTensor

        size, heads = config.parallel_config.tensor_parallel_size, config.model_config.get_total_num_kv_heads()
        held, width = max(1, heads // size), config.model_config.get_head_size()
        names = [f"model.layers.{i}.self_attn.attn" for i in range(layers)]
        spec = FullAttentionSpec(block_size=BLOCK, num_kv_heads=held, head_size=width, dtype=torch.bfloat16)
        page = spec.page_size_bytes
        self.cache_config = KVCacheConfig(
            num_blocks=blocks,
            kv_cache_tensors=[KVCacheTensor(size=page * blocks, layers=[n], layer_stride=page * blocks, block_stride=page) for n in names],
            kv_cache_groups=[KVCacheGroupSpec(names, spec)],
        )
        caches = {name: torch.zeros((blocks, held, BLOCK, 2 * width), dtype=torch.bfloat16) for name in names}
        # Its part of each block of the whole model.
        first = number * heads // size * (page // held)
        self.part = slice(first, first + page)
        self.bytes = [cache.view(torch.uint8).view(blocks, page) for cache in caches.values()]
        with rank_of(number, size):
            self.connector = KVConnectorFactory.create_connector(config, KVConnectorRole.WORKER, self.cache_config)
            self.connector.register_kv_caches(caches)

    def transfer(self, metadata, finished, compute):
        """The connector's part of a step, around the model's. Returns what the connector reports to the scheduler."""
        from vllm.v1.outputs import KVConnectorOutput

        # Ranks are processes in vLLM: each changes a copy.
        self.connector.bind_connector_metadata(copy.deepcopy(metadata))
        compute(self)
        self.connector.start_load_kv(None)
        self.connector.wait_for_save()
        results = self.connector.get_transfer_results(finished)
        failed = self.connector.get_block_ids_with_load_errors()
        self.connector.clear_connector_metadata()
        return KVConnectorOutput(finished_sending=results.finished_sending, finished_recving=results.finished_recving,
                                 failed_recving=results.failed_recving, invalid_block_ids=failed)


class Instance:
    """A vLLM instance without a model and a front end: scheduler, connectors, KV cache."""

    def __init__(self, role, model, options, blocks, port):
        os.environ.update(VLLM_NIXL_SIDE_CHANNEL_HOST="127.0.0.1", VLLM_NIXL_SIDE_CHANNEL_PORT=str(port), VLLM_LOGGING_LEVEL="WARNING")
        # The wheel is the one for CUDA; without a GPU it would take no platform at all.
        import vllm.platforms
        from vllm.platforms.cpu import CpuPlatform

        vllm.platforms._current_platform = CpuPlatform()
        import torch
        from vllm.config import set_current_vllm_config
        from vllm.distributed.kv_transfer.kv_connector.utils import KVOutputAggregator
        from vllm.distributed.parallel_state import init_distributed_environment, initialize_model_parallel
        from vllm.utils.hashing import sha256
        from vllm.v1.core.kv_cache_utils import init_none_hash
        from vllm.v1.core.sched.scheduler import Scheduler
        from vllm.v1.structured_output import StructuredOutputManager

        self.torch, self.role = torch, role
        init_none_hash(sha256)
        size = options.prefill_tp if role == "kv_producer" else options.decode_tp
        config = self.configure(role, model, options, size)
        config.cache_config.num_gpu_blocks = blocks
        with set_current_vllm_config(config):
            init_distributed_environment(1, 0, f"tcp://127.0.0.1:{free_port()}", 0, "gloo")
            initialize_model_parallel(1, 1)
            self.ranks = [Rank(number, config, options.layers, blocks) for number in range(size)]
            self.scheduler = Scheduler(config, self.ranks[0].cache_config, StructuredOutputManager(config), BLOCK, log_stats=False)
        self.scheduler.connector.set_xfer_handshake_metadata_pp_aware(
            {(0, number): rank.connector.get_handshake_metadata() for number, rank in enumerate(self.ranks)})
        self.aggregator = KVOutputAggregator.from_connector(self.scheduler.connector, size)
        # Where a proxy that does not wait for prefill sends decode.
        self.identity = {"remote_engine_id": config.kv_transfer_config.engine_id, "remote_host": "127.0.0.1", "remote_port": port, "tp_size": size}
        self.places = (torch.arange(options.heads * options.head_size * 2 * 2 * BLOCK) % 241).to(torch.uint8)
        self.requests, self.finished, self.marks, self.checked = {}, {}, {}, 0

    @staticmethod
    def configure(role, model, options, size):
        from vllm.config import CacheConfig, DeviceConfig, KVTransferConfig, ModelConfig, ParallelConfig, SchedulerConfig, VllmConfig

        cache = CacheConfig(block_size=BLOCK, gpu_memory_utilization=0.5, enable_prefix_caching=False)
        cache.kv_cache_layout = "LBHNC"
        tokens = options.tokens
        return VllmConfig(
            model_config=ModelConfig(model=model, skip_tokenizer_init=True, dtype="bfloat16", max_model_len=2 * tokens),
            scheduler_config=SchedulerConfig(max_num_seqs=64, max_num_batched_tokens=max(8192, tokens), max_model_len=2 * tokens,
                                             enable_chunked_prefill=True, is_encoder_decoder=False, async_scheduling=False),
            cache_config=cache,
            device_config=DeviceConfig("cpu"),
            parallel_config=ParallelConfig(tensor_parallel_size=size, distributed_executor_backend="external_launcher" if size > 1 else None),
            kv_transfer_config=KVTransferConfig(kv_connector="NixlPushConnector" if options.push else "NixlConnector", kv_role=role,
                                                kv_buffer_device="cpu", kv_connector_extra_config={"backends": [options.backend]}),
        )

    def content(self, rank, mark, layer, blocks):
        """The model's output on a rank: bytes that identify request, layer, block, head and offset."""
        torch = self.torch
        first = ((torch.arange(blocks) * 7 + layer * 31 + mark * 131) % 251).to(torch.uint8)
        return first[:, None] + self.places[None, rank.part]

    def submit(self, name, mark, tokens, parameters):
        from vllm import SamplingParams
        from vllm.utils.hashing import sha256
        from vllm.v1.core.kv_cache_utils import get_request_block_hasher
        from vllm.v1.request import Request

        sampling = SamplingParams(max_tokens=1 if self.role == "kv_producer" else 2)
        sampling.update_from_generation_config({}, EOS)
        request = Request(name, [(mark * 17 + i) % 30000 + 3 for i in range(tokens)], sampling, None,
                          block_hasher=get_request_block_hasher(BLOCK, sha256))
        request.kv_transfer_params = parameters
        self.requests[name], self.marks[name] = request, mark
        self.scheduler.add_request(request)

    def blocks_of(self, name):
        return self.scheduler.kv_cache_manager.get_block_ids(name)[0]

    def compute(self, rank, scheduled):
        """The model's part on a rank: prefill writes, decode compares before it would read."""
        for name, count in scheduled.num_scheduled_tokens.items():
            request, mark = self.requests[name], self.marks[name]
            full = request.num_prompt_tokens // BLOCK
            blocks = self.torch.tensor(self.blocks_of(name)[:full])
            if self.role == "kv_producer":
                for layer, data in enumerate(rank.bytes):
                    data[blocks] = self.content(rank, mark, layer, full)
            elif name not in self.finished and request.num_output_tokens == 0:
                if count > BLOCK:
                    raise SystemExit(f"{name}: decode had to compute {count} tokens: the transfer was abandoned")
                for layer, data in enumerate(rank.bytes):
                    arrived = data[blocks]
                    if not self.torch.equal(arrived, self.content(rank, mark, layer, full)):
                        raise SystemExit(f"{name}: wrong bytes in layer {layer}")
                    self.checked += arrived.numel()

    def step(self):
        """One step of the engine. Returns finished requests, with the parameters for the other instance, and the number of blocks that failed."""
        from vllm.v1.outputs import ModelRunnerOutput

        scheduled = self.scheduler.schedule()
        # A request has a token once its whole prompt is there.
        names = list(scheduled.num_scheduled_tokens)
        tokens = [[5] if self.requests[n].num_computed_tokens >= self.requests[n].num_prompt_tokens else [] for n in names]
        outputs = [ModelRunnerOutput(names, {n: i for i, n in enumerate(names)}, tokens, kv_connector_output=rank.transfer(
            scheduled.kv_connector_metadata, scheduled.finished_req_ids, lambda rank: self.compute(rank, scheduled))) for rank in self.ranks]
        output = self.aggregator.aggregate(outputs)
        failed = len(output.kv_connector_output.invalid_block_ids)
        done = {}
        for outputs in self.scheduler.update_from_output(scheduled, output).values():
            for one in outputs.outputs:
                if one.finished:
                    done[one.request_id] = (str(one.finish_reason), one.kv_transfer_params)
        return done, failed


def serve(pipe, arguments):
    instance = Instance(**arguments)
    pipe.send(instance.identity)
    while True:
        while pipe.poll(0):
            message = pipe.recv()
            if message is None:
                pipe.send(instance.checked)
                pipe.recv()
                os._exit(0)
            instance.submit(*message)
        done, failed = instance.step()
        for name, what in done.items():
            instance.finished[name] = what
            pipe.send((name, *what, failed))
        time.sleep(0.001)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=36)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--heads", type=int, default=8, help="KV heads of the model")
    parser.add_argument("--head-size", type=int, default=128)
    parser.add_argument("--backend", default="TCPX")
    parser.add_argument("--push", action="store_true", help="prefill writes, instead of decode reading")
    parser.add_argument("--overlap", action="store_true", help="with --push: decode gets every second request before prefill")
    parser.add_argument("--prefill-tp", type=int, default=1, help="ranks of prefill")
    parser.add_argument("--decode-tp", type=int, default=1, help="ranks of decode")
    parser.add_argument("--stop-prefill", type=float, default=0, help="seconds for which prefill stands still half-way, with nothing in flight")
    options = parser.parse_args()
    if options.overlap and not options.push:
        parser.error("--overlap needs --push: a pull reads what prefill has finished")
    each = options.tokens // BLOCK + 2
    sides = []
    with tempfile.TemporaryDirectory() as folder:
        model = describe_model(folder, options)
        for name, role in (("prefill", "kv_producer"), ("decode", "kv_consumer")):
            sides.append(Side(name, serve, {"role": role, "model": model, "options": options, "blocks": each * 8 + 8, "port": free_port()}))
        identity, _ = (side.answer(900) for side in sides)
        run(options, *sides, identity)


def run(options, prefill, decode, identity):
    """Sends every request to prefill and to decode, with the parameters from prefill or, with --overlap, before prefill has it. Four at a time."""
    begin, failures, batch = time.monotonic(), 0, 4
    for first in range(0, options.requests, batch):
        numbers = range(first, min(first + batch, options.requests))
        # vLLM adds eight random digits to a request's name in each instance. A push finds its request by what stands before them.
        names = {number: (f"request-{number}-{number:08x}", f"request-{number}-{number + 0x10000000:08x}") for number in numbers}
        early = [number for number in numbers if options.overlap and number % 2]
        for number in early:
            decode.send((names[number][1], number, options.tokens,
                         {**identity, "do_remote_decode": False, "do_remote_prefill": True, "remote_request_id": names[number][0]}))
        for number in numbers:
            prefill.send((names[number][0], number, options.tokens, {"do_remote_decode": True, "do_remote_prefill": False}))
        for _ in numbers:
            name, reason, parameters, _ = prefill.answer(180)
            if not parameters:
                raise SystemExit(f"{name} ended with {reason} and says nothing to decode")
            number = int(name.split("-")[1])
            if number not in early:
                decode.send((names[number][1], number, options.tokens, parameters))
        for _ in numbers:
            name, reason, _, failed = decode.answer(180)
            failures += failed
            print(f"{name}: {reason}" + (f", {failed} blocks failed" if failed else ""), flush=True)
        if options.stop_prefill and first <= options.requests // 2 < first + batch:
            prefill.stand_still(options.stop_prefill)
    seconds = time.monotonic() - begin
    decode.send(None)
    checked = decode.answer()
    # More ranks than heads hold a head several times.
    heads = max(options.heads, options.decode_tp)
    expected = options.requests * (options.tokens // BLOCK) * BLOCK * heads * options.head_size * 2 * 2 * options.layers
    print(f"{options.requests} requests, {checked / 1e9:.2f} GB compared, {seconds:.1f} s, {failures} blocks failed", flush=True)
    for side in (prefill, decode):
        side.process.kill()
    sys.exit(0 if checked == expected and failures == 0 else 1)


if __name__ == "__main__":
    main()
