/* Shared by the parts of contract_probe: the plugin's table, the driver's functions, the two processes, and reporting.
* main.c describes the program. */
#pragma once

#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

typedef unsigned long long dptr;
/* The CUDA driver, opened at run time. */
#define CUFUNCS(X) \
  X(Init, "cuInit", (unsigned)) X(DeviceGet, "cuDeviceGet", (int *, int)) \
  X(PrimaryCtxRetain, "cuDevicePrimaryCtxRetain", (void **, int)) X(CtxSetCurrent, "cuCtxSetCurrent", (void *)) \
  X(MemAlloc, "cuMemAlloc_v2", (dptr *, size_t)) X(MemsetD8, "cuMemsetD8_v2", (dptr, unsigned char, size_t)) \
  X(HtoD, "cuMemcpyHtoD_v2", (dptr, const void *, size_t)) X(DtoH, "cuMemcpyDtoH_v2", (void *, dptr, size_t)) \
  X(PtrAttr, "cuPointerGetAttribute", (void *, int, dptr)) X(Sync, "cuCtxSynchronize", (void))
#define X(f, n, args) extern int (*cu##f) args;
CUFUNCS(X)
#undef X

/* The plugin's table, version 7. */
typedef struct { char *name, *pciPath; uint64_t guid; int ptrSupport, speed, port; float latency; int maxComms, maxRecvs, devType, devVersion; } props_t;
typedef struct { int type, version; void *handle; size_t size; int needsProxy; } devh_t;
typedef struct {
  const char *name;
  int (*init)(void (*)(int, unsigned long, const char *, int, const char *, ...));
  int (*devices)(int *);
  int (*getProperties)(int, props_t *);
  int (*listen)(int, void *, void **);
  int (*connect)(int, void *, void **, devh_t **);
  int (*accept)(void *, void **, devh_t **);
  int (*regMr)(void *, void *, int, int, void **);
  int (*regMrDmaBuf)(void *, void *, size_t, int, uint64_t, int, void **);
  int (*deregMr)(void *, void *);
  int (*isend)(void *, void *, int, int, void *, void **);
  int (*irecv)(void *, int, void **, int *, int *, void **, void **);
  int (*iflush)(void *, int, void **, int *, void **, void **);
  int (*test)(void *, int *, int *);
  int (*closeSend)(void *);
  int (*closeRecv)(void *);
  int (*closeListen)(void *);
  int (*getDeviceMr)(void *, void *, void **);
  int (*irecvConsumed)(void *, int, void *);
} net_t;
struct meta { uint32_t src_off, len; uint64_t dst_off; };

/* The plugin's meta queue: 16 receives, with this many entries each. */
#define SLOTS 16
#define ENTRIES 2048


/* ---- plugin.c: loading, reporting, patterns ---- */
extern net_t *P;
extern const char *plugin_path, *scenario;
extern int fails, nnics;
extern int takes_host;        /* the plugin moves host memory too */
extern int largest;           /* bytes of the largest message */
extern char last_warn[300];   /* the last warning of the plugin */
void report(int ok, const char *fmt, ...) __attribute__((format(printf, 2, 3)));   /* ok < 0: information */
void die(const char *fmt, ...) __attribute__((format(printf, 1, 2), noreturn));
double now(void);
void cu_must(int rc, const char *what);
void load(const char *role);
/* Each message m has distinct words, and a distinct size if sizes are random. */
void fill(char *b, uint32_t m, uint32_t n);
uint32_t size_of(uint32_t m);
/* The software plugin, or its table for device memory TCP. Where it is deliberately stricter than Google's, the checks say so. */
int is_soft(void);

/* ---- sender.c: a process that takes commands over a socket pair ---- */
enum op {
  OP_CONNECT,      /* connect to the handle, register device and host memory */
  OP_REGISTER,     /* register b bytes at base + a, and deregister them */
  OP_SEND_DEVICE,  /* isend of message a, b bytes, from device memory */
  OP_SEND_HOST,    /* the same from host memory */
  OP_TEST_ALL,     /* test in order until all are done, at most a milliseconds */
  OP_TEST_OLDEST,  /* test the oldest a times */
  OP_STREAM,       /* a messages of b bytes, 16 in flight */
  OP_PATTERNS,     /* messages 0 to a - 1 with patterns and random sizes, 16 in flight */
  OP_CLOSE,        /* close the comm */
};
struct command { enum op op; int a, b; unsigned char handle[128]; };
struct reply { int rc, a, b; double t; char text[300]; };
#define REGION (64 << 20)
#define PLACE (4 << 20)   /* of the region, for each of 16 messages */
#define WINDOW 16
#define PIECE 524288      /* the largest message of stress */
void sender(int s);

/* ---- receiver.c: this process ---- */
extern int S;               /* to the sender */
extern pid_t peer;
extern void *listen_comm, *recv_comm, *mhandle;
extern devh_t device_handle;
extern dptr small_buf, d_meta, d_bounce;
extern int delivers;        /* the plugin writes to the posted address, as GPUDirect-TCPXO does: for stress and the scenarios in in_place.c */
extern uint64_t k_recv;     /* receives on this comm so far */
extern uint32_t m_next;     /* number of the next message */
void tell(enum op op, int a, int b, const void *h);
struct reply hear(void);
struct reply ask(enum op op, int a, int b);
void open_conn(int check);  /* check: report violations of the set-up rules */
void close_conn(void);
int post(int size, void **q);
int release(uint64_t k, void *q);
int flush_first(void **request);
int wait_done(void *q, double limit, int *size);
long check(uint64_t k, uint32_t m, uint32_t size, char *why, uint64_t *bytes_not_16);

/* ---- the scenarios: order.c, traffic.c, ends.c, in_place.c ---- */
void sc_main(void);
void sc_bench(void);
void sc_stress(void);
void sc_split(void);
void sc_host(void);
void sc_no_chunk_size(void);
void sc_no_device_handle(void);
void sc_driver_ranges(void);
void sc_sender_killed(void);
void sc_receiver_killed(void);
void doomed_receiver(int s);
void sc_in_place(void);
void sc_in_place_sender_killed(void);
void sc_in_place_receiver_killed(void);
