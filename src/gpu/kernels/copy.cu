// The one copy kernel: scatters the fragments of received chunks (unpack) and gathers segments into staging (pack).
// Compiled by NVRTC without headers (scripts/build-kernels) and included as it is by tests/gpu/kernel_test.cu.
// Knows addresses and lengths only; what a chunk or a plugin is, it must not know beyond the layout of loadMeta.
//
// A job is one message of `size` bytes. Its flat side is contiguous (bounce buffer or staging); its segment side is a
// table of addresses sorted by message offset. Fragments (loadMeta) say which flat bytes are which message bytes; a job
// without fragments is one fragment, the whole message. Where there are few of both, the host has joined them to items already;
// otherwise blocks search. Nothing on the PCIe path is cached by L2 and equal addresses are served one after another, so each
// block reads only its own strip of the fragments and its own window of the table, and what is small travels inside the kernel's
// parameters. Launches may overlap: nothing is kept between them but the counters of a job, which no other job in flight uses.

#include "bytes.cuh"

// loadMeta of the plugin's unpack queue.
struct UcclEntry {
    uccl_u32 src_off;
    uccl_u32 len;
    uccl_u64 dst_off;
};

// A piece that lies in one segment, where the host has joined entries and segments.
struct UcclItem {
    uccl_u32 src_off;
    uccl_u32 len;
    uccl_u64 addr;
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
    uccl_u32 entry_count;      // entries the host counted; 1 for a whole fragment; UCCL_ITEMS: items
    uccl_u32 segments;         // entries of the table; UCCL_ITEMS: entries the host counted in the plugin's row
    uccl_u32 entries_per_strip;
    uccl_u32 parts;            // blocks that share a strip; more than 1 only with at most UCCL_THREADS entries in a strip.
                               // UCCL_ITEMS: log2 of the units in the longest item
    uccl_u32 blocks;           // strips * parts, at most 8191
    uccl_u32 flags;            // UCCL_* below; bits 8..15: log2 of the bytes in a unit of work
    uccl_u32 sequence;         // not 0; tells this use of the status word from the last
};
static_assert(sizeof(UcclEntry) == 16 && sizeof(UcclItem) == 16, "loadMeta");
static_assert(sizeof(UcclJob) == 88, "job");

#define UCCL_THREADS 256u
#define UCCL_MAX_ENTRIES 2048u
#define UCCL_WINDOW 512u              // segments a block keeps in shared memory

#define UCCL_GATHER 1u                // segments -> flat; else flat -> segments
#define UCCL_ENTRIES_INLINE 2u
#define UCCL_SEGMENTS_INLINE 4u
#define UCCL_ITEMS 8u                 // `entries` are UcclItem, in range by the host's word; there is no table
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

// A word or address of a table; near: in the arguments. Elsewhere past the first-level cache, as above.
static __device__ __forceinline__ uccl_u32 uccl_get(const uccl_u32* p, bool near) {
    if (near) return *p;
    uccl_u32 v;
    asm volatile("ld.global.cg.u32 %0, [%1];" : "=r"(v) : "l"(p));
    return v;
}
static __device__ __forceinline__ uccl_u64 uccl_get(const uccl_u64* p, bool near) {
    if (near) return *p;
    uccl_u64 v;
    asm volatile("ld.global.cg.u64 %0, [%1];" : "=l"(v) : "l"(p));
    return v;
}
// An entry or item.
static __device__ __forceinline__ uint4 uccl_get16(const void* p, bool near) {
    if (near) return *reinterpret_cast<const uint4*>(p);
    uint4 v;
    uccl_load16<0>(v, reinterpret_cast<uccl_u64>(p));
    return v;
}

// Last segment in [lo, hi) that starts at or before x; the one at lo does.
static __device__ __forceinline__ uccl_u32 uccl_find(const volatile uccl_u32* start, uccl_u32 lo, uccl_u32 hi, uccl_u32 x) {
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
        const bool below = probe < hi && uccl_get(start + probe, false) <= x;
        const uccl_u32 k = 31u - (uccl_u32)__clz((int)__ballot_sync(0xffffffffu, below));  // lane 0 is always below
        lo += k * step;
        hi = uccl_min(hi, lo + step);
    }
    return lo;
}

struct UcclShared {
    uccl_u32 first_unit[UCCL_THREADS + 1];  // exclusive prefix of units by entry
    uccl_u32 src[UCCL_THREADS], len[UCCL_THREADS], at[UCCL_THREADS];
    uccl_u64 unit_flat[UCCL_THREADS], unit_seg[UCCL_THREADS];  // units, each with the first segment it touches
    uccl_u32 unit_bytes[UCCL_THREADS], unit_near[UCCL_THREADS], unit_segment[UCCL_THREADS];
    uccl_u32 start[UCCL_WINDOW + 1];
    uccl_u64 addr[UCCL_WINDOW];
    uccl_u32 warp_sum[UCCL_THREADS / 32], warp_min[UCCL_THREADS / 32], warp_max[UCCL_THREADS / 32];
    uccl_u64 warp_bytes[UCCL_THREADS / 32];
    uccl_u64 count;
    uccl_u32 error, lo, hi;
};

