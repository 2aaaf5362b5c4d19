#define _DEFAULT_SOURCE
#include "memory.h"

#include "check.h"

#include <dlfcn.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

/* The CUDA driver, found at run time: neither its headers nor its library are needed to build. */

#define DRIVER_FUNCTIONS(X)                                                     \
    X(cuGetErrorName, (int error, const char **name))                           \
    X(cuInit, (unsigned flags))                                                 \
    X(cuDeviceGetCount, (int *count))                                           \
    X(cuDeviceGet, (int *device, int ordinal))                                  \
    X(cuDevicePrimaryCtxRetain, (void **context, int device))                   \
    X(cuCtxSetCurrent, (void *context))                                         \
    X(cuCtxPushCurrent_v2, (void *context))                                     \
    X(cuCtxPopCurrent_v2, (void **context))                                     \
    X(cuMemAlloc_v2, (uint64_t *p, size_t len))                                 \
    X(cuMemFree_v2, (uint64_t p))                                               \
    X(cuMemcpyHtoD_v2, (uint64_t to, const void *from, size_t len))             \
    X(cuMemcpyDtoH_v2, (void *to, uint64_t from, size_t len))                   \
    X(cuMemsetD8_v2, (uint64_t p, unsigned char byte, size_t len))              \
    X(cuStreamSynchronize, (void *stream))                                      \
    X(cuIpcGetMemHandle, (memory_handle *handle, uint64_t p))                   \
    X(cuIpcOpenMemHandle_v2, (uint64_t *p, memory_handle handle, unsigned flags))

#define DECLARE(name, arguments) static int(*name) arguments;
DRIVER_FUNCTIONS(DECLARE)

#define CUDA_IPC_LAZY_PEER_ACCESS 1u
/* What a handle shares is an allocation of the driver, of which small memory is only a part: memory comes in whole ones. */
#define ALLOCATION (2 * MIB)

enum { FIRST, LAST, GPUS_USED };
static struct gpu {
    int ordinal;
    void *context; /* the primary one, kept to the end */
} gpus[GPUS_USED];

/* Memory on GPUs. Changed by the main thread alone, while no other looks. */
static struct area {
    const uint8_t *p; /* NULL: free */
    size_t len;
    const struct gpu *gpu;
    bool forbidden;
} areas[64];
#define AREAS_N (sizeof areas / sizeof *areas)

static const char *error_name(int error)
{
    const char *name = NULL;
    return cuGetErrorName(error, &name) == 0 && name ? name : "unknown error";
}

#define CU(call)                                                                  \
    do {                                                                          \
        int cu_error = (call);                                                    \
        CHECK_MSG(cu_error == 0, "CUDA error %d (%s)", cu_error, error_name(cu_error)); \
    } while (0)

static void resolve(void *library, const char *name, void *function)
{
    void *symbol = dlsym(library, name);
    CHECK_MSG(symbol, "%s: %s", name, dlerror());
    memcpy(function, &symbol, sizeof symbol);
}

static void gpu_open(struct gpu *gpu, int ordinal)
{
    int device = 0;
    gpu->ordinal = ordinal;
    CU(cuDeviceGet(&device, ordinal));
    CU(cuDevicePrimaryCtxRetain(&gpu->context, device));
}

/* The process that uses CUDA. */
static pid_t gpu_process;

static const struct gpu *gpu_of(int number)
{
    if (!gpus[FIRST].context) {
        gpu_process = getpid();
        int count = 0;
        if (getenv("UCCL_TCPX_EMULATE_DEVICE"))
            SKIP("emulated device memory is host memory, and UCCL_TEST_MEMORY=gpu");
        void *library = dlopen("libcuda.so.1", RTLD_NOW);
        if (!library)
            SKIP("UCCL_TEST_MEMORY=gpu, but there is no CUDA driver: %s", dlerror());
#define RESOLVE(name, arguments) resolve(library, #name, &name);
        DRIVER_FUNCTIONS(RESOLVE)
        int error = cuInit(0);
        if (error != 0)
            SKIP("UCCL_TEST_MEMORY=gpu, but cuInit says %s", error_name(error));
        CU(cuDeviceGetCount(&count));
        if (count == 0)
            SKIP("UCCL_TEST_MEMORY=gpu, but there is no GPU");
        gpu_open(&gpus[FIRST], 0);
        gpu_open(&gpus[LAST], count - 1);
    }
    return &gpus[number % 2 ? LAST : FIRST];
}

