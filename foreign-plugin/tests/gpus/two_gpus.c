/* A simulated CUDA driver of two GPUs, as far as an engine asks when it is created and a plugin asks which GPU is current. */
#include <stdio.h>
static __thread long now;
int cuInit(unsigned flags) { return 0; }
int cuDeviceGetCount(int *count) { *count = 2; return 0; }
int cuDeviceGet(int *device, int ordinal) { *device = ordinal; return ordinal < 0 || ordinal > 1; }
int cuDeviceGetPCIBusId(char *text, int len, int device) { snprintf(text, len, "0000:0%d:00.0", 4 + device); return 0; }
int cuDevicePrimaryCtxRetain(long *context, int device) { *context = device + 1; return 0; }
int cuDevicePrimaryCtxRelease_v2(int device) { return 0; }
int cuDevicePrimaryCtxGetState(int device, unsigned *flags, int *active) { *flags = *active = 0; return 0; }
int cuCtxGetCurrent(long *context) { *context = now; return 0; }
int cuCtxPushCurrent_v2(long context) { now = context; return 0; }
int cuCtxPopCurrent_v2(long *context) { *context = now; now = 0; return 0; }
int cuCtxGetDevice(int *device) { *device = (int)now - 1; return now ? 0 : 201; }
