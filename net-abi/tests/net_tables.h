/* The tables of NCCL net plugins, versions 7 to 12, as a C compiler lays them out. layout.rs compares net-abi with it, and the simulated
 * plugins in tests/plugins are written with it. Members have NCCL's names; everything else is ours. */
#ifndef NET_TABLES_H
#define NET_TABLES_H

#include <stddef.h>
#include <stdint.h>

typedef void (*logger_fn)(int level, unsigned long flags, const char *file, int line, const char *format, ...);
typedef int (*profiler_fn)(void **event, int kind, void *profiler_handle, int64_t plugin_id, void *data);

typedef struct {
  int netDeviceType, netDeviceVersion;
  void *handle;
  size_t size;
  int needsProxyProgress;
} device_handle;

typedef struct {
  int trafficClass;
} comm_config;

typedef struct {
  int ndevs, devs[4];
} virtual_device_4;

typedef struct {
  int ndevs, devs[8];
} virtual_device_8;

/* PROPERTIES(VERSION, members after ptrSupport, members at the end) */
#define PROPERTIES(VERSION, NEW, LAST) \
  typedef struct { \
    char *name, *pciPath; \
    uint64_t guid; \
    int ptrSupport; \
    NEW int speed, port; \
    float latency; \
    int maxComms, maxRecvs, netDeviceType, netDeviceVersion; \
    LAST \
  } properties_v##VERSION

#define SIZES size_t maxP2pBytes, maxCollBytes;
PROPERTIES(7, , );
PROPERTIES(8, int regIsGlobal;, );
PROPERTIES(9, int regIsGlobal; int forceFlush;, virtual_device_4 vProps; SIZES);
typedef properties_v9 properties_v10;
PROPERTIES(11, int regIsGlobal; int forceFlush;, virtual_device_4 vProps; SIZES int maxMultiRequestSize;);
PROPERTIES(12, int regIsGlobal; int forceFlush;, virtual_device_8 vProps; SIZES int maxMultiRequestSize; int16_t railId; int16_t planeId;);

#define INIT_7 (logger_fn)
#define INIT_10 (logger_fn, profiler_fn)
#define INIT_11 (void **context, uint64_t id, comm_config *, logger_fn, profiler_fn)
#define LISTEN_7 (int device, void *handle, void **comm)
#define LISTEN_11 (void *context, int device, void *handle, void **comm)
#define CONNECT_7 (int device, void *handle, void **comm, device_handle **)
#define CONNECT_10 (int device, comm_config *, void *handle, void **comm, device_handle **)
#define CONNECT_11 (void *context, int device, void *handle, void **comm, device_handle **)
#define ISEND(SIZE) (void *comm, void *data, SIZE size, int tag, void *mhandle, void **request)
#define ISEND_10 (void *comm, void *data, size_t size, int tag, void *mhandle, void *profiler_handle, void **request)
#define IRECV(SIZE) (void *comm, int n, void **data, SIZE *sizes, int *tags, void **mhandles, void **request)
#define IRECV_10 (void *comm, int n, void **data, size_t *sizes, int *tags, void **mhandles, void **profiler_handles, void **request)

/* TABLE(VERSION, arguments of init, listen and connect, type of regMr's size, arguments of isend and irecv, members at the end) */
#define TABLE(VERSION, INIT, LISTEN, CONNECT, REGISTERED, ISEND, IRECV, LAST) \
  typedef struct { \
    const char *name; \
    int(*init) INIT; \
    int (*devices)(int *n); \
    int (*getProperties)(int device, properties_v##VERSION *); \
    int(*listen) LISTEN; \
    int(*connect) CONNECT; \
    int (*accept)(void *listen_comm, void **comm, device_handle **); \
    int (*regMr)(void *comm, void *data, REGISTERED size, int kind, void **mhandle); \
    int (*regMrDmaBuf)(void *comm, void *data, size_t size, int kind, uint64_t offset, int fd, void **mhandle); \
    int (*deregMr)(void *comm, void *mhandle); \
    int(*isend) ISEND; \
    int(*irecv) IRECV; \
    int (*iflush)(void *comm, int n, void **data, int *sizes, void **mhandles, void **request); \
    int (*test)(void *request, int *done, int *sizes); \
    int (*closeSend)(void *comm); \
    int (*closeRecv)(void *comm); \
    int (*closeListen)(void *comm); \
    int (*getDeviceMr)(void *comm, void *mhandle, void **device_mhandle); \
    int (*irecvConsumed)(void *comm, int n, void *request); \
    LAST \
  } table_v##VERSION

#define MAKE_4 int (*makeVDevice)(int *device, virtual_device_4 *);
#define MAKE_8 int (*makeVDevice)(int *device, virtual_device_8 *);
#define CONTEXT int (*finalize)(void *context); int (*setNetAttr)(void *context, void *attributes);
TABLE(7, INIT_7, LISTEN_7, CONNECT_7, int, ISEND(int), IRECV(int), );
TABLE(8, INIT_7, LISTEN_7, CONNECT_7, size_t, ISEND(int), IRECV(int), );
TABLE(9, INIT_7, LISTEN_7, CONNECT_7, size_t, ISEND(size_t), IRECV(size_t), MAKE_4);
TABLE(10, INIT_10, LISTEN_7, CONNECT_10, size_t, ISEND_10, IRECV_10, MAKE_4);
TABLE(11, INIT_11, LISTEN_11, CONNECT_11, size_t, ISEND_10, IRECV_10, MAKE_4 CONTEXT);
TABLE(12, INIT_11, LISTEN_11, CONNECT_11, size_t, ISEND_10, IRECV_10, MAKE_8 CONTEXT);

#endif
