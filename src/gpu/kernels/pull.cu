// The pull kernel: copies a list of pieces from memory of another process or GPU into memory of its own GPU. Any alignment, any length, any
// order. Compiled by NVRTC without headers (scripts/build-kernels). Knows addresses and lengths only; whether a piece may be copied, its
// caller has checked.
//
// A warp takes a batch of pieces at a time. The first two batches of each warp are dealt out beforehand; later ones it draws from a
// counter, so that blocks which start late, on a GPU that is busy, hold up nobody. What describes the next batch is on its way over PCIe
// while a batch is copied. The pull is over when as many pieces are done as there are, even if blocks without work have not begun.

#include "bytes.cuh"

// Layout shared with src/gpu/pull_launcher.rs, which asserts the same numbers.
struct UcclPiece {
    uccl_u64 src;
    uccl_u64 dst;
    uccl_u64 len;  // at most UCCL_PULL_UNIT
};

#define UCCL_PULL_THREADS 512u
#define UCCL_PULL_NEAR 40u            // pieces inside the parameters
#define UCCL_PULL_UNIT (1u << 30)     // a piece's length, at most
#define UCCL_PULL_SMALL 1024u         // batches without a longer piece are copied by groups of 8 lanes

struct UcclPullState {                // zero between launches
    uccl_u32 drawn;
    uccl_u32 done;
    uccl_u32 ended;
    uccl_u32 reserved;
};

struct __align__(16) UcclPullArgs {
    uccl_u64 pieces;                  // UcclPiece[count] in mapped host memory or device memory; 0: `near`
    uccl_u64 state;                   // UcclPullState in device memory
    uccl_u64 status;                  // u32 in mapped host memory: `sequence` when the pull is over
    uccl_u32 count;
    uccl_u32 batch;                   // pieces a warp takes at a time, 1 to 32
    uccl_u32 sequence;
    uccl_u32 reserved;
    uccl_u64 unused;
    UcclPiece near[UCCL_PULL_NEAR];
};
static_assert(sizeof(UcclPiece) == 24 && sizeof(UcclPullState) == 16 && sizeof(UcclPullArgs) == 48 + 24 * UCCL_PULL_NEAR, "pull");

// A few short aligned pieces, for the time from a launch to its end: little code, little to read, one block.
#define UCCL_FEW 8u
#define UCCL_FEW_UNIT 2048u

struct __align__(16) UcclFewArgs {
    uccl_u64 status;
    uccl_u32 count;                   // warps of the launch, at most UCCL_FEW
    uccl_u32 sequence;
    UcclPiece near[UCCL_FEW];         // all a multiple of 16, at most UCCL_FEW_UNIT bytes each
};
static_assert(sizeof(UcclFewArgs) == 16 + 24 * UCCL_FEW, "few");

// grid: 1; block: 32 * count.
extern "C" __global__ void __launch_bounds__(256) uccl_pull_few(const __grid_constant__ UcclFewArgs args) {
    const uccl_u32 lane = threadIdx.x & 31u;
    const UcclPiece& piece = args.near[threadIdx.x >> 5];
    const uccl_u64 src = piece.src + lane * 16u, dst = piece.dst + lane * 16u;
    const int left = (int)((uccl_u32)piece.len >> 4) - (int)lane;
    uint4 v[4];
    uccl_load_batch<32, false, 0, 4>(v, src, left);
    uccl_store_batch<32, false, 0, 4>(v, dst, left);
    __syncthreads();
    if (threadIdx.x != 0) return;
    __threadfence_system();
    asm volatile("st.volatile.global.u32 [%0], %1;" ::"l"(args.status), "r"(args.sequence) : "memory");
}

struct UcclHand {  // a lane's piece of a batch
    uccl_u64 src, dst;
    uccl_u32 len;
};