// Where the places of units come from: searched for with the entries in shared memory; items in the arguments, of which a block takes
// every (8 * blocks)th eight units; items elsewhere.
enum UcclSource { UCCL_SEARCH, UCCL_NEAR, UCCL_FAR };

// Copies units [u0, u1), a group of W lanes to a unit. Returns the bytes this thread answers for.
template <uccl_u32 W, UcclSource SOURCE>
static __device__ __forceinline__ uccl_u64 uccl_units(UcclShared& sh, const UcclJob& job, const UcclItem* items, uccl_u32 shift, uccl_u32 entries, uccl_u32 u0,
                                                     uccl_u32 u1, const volatile uccl_u32* start, const volatile uccl_u64* addr,
                                                     uccl_u32 segments) {
    const uccl_u32 tid = threadIdx.x, lane = tid % W;
    const bool gather = job.flags & UCCL_GATHER;
    uccl_u64 bytes = 0;
#pragma unroll 1
    while (u0 < u1) {
        const uccl_u32 units = uccl_min(u1 - u0, SOURCE == UCCL_NEAR ? UCCL_THREADS / W : UCCL_THREADS);
        if constexpr (SOURCE != UCCL_NEAR) {
            // Every thread first looks up the place of one unit, so that the reads and searches of a round are made at once.
            if (SOURCE == UCCL_FAR && tid < units) {
                const uint4 item = uccl_get16(items + ((u0 + tid) >> job.parts), false);
                const uccl_u32 skip = ((u0 + tid) & ((1u << job.parts) - 1)) << shift;
                const uccl_u32 n = skip < item.y ? uccl_min(item.y - skip, 1u << shift) : 0;
                sh.unit_flat[tid] = job.flat + item.x + skip;
                sh.unit_seg[tid] = ((uccl_u64)item.w << 32 | item.z) + skip;
                sh.unit_bytes[tid] = n;
                sh.unit_near[tid] = n;
            } else if (tid < units) {
                // Entries of length 0 have no unit: the last one that starts at or before it holds the unit.
                const uccl_u32 e = uccl_find(sh.first_unit, 0, entries, u0 + tid);
                const uccl_u32 skip = (u0 + tid - sh.first_unit[e]) << shift;
                const uccl_u32 n = uccl_min(sh.len[e] - skip, 1u << shift);
                const uccl_u32 x = sh.at[e] + skip;
                const uccl_u32 s = uccl_find(start, 0, segments, x);
                sh.unit_flat[tid] = job.flat + sh.src[e] + skip;
                sh.unit_seg[tid] = addr[s] + (x - start[s]);
                sh.unit_bytes[tid] = n;
                sh.unit_near[tid] = uccl_min(n, start[s + 1] - x);
                sh.unit_segment[tid] = s;
            }
            __syncthreads();
            if (SOURCE == UCCL_FAR && sh.error) return 0;
        }
#pragma unroll 1
        for (uccl_u32 u = tid / W; u < units; u += UCCL_THREADS / W) {
            uccl_u64 flat, seg;
            uccl_u32 n, left, s = 0;
            if constexpr (SOURCE == UCCL_NEAR) {
                const UcclItem& item = items[(u0 + u) >> job.parts];
                const uccl_u32 skip = ((u0 + u) & ((1u << job.parts) - 1)) << shift;
                if (skip >= item.len) continue;
                n = left = uccl_min(item.len - skip, 1u << shift);
                flat = job.flat + item.src_off + skip;
                seg = item.addr + skip;
            } else {
                flat = sh.unit_flat[u];
                seg = sh.unit_seg[u];
                n = sh.unit_near[u];
                left = sh.unit_bytes[u];
                s = sh.unit_segment[u];
                if (n == 0) continue;
            }
            if (lane == 0) bytes += left;
#pragma unroll 1
            while (true) {
                uccl_copy<W>(gather ? flat : seg, gather ? seg : flat, n, lane);
                left -= n;
                if (SOURCE != UCCL_SEARCH || left == 0) break;
                flat += n;
                s++;
                seg = addr[s];
                n = uccl_min(left, start[s + 1] - start[s]);
            }
        }
        if (SOURCE != UCCL_NEAR) __syncthreads();
        u0 += SOURCE == UCCL_NEAR ? job.blocks * (UCCL_THREADS / W) : UCCL_THREADS;
    }
    return bytes;
}