/* The GPU memory that p lies in, or NULL. */
static struct area *area_of(const uint8_t *p)
{
    for (struct area *a = areas; a < areas + AREAS_N; a++)
        if (a->p && p >= a->p && p < a->p + a->len)
            return a;
    return NULL;
}

static void area_add(uint64_t p, size_t len, const struct gpu *gpu)
{
    struct area *a = areas;
    while (a < areas + AREAS_N && a->p)
        a++;
    CHECK(a < areas + AREAS_N);
    *a = (struct area){(const uint8_t *)(uintptr_t)p, len, gpu, false};
}

static void enter(const struct gpu *gpu)
{
    CU(cuCtxPushCurrent_v2(gpu->context));
}

/* Copies and settings of memory are done when they return, also for streams that do not wait for the default one. */
static void leave(void)
{
    void *context;
    CU(cuStreamSynchronize(NULL));
    CU(cuCtxPopCurrent_v2(&context));
}

static void device_write(const struct area *a, uint8_t *to, const void *from, size_t len)
{
    enter(a->gpu);
    CU(cuMemcpyHtoD_v2((uintptr_t)to, from, len));
    leave();
}

static void device_read(const struct area *a, void *to, const uint8_t *from, size_t len)
{
    enter(a->gpu);
    CU(cuMemcpyDtoH_v2(to, (uintptr_t)from, len));
    leave();
}

static void device_wipe(const struct area *a, uint8_t *p, size_t len)
{
    enter(a->gpu);
    CU(cuMemsetD8_v2((uintptr_t)p, GUARD, len));
    leave();
}

/* Memory of either kind. */

bool memory_is_gpu(void)
{
    const char *kind = getenv("UCCL_TEST_MEMORY");
    bool gpu = kind && strcmp(kind, "gpu") == 0;
    CHECK_MSG(gpu || !kind || !*kind || strcmp(kind, "host") == 0, "UCCL_TEST_MEMORY=%s is neither host nor gpu", kind);
    /* In the child of a process that used it CUDA does not work. */
    return gpu && (gpu_process == 0 || gpu_process == getpid());
}

