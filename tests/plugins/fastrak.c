/* A simulated GPUDirect-TCPXO that lists one device and carries no data. As with the real one, an init ends the process where the receive
 * manager is missing: here, where the folder of its socket is not named. */
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>

typedef struct {
  char *name, *pci_path;
  uint64_t guid;
  int ptr_support, speed, port;
  float latency;
  int max_comms, max_recvs, device_type, device_version;
} properties_v7;
typedef struct {
  const char *name;
  int (*init)(void *);
  int (*devices)(int *);
  int (*properties)(int, properties_v7 *);
  void *rest[15];
} table_v7;

static int init(void *log) {
  (void)log;
  if (!getenv("FILE_BASED_UDS_PATH_PREFIX")) abort();
  return 0;
}
static int devices(int *n) { *n = 1; return 0; }
static int properties(int device, properties_v7 *p) {
  (void)device;
  *p = (properties_v7){.name = (char *)"eth1", .ptr_support = 3, .speed = 200000, .max_comms = 10, .max_recvs = 1};
  return 0;
}

table_v7 ncclNetPlugin_v7 = {"FasTrak", init, devices, properties, {0}};