static __device__ __forceinline__ UcclHand uccl_take(const UcclPullArgs& args, uccl_u32 at, uccl_u32 lane) {
    UcclHand h{0, 0, 0};
    if (lane >= args.batch || at >= args.count || lane >= args.count - at) return h;
    if (args.pieces == 0) {
        const UcclPiece& p = args.near[at + lane];
        h.src = p.src;
        h.dst = p.dst;
        h.len = (uccl_u32)p.len;
        return h;
    }
    // Past the first-level cache: another pull on this multiprocessor may have read the same place of the list's ring.
    const uccl_u64 p = args.pieces + (uccl_u64)(at + lane) * sizeof(UcclPiece);
    asm volatile("ld.global.cg.u64 %0, [%1];" : "=l"(h.src) : "l"(p));
    asm volatile("ld.global.cg.u64 %0, [%1 + 8];" : "=l"(h.dst) : "l"(p));
    asm volatile("ld.global.cg.u32 %0, [%1 + 16];" : "=r"(h.len) : "l"(p));
    return h;
}

// Copies the batch that the lanes hold, a group of W lanes to a piece.
template <uccl_u32 W>
static __device__ __forceinline__ void uccl_pull_batch(const UcclHand& h, uccl_u32 n, uccl_u32 lane) {
#pragma unroll 1
    for (uccl_u32 i = 0; i < n; i += 32u / W) {
        const uccl_u32 from = (i + lane / W) & 31u;
        const uccl_u64 src = __shfl_sync(0xffffffffu, h.src, from), dst = __shfl_sync(0xffffffffu, h.dst, from);
        const uccl_u32 len = __shfl_sync(0xffffffffu, h.len, from);
        if (len != 0) uccl_copy<W, 4>(dst, src, len, lane % W);
    }
}

// grid: blocks; block: UCCL_PULL_THREADS.
extern "C" __global__ void __launch_bounds__(512, 2) uccl_pull(const __grid_constant__ UcclPullArgs args) {
    __shared__ uccl_u32 done;
    const uccl_u32 tid = threadIdx.x, lane = tid & 31u;
    if (tid == 0) done = 0;
    __syncthreads();
    UcclPullState* state = reinterpret_cast<UcclPullState*>(args.state);
    const uccl_u32 warps = gridDim.x * (UCCL_PULL_THREADS / 32), warp = (tid >> 5) * gridDim.x + blockIdx.x;
    const uccl_u32 dealt = 2 * warps * args.batch;
    uccl_u32 at = warp * args.batch, then = at + warps * args.batch, mine = 0;
    UcclHand now = uccl_take(args, at, lane);
#pragma unroll 1
    while (at < args.count) {
        const uccl_u32 n = uccl_min(args.batch, args.count - at);
        uccl_u32 later = args.count;
        if (lane == 0 && dealt < args.count && then < args.count) later = dealt + atomicAdd(&state->drawn, args.batch);
        const UcclHand next = uccl_take(args, then, lane);
        if (__reduce_max_sync(0xffffffffu, now.len) > UCCL_PULL_SMALL)
            uccl_pull_batch<32>(now, n, lane);
        else
            uccl_pull_batch<8>(now, n, lane);
        mine += n;
        now = next;
        at = then;
        then = __shfl_sync(0xffffffffu, later, 0);
    }
    if (lane == 0 && mine != 0) atomicAdd(&done, mine);
    __syncthreads();
    if (tid != 0) return;
    // One thread tells the others' work: the barrier and its fence make every store of the block precede the arrival.
    uccl_u32 sum = done;
    if (gridDim.x > 1 && sum != 0) {
        __threadfence();
        sum += atomicAdd(&state->done, sum);
    }
    if (sum == args.count) {
        __threadfence_system();
        asm volatile("st.volatile.global.u32 [%0], %1;" ::"l"(args.status), "r"(args.sequence) : "memory");
    }
    if (gridDim.x == 1 && dealt >= args.count) return;
    // The last block leaves the counters as it found them. Stream order keeps the next launch away from them until then.
    __threadfence();
    if (atomicAdd(&state->ended, 1u) + 1u != gridDim.x) return;
    *reinterpret_cast<volatile uccl_u32*>(&state->drawn) = 0;
    *reinterpret_cast<volatile uccl_u32*>(&state->done) = 0;
    *reinterpret_cast<volatile uccl_u32*>(&state->ended) = 0;
}
