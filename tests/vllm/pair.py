"""vLLM's NixlConnector over the backend TCPX: a prefill and a decode instance in two processes, each with vLLM's own scheduler and both
roles of the connector. Only the model is replaced: prefill writes bytes that depend on request, layer and block where the model would write
keys and values, decode compares what arrived. This program is the proxy between them. Run it with run.sh.

    pair.py [--requests 36] [--tokens 4096] [--layers 32] [--backend TCPX] [--stop-prefill SECONDS]
"""

import argparse
import json
import os
import random
import socket
import sys
import tempfile
import time

from sides import Side

# vLLM's attention on CPUs takes blocks of multiples of 32 tokens.
BLOCK, HEADS, HEAD_SIZE = 32, 8, 128
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


def describe_model(folder, layers):
    """The few files from which vLLM learns a model's shape. It has no weights."""
    shape = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336,
        "num_hidden_layers": layers, "num_attention_heads": 32, "num_key_value_heads": HEADS, "head_dim": HEAD_SIZE, "vocab_size": 32000,
        "max_position_embeddings": 65536, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "torch_dtype": "bfloat16", "bos_token_id": 1,
        "eos_token_id": EOS,
    }
    with open(os.path.join(folder, "config.json"), "w", encoding="utf-8") as file:
        json.dump(shape, file)
    return folder


class Instance:
    """A vLLM instance without a model and a front end: scheduler, connector, KV cache."""

    def __init__(self, role, model, layers, blocks, tokens, backend, port):
        os.environ.update(VLLM_NIXL_SIDE_CHANNEL_HOST="127.0.0.1", VLLM_NIXL_SIDE_CHANNEL_PORT=str(port), VLLM_LOGGING_LEVEL="WARNING")
        # The wheel is the one for CUDA; without a GPU it would take no platform at all.
        import vllm.platforms
        from vllm.platforms.cpu import CpuPlatform

        vllm.platforms._current_platform = CpuPlatform()
        import torch
        from vllm.config import set_current_vllm_config
        from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
        from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole
        from vllm.distributed.parallel_state import init_distributed_environment, initialize_model_parallel
        from vllm.utils.hashing import sha256
        from vllm.v1.core.kv_cache_utils import init_none_hash
        from vllm.v1.core.sched.scheduler import Scheduler
        from vllm.v1.structured_output import StructuredOutputManager

        self.torch, self.layers, self.role = torch, layers, role
        init_none_hash(sha256)
        config = self.configure(role, model, tokens, backend)
        config.cache_config.num_gpu_blocks = blocks
        with set_current_vllm_config(config):
            init_distributed_environment(1, 0, f"tcp://127.0.0.1:{free_port()}", 0, "gloo")
            initialize_model_parallel(1, 1)
            caches = self.kv_caches(config, blocks)
            self.worker = KVConnectorFactory.create_connector(config, KVConnectorRole.WORKER, self.cache_config)
            self.worker.register_kv_caches(caches)
            self.scheduler = Scheduler(config, self.cache_config, StructuredOutputManager(config), BLOCK, log_stats=False)
        self.scheduler.connector.set_xfer_handshake_metadata_pp_aware({(0, 0): self.worker.get_handshake_metadata()})
        self.requests, self.finished, self.marks, self.checked = {}, {}, {}, 0

    @staticmethod
    def configure(role, model, tokens, backend):
        from vllm.config import CacheConfig, DeviceConfig, KVTransferConfig, ModelConfig, SchedulerConfig, VllmConfig

        cache = CacheConfig(block_size=BLOCK, gpu_memory_utilization=0.5, enable_prefix_caching=False)
        cache.kv_cache_layout = "LBHNC"
        return VllmConfig(
            model_config=ModelConfig(model=model, skip_tokenizer_init=True, dtype="bfloat16", max_model_len=2 * tokens),
            scheduler_config=SchedulerConfig(max_num_seqs=64, max_num_batched_tokens=max(8192, tokens), max_model_len=2 * tokens,
                                             enable_chunked_prefill=True, is_encoder_decoder=False, async_scheduling=False),
            cache_config=cache,
            device_config=DeviceConfig("cpu"),
            kv_transfer_config=KVTransferConfig(kv_connector="NixlConnector", kv_role=role, kv_buffer_device="cpu",
                                                kv_connector_extra_config={"backends": [backend]}),
        )

    def kv_caches(self, config, blocks):
        from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec, KVCacheTensor

        names = [f"model.layers.{i}.self_attn.attn" for i in range(self.layers)]
        spec = FullAttentionSpec(block_size=BLOCK, num_kv_heads=HEADS, head_size=HEAD_SIZE, dtype=self.torch.bfloat16)
        page = spec.page_size_bytes
        self.page = page
        self.cache_config = KVCacheConfig(
            num_blocks=blocks,
            kv_cache_tensors=[KVCacheTensor(size=page * blocks, layers=[n], layer_stride=page * blocks, block_stride=page) for n in names],
            kv_cache_groups=[KVCacheGroupSpec(names, spec)],
        )
        shape = (blocks, HEADS, BLOCK, 2 * HEAD_SIZE)
        caches = {name: self.torch.zeros(shape, dtype=self.torch.bfloat16) for name in names}
        self.places = (self.torch.arange(page) % 241).to(self.torch.uint8)
        self.bytes = [cache.view(self.torch.uint8).view(blocks, page) for cache in caches.values()]
        return caches

    def content(self, mark, layer, blocks):
        """The model's output: bytes that identify request, layer, block and offset."""
        torch = self.torch
        first = ((torch.arange(blocks) * 7 + layer * 31 + mark * 131) % 251).to(torch.uint8)
        return first[:, None] + self.places[None, :]

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

    def compute(self, scheduled):
        """The model's part: prefill writes, decode compares before it would read. The number of bytes compared."""
        for name, count in scheduled.num_scheduled_tokens.items():
            request, mark = self.requests[name], self.marks[name]
            full = request.num_prompt_tokens // BLOCK
            blocks = self.torch.tensor(self.blocks_of(name)[:full])
            if self.role == "kv_producer":
                for layer, data in enumerate(self.bytes):
                    data[blocks] = self.content(mark, layer, full)
            elif name not in self.finished and request.num_output_tokens == 0:
                if count > BLOCK:
                    raise SystemExit(f"{name}: decode had to compute {count} tokens: the transfer was abandoned")
                for layer, data in enumerate(self.bytes):
                    if not self.torch.equal(data[blocks], self.content(mark, layer, full)):
                        raise SystemExit(f"{name}: wrong bytes in layer {layer}")
                self.checked += full * self.page * len(self.bytes)

    def step(self):
        """One step of the engine. Returns finished requests, with the parameters for the other instance."""
        from vllm.v1.outputs import KVConnectorOutput, ModelRunnerOutput

        scheduled = self.scheduler.schedule()
        self.worker.bind_connector_metadata(scheduled.kv_connector_metadata)
        self.compute(scheduled)
        self.worker.start_load_kv(None)
        self.worker.wait_for_save()
        results = self.worker.get_transfer_results(scheduled.finished_req_ids)
        failed = self.worker.get_block_ids_with_load_errors()
        self.worker.clear_connector_metadata()
        # A request has a token once its whole prompt is there.
        names = [n for n, count in scheduled.num_scheduled_tokens.items()]
        tokens = [[5] if self.requests[n].num_computed_tokens >= self.requests[n].num_prompt_tokens else [] for n in names]
        output = ModelRunnerOutput(names, {n: i for i, n in enumerate(names)}, tokens, kv_connector_output=KVConnectorOutput(
            finished_sending=results.finished_sending, finished_recving=results.finished_recving, failed_recving=results.failed_recving,
            invalid_block_ids=failed))
        done = {}
        for outputs in self.scheduler.update_from_output(scheduled, output).values():
            for one in outputs.outputs:
                if one.finished:
                    done[one.request_id] = (str(one.finish_reason), one.kv_transfer_params)
        return done, len(failed)


