/* A simulated CUDA driver for contract_probe on machines without a GPU: device memory is host memory of the process, as it is to the
 * plugins under UCCL_TCPX_EMULATE_DEVICE=1. */
#include <stddef.h>
#include <stdlib.h>
#include <string.h>

typedef unsigned long long dptr;
/* The alignment of the real driver for this size. */
#define ALIGN 65536

int cuInit(unsigned flags) { return flags != 0; }
int cuDeviceGet(int *device, int ordinal) { return *device = ordinal, 0; }
int cuDevicePrimaryCtxRetain(void **context, int device) { return *context = (void *)1, device != 0; }
int cuCtxSetCurrent(void *context) { return context == NULL; }
int cuCtxSynchronize(void) { return 0; }

int cuMemAlloc_v2(dptr *at, size_t size) {
  void *memory = aligned_alloc(ALIGN, (size + ALIGN - 1) / ALIGN * ALIGN);
  *at = (dptr)memory;
  return memory ? 0 : 2;
}

int cuMemsetD8_v2(dptr at, unsigned char byte, size_t size) { return memset((void *)at, byte, size) == NULL; }
int cuMemcpyHtoD_v2(dptr to, const void *from, size_t size) { return memcpy((void *)to, from, size) == NULL; }
int cuMemcpyDtoH_v2(void *to, dptr from, size_t size) { return memcpy(to, (const void *)from, size) == NULL; }

/* CU_POINTER_ATTRIBUTE_MEMORY_TYPE of everything: device memory. */
int cuPointerGetAttribute(unsigned *value, int attribute, dptr at) { return *value = 2, attribute != 2 || !at; }
