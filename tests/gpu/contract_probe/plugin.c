/* Loads the plugin and the CUDA driver, keeps the plugin's log, reports, and makes the bytes of messages. */
#include "probe.h"

#define X(f, n, args) int (*cu##f) args;
CUFUNCS(X)
#undef X

net_t *P;
const char *plugin_path, *scenario;
int fails, nnics, takes_host, largest = 1 << 20;
char last_warn[300];
static FILE *plog;

void report(int ok, const char *fmt, ...) {
  va_list a;
  va_start(a, fmt);
  printf("%s [%s] ", ok < 0 ? "INFO" : ok ? "PASS" : "FAIL", scenario);
  vprintf(fmt, a);
  printf("\n");
  fflush(stdout);
  va_end(a);
  if (!ok) fails++;
}
void die(const char *fmt, ...) {
  va_list a;
  va_start(a, fmt);
  printf("FAIL [%s] gave up: ", scenario);
  vprintf(fmt, a);
  printf("\n");
  fflush(stdout);
  _exit(1);
}
double now(void) { struct timespec t; clock_gettime(CLOCK_MONOTONIC, &t); return t.tv_sec + t.tv_nsec * 1e-9; }
static void logger(int level, unsigned long flags, const char *where, int line, const char *fmt, ...) {
  char b[1024];
  va_list a;
  va_start(a, fmt);
  vsnprintf(b, sizeof b, fmt, a);
  va_end(a);
  if (level <= 2) snprintf(last_warn, sizeof last_warn, "%.299s", b);
  if (plog) { fprintf(plog, "%.6f level %d %s:%d %s\n", now(), level, where, line, b); fflush(plog); }
}
void cu_must(int rc, const char *what) { if (rc) die("%s: CUDA error %d", what, rc); }
void load(const char *role) {
  void *l = dlopen("libcuda.so.1", RTLD_NOW | RTLD_GLOBAL);
  if (!l) die("%s", dlerror());
#define X(f, n, args) if (!(*(void **)&cu##f = dlsym(l, n))) die("no %s", n);
  CUFUNCS(X)
#undef X
  int dev;
  void *ctx;
  cu_must(cuInit(0), "cuInit");
  cu_must(cuDeviceGet(&dev, 0), "cuDeviceGet");
  cu_must(cuPrimaryCtxRetain(&ctx, dev), "cuDevicePrimaryCtxRetain");
  cu_must(cuCtxSetCurrent(ctx), "cuCtxSetCurrent");
  void *h = dlopen(plugin_path, RTLD_NOW | RTLD_LOCAL);
  if (!h) die("dlopen: %s", dlerror());
  P = dlsym(h, "ncclNetPlugin_v7");
  if (!P) die("no ncclNetPlugin_v7");
  if (getenv("PROBE_LOG")) {
    char p[256];
    snprintf(p, sizeof p, "%s.%s.%s", getenv("PROBE_LOG"), scenario, role);
    plog = fopen(p, "w");
  }
  int rc = P->init(logger), n = -1;
  if (rc) die("init: %d (%s)", rc, last_warn);
  rc = P->devices(&n);
  if (rc || n < 1) die("devices: %d, %d", rc, n);
  nnics = n;
  props_t p;
  memset(&p, 0, sizeof p);
  if ((rc = P->getProperties(0, &p))) die("getProperties: %d", rc);
  takes_host = (p.ptrSupport & 1) != 0;
  /* Device memory TCP takes no longer messages. */
  if (!takes_host) largest = PIECE;
}
uint32_t word(uint32_t m, uint32_t j) { uint32_t x = (m * 0x9e3779b1u + j) * 0x85ebca6bu; x ^= x >> 15; return x * 0xc2b2ae35u + m; }
void fill(char *b, uint32_t m, uint32_t n) { for (uint32_t j = 0; j * 4 < n; j++) { uint32_t w = word(m, j); memcpy(b + j * 4, &w, n - j * 4 < 4 ? n - j * 4 : 4); } }

uint32_t size_of(uint32_t m) { uint32_t w = word(m, 12345); return 1 + w % (w & 0x10000 ? 524288 : 3000); }

int is_soft(void) { return strstr(P->name, "soft") || strstr(P->name, "devmem"); }