def serve(pipe, arguments):
    instance = Instance(**arguments)
    pipe.send("ready")
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
    parser.add_argument("--backend", default="TCPX")
    parser.add_argument("--stop-prefill", type=float, default=0, help="seconds for which prefill stands still half-way, with nothing in flight")
    options = parser.parse_args()
    each = options.tokens // BLOCK + 2
    sides = []
    with tempfile.TemporaryDirectory() as folder:
        model = describe_model(folder, options.layers)
        for name, role in (("prefill", "kv_producer"), ("decode", "kv_consumer")):
            sides.append(Side(name, serve, {"role": role, "model": model, "layers": options.layers, "blocks": each * 8 + 8,
                                            "tokens": options.tokens, "backend": options.backend, "port": free_port()}))
        for side in sides:
            side.answer(900)
        run(options, *sides)


def run(options, prefill, decode):
    """Sends every request through prefill and then, with the parameters from prefill, through decode. Four at a time."""
    begin, failures, batch = time.monotonic(), 0, 4
    for first in range(0, options.requests, batch):
        numbers = range(first, min(first + batch, options.requests))
        for number in numbers:
            prefill.send((f"prefill-{number}", number, options.tokens, {"do_remote_decode": True, "do_remote_prefill": False}))
        for _ in numbers:
            name, reason, parameters, _ = prefill.answer(180)
            if not parameters:
                raise SystemExit(f"{name} ended with {reason} and says nothing to decode")
            number = int(name.split("-")[1])
            decode.send((f"decode-{number}", number, options.tokens, parameters))
        for _ in numbers:
            name, reason, _, failed = decode.answer(180)
            failures += failed
            print(f"{name}: {reason}" + (f", {failed} blocks failed" if failed else ""), flush=True)
        if options.stop_prefill and first <= options.requests // 2 < first + batch:
            prefill.stand_still(options.stop_prefill)
    seconds = time.monotonic() - begin
    decode.send(None)
    checked = decode.answer()
    expected = options.requests * (options.tokens // BLOCK) * BLOCK * HEADS * HEAD_SIZE * 2 * 2 * options.layers
    print(f"{options.requests} requests, {checked / 1e9:.2f} GB compared, {seconds:.1f} s, {failures} blocks failed", flush=True)
    for side in (prefill, decode):
        side.process.kill()
    sys.exit(0 if checked == expected and failures == 0 else 1)


if __name__ == "__main__":
    main()