uint8_t *map_shared(size_t len)
{
    void *p = mmap(NULL, len, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    CHECK_MSG(p != MAP_FAILED, "no %zu bytes of memory", len);
    return p;
}

uint8_t *memory_new(int number, size_t len)
{
    if (!memory_is_gpu())
        return map_shared(len);
    const struct gpu *gpu = gpu_of(number);
    uint64_t p = 0;
    /* It stays current in this thread, as it does in an application. */
    CU(cuCtxSetCurrent(gpu->context));
    CU(cuMemAlloc_v2(&p, (len + ALLOCATION - 1) / ALLOCATION * ALLOCATION));
    CU(cuMemsetD8_v2(p, 0, len));
    CU(cuStreamSynchronize(NULL));
    area_add(p, len, gpu);
    return (uint8_t *)(uintptr_t)p;
}

void memory_free(uint8_t *p, size_t len)
{
    struct area *a = area_of(p);
    if (!a) {
        CHECK(munmap(p, len) == 0);
        return;
    }
    CHECK(a->p == p && a->len == len);
    if (a->forbidden)
        memory_allow(p, len);
    enter(a->gpu);
    CU(cuMemFree_v2((uintptr_t)p));
    leave();
    a->p = NULL;
}

void memory_forbid(uint8_t *p, size_t len)
{
    struct area *a = area_of(p);
    if (!a) {
        CHECK(mprotect(p, len, PROT_NONE) == 0);
        return;
    }
    device_wipe(a, p, len);
    a->forbidden = true;
}

void memory_allow(uint8_t *p, size_t len)
{
    struct area *a = area_of(p);
    if (!a) {
        CHECK(mprotect(p, len, PROT_READ | PROT_WRITE) == 0);
        return;
    }
    CHECK_MSG(a->forbidden && is_wiped(p, len), "memory was written after access was forbidden");
    a->forbidden = false;
}

int memory_rkey(const uint8_t *p)
{
    const struct area *a = area_of(p);
    if (getenv("UCCL_TCPX_EMULATE_DEVICE"))
        return 2;
    return a ? 2 + a->gpu->ordinal : 1;
}

memory_handle memory_lend(const uint8_t *p)
{
    memory_handle handle;
    const struct area *a = area_of(p);
    CHECK(a && a->p == p);
    enter(a->gpu);
    int error = cuIpcGetMemHandle(&handle, (uintptr_t)p);
    leave();
    if (error != 0)
        SKIP("processes cannot share GPU memory here: cuIpcGetMemHandle says %s", error_name(error));
    return handle;
}

uint8_t *memory_borrow(const memory_handle *handle, int number, size_t len)
{
    const struct gpu *gpu = gpu_of(number);
    uint64_t p = 0;
    enter(gpu);
    int error = cuIpcOpenMemHandle_v2(&p, *handle, CUDA_IPC_LAZY_PEER_ACCESS);
    leave();
    if (error != 0)
        SKIP("processes cannot share GPU memory here: cuIpcOpenMemHandle says %s", error_name(error));
    area_add(p, len, gpu);
    return (uint8_t *)(uintptr_t)p;
}

/* Patterns. */

/* The finaliser of splitmix64: a bijection, so no two words of a pattern are equal. */
static uint64_t mix(uint64_t x)
{
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
    return x ^ (x >> 31);
}

static uint8_t *scratch(size_t len)
{
    uint8_t *p = malloc(len + 1);
    CHECK_MSG(p, "no %zu bytes of memory", len);
    return p;
}

void fill(uint8_t *p, size_t len, uint64_t seed)
{
    const struct area *a = len ? area_of(p) : NULL;
    uint8_t *at = a ? scratch(len) : p;
    for (size_t i = 0; i < len; i += 8) {
        uint64_t word = mix((seed << 40) + i / 8 + 1);
        memcpy(at + i, &word, len - i < 8 ? len - i : 8);
    }
    if (!a)
        return;
    device_write(a, p, at, len);
    free(at);
}

void wipe(uint8_t *p, size_t len)
{
    const struct area *a = len ? area_of(p) : NULL;
    if (a)
        device_wipe(a, p, len);
    else
        memset(p, GUARD, len);
}

uint8_t *copy_of(const uint8_t *p, size_t len)
{
    const struct area *a = len ? area_of(p) : NULL;
    uint8_t *copy = scratch(len);
    if (a)
        device_read(a, copy, p, len);
    else
        memcpy(copy, p, len);
    return copy;
}

/* The bytes for the CPU: GPU memory is copied, host memory read in place. */
typedef struct view {
    const uint8_t *bytes;
    uint8_t *copy;
} view;

static view view_of(const uint8_t *p, size_t len)
{
    uint8_t *copy = len && area_of(p) ? copy_of(p, len) : NULL;
    return (view){copy ? copy : p, copy};
}

bool is_wiped(const uint8_t *p, size_t len)
{
    view v = view_of(p, len);
    bool wiped = len == 0 || (v.bytes[0] == GUARD && memcmp(v.bytes, v.bytes + 1, len - 1) == 0);
    free(v.copy);
    return wiped;
}

void check_same(const char *what, const uint8_t *got, const uint8_t *want, size_t len)
{
    view g = view_of(got, len), w = view_of(want, len);
    if (memcmp(g.bytes, w.bytes, len) != 0) {
        size_t i = 0;
        while (g.bytes[i] == w.bytes[i])
            i++;
        CHECK_MSG(g.bytes[i] == w.bytes[i], "%s: byte %zu of %zu is 0x%02x, expected 0x%02x", what, i, len, g.bytes[i], w.bytes[i]);
    }
    free(g.copy);
    free(w.copy);
}

uint64_t random_next(uint64_t *state)
{
    return mix(*state += 0x9E3779B97F4A7C15u);
}
