// How a group of lanes copies bytes of any alignment; what the kernels here share. Compiled by NVRTC without headers. Knows two addresses
// and a length only.
#pragma once

typedef unsigned char uccl_u8;
typedef unsigned int uccl_u32;
typedef unsigned long long uccl_u64;

// Reads go past the first-level cache: a launch may start while the one ahead of it runs, on a multiprocessor that holds lines of the
// same buffers from before they were filled again. The offset is an immediate operand: a register pair for each of eight addresses
// would spill.
template <int OFFSET>
static __device__ __forceinline__ void uccl_load16(uint4& v, uccl_u64 a) {
    asm volatile("ld.global.cg.v4.u32 {%0, %1, %2, %3}, [%4 + %5];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(a), "n"(OFFSET));
}
template <int OFFSET>
static __device__ __forceinline__ void uccl_store16(uccl_u64 a, const uint4& v) {
    asm volatile("st.global.v4.u32 [%0 + %1], {%2, %3, %4, %5};" ::"l"(a), "n"(OFFSET), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
}
static __device__ __forceinline__ uccl_u32 uccl_load1(uccl_u64 a) {
    uccl_u32 v;
    asm volatile("ld.global.cg.u8 %0, [%1];" : "=r"(v) : "l"(a));
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

// Loads of a batch: word k of this lane lies k * W words on. FULL: all are there; else those below `left`, the rest are zero
// (a register that may be unset would stay live everywhere).
template <uccl_u32 W, bool FULL, int K, int N>
static __device__ __forceinline__ void uccl_load_batch(uint4* v, uccl_u64 from, int left) {
    if constexpr (K < N) {
        if constexpr (!FULL) v[K] = make_uint4(0, 0, 0, 0);
        if (FULL || left > K * (int)W) uccl_load16<K * (int)W * 16>(v[K], from);
        uccl_load_batch<W, FULL, K + 1, N>(v, from, left);
    }
}
template <uccl_u32 W, bool FULL, int K, int N>
static __device__ __forceinline__ void uccl_store_batch(const uint4* v, uccl_u64 to, int left) {
    if constexpr (K < N) {
        if (FULL || left > K * (int)W) uccl_store16<K * (int)W * 16>(to, v[K]);
        uccl_store_batch<W, FULL, K + 1, N>(v, to, left);
    }
}

// One batch of N words a lane. `left`: words from this lane's first to the end. SHIFTED: `from` is the aligned word in which the
// lane's first source byte lies; what a lane lacks of its next word, the next lane has.
template <uccl_u32 W, bool FULL, bool SHIFTED, int N>
static __device__ __forceinline__ void uccl_batch(uccl_u64 to, uccl_u64 from, int left, uccl_u32 lane, uccl_u32 mask, uccl_u32 q, uccl_u32 r) {
    uint4 v[N + 1];
    if constexpr (SHIFTED) {
        uccl_load_batch<W, FULL, 0, N>(v, from, left + 1);
        v[N] = make_uint4(0, 0, 0, 0);
        if (lane == 0 && (FULL || left + 1 > N * (int)W)) uccl_load16<N * (int)W * 16>(v[N], from);
#pragma unroll
        for (int k = 0; k < N; k++) {
            const uint4 give = lane == 0 ? v[k + 1] : v[k];
            uint4 next;
            next.x = __shfl_sync(mask, give.x, lane + 1, W);
            next.y = __shfl_sync(mask, give.y, lane + 1, W);
            next.z = __shfl_sync(mask, give.z, lane + 1, W);
            next.w = __shfl_sync(mask, give.w, lane + 1, W);
            v[k] = uccl_funnel(v[k], next, q, r);
        }
    } else {
        uccl_load_batch<W, FULL, 0, N>(v, from, left);
    }
    uccl_store_batch<W, FULL, 0, N>(v, to, left);
}

// Copies n bytes with a group of W lanes, all of which come here. Reads only 16-byte words that hold a source byte, writes only
// [dst, dst + n).
template <uccl_u32 W, int N = W == 32 ? 8 : 4>  // N: 16-byte loads in flight in a lane
static __device__ __forceinline__ void uccl_copy(uccl_u64 dst, uccl_u64 src, uccl_u32 n, uccl_u32 lane) {
    const uccl_u32 mask = W == 32 ? 0xffffffffu : ((1u << (W & 31u)) - 1) << (threadIdx.x & 31u & ~(W - 1));
    const uccl_u32 head = uccl_min(n, (0u - (uccl_u32)dst) & 15u);
    const uccl_u32 words = (n - head) >> 4;
    const uccl_u32 body = words << 4;
    const uccl_u32 edge = n - body;  // head and tail bytes, below 32
    const uccl_u32 at = lane < head ? lane : lane + body;
    uccl_u32 byte = 0;
    if (lane < edge) byte = uccl_load1(src + at);
    const uccl_u64 s = src + head;
    const uccl_u32 shift = (uccl_u32)s & 15u;
    uccl_u64 to = dst + head + lane * 16u, from = s - shift + lane * 16u;
    const uccl_u32 q = shift >> 2, r = (shift & 3u) * 8u;
    uccl_u32 left = words;
    if (shift == 0) {
#pragma unroll 1
        for (; left >= N * W; left -= N * W, from += N * W * 16, to += N * W * 16) uccl_batch<W, true, false, N>(to, from, 0, lane, mask, q, r);
        if (left > 0) uccl_batch<W, false, false, N>(to, from, (int)left - (int)lane, lane, mask, q, r);
    } else {
#pragma unroll 1
        for (; left >= N * W; left -= N * W, from += N * W * 16, to += N * W * 16) uccl_batch<W, true, true, N>(to, from, 0, lane, mask, q, r);
        if (left > 0) uccl_batch<W, false, true, N>(to, from, (int)left - (int)lane, lane, mask, q, r);
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
