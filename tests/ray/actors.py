"""Two Ray actors that hand tensors to each other through Ray's NIXL transport. Every element is checked, and each actor's log says that the bytes
went over this library."""

import sys

import ray
import torch

SHAPES = [(1,), (7, 13), (1 << 20,), (64, 1 << 18)]
ROUNDS = 3


def tensors(seed):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 1 << 30, shape, dtype=torch.int32, generator=generator) for shape in SHAPES]


@ray.remote(num_cpus=0)
class Actor:
    @ray.method(tensor_transport="nixl")
    def make(self, seed):
        return tensors(seed)

    def check(self, seed, got):
        mine = tensors(seed)
        return [(tuple(g.shape), bool(torch.equal(g, m))) for g, m in zip(got, mine, strict=True)]

    def libraries(self):
        """The NIXL plugins that the process has loaded, and the backend that its agent names."""
        from ray.experimental.rdt.util import get_tensor_transport_manager

        manager = get_tensor_transport_manager("NIXL")
        with open("/proc/self/maps") as maps:
            loaded = {line.split()[-1] for line in maps if "plugin_TCPX" in line or "plugin_UCX" in line}
        return sorted(loaded), manager._backend


def main():
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=True)
    a, b = Actor.remote(), Actor.remote()
    for seed in range(ROUNDS):
        for source, sink in ((a, b), (b, a)):
            got = ray.get(sink.check.remote(seed, source.make.remote(seed)))
            assert got == [(shape, True) for shape in SHAPES], got
            print(f"round {seed}: {got}")
    for actor in (a, b):
        loaded, backend = ray.get(actor.libraries.remote())
        assert backend == "UCX" and loaded and all("nixl_tcpx" in file for file in loaded), (loaded, backend)
        print(f"an actor's agent names {backend} and has loaded {', '.join(loaded)}")
    # What was received may be handed to the driver, too.
    got = ray.get(a.make.remote(99))
    assert all(torch.equal(g, m) for g, m in zip(got, tensors(99), strict=True))
    print(f"ray {ray.__version__}: {ROUNDS * 2 + 1} lists of {len(SHAPES)} tensors, every element right")


if __name__ == "__main__":
    sys.exit(main())
