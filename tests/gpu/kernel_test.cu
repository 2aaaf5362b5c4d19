// Correctness and speed of the copy kernel (src/gpu/kernels/copy.cu) on a GPU: stand-alone, driver API, loads the COMMITTED
// cubin and PTX and runs every check with each. Exit code 0 only when every byte was right.
//
//   nvcc -O3 -std=c++17 -arch=sm_90 tests/gpu/kernel_test.cu -o kernel_test -lcuda
//   ./kernel_test [--quick] [--no-timing | --timing-only] [--no-ptx] [--kernels DIR] [--seed N]
//   compute-sanitizer --tool memcheck ./kernel_test --quick      (and --tool racecheck, --tool synccheck)
//
// Outputs are poisoned and compared byte for byte with a host reference, gaps between destinations included.
#include "../../src/gpu/kernels/copy.cu"
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <cuda.h>
#include <fstream>
#include <iterator>
#include <random>
#include <string>
#include <vector>

#define CK(x)                                                                                     \
    do {                                                                                          \
        CUresult e_ = (x);                                                                        \
        if (e_ != CUDA_SUCCESS) {                                                                 \
            const char* s_ = "?";                                                                 \
            cuGetErrorString(e_, &s_);                                                            \
            fprintf(stderr, "%s:%d: %s: %s\n", __FILE__, __LINE__, #x, s_);                       \
            exit(2);                                                                              \
        }                                                                                         \
    } while (0)

typedef uccl_u8 u8;
typedef uccl_u32 u32;
typedef uccl_u64 u64;
using Clock = std::chrono::steady_clock;

static const size_t BOUNCE = 96u << 20, ARENA = 160u << 20, TABLES = 16u << 20;
static const u8 POISON = 0xA5;
static std::mt19937_64 rng(1);
static u64 draw(u64 lo, u64 hi) { return lo + rng() % (hi - lo + 1); }

// Where fragments and tables lie. INLINE falls back to MAPPED when they do not fit; JOINED, what the launcher does, has the host join
// small jobs to items and falls back to INLINE.
enum Place { INLINE, MAPPED, DEVICE, JOINED };

struct Seg {
    u64 addr;
    u32 len;
};
struct Spec {
    bool gather = false, wait = true;
    u64 flat = 0;
    u32 size = 0;
    std::vector<UcclEntry> entries;  // empty: one whole fragment
    std::vector<Seg> segs;
    Place place = INLINE;
    long long count = -1;  // the plugin's counter; -1: the true value
    long long hint = -1;   // the host's hint; -1: the counter
};

struct Bump {  // host view and device view of one block of memory
    u8* host = nullptr;
    u64 dev = 0;
    size_t size = 0, used = 0;
    u64 take(const void* data, size_t n, size_t align = 16) {
        used = (used + align - 1) / align * align;
        if (used + n > size) { fprintf(stderr, "table memory exhausted\n"); exit(2); }
        memcpy(host + used, data, n);
        used += n;
        return dev + used - n;
    }
};

struct Gpu {
    CUstream stream;
    CUevent a, b;
    u64 bounce, pinned_bounce, arena, flat, state, status_dev;
    u8 *pinned_host, *arena_pinned_host;
    u64 arena_pinned;
    volatile u64* status;
    Bump mapped, device;  // device: filled on the host side, uploaded before the launch
    u64 device_dev;
    std::vector<u8> source;  // the content of both bounce buffers
} g;

struct Kernel {
    CUmodule module;
    CUfunction small, large;
    std::string name;
    bool overlaps;
};

struct Launch {
    alignas(16) u8 args[4096];
    u32 jobs = 0, grid = 1;
    bool large = false;
    volatile u64* status = nullptr;
    UcclJob* job(u32 i) { return reinterpret_cast<UcclJob*>(args + 16) + i; }
};

static u32 sequence = 0;

// The same rules as src/gpu/plan.rs.
static u32 plan_times(u64 launch_bytes) {
    const u32 wave = (u32)std::min<u64>((launch_bytes + (264u << 15) - 1) / (264u << 15), 64);
    return launch_bytes < (12u << 20) ? std::max(wave, 1u) : std::max(wave, 4u);
}
static void plan(UcclJob& j, u64 launch_bytes, u32 max_len) {
    const u32 count = std::max(j.entry_count, 1u), pieces = std::max(count, j.segments);
    const u32 shift = j.size / pieces < 1024 ? 9 : launch_bytes <= (4u << 20) ? 11 : 12;
    const u32 times = plan_times(launch_bytes);
    const u32 per_block = (shift == 9 ? 32u << 9 : 8u << shift) * times;
    const u32 want = std::min(std::max((u32)(((u64)j.size + per_block - 1) / per_block), 1u), 2048u);
    u32 strips = std::min(count, std::max(want, (count + UCCL_THREADS - 1) / UCCL_THREADS));
    j.entries_per_strip = (count + strips - 1) / strips;
    strips = (count + j.entries_per_strip - 1) / j.entries_per_strip;
    j.parts = (want + strips - 1) / strips;
    j.parts = std::max(j.parts, std::min((u32)(((u64)max_len + 2 * per_block - 1) / (2 * per_block)), std::max(4096 / strips, 1u)));
    j.blocks = strips * j.parts;
    j.flags |= shift << UCCL_UNIT_SHIFT;
}

// The same rules as join() and cut() of src/gpu/plan.rs: false when the job is not for items.
static bool join(const Spec& s, size_t room, std::vector<UcclItem>& out) {
    out.clear();
    std::vector<UcclEntry> whole{{0, s.size, 0}};
    const auto& entries = s.entries.empty() ? whole : s.entries;
    u64 begin = 0, sum = 0;
    size_t i = 0, steps = 0;
    for (auto& e : entries) {
        if (e.dst_off > s.size || e.len > s.size - e.dst_off) return false;
        u64 x = e.dst_off, flat = e.src_off, left = e.len;
        sum += left;
        if (x < begin) begin = 0, i = 0;
        while (left) {
            if (++steps > 4 * room) return false;
            const u64 end = begin + s.segs[i].len;
            if (x < end) {
                const u64 n = std::min(left, end - x);
                if (out.size() == room || flat + n > 1ull << 32) return false;
                out.push_back({(u32)flat, (u32)n, s.segs[i].addr + (x - begin)});
                x += n, flat += n, left -= n;
                if (left == 0) break;
            }
            begin = end, i++;
        }
    }
    return sum == s.size;
}
static bool cut(UcclJob& j, u64 launch_bytes, size_t room, std::vector<UcclItem>& items) {
    const u32 shift = launch_bytes > (1u << 20) || j.count ? 12 : 10, times = plan_times(launch_bytes);
    u32 longest = 1, p = 0;
    for (auto& it : items) longest = std::max(longest, it.len);
    while (((u64)1 << (shift + p)) < longest) p++;
    for (;; p--) {
        const u64 piece = (u64)1 << (shift + p);
        u64 n = 0;
        for (auto& it : items) n += (it.len + piece - 1) / piece;
        if (n > room) return false;
        const u64 slots = n << p;
        if (p && slots > 2 * (((u64)j.size >> shift) + 1) + 64) continue;
        std::vector<UcclItem> cut;
        for (auto& it : items)
            for (u64 at = 0; at < it.len; at += piece) cut.push_back({(u32)(it.src_off + at), (u32)std::min<u64>(piece, it.len - at), it.addr + at});
        items = cut;
        j.segments = j.entry_count;
        j.entry_count = n;
        j.parts = p;
        const u64 per_block = 8 * times, full = (j.size + (per_block << shift) - 1) / (per_block << shift) * (j.count ? 1 : 4);
        j.blocks = (u32)std::min<u64>({(slots + per_block - 1) / per_block, full, 4096});
        j.flags |= UCCL_ITEMS | shift << UCCL_UNIT_SHIFT;
        return true;
    }
}
static size_t far_room(size_t entries, size_t segments) { return entries + segments <= 4096 ? entries + segments : 0; }

// Launches of one test need separate slots, filled from 0.
static Launch prepare(const std::vector<Spec>& specs, u32 slot = 0) {
    Launch l;
    memset(l.args, 0, sizeof l.args);
    if (slot == 0) g.mapped.used = g.device.used = 0;
    l.jobs = specs.size();
    l.status = g.status + slot * 46 * 8;
    size_t used = specs.size() * sizeof(UcclJob);
    u64 total = 0;
    for (auto& s : specs) total += s.size;
    auto put = [&](const void* data, size_t n, size_t align, Place place, bool& near) -> u64 {
        size_t at = (used + align - 1) / align * align;
        near = place == INLINE && at + n <= sizeof l.args - 16;
        if (near) {
            memcpy(l.args + 16 + at, data, n);
            used = at + n;
            return at;
        }
        return place == DEVICE ? g.device.take(data, n) : g.mapped.take(data, n);
    };
    std::vector<UcclItem> items;
    for (u32 i = 0; i < specs.size(); i++) {
        const Spec& s = specs[i];
        UcclJob& j = *l.job(i);
        const Place place = s.place == JOINED ? INLINE : s.place;
        j.flat = s.flat;
        j.state = g.state + (slot * 46 + i) * 16;
        j.status = g.status_dev + (slot * 46 + i) * 64;
        j.size = s.size;
        if (s.gather) j.flags |= UCCL_GATHER;
        u64 count = s.count >= 0 ? s.count : s.entries.size();
        j.entry_count = s.entries.empty() ? 1 : s.hint >= 0 ? s.hint : count;
        if (!s.entries.empty() && s.wait) j.count = s.place == DEVICE ? g.device.take(&count, 8) : g.mapped.take(&count, 8);
        used = (used + 15) / 16 * 16;
        const size_t room = used < sizeof l.args - 16 ? (sizeof l.args - 16 - used) / (specs.size() - i) / 16 : 0;
        const size_t far = far_room(j.entry_count, s.segs.size());
        if (s.place == JOINED && j.entry_count == std::max<size_t>(s.entries.size(), 1) && join(s, std::max(room, far), items)) {
            bool near = cut(j, total, room, items);
            if (near || (s.size / items.size() >= 1024 && cut(j, total, far, items))) {
                if (near) {
                    memcpy(l.args + 16 + used, items.data(), items.size() * 16);
                    j.entries = used;
                    j.flags |= UCCL_ENTRIES_INLINE;
                    used += items.size() * 16;
                } else {
                    j.entries = g.mapped.take(items.data(), items.size() * 16);
                }
                l.grid = std::max(l.grid, j.blocks);
                continue;
            }
        }
        std::vector<u32> start(1, 0);
        std::vector<u64> addr;
        for (auto& seg : s.segs) {
            start.push_back(start.back() + seg.len);
            addr.push_back(seg.addr);
        }
        bool near_start, near_addr, near = false;
        // Both or neither inline.
        size_t need = start.size() * 4 + addr.size() * 8 + 16;
        Place p = place == INLINE && used + need > sizeof l.args - 16 ? MAPPED : place;
        j.seg_addr = put(addr.data(), addr.size() * 8, 8, p, near_addr);
        j.seg_start = put(start.data(), start.size() * 4, 4, p, near_start);
        if (near_addr) j.flags |= UCCL_SEGMENTS_INLINE;
        u32 max_len = s.size;
        if (!s.entries.empty()) {
            max_len = 0;
            for (auto& e : s.entries) max_len = std::max(max_len, std::min(e.len, s.size));
            j.entries = put(s.entries.data(), s.entries.size() * 16, 16, place, near);
            if (near) j.flags |= UCCL_ENTRIES_INLINE;
        }
        j.segments = s.segs.size();
        plan(j, total, max_len);
        l.grid = std::max(l.grid, j.blocks);
    }
    reinterpret_cast<UcclArgs<4096>*>(l.args)->jobs = l.jobs;
    l.large = used > 1024 - 16;
    if (g.device.used) {
        CK(cuMemcpyHtoD(g.device_dev, g.device.host, g.device.used));
        CK(cuCtxSynchronize());  // a copy from pageable memory may return before it is done, and our stream does not wait for it
    }
    return l;
}

// overlap: may start before the launch ahead of it has ended, as the launcher does.
static u32 launch(const Kernel& k, Launch& l, bool overlap = false) {
    const u32 seq = ++sequence;
    for (u32 i = 0; i < l.jobs; i++) l.job(i)->sequence = seq;
    void* params[] = {l.args};
    CUlaunchAttribute attribute{};
    attribute.id = CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION;
    attribute.value.programmaticStreamSerializationAllowed = 1;
    CUlaunchConfig config{};
    config.gridDimX = l.grid, config.gridDimY = l.jobs, config.gridDimZ = 1;
    config.blockDimX = UCCL_THREADS, config.blockDimY = config.blockDimZ = 1;
    config.hStream = g.stream;
    config.attrs = &attribute;
    config.numAttrs = overlap && k.overlaps;
    CK(cuLaunchKernelEx(&config, l.large ? k.large : k.small, params, nullptr));
    return seq;
}
static void observe(const Launch& l, u32 seq) {
    auto deadline = Clock::now() + std::chrono::seconds(120);
    for (u32 i = 0; i < l.jobs; i++)
        for (u64 n = 1; (u32)(l.status[i * 8] >> 32) != seq; n++)
            if (n % 1000000 == 0 && Clock::now() > deadline) {
                fprintf(stderr, "no completion: %s\n", cuStreamQuery(g.stream) == CUDA_SUCCESS ? "kernel ended" : "kernel runs or failed");
                exit(3);
            }
}

// ---------------------------------------------------------------- correctness
static long long failures = 0, checked_jobs = 0, checked_bytes = 0;
#define EXPECT(cond, ...)                         \
    do {                                          \
        if (!(cond) && ++failures <= 20) {        \
            printf("FAIL %s:%d: ", __func__, __LINE__); \
            printf(__VA_ARGS__);                  \
            printf("\n");                         \
        }                                         \
    } while (0)

// Cuts n bytes into k parts of at least one byte each.
static std::vector<u32> cuts(u32 n, u32 k) {
    k = std::min(k, n);
    std::vector<u32> at{0};
    if (k > n / 4) {  // dense: selection sampling of the k - 1 inner cuts
        u32 need = k - 1;
        for (u32 i = 1; i < n && need; i++)
            if (draw(0, n - i - 1) < need) at.push_back(i), need--;
    }
    while (at.size() < k) {
        while (at.size() < k) at.push_back((u32)draw(1, n - 1));
        std::sort(at.begin(), at.end());
        at.erase(std::unique(at.begin(), at.end()), at.end());
    }
    std::vector<u32> out;
    for (size_t i = 0; i < at.size(); i++) out.push_back((i + 1 < at.size() ? at[i + 1] : n) - at[i]);
    return out;
}

struct Check {  // one launch with its expected memory
    std::vector<Spec> specs;
    std::vector<u8> expect;  // of the destination arena (unpack) or of the flat staging (gather)
    bool gather = false;
    size_t flat_used = 64;
    std::vector<u32> error;  // expected code per job
    size_t per = 46;         // jobs of a launch; launches may overlap
};

static size_t arena_cursor;
static void begin(Check& c, bool gather) {
    c.gather = gather;
    arena_cursor = 64;
}
// Adds a job with random fragments and segments. shuffle: segments lie in memory in any order.
static Spec make(Check& c, u32 size, u32 frags, u32 segs, bool host_bounce, Place place, bool wait, int src_align = -1, int dst_align = -1) {
    Spec s;
    s.size = size;
    s.gather = c.gather;
    s.place = place;
    s.wait = wait;
    auto lens = cuts(size, segs);
    std::vector<size_t> order(lens.size()), where(lens.size());
    for (size_t i = 0; i < order.size(); i++) order[i] = i;
    std::shuffle(order.begin(), order.end(), rng);
    for (size_t i : order) {
        arena_cursor += draw(0, 40);
        if (dst_align >= 0) arena_cursor = (arena_cursor + 15) / 16 * 16 + dst_align;
        where[i] = arena_cursor;
        arena_cursor += lens[i];
        if (arena_cursor + 64 > ARENA) { fprintf(stderr, "arena exhausted\n"); exit(2); }
    }
    for (size_t i = 0; i < lens.size(); i++) s.segs.push_back({g.arena + where[i], lens[i]});
    if (c.gather) {
        size_t at = c.flat_used + draw(0, 40);
        if (dst_align >= 0) at = (at + 15) / 16 * 16 + src_align;
        s.flat = g.flat + at;
        c.flat_used = at + size + 64;
        return s;
    }
    s.flat = host_bounce ? g.pinned_bounce : g.bounce;
    if (frags == 0) {
        size_t at = draw(0, BOUNCE - size);
        if (src_align >= 0) at = std::min(at / 16 * 16, (BOUNCE - size) / 16 * 16 - 16) + src_align;
        s.flat += at;
        return s;
    }
    u64 at = 0;
    for (u32 len : cuts(size, frags)) {
        u64 src = draw(0, std::min<u64>(BOUNCE, 1ull << 31) - len);
        s.entries.push_back({(u32)src, len, at});
        at += len;
    }
    std::shuffle(s.entries.begin(), s.entries.end(), rng);
    if (draw(0, 3) == 0 && s.entries.size() < UCCL_MAX_ENTRIES) s.entries.insert(s.entries.begin() + draw(0, s.entries.size()), {5, 0, size});  // empty entry
    return s;
}
static u8 source_at(const Spec& s, u64 flat_offset) {
    u64 base = s.flat >= g.pinned_bounce && s.flat < g.pinned_bounce + BOUNCE ? g.pinned_bounce : g.bounce;
    return g.source[s.flat - base + flat_offset];
}
static void reference(Check& c, const Spec& s) {
    std::vector<u64> start(1, 0);
    for (auto& seg : s.segs) start.push_back(start.back() + seg.len);
    auto entries = s.entries;
    if (entries.empty()) entries.push_back({0, s.size, 0});
    for (auto& e : entries) {
        if (e.dst_off > s.size || e.len > s.size - e.dst_off) continue;
        u64 x = e.dst_off, left = e.len, flat = e.src_off;
        size_t i = std::upper_bound(start.begin(), start.end() - 1, x) - start.begin() - 1;
        while (left) {
            u64 n = std::min<u64>(left, start[i + 1] - x);
            u64 in_arena = s.segs[i].addr - g.arena + (x - start[i]);
            for (u64 b = 0; b < n; b++) {
                if (c.gather) c.expect[s.flat - g.flat + flat + b] = g.source[in_arena + b];
                else c.expect[in_arena + b] = source_at(s, flat + b);
            }
            x += n, flat += n, left -= n, i++;
        }
    }
}
static void run(const Kernel& k, Check& c) {
    size_t span = std::min(ARENA, (c.gather ? c.flat_used : arena_cursor) + 4096);
    c.expect.assign(span, POISON);
    u64 out = c.gather ? g.flat : g.arena;
    CK(cuMemsetD8(out, POISON, span));
    if (c.gather) CK(cuMemcpyHtoD(g.arena, g.source.data(), std::min(arena_cursor, BOUNCE)));
    for (size_t i = 0; i < c.specs.size(); i++)
        if (i >= c.error.size() || (c.error[i] & 255) != UCCL_ERROR_COUNT) reference(c, c.specs[i]);
    CK(cuCtxSynchronize());
    std::vector<Launch> ls;
    for (size_t i = 0; i < c.specs.size(); i += c.per)
        ls.push_back(prepare({c.specs.begin() + i, c.specs.begin() + std::min(c.specs.size(), i + c.per)}, ls.size()));
    u32 seq = 0;
    for (auto& l : ls) seq = launch(k, l, true);
    if (ls.size() > 1) CK(cuStreamSynchronize(g.stream));  // the end of the last launch has to be that of all
    for (size_t n = 0; n < ls.size(); n++) {
        const Launch& l = ls[n];
        if (ls.size() == 1) observe(l, seq);
        for (u32 j = 0; j < l.jobs; j++) {
            const size_t i = n * c.per + j;
            EXPECT((u32)(l.status[j * 8] >> 32) == seq - (u32)(ls.size() - 1 - n), "job %zu: no status", i);
            u32 error = (u32)l.status[j * 8], want = i < c.error.size() ? c.error[i] : 0;
            EXPECT(error == want, "job %zu of %zu: status %x, expected %x (size %u, %zu entries, %zu segments)", i, c.specs.size(), error, want, c.specs[i].size,
                   c.specs[i].entries.size(), c.specs[i].segs.size());
            if (!want) EXPECT(l.status[j * 8 + 1] == c.specs[i].size, "job %zu: %llu bytes of %u", i, (u64)l.status[j * 8 + 1], c.specs[i].size);
            checked_jobs++;
            checked_bytes += c.specs[i].size;
        }
    }
    CK(cuStreamSynchronize(g.stream));
    static std::vector<u8> got;
    got.resize(span);
    CK(cuMemcpyDtoH(got.data(), out, span));
    if (memcmp(got.data(), c.expect.data(), span)) {
        size_t at = 0, wrong = 0, first = span;
        for (; at < span; at++)
            if (got[at] != c.expect[at]) wrong++, first = std::min(first, at);
        EXPECT(false, "%zu bytes differ, first at %zu: %02x, expected %02x (%s, job 0: size %u, %zu entries, %zu segments)", wrong, first, got[first], c.expect[first],
               c.gather ? "gather" : "unpack", c.specs[0].size, c.specs[0].entries.size(), c.specs[0].segs.size());
    }
    u64 state[2 * 46 * 8];
    CK(cuMemcpyDtoH(state, g.state, sizeof state));
    for (u64 v : state) EXPECT(v == 0, "a job counter was not re-armed");
}

static void alignments(const Kernel& k, bool quick) {
    std::vector<u32> sizes = quick ? std::vector<u32>{1, 31, 700, 3000} : std::vector<u32>{1, 2, 15, 16, 17, 31, 33, 100, 511, 513, 1025, 4095, 5000, 16400, 70001};
    for (u32 size : sizes)
        for (int gather = 0; gather < 2; gather++)
            for (int sa = 0; sa < 16; sa += 1) {
                Check c;
                begin(c, gather);
                for (int da = 0; da < 16; da++) c.specs.push_back(make(c, size, 0, 1, (sa + da) % 5 == 0, Place(da % 4), true, sa, da));
                run(k, c);
            }
}
static void random_cases(const Kernel& k, int n, u32 max_size, u32 max_jobs) {
    for (int i = 0; i < n; i++) {
        Check c;
        begin(c, draw(0, 3) == 0);
        u32 jobs = (u32)draw(1, max_jobs), budget = max_size;
        for (u32 j = 0; j < jobs && budget > 0; j++) {
            u32 size = 1u << draw(0, 26);
            size = (u32)draw(1, std::min(size, budget));
            budget -= size;
            u32 frags = draw(0, 4) == 0 ? 0 : (u32)draw(1, draw(0, 1) ? 16 : 2047), segs = (u32)draw(1, draw(0, 2) ? 100 : 3000);
            c.specs.push_back(make(c, size, frags, segs, draw(0, 2) == 0, Place(draw(0, 3)), draw(0, 1)));
        }
        run(k, c);
    }
}
static void shapes(const Kernel& k, bool quick) {
    struct Shape { u32 size, frags, segs; };
    std::vector<Shape> list{{512 << 10, 128, 20000}, {512 << 10, 2047, 1}, {512 << 10, 1, 128}, {2047, 2047, 2047}, {512 << 10, 2, 3000}, {20000, 1, 20000}};
    if (!quick) list.insert(list.end(), {{64 << 20, 1, 1}, {64 << 20, 2048, 16384}, {64 << 20, 16, 20000}, {8 << 20, 2047, 40000}, {33333333, 3, 7}});
    for (auto& s : list)
        for (int place = 0; place < 4; place++) {
            Check c;
            begin(c, false);
            c.specs.push_back(make(c, s.size, s.frags, s.segs, false, Place(place), true));
            run(k, c);
            Check p;
            begin(p, true);
            p.specs.push_back(make(p, s.size, 0, s.segs, false, Place(place), true));
            run(k, p);
        }
    // One huge fragment among tiny ones.
    Check c;
    begin(c, false);
    Spec s = make(c, quick ? 300000 : 6000000, 0, 50, false, MAPPED, true);
    s.flat = g.bounce;
    u32 at = 0;
    for (int i = 0; i < 200; i++) s.entries.push_back({(u32)draw(0, 1 << 20), 50, at}), at += 50;
    s.entries.push_back({77, s.size - at, at});
    std::shuffle(s.entries.begin(), s.entries.end(), rng);
    c.specs.push_back(s);
    run(k, c);
    // What a joined job may look like: few pieces, of any length.
    for (int i = 0; i < (quick ? 20 : 300); i++) {
        Check j;
        begin(j, draw(0, 3) == 0);
        for (u64 n = draw(1, 8); n; n--) j.specs.push_back(make(j, (u32)draw(1, 1u << draw(1, quick ? 16 : 22)), (u32)draw(0, 12), (u32)draw(1, 12), draw(0, 3) == 0, JOINED, draw(0, 1)));
        run(k, j);
    }
    // Launches that overlap.
    for (int i = 0; i < (quick ? 2 : 10); i++) {
        Check o;
        begin(o, i % 2);
        o.per = 6;
        for (int n = 0; n < 48; n++) o.specs.push_back(make(o, (u32)draw(1, quick ? 20000 : 1 << 20), (u32)draw(0, 200), (u32)draw(1, 100), n % 2, Place(n % 4), n % 3));
        run(k, o);
    }
    // As many jobs as a launch takes.
    Check m;
    begin(m, false);
    for (int i = 0; i < 46; i++) m.specs.push_back(make(m, quick ? 3000 : 500000, 100, 30, i % 2, Place(i % 4), i % 3));
    run(k, m);
}
static void malformed(const Kernel& k) {
    for (int place = 0; place < 4; place++)
        for (int kind = 0; kind < 9; kind++) {
            Check c;
            begin(c, false);
            c.specs.push_back(make(c, 100000, 40, 25, false, Place(place), true));  // a good neighbour
            Spec s = make(c, 100000, 40, 25, false, Place(place), true);
            while (s.entries.size() > 40) s.entries = make(c, 100000, 40, 25, false, Place(place), true).entries;
            auto& e = s.entries[7];
            u32 want = UCCL_ERROR_RANGE | 7 << 8;
            switch (kind) {
            case 0: e.dst_off = s.size - e.len + 1; break;
            case 1: e.dst_off = ~0ull; break;
            case 2: e.dst_off = ~0ull - e.len + 1; break;
            case 3: e.len = 0xffffffff; break;
            case 4: e.dst_off = 1ull << 32; break;
            case 5: s.entries.pop_back(); want = UCCL_ERROR_TOTAL; break;
            case 6: s.count = 2049; want = UCCL_ERROR_COUNT; break;
            case 7: s.count = 41; s.hint = 40; want = UCCL_ERROR_COUNT; break;
            case 8: s.count = -1; s.hint = 40; s.entries[7] = s.entries[8]; want = s.entries[8].len == e.len ? 0 : UCCL_ERROR_TOTAL; break;
            }
            if (kind == 8 && want == 0) continue;
            if (kind == 8) {  // an overlap: the same bytes twice, others never; the sum differs unless lengths agree
                u64 sum = 0;
                for (auto& x : s.entries) sum += x.len;
                if (sum == s.size) continue;
            }
            c.specs.push_back(s);
            c.specs.push_back(make(c, 70000, 3, 2, false, Place(place), false));
            c.error = {0, want, 0};
            run(k, c);
        }
}

// ---------------------------------------------------------------- timing
static double median(std::vector<double> v) {
    std::sort(v.begin(), v.end());
    return v[v.size() / 2];
}
template <typename F> static double device_us(F f, int repeats = 60) {
    std::vector<double> v;
    for (int i = 0; i < repeats + 5; i++) {
        CK(cuEventRecord(g.a, g.stream));
        f(i);
        CK(cuEventRecord(g.b, g.stream));
        CK(cuEventSynchronize(g.b));
        float ms;
        CK(cuEventElapsedTime(&ms, g.a, g.b));
        if (i >= 5) v.push_back(ms * 1e3);
    }
    return median(v);
}
template <typename F> static double host_us(F f, int repeats = 60) {
    std::vector<double> v;
    for (int i = 0; i < repeats + 5; i++) {
        auto t = Clock::now();
        f(i);
        double us = std::chrono::duration<double>(Clock::now() - t).count() * 1e6;
        CK(cuStreamSynchronize(g.stream));
        if (i >= 5) v.push_back(us);
    }
    return median(v);
}

// Jobs of `chunk` bytes that make up `size`: fragments of `frag` bytes from shuffled places, segments of `seg` bytes to shuffled places.
static std::vector<Spec> workload(u32 size, u32 chunk, u32 frag, u32 seg, u32 misalign, u64 bounce, Place place, bool wait, bool gather) {
    u32 slots = BOUNCE / (frag + 64) - 1;
    std::vector<u32> where(std::min<u32>(slots, (64u << 20) / frag + 16));
    for (u32 i = 0; i < where.size(); i++) where[i] = i;
    std::shuffle(where.begin(), where.end(), rng);
    u32 segs = size / seg;
    std::vector<u32> to(segs);
    for (u32 i = 0; i < segs; i++) to[i] = i;
    std::shuffle(to.begin(), to.end(), rng);
    std::vector<Spec> out;
    u32 next = 0, next_seg = 0;
    const u32 pitch = frag + (misalign ? 33 : 0);
    for (u32 at = 0; at < size; at += chunk) {
        Spec s;
        s.size = chunk;
        s.flat = bounce;
        s.place = place;
        s.wait = wait;
        s.gather = gather;
        if (gather) s.flat = g.flat + at;
        else
            for (u32 x = 0; x < chunk; x += frag, next++) s.entries.push_back({where[next % where.size()] * pitch + (misalign ? 1 : 0), frag, x});
        for (u32 x = 0; x < chunk; x += seg, next_seg++) s.segs.push_back({g.arena + (u64)to[next_seg] * (seg + (misalign ? 16 : 0)) + (misalign ? 7 * misalign % 16 : 0), seg});
        out.push_back(s);
    }
    return out;
}
static void row(const Kernel& k, const char* what, const std::vector<Spec>& specs, double copy_us, double copy_host_us) {
    // Several launches when the jobs do not fit one.
    std::vector<Launch> ls;
    const size_t per = 32;
    for (size_t i = 0; i < specs.size(); i += per) ls.push_back(prepare({specs.begin() + i, specs.begin() + std::min(specs.size(), i + per)}, ls.size()));
    double dev = device_us([&](int) { for (auto& l : ls) launch(k, l, &l != &ls[0]); });
    double host = host_us([&](int) {
        u32 seq = 0;
        for (auto& l : ls) seq = launch(k, l, &l != &ls[0]);
        for (size_t i = 0; i < ls.size(); i++) observe(ls[i], seq - (u32)(ls.size() - 1 - i));
    });
    for (auto& l : ls)
        for (u32 j = 0; j < l.jobs; j++) EXPECT((u32)l.status[j * 8] == 0, "timing job status %x", (u32)l.status[j * 8]);
    u64 bytes = 0;
    for (auto& s : specs) bytes += s.size;
    printf("| %s | %llu KiB | %zu | %u x %u | %.2f | %.2f | %+.2f (%.0f%%) | %.0f | %.2f | %.2f |\n", what, bytes >> 10, ls.size(), ls[0].grid, ls[0].jobs, dev, copy_us,
           dev - copy_us, 100 * copy_us / dev, bytes / dev / 1e3, host, copy_host_us);
}
static void timing(const Kernel& k) {
    printf("\n### %s\n\n", k.name.c_str());
    printf("| what | bytes | launches | grid | device us | memcpy us | difference (speed) | GB/s payload | launch to observed us | memcpy + event to observed us |\n|---|---|---|---|---|---|---|---|---|---|\n");
    CK(cuMemcpyHtoD(g.bounce, g.source.data(), BOUNCE));
    const u32 K512 = 512 << 10, sizes[] = {K512, 4u << 20, 64u << 20};
    for (u32 size : sizes) {
        double d2d = device_us([&](int i) { CK(cuMemcpyDtoDAsync(g.arena + (size <= K512 ? (u64)(i % 64) * size : 0), g.bounce, size, g.stream)); });
        double d2dh = host_us([&](int) { CK(cuMemcpyDtoDAsync(g.arena, g.bounce, size, g.stream)); CK(cuEventRecord(g.b, g.stream)); while (cuEventQuery(g.b) == CUDA_ERROR_NOT_READY); });
        row(k, "4 KiB pages, inline, no count read", workload(size, K512, 4096, 4096, 0, g.bounce, JOINED, false, false), d2d, d2dh);
        row(k, "4 KiB pages, inline", workload(size, K512, 4096, 4096, 0, g.bounce, JOINED, true, false), d2d, d2dh);
        row(k, "4 KiB pages, inline, not joined, no count", workload(size, K512, 4096, 4096, 0, g.bounce, INLINE, false, false), d2d, d2dh);
        row(k, "4 KiB pages, mapped", workload(size, K512, 4096, 4096, 0, g.bounce, MAPPED, true, false), d2d, d2dh);
        row(k, "4 KiB pages, device", workload(size, K512, 4096, 4096, 0, g.bounce, DEVICE, false, false), d2d, d2dh);
        if (size > K512) row(k, "4 KiB pages, 8 jobs, no count", workload(size, size / 8, 4096, 4096, 0, g.bounce, JOINED, false, false), d2d, d2dh);
        if (size > K512) row(k, "4 KiB pages, 8 jobs", workload(size, size / 8, 4096, 4096, 0, g.bounce, JOINED, true, false), d2d, d2dh);
        if (size > K512) row(k, "alignment 1, 8 jobs, no count", workload(size, size / 8, 4096, 4096, 1, g.bounce, JOINED, false, false), d2d, d2dh);
        if (size > K512) row(k, "one fragment, 8 jobs", workload(size, size / 8, size / 8, size / 8, 0, g.bounce, JOINED, false, false), d2d, d2dh);
        if (size > K512) row(k, "4 KiB pages, mapped, 8 jobs", workload(size, size / 8, 4096, 4096, 0, g.bounce, MAPPED, true, false), d2d, d2dh);
        if (size > K512) row(k, "4 KiB pages, mapped, 8 jobs, no count", workload(size, size / 8, 4096, 4096, 0, g.bounce, MAPPED, false, false), d2d, d2dh);
        if (size > K512) row(k, "alignment 1, device, 8 jobs", workload(size, size / 8, 4096, 4096, 1, g.bounce, DEVICE, false, false), d2d, d2dh);
        if (size > K512) row(k, "4 KiB pages, device, 8 jobs", workload(size, size / 8, 4096, 4096, 0, g.bounce, DEVICE, false, false), d2d, d2dh);
        row(k, "1 KiB fragments to 32 KiB", workload(size, K512, 1024, 32768, 0, g.bounce, JOINED, true, false), d2d, d2dh);
        row(k, "256 B fragments to 4 KiB, device", workload(size, K512, 256, 4096, 0, g.bounce, DEVICE, false, false), d2d, d2dh);
        row(k, "alignment 1, 4 KiB, inline, no count", workload(size, K512, 4096, 4096, 1, g.bounce, JOINED, false, false), d2d, d2dh);
        row(k, "alignment 1, 4 KiB, device", workload(size, K512, 4096, 4096, 1, g.bounce, DEVICE, false, false), d2d, d2dh);
        row(k, "one 512 KiB fragment", workload(size, K512, K512, K512, 0, g.bounce, JOINED, false, false), d2d, d2dh);
        row(k, "gather 4 KiB", workload(size, K512, 4096, 4096, 0, 0, JOINED, false, true), d2d, d2dh);
        row(k, "gather 4 KiB, alignment 7", workload(size, K512, 4096, 4096, 1, 0, JOINED, false, true), d2d, d2dh);
        double h2d = device_us([&](int) { CK(cuMemcpyHtoDAsync(g.arena, g.pinned_host, size, g.stream)); });
        double h2dh = host_us([&](int) { CK(cuMemcpyHtoDAsync(g.arena, g.pinned_host, size, g.stream)); CK(cuEventRecord(g.b, g.stream)); while (cuEventQuery(g.b) == CUDA_ERROR_NOT_READY); });
        row(k, "pinned bounce, 4 KiB pages", workload(size, K512, 4096, 4096, 0, g.pinned_bounce, JOINED, false, false), h2d, h2dh);
        row(k, "pinned bounce, alignment 1", workload(size, K512, 4096, 4096, 1, g.pinned_bounce, JOINED, false, false), h2d, h2dh);
        row(k, "pinned bounce, one fragment", workload(size, K512, K512, K512, 0, g.pinned_bounce, JOINED, false, false), h2d, h2dh);
    }
    double d4 = device_us([&](int) { CK(cuMemcpyDtoDAsync(g.arena, g.bounce, 4096, g.stream)); });
    double d4h = host_us([&](int) { CK(cuMemcpyDtoDAsync(g.arena, g.bounce, 4096, g.stream)); CK(cuEventRecord(g.b, g.stream)); while (cuEventQuery(g.b) == CUDA_ERROR_NOT_READY); });
    row(k, "one 4 KiB op", workload(4096, 4096, 4096, 4096, 0, g.bounce, JOINED, false, false), d4, d4h);
    row(k, "one 4 KiB op from pinned", workload(4096, 4096, 4096, 4096, 0, g.pinned_bounce, JOINED, false, false), d4, d4h);
    // Host cost of a launch alone.
    Launch l = prepare(workload(K512, K512, 4096, 4096, 0, g.bounce, JOINED, false, false));
    auto t = Clock::now();
    for (int i = 0; i < 1000; i++) launch(k, l);
    printf("\nhost cost of a launch (512 KiB, 4 KiB parameters): %.2f us", std::chrono::duration<double>(Clock::now() - t).count() * 1e3);
    CK(cuStreamSynchronize(g.stream));
    t = Clock::now();
    for (int i = 0; i < 1000; i++) launch(k, l);
    CK(cuStreamSynchronize(g.stream));
    printf("; back to back on the device: %.2f us each\n", std::chrono::duration<double>(Clock::now() - t).count() * 1e3);
}

static void* mapped(size_t n, u64* dev) {
    void* p;
    CK(cuMemHostAlloc(&p, n, CU_MEMHOSTALLOC_PORTABLE | CU_MEMHOSTALLOC_DEVICEMAP));
    CUdeviceptr d;
    CK(cuMemHostGetDevicePointer(&d, p, 0));
    *dev = d;
    memset(p, 0, n);
    return p;
}
static Kernel load(const std::string& path, const char* name) {
    std::ifstream in(path, std::ios::binary);
    std::string image((std::istreambuf_iterator<char>(in)), {});
    if (image.empty()) { fprintf(stderr, "cannot read %s (run from the repository root, or --kernels DIR)\n", path.c_str()); exit(2); }
    Kernel k;
    k.name = name;
    k.overlaps = path.find("cubin") != std::string::npos;
    CK(cuModuleLoadData(&k.module, image.c_str()));
    CK(cuModuleGetFunction(&k.small, k.module, "uccl_copy_1k"));
    CK(cuModuleGetFunction(&k.large, k.module, "uccl_copy_4k"));
    int regs, local;
    CK(cuFuncGetAttribute(&regs, CU_FUNC_ATTRIBUTE_NUM_REGS, k.large));
    CK(cuFuncGetAttribute(&local, CU_FUNC_ATTRIBUTE_LOCAL_SIZE_BYTES, k.large));
    printf("%s: %d registers, %d bytes of local memory\n", name, regs, local);
    return k;
}

int main(int argc, char** argv) {
    bool quick = false, with_timing = true, with_ptx = true, checks = true;
    std::string dir = "src/gpu/kernels";
    u64 seed = 1;
    for (int i = 1; i < argc; i++) {
        std::string a = argv[i];
        if (a == "--quick") quick = true, with_timing = false;
        else if (a == "--no-timing") with_timing = false;
        else if (a == "--no-ptx") with_ptx = false;
        else if (a == "--timing-only") checks = false;
        else if (a == "--kernels" && i + 1 < argc) dir = argv[++i];
        else if (a == "--seed" && i + 1 < argc) seed = strtoull(argv[++i], nullptr, 0);
        else { fprintf(stderr, "unknown argument %s\n", argv[i]); return 2; }
    }
    CK(cuInit(0));
    CUdevice dev;
    CK(cuDeviceGet(&dev, 0));
    CUcontext ctx;
    CK(cuDevicePrimaryCtxRetain(&ctx, dev));
    CK(cuCtxSetCurrent(ctx));
    CK(cuStreamCreate(&g.stream, CU_STREAM_NON_BLOCKING));
    CK(cuEventCreate(&g.a, CU_EVENT_DEFAULT));
    CK(cuEventCreate(&g.b, CU_EVENT_DEFAULT));
    CUdeviceptr p;
    CK(cuMemAlloc(&p, BOUNCE)); g.bounce = p;
    CK(cuMemAlloc(&p, ARENA)); g.arena = p;
    CK(cuMemAlloc(&p, ARENA)); g.flat = p;
    CK(cuMemAlloc(&p, 8 * 46 * 16)); g.state = p;
    CK(cuMemsetD8(g.state, 0, 8 * 46 * 16));
    CK(cuMemAlloc(&p, TABLES)); g.device_dev = g.device.dev = p;
    std::vector<u8> device_side(TABLES);
    g.device.host = device_side.data();
    g.device.size = g.mapped.size = TABLES;
    g.mapped.host = (u8*)mapped(TABLES, &g.mapped.dev);
    g.status = (volatile u64*)mapped(8 * 46 * 64, &g.status_dev);
    g.pinned_host = (u8*)mapped(BOUNCE, &g.pinned_bounce);
    rng.seed(99);
    g.source.resize(BOUNCE);
    for (size_t i = 0; i < BOUNCE; i += 8) {
        u64 v = rng();
        memcpy(&g.source[i], &v, 8);
    }
    memcpy(g.pinned_host, g.source.data(), BOUNCE);
    CK(cuMemcpyHtoD(g.bounce, g.source.data(), BOUNCE));

    std::vector<Kernel> kernels{load(dir + "/copy.sm_90.cubin", "sm_90 cubin")};
    if (with_ptx) kernels.push_back(load(dir + "/copy.sm_80.ptx", "sm_80 PTX"));
    for (auto& k : kernels) {
        if (!checks) break;
        rng.seed(seed);
        auto t = Clock::now();
        alignments(k, quick);
        malformed(k);
        shapes(k, quick);
        random_cases(k, quick ? 20 : 400, quick ? 400000 : 3 << 20, 12);
        if (!quick) random_cases(k, 12, 90 << 20, 3);
        printf("%s: %lld jobs, %.1f MB compared so far, %lld failures, %.1f s\n", k.name.c_str(), checked_jobs, checked_bytes / 1e6, failures,
               std::chrono::duration<double>(Clock::now() - t).count());
        fflush(stdout);
    }
    if (with_timing && failures == 0)
        for (auto& k : kernels) timing(k);
    CK(cuStreamSynchronize(g.stream));
    printf(failures ? "FAILED: %lld\n" : "all checks passed\n", failures);
    return failures ? 1 : 0;
}
