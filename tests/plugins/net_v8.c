/* A simulated NCCL net plugin with a table of version 8 and, beside it, one of version 7 that must not be used. It lists one device and
* carries no data. Its logger is called at once, unchecked, with arguments. */
#include <stddef.h>
#include <stdint.h>

typedef void (*logger_fn)(int, unsigned long, const char *, int, const char *, ...);
typedef struct {
  char *name, *pci_path;
  uint64_t guid;
  int ptr_support, reg_is_global, speed, port;
  float latency;
  int max_comms, max_recvs, device_type, device_version;
} properties_v8;
typedef struct {
  const char *name;
  int (*init)(logger_fn);
  int (*devices)(int *);
  int (*properties)(int, properties_v8 *);
  void *rest[15];
} table_v8;

static int init(logger_fn log) {
  log(2, 16, "net_v8.c", __LINE__, "simulated plugin: %s has %d devices", "v8", 1);
  return 0;
}
static int devices(int *n) { *n = 1; return 0; }
static int properties(int device, properties_v8 *p) {
  (void)device;
  p->name = (char *)"ib0";
  p->pci_path = (char *)"/sys/devices/pci0000:00/0000:00:05.0";
  p->guid = 7; p->ptr_support = 3; p->reg_is_global = 1; p->speed = 400000; p->port = 1; p->latency = 1.5f;
  p->max_comms = 10; p->max_recvs = 1; p->device_type = 0; p->device_version = 0;
  return 0;
}
static int refuse(logger_fn log) { (void)log; return 3; }

table_v8 ncclNetPlugin_v8 = {"simulated-v8", init, devices, properties, {0}};
/* init sits at the same place in both versions. */
table_v8 ncclNetPlugin_v7 = {"simulated-v7", refuse, devices, NULL, {0}};
