// The one copy kernel: scatters the fragments of received chunks (unpack) and gathers segments into staging (pack).
// Compiled by NVRTC without headers (scripts/build-kernels) and included as it is by tests/gpu/kernel_test.cu.
// Knows addresses and lengths only; what a chunk or a plugin is, it must not know beyond the layout of loadMeta.
//
// A job is one message of `size` bytes. Its flat side is contiguous (bounce buffer or staging); its segment side is a
// table of addresses sorted by message offset. Fragments (loadMeta) say which flat bytes are which message bytes; a job
// without fragments is one fragment, the whole message. Nothing on the PCIe path is cached by L2 and equal addresses are
// served one after another, so each block reads only its own strip of the fragments and its own window of the table, and
// small launches carry both inside the kernel's parameters.

typedef unsigned char uccl_u8;
typedef unsigned int uccl_u32;
typedef unsigned long long uccl_u64;

// loadMeta of the plugin's unpack queue.
struct UcclEntry {
    uccl_u32 src_off;
    uccl_u32 len;
    uccl_u64 dst_off;
};

// Layout shared with src/gpu/layout.rs, which asserts the same numbers.
struct UcclJob {
    uccl_u64 entries;          // UcclEntry[entry_count]; with UCCL_ENTRIES_INLINE an offset into the arguments; 0: one whole fragment
    uccl_u64 count;            // u64 the plugin counts its entries in, read before any flat byte; 0: entry_count stands
    uccl_u64 flat;             // first byte of the contiguous side
    uccl_u64 seg_start;        // u32[segments + 1], message offsets, first 0, last `size`; UCCL_SEGMENTS_INLINE: offset
    uccl_u64 seg_addr;         // u64[segments], addresses; UCCL_SEGMENTS_INLINE: offset
    uccl_u64 state;            // u64[2] in device memory, zero between launches: {counter, error}
    uccl_u64 status;           // u64[2] in mapped host memory, 16-byte aligned: {sequence << 32 | error, bytes}
    uccl_u32 size;             // bytes of the message, as announced
    uccl_u32 entry_count;      // entries the host counted; 1 for a whole fragment
    uccl_u32 segments;         // entries of the table
    uccl_u32 entries_per_strip;
    uccl_u32 parts;            // blocks that share a strip; more than 1 only with at most UCCL_THREADS entries in a strip
    uccl_u32 blocks;           // strips * parts, at most 8191
    uccl_u32 flags;            // UCCL_* below; bits 8..15: log2 of the bytes in a unit of work
    uccl_u32 sequence;         // not 0; tells this use of the status word from the last
};
static_assert(sizeof(UcclEntry) == 16, "loadMeta");
static_assert(sizeof(UcclJob) == 88, "job");

#define UCCL_THREADS 256u
#define UCCL_MAX_ENTRIES 2048u
#define UCCL_WINDOW 512u              // segments a block keeps in shared memory

#define UCCL_GATHER 1u                // segments -> flat; else flat -> segments
#define UCCL_ENTRIES_INLINE 2u
#define UCCL_SEGMENTS_INLINE 4u
#define UCCL_UNIT_SHIFT 8

#define UCCL_ERROR_RANGE 1u           // an entry leaves the message; bits 8..31: its index
#define UCCL_ERROR_COUNT 2u           // the plugin's count is over 2048, or not the one the host saw
#define UCCL_ERROR_TOTAL 3u           // entries do not add up to the message

// Kernel parameters: a header, the jobs, then whatever tables travel inline.
template <uccl_u32 BYTES>
struct __align__(16) UcclArgs {
    uccl_u32 jobs;
    uccl_u32 reserved[3];
    uccl_u8 blob[BYTES - 16];
};