// The plugin's count, past every cache.
static __device__ __forceinline__ uccl_u64 uccl_count(const UcclJob& job) {
    uccl_u64 c;
    asm volatile("ld.relaxed.gpu.global.u64 %0, [%1];" : "=l"(c) : "l"(job.count) : "memory");
    return c;
}

// End of a block; the last one of a job writes its status.
static __device__ __forceinline__ void uccl_arrive(UcclShared& sh, const UcclJob& job, uccl_u64 bytes) {
    const uccl_u32 tid = threadIdx.x, lane = tid & 31u, warp = tid >> 5;
    // One thread tells the others' work: the barrier and its fence make every store of the block precede the arrival.
    const uccl_u32 fine = __reduce_add_sync(0xffffffffu, (uccl_u32)bytes & 0x7ffffffu), coarse = __reduce_add_sync(0xffffffffu, (uccl_u32)(bytes >> 27));
    if (lane == 0) sh.warp_bytes[warp] = ((uccl_u64)coarse << 27) + fine;
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
#if __CUDA_ARCH__ >= 900
    // A launch may have started before the one ahead of it ended; it must not end before.
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

template <typename Args>
static __device__ __forceinline__ void uccl_copy_body(const Args& args) {
#if __CUDA_ARCH__ >= 900
    // Launches know nothing of each other: the next may start as soon as all blocks of this one have.
    asm volatile("griddepcontrol.launch_dependents;");
#endif
    const UcclJob& job = reinterpret_cast<const UcclJob*>(args.blob)[blockIdx.y];
    // Both cache lines of the job are fetched at once, before anything waits for one of them.
    const uccl_u64 flat = job.flat, entries_at = job.entries;
    const uccl_u32 blocks = job.blocks, flags = job.flags;
    asm volatile("" ::"l"(flat), "l"(entries_at), "r"(blocks), "r"(flags));
    if (blockIdx.x >= blocks) return;
    __shared__ UcclShared sh;
    const uccl_u32 tid = threadIdx.x, lane = tid & 31u, warp = tid >> 5;
    const uccl_u32 shift = (flags >> UCCL_UNIT_SHIFT) & 31u;
    uccl_u64 bytes = 0;
    const bool joined = flags & UCCL_ITEMS;
    if (joined && (flags & UCCL_ENTRIES_INLINE)) {
        if (tid == 0) sh.error = 0;
        if (job.count != 0) {
            if (tid == 0 && uccl_count(job) != job.segments) sh.error = UCCL_ERROR_COUNT;
            __syncthreads();
            if (sh.error) return uccl_arrive(sh, job, 0);
        }
        const UcclItem* items = reinterpret_cast<const UcclItem*>(args.blob + entries_at);
        bytes = uccl_units<32, UCCL_NEAR>(sh, job, items, shift, 0, blockIdx.x * (UCCL_THREADS / 32), job.entry_count << job.parts, nullptr, nullptr, 0);
        return uccl_arrive(sh, job, bytes);
    }
    if (joined) {
        // The barrier after the first look at items is also that of the count.
        if (tid == UCCL_THREADS - 1) sh.error = job.count != 0 && uccl_count(job) != job.segments ? UCCL_ERROR_COUNT : 0;
        const uccl_u64 slots = (uccl_u64)job.entry_count << job.parts;
        bytes = uccl_units<32, UCCL_FAR>(sh, job, reinterpret_cast<const UcclItem*>(entries_at), shift, 0, (uccl_u32)(slots * blockIdx.x / blocks),
                                         (uccl_u32)(slots * (blockIdx.x + 1) / blocks), nullptr, nullptr, 0);
        return uccl_arrive(sh, job, bytes);
    }
    const uccl_u32 strip = blockIdx.x / job.parts, part = blockIdx.x % job.parts;
    const bool whole = job.entries == 0;
    const bool near_entries = flags & UCCL_ENTRIES_INLINE;
    const UcclEntry* entries =
        near_entries ? reinterpret_cast<const UcclEntry*>(args.blob + job.entries) : reinterpret_cast<const UcclEntry*>(job.entries);
    const bool near_table = flags & UCCL_SEGMENTS_INLINE;
    const uccl_u32* starts = near_table ? reinterpret_cast<const uccl_u32*>(args.blob + job.seg_start) : reinterpret_cast<const uccl_u32*>(job.seg_start);
    const uccl_u64* addrs = near_table ? reinterpret_cast<const uccl_u64*>(args.blob + job.seg_addr) : reinterpret_cast<const uccl_u64*>(job.seg_addr);
    uccl_u32 first = strip * job.entries_per_strip;
    const uccl_u32 last = uccl_min(uccl_min(job.entry_count, UCCL_MAX_ENTRIES), first + job.entries_per_strip);
    // All reads that depend on the job alone are made at once: entries, count, and the table or the part of it that would be needed
    // if entries were in order and all alike.
    uint4 next = make_uint4(0, 0, 0, 0);
    if (!whole && first + tid < uccl_min(last, first + UCCL_THREADS)) next = uccl_get16(entries + first + tid, near_entries);
    if (tid == 0) sh.error = job.entry_count > UCCL_MAX_ENTRIES ? UCCL_ERROR_COUNT : 0;
    const bool all = near_table && job.segments <= UCCL_WINDOW;
    uccl_u32 guess_lo = 0, guess_hi = job.segments;
    if (!all) {
        guess_lo = (uccl_u32)((uccl_u64)blockIdx.x * job.segments / job.blocks);
        guess_hi = uccl_min((uccl_u32)((uccl_u64)(blockIdx.x + 1) * job.segments / job.blocks) + 1, job.segments);
    }
    bool guessed = guess_hi - guess_lo <= UCCL_WINDOW;
    if (guessed) {
#pragma unroll 1
        for (uccl_u32 i = tid; i <= guess_hi - guess_lo; i += UCCL_THREADS) {
            const uccl_u32 start = uccl_get(starts + guess_lo + i, near_table);
            if (i < guess_hi - guess_lo) sh.addr[i] = uccl_get(addrs + guess_lo + i, near_table);
            sh.start[i] = start;
        }
    }
    if (job.count != 0 && tid == 0) sh.count = uccl_count(job);
    __syncthreads();
    bool sane = job.entry_count <= UCCL_MAX_ENTRIES;
    if (sane && job.count != 0 && sh.count != job.entry_count) {
        if (tid == 0) sh.error = UCCL_ERROR_COUNT;
        sane = false;
    }
#pragma unroll 1
    for (; first < last && sane; first += UCCL_THREADS) {
        const uccl_u32 batch = uccl_min(last - first, UCCL_THREADS);
        uint4 e = next;
        if (whole) e.y = tid == 0 ? job.size : 0;
        next = make_uint4(0, 0, 0, 0);
        if (!whole && first + UCCL_THREADS + tid < last) next = uccl_get16(entries + first + UCCL_THREADS + tid, near_entries);
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
            // Window of the table: the one at hand, else the place where segments of equal length would be, else where a search finds it.
            uccl_u32 lo = guess_lo, hi = guess_hi;
            bool inside = guessed;
            if (!all && (!inside || sh.start[0] > low || sh.start[hi - lo] < high)) {
                __syncthreads();  // all have looked
                lo = (uccl_u32)((uccl_u64)low * job.segments / job.size);
                hi = (uccl_u32)((uccl_u64)(high - 1) * job.segments / job.size) + 1;
                inside = hi - lo <= UCCL_WINDOW;
                if (inside) {
#pragma unroll 1
                    for (uccl_u32 i = tid; i <= hi - lo; i += UCCL_THREADS) sh.start[i] = uccl_get(starts + lo + i, false);
#pragma unroll 1
                    for (uccl_u32 i = tid; i < hi - lo; i += UCCL_THREADS) sh.addr[i] = uccl_get(addrs + lo + i, false);
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
                        for (uccl_u32 i = tid; i <= hi - lo; i += UCCL_THREADS) sh.start[i] = uccl_get(starts + lo + i, false);
#pragma unroll 1
                        for (uccl_u32 i = tid; i < hi - lo; i += UCCL_THREADS) sh.addr[i] = uccl_get(addrs + lo + i, false);
                    }
                    __syncthreads();
                }
                guess_lo = lo;
                guess_hi = hi;
                guessed = inside;
            }
            const uccl_u32* start = inside ? sh.start : starts + lo;
            const uccl_u64* addr = inside ? sh.addr : addrs + lo;
            if (shift <= 9)
                bytes += uccl_units<8, UCCL_SEARCH>(sh, job, nullptr, shift, batch, u0, u1, start, addr, hi - lo);
            else
                bytes += uccl_units<32, UCCL_SEARCH>(sh, job, nullptr, shift, batch, u0, u1, start, addr, hi - lo);
        }
        __syncthreads();
    }
    uccl_arrive(sh, job, bytes);
}

// grid: (most blocks of a job, jobs); block: UCCL_THREADS.
extern "C" __global__ void __launch_bounds__(256, 2) uccl_copy_1k(const __grid_constant__ UcclArgs<1024> args) { uccl_copy_body(args); }
extern "C" __global__ void __launch_bounds__(256, 2) uccl_copy_4k(const __grid_constant__ UcclArgs<4096> args) { uccl_copy_body(args); }