// The offset is an immediate operand: a register pair for each of eight addresses would spill.
template <int OFFSET>
static __device__ __forceinline__ void uccl_load16(uint4& v, uccl_u64 a) {
    asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4 + %5];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(a), "n"(OFFSET));
}
template <int OFFSET>
static __device__ __forceinline__ void uccl_store16(uccl_u64 a, const uint4& v) {
    asm volatile("st.global.v4.u32 [%0 + %1], {%2, %3, %4, %5};" ::"l"(a), "n"(OFFSET), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
}
static __device__ __forceinline__ uccl_u32 uccl_load1(uccl_u64 a) {
    uccl_u32 v;
    asm volatile("ld.global.u8 %0, [%1];" : "=r"(v) : "l"(a));
    return v;
}
static __device__ __forceinline__ void uccl_store1(uccl_u64 a, uccl_u32 v) {
    asm volatile("st.global.u8 [%0], %1;" ::"l"(a), "r"(v) : "memory");
}
static __device__ __forceinline__ uccl_u32 uccl_min(uccl_u32 a, uccl_u32 b) { return a < b ? a : b; }
static __device__ __forceinline__ uccl_u32 uccl_max(uccl_u32 a, uccl_u32 b) { return a > b ? a : b; }

// 16 bytes that start q * 4 + r / 8 bytes into the 32 bytes a, b.
static __device__ __forceinline__ uint4 uccl_funnel(uint4 a, uint4 b, uccl_u32 q, uccl_u32 r) {
    const bool two = q & 2u, one = q & 1u;
    uccl_u32 t0 = two ? a.z : a.x, t1 = two ? a.w : a.y, t2 = two ? b.x : a.z, t3 = two ? b.y : a.w, t4 = two ? b.z : b.x, t5 = two ? b.w : b.y;
    uccl_u32 u0 = one ? t1 : t0, u1 = one ? t2 : t1, u2 = one ? t3 : t2, u3 = one ? t4 : t3, u4 = one ? t5 : t4;
    uint4 o;
    o.x = __funnelshift_r(u0, u1, r);
    o.y = __funnelshift_r(u1, u2, r);
    o.z = __funnelshift_r(u2, u3, r);
    o.w = __funnelshift_r(u3, u4, r);
    return o;
}

// Copies n bytes with a group of W lanes. Reads only 16-byte words that hold a source byte, writes only [dst, dst + n).
template <uccl_u32 W>
static __device__ __forceinline__ void uccl_copy(uccl_u64 dst, uccl_u64 src, uccl_u32 n, uccl_u32 lane) {
    const uccl_u32 head = uccl_min(n, (0u - (uccl_u32)dst) & 15u);
    const uccl_u32 words = (n - head) >> 4;
    const uccl_u32 body = words << 4;
    const uccl_u32 edge = n - body;  // head and tail bytes, below 32
    const uccl_u32 at = lane < head ? lane : lane + body;
    uccl_u32 byte = 0;
    if (lane < edge) byte = uccl_load1(src + at);
    const uccl_u64 d = dst + head, s = src + head;
    const uccl_u32 shift = (uccl_u32)s & 15u;
    if (lane < words) {
        constexpr int STEP = W * 16;
        uccl_u32 left = words - lane;  // words from this lane's next one to the end
        uccl_u64 to = d + lane * 16u;
        // Values of loads that are not made are set all the same: a register that may be unset stays live everywhere.
        const uint4 zero = make_uint4(0, 0, 0, 0);
        uint4 v0, v1 = zero, v2 = zero, v3 = zero;
        if (shift == 0) {
            uccl_u64 from = s + lane * 16u;
#pragma unroll 1
            for (; left > 3 * W; left -= 4 * W, from += 4 * STEP, to += 4 * STEP) {
                uccl_load16<0>(v0, from);
                uccl_load16<1 * STEP>(v1, from);
                uccl_load16<2 * STEP>(v2, from);
                uccl_load16<3 * STEP>(v3, from);
                uccl_store16<0>(to, v0);
                uccl_store16<1 * STEP>(to, v1);
                uccl_store16<2 * STEP>(to, v2);
                uccl_store16<3 * STEP>(to, v3);
                if (left <= 4 * W) {
                    left = 0;
                    break;
                }
            }
            if (left > 0) {
                uccl_load16<0>(v0, from);
                if (left > 1 * W) uccl_load16<1 * STEP>(v1, from);
                if (left > 2 * W) uccl_load16<2 * STEP>(v2, from);
                uccl_store16<0>(to, v0);
                if (left > 1 * W) uccl_store16<1 * STEP>(to, v1);
                if (left > 2 * W) uccl_store16<2 * STEP>(to, v2);
            }
        } else {
            uccl_u64 from = s - shift + lane * 16u;
            const uccl_u32 q = shift >> 2, r = (shift & 3u) * 8u;
            uint4 w0, w1 = zero, w2 = zero, w3 = zero;
#pragma unroll 1
            for (; left > 3 * W; left -= 4 * W, from += 4 * STEP, to += 4 * STEP) {
                uccl_load16<0>(v0, from);
                uccl_load16<16>(w0, from);
                uccl_load16<1 * STEP>(v1, from);
                uccl_load16<1 * STEP + 16>(w1, from);
                uccl_load16<2 * STEP>(v2, from);
                uccl_load16<2 * STEP + 16>(w2, from);
                uccl_load16<3 * STEP>(v3, from);
                uccl_load16<3 * STEP + 16>(w3, from);
                uccl_store16<0>(to, uccl_funnel(v0, w0, q, r));
                uccl_store16<1 * STEP>(to, uccl_funnel(v1, w1, q, r));
                uccl_store16<2 * STEP>(to, uccl_funnel(v2, w2, q, r));
                uccl_store16<3 * STEP>(to, uccl_funnel(v3, w3, q, r));
                if (left <= 4 * W) {
                    left = 0;
                    break;
                }
            }
            if (left > 0) {
                uccl_load16<0>(v0, from);
                uccl_load16<16>(w0, from);
                if (left > 1 * W) {
                    uccl_load16<1 * STEP>(v1, from);
                    uccl_load16<1 * STEP + 16>(w1, from);
                }
                if (left > 2 * W) {
                    uccl_load16<2 * STEP>(v2, from);
                    uccl_load16<2 * STEP + 16>(w2, from);
                }
                uccl_store16<0>(to, uccl_funnel(v0, w0, q, r));
                if (left > 1 * W) uccl_store16<1 * STEP>(to, uccl_funnel(v1, w1, q, r));
                if (left > 2 * W) uccl_store16<2 * STEP>(to, uccl_funnel(v2, w2, q, r));
            }
        }
    }
    if (lane < edge) uccl_store1(dst + at, byte);
    if (W < 32) {
#pragma unroll 1
        for (uccl_u32 i = lane + W; i < edge; i += W) {
            const uccl_u32 o = i < head ? i : i + body;
            uccl_store1(dst + o, uccl_load1(src + o));
        }
    }
}

// Last segment in [lo, hi) that starts at or before x; the one at lo does.
static __device__ __forceinline__ uccl_u32 uccl_find(const uccl_u32* start, uccl_u32 lo, uccl_u32 hi, uccl_u32 x) {
#pragma unroll 1
    while (hi - lo > 1) {
        const uccl_u32 mid = lo + (hi - lo) / 2;
        if (start[mid] <= x) lo = mid; else hi = mid;
    }
    return lo;
}

// The same by a whole warp, 32 probes a step: a step costs one round trip over PCIe.
static __device__ __forceinline__ uccl_u32 uccl_find_warp(const uccl_u32* start, uccl_u32 count, uccl_u32 x) {
    const uccl_u32 lane = threadIdx.x & 31u;
    uccl_u32 lo = 0, hi = count;
#pragma unroll 1
    while (hi - lo > 1) {
        const uccl_u32 step = (hi - lo + 31u) / 32u;
        const uccl_u32 probe = lo + lane * step;
        const bool below = probe < hi && start[probe] <= x;
        const uccl_u32 k = 31u - (uccl_u32)__clz((int)__ballot_sync(0xffffffffu, below));  // lane 0 is always below
        lo += k * step;
        hi = uccl_min(hi, lo + step);
    }
    return lo;
}

struct UcclShared {
    uccl_u32 first_unit[UCCL_THREADS + 1];  // exclusive prefix of units by entry
    uccl_u32 src[UCCL_THREADS], len[UCCL_THREADS], at[UCCL_THREADS];
    uccl_u32 start[UCCL_WINDOW + 1];
    uccl_u64 addr[UCCL_WINDOW];
    uccl_u32 warp_sum[UCCL_THREADS / 32], warp_min[UCCL_THREADS / 32], warp_max[UCCL_THREADS / 32];
    uccl_u64 warp_bytes[UCCL_THREADS / 32];
    uccl_u64 count;
    uccl_u32 error, lo, hi;
};

// Copies units [u0, u1) of the entries in shared memory, a group of W lanes to a unit. Returns the bytes this thread answers for.
template <uccl_u32 W>
static __device__ __forceinline__ uccl_u64 uccl_units(const UcclShared& sh, const UcclJob& job, uccl_u32 shift, uccl_u32 entries, uccl_u32 u0,
                                                     uccl_u32 u1, const uccl_u32* start, const uccl_u64* addr, uccl_u32 lo, uccl_u32 hi) {
    const uccl_u32 lane = threadIdx.x % W;
    uccl_u64 bytes = 0;
#pragma unroll 1
    for (uccl_u32 u = u0 + threadIdx.x / W; u < u1; u += UCCL_THREADS / W) {
        // Entries of length 0 have no unit: the last one that starts at or before u holds it.
        const uccl_u32 e = uccl_find(sh.first_unit, 0, entries, u);
        const uccl_u32 skip = (u - sh.first_unit[e]) << shift;
        uccl_u32 left = uccl_min(sh.len[e] - skip, 1u << shift);
        uccl_u32 x = sh.at[e] + skip;
        uccl_u64 flat = job.flat + sh.src[e] + skip;
        if (lane == 0) bytes += left;
        uccl_u32 s = uccl_find(start, lo, hi, x);
#pragma unroll 1
        while (true) {
            const uccl_u32 begin = start[s];
            const uccl_u32 n = uccl_min(left, start[s + 1] - x);
            const uccl_u64 seg = addr[s] + (x - begin);
            const bool gather = job.flags & UCCL_GATHER;
            uccl_copy<W>(gather ? flat : seg, gather ? seg : flat, n, lane);
            left -= n;
            if (left == 0) break;
            x += n;
            flat += n;
            s++;
        }
    }
    return bytes;
}

template <typename Args>
static __device__ __forceinline__ void uccl_copy_body(const Args& args) {
    const UcclJob& job = reinterpret_cast<const UcclJob*>(args.blob)[blockIdx.y];
    if (blockIdx.x >= job.blocks) return;
    __shared__ UcclShared sh;
    const uccl_u32 tid = threadIdx.x, lane = tid & 31u, warp = tid >> 5;
    const uccl_u32 strip = blockIdx.x / job.parts, part = blockIdx.x % job.parts;
    const uccl_u32 shift = (job.flags >> UCCL_UNIT_SHIFT) & 31u;
    const bool whole = job.entries == 0;
    const UcclEntry* entries =
        (job.flags & UCCL_ENTRIES_INLINE) ? reinterpret_cast<const UcclEntry*>(args.blob + job.entries) : reinterpret_cast<const UcclEntry*>(job.entries);
    const bool near_table = job.flags & UCCL_SEGMENTS_INLINE;
    const uccl_u32* starts = near_table ? reinterpret_cast<const uccl_u32*>(args.blob + job.seg_start) : reinterpret_cast<const uccl_u32*>(job.seg_start);
    const uccl_u64* addrs = near_table ? reinterpret_cast<const uccl_u64*>(args.blob + job.seg_addr) : reinterpret_cast<const uccl_u64*>(job.seg_addr);

    uccl_u64 bytes = 0;
    uccl_u32 first = strip * job.entries_per_strip;
    const uccl_u32 last = uccl_min(uccl_min(job.entry_count, UCCL_MAX_ENTRIES), first + job.entries_per_strip);
    if (tid == 0) sh.error = job.entry_count > UCCL_MAX_ENTRIES ? UCCL_ERROR_COUNT : 0;
    // A small table near by is read at once, beside the entries.
    const bool all = near_table && job.segments <= UCCL_WINDOW;
    if (all) {
#pragma unroll 1
        for (uccl_u32 i = tid; i <= job.segments; i += UCCL_THREADS) sh.start[i] = starts[i];
#pragma unroll 1
        for (uccl_u32 i = tid; i < job.segments; i += UCCL_THREADS) sh.addr[i] = addrs[i];
    }
    __syncthreads();
    bool sane = job.entry_count <= UCCL_MAX_ENTRIES;
    bool counted = job.count == 0;
#pragma unroll 1
    for (; first < last && sane; first += UCCL_THREADS) {
        const uccl_u32 batch = uccl_min(last - first, UCCL_THREADS);
        uint4 e = make_uint4(0, 0, 0, 0);
        if (whole) {
            if (tid == 0) e.y = job.size;
        } else if (tid < batch) {
            e = *reinterpret_cast<const uint4*>(entries + first + tid);
        }
        if (!counted && tid == 0) {
            uccl_u64 c;
            asm volatile("ld.relaxed.gpu.global.u64 %0, [%1];" : "=l"(c) : "l"(job.count) : "memory");
            sh.count = c;
        }
        const uccl_u64 at = (uccl_u64)e.w << 32 | e.z;
        uccl_u32 len = e.y;
        if (at > job.size || len > job.size - (uccl_u32)at) {
            len = 0;
            atomicCAS(&sh.error, 0u, UCCL_ERROR_RANGE | (first + tid) << 8);
        }
        // Inclusive prefix sum of units over the block.
        const uccl_u32 units = (uccl_u32)(((uccl_u64)len + (1u << shift) - 1) >> shift);
        uccl_u32 sum = units;
#pragma unroll
        for (uccl_u32 d = 1; d < 32; d <<= 1) {
            const uccl_u32 other = __shfl_up_sync(0xffffffffu, sum, d);
            if (lane >= d) sum += other;
        }
        if (lane == 31) sh.warp_sum[warp] = sum;
        sh.src[tid] = e.x;
        sh.len[tid] = len;
        sh.at[tid] = (uccl_u32)at;
        __syncthreads();
        if (!counted) {
            counted = true;
            if (sh.count != job.entry_count) {
                if (tid == 0) sh.error = UCCL_ERROR_COUNT;
                sane = false;
                break;
            }
        }
        uccl_u32 total = 0, before = 0;
#pragma unroll
        for (uccl_u32 w = 0; w < UCCL_THREADS / 32; w++) {
            const uccl_u32 v = sh.warp_sum[w];
            if (w < warp) before += v;
            total += v;
        }
        const uccl_u32 mine = before + sum - units;
        sh.first_unit[tid] = mine;
        const uccl_u32 u0 = (uccl_u32)((uccl_u64)total * part / job.parts), u1 = (uccl_u32)((uccl_u64)total * (part + 1) / job.parts);
        // Message bytes this block touches.
        uccl_u32 low = 0xffffffffu, high = 0;
        const uccl_u32 a = uccl_max(mine, u0), b = uccl_min(mine + units, u1);
        if (a < b) {
            low = (uccl_u32)at + ((a - mine) << shift);
            high = (uccl_u32)at + (b == mine + units ? len : (b - mine) << shift);
        }
        low = __reduce_min_sync(0xffffffffu, low);
        high = __reduce_max_sync(0xffffffffu, high);
        if (lane == 0) {
            sh.warp_min[warp] = low;
            sh.warp_max[warp] = high;
        }
        __syncthreads();
#pragma unroll
        for (uccl_u32 w = 0; w < UCCL_THREADS / 32; w++) {
            low = uccl_min(low, sh.warp_min[w]);
            high = uccl_max(high, sh.warp_max[w]);
        }
        if (u0 < u1) {  // the same in every thread, hence so are the barriers inside
            // Window of the table: all of it, else the place where segments of equal length would be, else where a search finds it.
            uccl_u32 lo = 0, hi = job.segments;
            bool inside = all;
            if (!all) {
                lo = (uccl_u32)((uccl_u64)low * job.segments / job.size);
                hi = (uccl_u32)((uccl_u64)(high - 1) * job.segments / job.size) + 1;
                inside = hi - lo <= UCCL_WINDOW;
                if (inside) {
#pragma unroll 1
                    for (uccl_u32 i = tid; i <= hi - lo; i += UCCL_THREADS) sh.start[i] = starts[lo + i];
#pragma unroll 1
                    for (uccl_u32 i = tid; i < hi - lo; i += UCCL_THREADS) sh.addr[i] = addrs[lo + i];
                }
                __syncthreads();
                if (!inside || sh.start[0] > low || sh.start[hi - lo] < high) {
                    if (warp == 0) {
                        const uccl_u32 s = uccl_find_warp(starts, job.segments, low);
                        if (lane == 0) sh.lo = s;
                    } else if (warp == 1) {
                        const uccl_u32 s = uccl_find_warp(starts, job.segments, high - 1);
                        if (lane == 0) sh.hi = s + 1;
                    }
                    __syncthreads();
                    lo = sh.lo;
                    hi = sh.hi;
                    inside = hi - lo <= UCCL_WINDOW;
                    if (inside) {
#pragma unroll 1
                        for (uccl_u32 i = tid; i <= hi - lo; i += UCCL_THREADS) sh.start[i] = starts[lo + i];
#pragma unroll 1
                        for (uccl_u32 i = tid; i < hi - lo; i += UCCL_THREADS) sh.addr[i] = addrs[lo + i];
                    }
                    __syncthreads();
                }
            }
            const uccl_u32* start = inside ? sh.start : starts + lo;
            const uccl_u64* addr = inside ? sh.addr : addrs + lo;
            if (shift <= 9)
                bytes += uccl_units<8>(sh, job, shift, batch, u0, u1, start, addr, 0, hi - lo);
            else
                bytes += uccl_units<32>(sh, job, shift, batch, u0, u1, start, addr, 0, hi - lo);
        }
        __syncthreads();
    }

    // One thread tells the others' work: the barrier and its fence make every store of the block precede the arrival.
#pragma unroll
    for (uccl_u32 d = 16; d > 0; d >>= 1) bytes += __shfl_down_sync(0xffffffffu, bytes, d);
    if (lane == 0) sh.warp_bytes[warp] = bytes;
    __syncthreads();
    if (tid != 0) return;
    uccl_u64 done = 0;
#pragma unroll
    for (uccl_u32 w = 0; w < UCCL_THREADS / 32; w++) done += sh.warp_bytes[w];
    uccl_u32 error = sh.error;
    if (job.blocks > 1) {
        // One counter for all: bytes in bits 0..42, blocks in 43..55, and bit 56 from the first block that has an error to tell.
        uccl_u64* state = reinterpret_cast<uccl_u64*>(job.state);
        uccl_u64 arrival = (1ull << 43) + done;
        if (error && atomicMax(state + 1, (uccl_u64)error) == 0) arrival += 1ull << 56;
        __threadfence();
        const uccl_u64 sum = atomicAdd(state, arrival) + arrival;
        if ((uccl_u32)(sum >> 43 & 0x1fff) != job.blocks) return;
        done = sum & ((1ull << 43) - 1);
        error = 0;
        if (sum >> 56) error = (uccl_u32)atomicExch(state + 1, 0ull);
        *reinterpret_cast<volatile uccl_u64*>(state) = 0;
    }
    if (error == 0 && done != job.size) error = UCCL_ERROR_TOTAL;
    __threadfence_system();  // also what lets the last block speak for the others' stores
    asm volatile("st.volatile.global.v2.u64 [%0], {%1, %2};" ::"l"(job.status), "l"((uccl_u64)job.sequence << 32 | error), "l"(done) : "memory");
}

// grid: (most blocks of a job, jobs); block: UCCL_THREADS.
extern "C" __global__ void __launch_bounds__(256, 4) uccl_copy_1k(const __grid_constant__ UcclArgs<1024> args) { uccl_copy_body(args); }
extern "C" __global__ void __launch_bounds__(256, 4) uccl_copy_4k(const __grid_constant__ UcclArgs<4096> args) { uccl_copy_body(args); }
