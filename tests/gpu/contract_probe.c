/* contract_probe: runs a NCCL net plugin's ncclNetPlugin_v7 (GPUDirect-TCPX, or the software plugin) between two processes with GPU memory
 * and checks what an engine has to rely on. Prints PASS, FAIL or INFO lines; exit status 1 if any FAIL. Letters in front of a check name
 * its group. Without arguments it lists the scenarios.
 *
 *   gcc -O2 -o contract_probe contract_probe.c -ldl -lpthread
 *   contract_probe [SCENARIO...] PLUGIN.so
 *
 * The plugin's log goes to $PROBE_LOG.SCENARIO.ROLE when PROBE_LOG is set. Check g3 makes GPUDirect-TCPX close descriptor 0.
 */
#define _GNU_SOURCE
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
#define CUFUNCS(X) \
  X(Init, "cuInit", (unsigned)) X(DeviceGet, "cuDeviceGet", (int *, int)) \
  X(PrimaryCtxRetain, "cuDevicePrimaryCtxRetain", (void **, int)) X(CtxSetCurrent, "cuCtxSetCurrent", (void *)) \
  X(MemAlloc, "cuMemAlloc_v2", (dptr *, size_t)) X(MemsetD8, "cuMemsetD8_v2", (dptr, unsigned char, size_t)) \
  X(HtoD, "cuMemcpyHtoD_v2", (dptr, const void *, size_t)) X(DtoH, "cuMemcpyDtoH_v2", (void *, dptr, size_t)) \
  X(PtrAttr, "cuPointerGetAttribute", (void *, int, dptr)) X(Sync, "cuCtxSynchronize", (void))
#define X(f, n, args) static int (*cu##f) args;
CUFUNCS(X)
#undef X

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
#define SLOTS 16
#define ENTRIES 2048

static net_t *P;
static const char *plugin_path, *scenario;
static FILE *plog;
static int fails, nnics;

static void report(int ok, const char *fmt, ...) {
  va_list a;
  va_start(a, fmt);
  printf("%s [%s] ", ok < 0 ? "INFO" : ok ? "PASS" : "FAIL", scenario);
  vprintf(fmt, a);
  printf("\n");
  fflush(stdout);
  va_end(a);
  if (!ok) fails++;
}
static void die(const char *fmt, ...) {
  va_list a;
  va_start(a, fmt);
  printf("FAIL [%s] gave up: ", scenario);
  vprintf(fmt, a);
  printf("\n");
  fflush(stdout);
  _exit(1);
}
static double now(void) { struct timespec t; clock_gettime(CLOCK_MONOTONIC, &t); return t.tv_sec + t.tv_nsec * 1e-9; }
static char last_warn[300];
static void logger(int level, unsigned long flags, const char *where, int line, const char *fmt, ...) {
  char b[1024];
  va_list a;
  va_start(a, fmt);
  vsnprintf(b, sizeof b, fmt, a);
  va_end(a);
  if (level <= 2) snprintf(last_warn, sizeof last_warn, "%.299s", b);
  if (plog) { fprintf(plog, "%.6f level %d %s:%d %s\n", now(), level, where, line, b); fflush(plog); }
}
static void cu_must(int rc, const char *what) { if (rc) die("%s: CUDA error %d", what, rc); }
static void load(const char *role) {
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
}
static uint32_t word(uint32_t m, uint32_t j) { uint32_t x = (m * 0x9e3779b1u + j) * 0x85ebca6bu; x ^= x >> 15; return x * 0xc2b2ae35u + m; }
static void fill(char *b, uint32_t m, uint32_t n) { for (uint32_t j = 0; j * 4 < n; j++) { uint32_t w = word(m, j); memcpy(b + j * 4, &w, n - j * 4 < 4 ? n - j * 4 : 4); } }

static uint32_t size_of(uint32_t m) { uint32_t w = word(m, 12345); return 1 + w % (w & 0x10000 ? 524288 : 3000); }

/* ---- the sender: a process that does what it is told over a socket pair ---- */
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

/* What the sender has. */
static struct {
  void *comm, *mhandle, *host_mhandle;
  dptr device;
  char *host;
  void *requests[64];
  int posted, done;
} tx;

static uint32_t place_of(uint32_t m) { return (m % WINDOW) * PLACE + (m * 52) % 1000; }

static void do_connect(struct command *c, struct reply *r) {
  unsigned char before[128];
  memcpy(before, c->handle, 128);
  double t0 = now();
  int calls = 1;
  r->rc = P->connect(0, c->handle, &tx.comm, NULL);
  r->a = tx.comm == NULL && r->rc == 0;                 /* what the first call gave */
  r->b = memcmp(before, c->handle, 128) != 0;           /* state in the handle */
  for (; !r->rc && !tx.comm && now() - t0 < 30; calls++) {
    usleep(1000);
    r->rc = P->connect(0, c->handle, &tx.comm, NULL);
  }
  r->t = now() - t0;
  if (!tx.comm && !r->rc) r->rc = -1;
  if (!r->rc && !tx.mhandle) r->rc = P->regMr(tx.comm, (void *)tx.device, REGION, 2, &tx.mhandle);
  if (!r->rc && !tx.host_mhandle) r->rc = P->regMr(tx.comm, tx.host, REGION, 1, &tx.host_mhandle);
  tx.posted = tx.done = 0;
  snprintf(r->text, sizeof r->text, "%d calls; %.280s", calls, last_warn);
}

static void do_register(const struct command *c, struct reply *r) {
  void *m = NULL;
  r->rc = P->regMr(tx.comm, (void *)(tx.device + c->a), c->b, 2, &m);
  r->a = fcntl(0, F_GETFD) >= 0;
  if (!r->rc && m) r->b = P->deregMr(tx.comm, m);
}

static void do_send(const struct command *c, struct reply *r) {
  int device = c->op == OP_SEND_DEVICE;
  uint32_t at = place_of(c->a);
  if (c->b > PLACE - 1000) die("too large");
  fill(tx.host + at, c->a, c->b);
  if (device) cu_must(cuHtoD(tx.device + at, tx.host + at, c->b), "HtoD");
  cu_must(cuSync(), "sync");
  void *q = NULL;
  r->rc = P->isend(tx.comm, device ? (void *)(tx.device + at) : tx.host + at, c->b, 0, device ? tx.mhandle : tx.host_mhandle, &q);
  if (!r->rc && q) tx.requests[tx.posted++ % 64] = q;
}

static void do_test(const struct command *c, struct reply *r) {
  double t0 = now();
  int left = c->a;
  r->b = -12345;
  while (tx.done < tx.posted && (c->op == OP_TEST_ALL ? now() - t0 < c->a * 1e-3 : left-- > 0)) {
    int done = 0;
    if ((r->rc = P->test(tx.requests[tx.done % 64], &done, &r->b))) break;
    if (done) tx.done++;
    else if (c->op == OP_TEST_OLDEST) usleep(1000);
  }
  r->a = tx.posted - tx.done;                           /* not done */
  r->t = now() - t0;
}

/* a messages through the window; with patterns each has a size and bytes of its own, and its memory is overwritten once it is done */
static void do_window(const struct command *c, struct reply *r) {
  int patterns = c->op == OP_PATTERNS, sent = 0, done = 0;
  void *window[WINDOW];
  double t0 = now();
  while (done < c->a && !r->rc && now() - t0 < 120) {
    while (sent < c->a && sent - done < WINDOW && !r->rc) {
      uint32_t size = patterns ? size_of(sent) : (uint32_t)c->b, at = patterns ? place_of(sent) : (uint32_t)(sent % WINDOW) * PLACE;
      if (patterns) {
        fill(tx.host, sent, size);
        cu_must(cuHtoD(tx.device + at, tx.host, size), "HtoD");
        cu_must(cuSync(), "sync");
      }
      void *q = NULL;
      r->rc = P->isend(tx.comm, (void *)(tx.device + at), size, 0, tx.mhandle, &q);
      if (!q) break;
      window[sent++ % WINDOW] = q;
    }
    int ready = 0;
    if (!r->rc && done < sent) r->rc = P->test(window[done % WINDOW], &ready, NULL);
    if (ready && patterns) cu_must(cuMemsetD8(tx.device + (done % WINDOW) * PLACE, 0xee, 1 << 20), "memset");
    done += ready != 0;
  }
  r->a = done;
  r->t = now() - t0;
}

static void do_close(struct reply *r) {
  r->rc = P->closeSend(tx.comm);
  tx.comm = tx.mhandle = tx.host_mhandle = NULL;        /* left registered on purpose: the comm is gone */
}

static void sender(int s) {
  load("sender");
  tx.host = malloc(REGION);
  cu_must(cuMemAlloc(&tx.device, REGION), "cuMemAlloc");
  struct command c;
  while (read(s, &c, sizeof c) == sizeof c) {
    struct reply r = {0};
    last_warn[0] = 0;
    switch (c.op) {
    case OP_CONNECT: do_connect(&c, &r); break;
    case OP_REGISTER: do_register(&c, &r); break;
    case OP_SEND_DEVICE:
    case OP_SEND_HOST: do_send(&c, &r); break;
    case OP_TEST_ALL:
    case OP_TEST_OLDEST: do_test(&c, &r); break;
    case OP_STREAM:
    case OP_PATTERNS: do_window(&c, &r); break;
    case OP_CLOSE: do_close(&r); break;
    }
    if (!r.text[0]) snprintf(r.text, sizeof r.text, "%s", last_warn);
    if (write(s, &r, sizeof r) != sizeof r) break;
  }
  exit(0);
}

/* ---- the receiver ---- */
static int S;               /* to the sender */
static pid_t peer;
static void *listen_comm, *recv_comm, *mhandle;
static devh_t device_handle;
static dptr small_buf, d_meta, d_bounce;
static uint64_t k_recv;     /* receives on this comm so far */
static uint32_t m_next;     /* message number */

static void tell(enum op op, int a, int b, const void *h) {
  struct command c;
  memset(&c, 0, sizeof c);
  c.op = op; c.a = a; c.b = b;
  if (h) memcpy(c.handle, h, 128);
  if (write(S, &c, sizeof c) != sizeof c) die("the sender is gone");
}
static struct reply hear(void) {
  struct reply r;
  ssize_t n = read(S, &r, sizeof r);
  if (n != sizeof r) die("no answer from the sender");
  return r;
}
static struct reply ask(enum op op, int a, int b) { tell(op, a, b, NULL); return hear(); }

static void open_conn(int check) {
  unsigned char h[128];
  memset(h, 0, sizeof h);
  int rc = P->listen(0, h, &listen_comm);
  if (rc) die("listen: %d (%s)", rc, last_warn);
  tell(OP_CONNECT, 0, 0, h);
  struct { devh_t d; char guard[64]; } box;
  memset(&box, 0xee, sizeof box);
  devh_t *pd = &box.d;
  recv_comm = NULL;
  rc = P->accept(listen_comm, &recv_comm, &pd);
  int first_null = rc == 0 && recv_comm == NULL, untouched = box.d.type == (int)0xeeeeeeee;
  double t0 = now();
  while (!rc && !recv_comm && now() - t0 < 30) { usleep(1000); rc = P->accept(listen_comm, &recv_comm, &pd); }
  double ta = now() - t0;
  if (rc || !recv_comm) die("accept: %d (%s)", rc, last_warn);
  struct reply r = hear();
  if (r.rc) die("connect: %d (%s)", r.rc, r.text);
  /* The software plugin makes what the handle names when device memory is first registered. */
  cu_must(cuMemAlloc(&small_buf, 65536 + 4096), "cuMemAlloc");
  if (check) report(-1, "a small cuMemAlloc lies at +%llu of a page: round up before regMr", small_buf % 4096);
  small_buf = (small_buf + 4095) & ~4095ull;
  rc = P->regMr(recv_comm, (void *)small_buf, 65536, 2, &mhandle);
  if (rc) die("regMr: %d (%s)", rc, last_warn);
  device_handle = box.d;
  uint64_t h3[3] = {0};
  unsigned type = 0;
  int att = cuPtrAttr(&type, 2 /* memory type */, (dptr)(uintptr_t)device_handle.handle);
  cu_must(cuDtoH(h3, (dptr)(uintptr_t)device_handle.handle, 24), "DtoH of the device handle");
  d_meta = h3[0];
  d_bounce = h3[1];
  k_recv = 0;
  if (!check) return;
  int guard = 1;
  for (int i = 0; i < 64; i++) guard &= box.guard[i] == (char)0xee;
  report(pd == &box.d && guard && device_handle.type == 1 && device_handle.version == 7 && device_handle.size == 24 && device_handle.needsProxy == 1,
         "a1 accept filled the caller's device handle: type %d, version %d, size %zu, needsProxyProgress %d, pointer kept %d", device_handle.type, device_handle.version, device_handle.size, device_handle.needsProxy, pd == &box.d);
  unsigned mt = 0, bt = 0;
  cuPtrAttr(&mt, 2, d_meta);
  cuPtrAttr(&bt, 2, d_bounce);
  /* Google's bounce buffer is device memory (2); pinned host memory that the GPU reads directly (1) serves as well. */
  report(att == 0 && type == 2 && (bt == 2 || bt == 1) && h3[2] == ~0ull,
         "a2 handle is device memory (type %u) with meta %#lx (memory type %u: 1 host, 2 device), bounce %#lx (%u), head %ld", type, h3[0], mt, h3[1], bt, (long)h3[2]);
  report(first_null && untouched, "a3 the first accept gave success and a NULL comm, the handle untouched; it took %.2f s", ta);
  report(r.a && r.b, "h connect: first call success with a NULL comm %d, it wrote into the handle buffer %d, then the comm after %s %.2f s", r.a, r.b, r.text, r.t);
}
static void close_conn(void) {
  struct reply r = ask(OP_CLOSE, 0, 0);
  int rc = P->deregMr(recv_comm, mhandle), c = P->closeRecv(recv_comm), l = P->closeListen(listen_comm);
  if (r.rc || rc || c || l) report(0, "close: closeSend %d deregMr %d closeRecv %d closeListen %d", r.rc, rc, c, l);
}
static int post(int size, void **q) {
  void *d[1] = {(void *)0x1000};  /* no such memory: the destination is never touched by the plugin */
  int sz[1] = {size}, tag[1] = {0};
  void *m[1] = {mhandle};
  *q = NULL;
  return P->irecv(recv_comm, 1, d, sz, tag, m, q);
}
static int wait_done(void *q, double limit, int *size) {
  double t0 = now();
  int done = 0;
  while (!done && now() - t0 < limit) {
    int rc = P->test(q, &done, size);
    if (rc) return rc;
  }
  return done ? 0 : -1;
}
/* checks slot k % 16 against message m; returns the number of entries or a negative number */
static long check(uint64_t k, uint32_t m, uint32_t size, char *why, uint64_t *bytes_not_16) {
  uint64_t cnt = 0;
  static struct meta e[ENTRIES];
  static char *got, *want, *seen;
  if (!got) { got = malloc(REGION); want = malloc(REGION); seen = malloc(REGION); }
  cu_must(cuDtoH(&cnt, d_meta + (uint64_t)SLOTS * ENTRIES * 16 + (k % SLOTS) * 8, 8), "cnt");
  if (cnt == 0 || cnt >= ENTRIES) { sprintf(why, "cnt %lu", cnt); return -1; }
  cu_must(cuDtoH(e, d_meta + (k % SLOTS) * ENTRIES * 16, cnt * 16), "meta");
  memset(seen, 0, size);
  uint64_t sum = 0;
  for (uint64_t i = 0; i < cnt; i++) {
    if (e[i].dst_off + e[i].len > size || !e[i].len) { sprintf(why, "entry %lu: %u bytes at %lu of %u", i, e[i].len, e[i].dst_off, size); return -2; }
    for (uint32_t j = 0; j < e[i].len; j++) if (seen[e[i].dst_off + j]++) { sprintf(why, "entry %lu overlaps", i); return -3; }
    cu_must(cuDtoH(got + e[i].dst_off, d_bounce + e[i].src_off, e[i].len), "bounce");
    sum += e[i].len;
    *bytes_not_16 += (e[i].src_off | e[i].len | e[i].dst_off) % 16 != 0;
  }
  if (sum != size) { sprintf(why, "lengths add up to %lu, not %u", sum, size); return -4; }
  fill(want, m, size);
  if (memcmp(got, want, size)) { sprintf(why, "bytes differ"); return -5; }
  return cnt;
}
/* Where the software plugin is deliberately stricter than Google's, the checks say so. */
static int is_soft(void) { return strstr(P->name, "soft") != NULL; }

static void sc_main(void) {
  open_conn(1);
  char why[600] = "";
  /* b, f, j */
  static const int sizes[] = {1, 17, 4096, 5000, 65536, 300001, 524288, 1048576, 3, 131072, 77777, 4095};
  int ok = 1, untouched = 1, n = 40;
  uint64_t entries = 0, odd = 0;
  for (int i = 0; i < n && ok; i++) {
    int size = sizes[i % 12], sz = -12345;
    uint32_t m = m_next++;
    void *q;
    struct reply r = ask(OP_SEND_DEVICE, m, size);
    if (r.rc) { ok = 0; sprintf(why, "isend %d", r.rc); break; }
    int rc = post(size, &q);
    if (rc || !q) { ok = 0; sprintf(why, "irecv %d", rc); break; }
    tell(OP_TEST_ALL, 10000, 0, NULL);
    rc = wait_done(q, 10, &sz);
    if (rc) { ok = 0; sprintf(why, "test %d (%s)", rc, last_warn); hear(); break; }
    r = hear();
    if (r.rc || r.a) { ok = 0; sprintf(why, "sender: %d, %d left", r.rc, r.a); break; }
    untouched &= sz == -12345 && r.b == -12345;
    long e = check(k_recv++, m, size, why, &odd);
    if (e < 0) { ok = 0; sprintf(why + strlen(why), " (receive %d)", i); break; }
    entries += e;
    rc = P->irecvConsumed(recv_comm, 1, q);
    if (rc) { ok = 0; sprintf(why, "irecvConsumed %d", rc); break; }
  }
  report(ok, "b %d receives of 1 B to 1 MiB: receive k in slot k %% 16, lengths add up, bytes right; %lu entries, %lu not 16-aligned %s", n, entries, odd, why);
  report(ok, "f the mhandle was a 64 KiB buffer's and the destination no memory at all%s", "");
  report(untouched, "j test wrote nothing to size, on either side");
  if (!ok) die("cannot go on");

  /* n: the sender first, nothing posted here */
  uint32_t m = m_next++;
  ask(OP_SEND_DEVICE, m, 65536);
  struct reply r = ask(OP_TEST_ALL, 1500, 0);
  report(-1, "n isend of 64 KiB with no receive posted: %s after %.3f s (receiver sync %s)", r.a ? "not done" : "done", r.t, r.a ? "on" : "off");
  void *q;
  if (post(65536, &q)) die("irecv");
  tell(OP_TEST_ALL, 10000, 0, NULL);
  int rc = wait_done(q, 10, NULL);
  r = hear();
  long e = check(k_recv++, m, 65536, why, &odd);
  report(!rc && !r.rc && !r.a && e > 0 && !P->irecvConsumed(recv_comm, 1, q), "n the message arrives all the same: test %d, %ld entries %s", rc, e, why);

  /* d: testing another one than the head */
  void *qs[20];
  uint32_t ms[20];
  for (int i = 0; i < 3; i++) { ms[i] = m_next++; ask(OP_SEND_DEVICE, ms[i], 8192); if (post(8192, &qs[i])) die("irecv"); }
  int done = 0;
  int rc1 = P->test(qs[1], &done, NULL);
  /* The software plugin refuses it always, TCPX only once the head has been announced. */
  report((rc1 == 0 || (is_soft() && rc1 == 3)) && !done, "d1 test of the second request before anything of the head arrived: %d, done %d", rc1, done);
  int rc2 = 0, d2 = 0;
  tell(OP_TEST_ALL, 10000, 0, NULL);
  usleep(200000);
  rc2 = P->test(qs[1], &d2, NULL);
  report(rc2 == 3 && !d2, "d2 head complete but not tested: test of the second: %d, done %d", rc2, d2);
  int dr = wait_done(qs[0], 10, NULL);
  report(dr == 0, "d3 and the head's own test then works: %d", dr);
  int bad = 0;
  for (int i = 1; i < 3; i++) bad |= wait_done(qs[i], 10, NULL);
  r = hear();
  for (int i = 0; i < 3; i++) { bad |= check(k_recv++, ms[i], 8192, why, &odd) < 0; bad |= P->irecvConsumed(recv_comm, 1, qs[i]); }
  report(!bad && !r.rc && !r.a, "d4 all three arrive right afterwards %s", why);

  /* c, e */
  for (int i = 0; i < 16; i++) { ms[i] = m_next++; r = ask(OP_SEND_DEVICE, ms[i], 4096 + i); if (r.rc) die("isend %d", r.rc); }
  r = ask(OP_SEND_DEVICE, m_next, 100);
  report(r.rc == 3, "c1 17th isend: %d (%s)", r.rc, r.text);
  for (int i = 0; i < 16; i++) if ((rc = post(8192, &qs[i]))) die("irecv %d: %d", i, rc);
  rc = post(100, &q);
  report(rc == 3, "c2 17th irecv: %d (%s)", rc, last_warn);
  tell(OP_TEST_ALL, 10000, 0, NULL);
  bad = 0;
  for (int i = 0; i < 16; i++) bad |= wait_done(qs[i], 10, NULL);
  r = hear();
  report(!bad && !r.rc && !r.a, "c3 the 16 of each side complete (posted 8192, announced 4096..4111)");
  rc = post(100, &q);
  report(rc == 3, "e1 all 16 tested done but none consumed: irecv gives %d", rc);
  int s17 = ask(OP_SEND_DEVICE, m_next, 100).rc;
  report(s17 == 0, "e2 the sender's slots are free once test says done: isend gives %d", s17);
  m_next++;
  rc = P->irecvConsumed(recv_comm, 1, qs[1]);
  report(rc == 3, "e3 irecvConsumed out of order: %d (%s)", rc, last_warn);
  bad = 0;
  for (int i = 0; i < 16; i++) { if (check(k_recv + i, ms[i], 4096 + i, why, &odd) < 0) bad++; }
  report(!bad, "e4 all 16 receives readable at once, after their tests %s", why);
  bad = 0;
  for (int i = 0; i < 16; i++) { bad |= P->irecvConsumed(recv_comm, 1, qs[i]); if (i == 0) bad |= post(100, &q); }
  k_recv += 16;
  report(!bad, "e5 consumed in order; after the first one irecv works again");
  tell(OP_TEST_ALL, 10000, 0, NULL);
  rc = wait_done(q, 10, NULL);
  r = hear();
  e = check(k_recv++, m_next - 1, 100, why, &odd);
  report(!rc && e > 0 && !P->irecvConsumed(recv_comm, 1, q), "e6 that one arrives: %d, %ld %s", rc, e, why);

  /* p: a receive smaller than the message */
  m = m_next++;
  ask(OP_SEND_DEVICE, m, 8192);
  if (post(100, &q)) die("irecv");
  tell(OP_TEST_ALL, 10000, 0, NULL);
  rc = wait_done(q, 10, NULL);
  r = hear();
  if (is_soft()) {
    report(rc == 3, "p irecv posted with 100 B for a message of 8192 B: the software plugin enforces the posted size: %d", rc);
    goto registrations;
  }
  e = check(k_recv++, m, 8192, why, &odd);
  report(!rc && e > 0 && !P->irecvConsumed(recv_comm, 1, q), "p irecv posted with 100 B for a message of 8192 B: no error, entries for all 8192 B: the posted size counts for nothing %s", why);

registrations:
  /* g */
  r = ask(OP_REGISTER, 512, 65536);
  report(r.rc == 3 || (is_soft() && r.rc == 4), "g1 regMr of a base at +512: %d (%s)", r.rc, r.text);
  r = ask(OP_REGISTER, 8192, 65536);
  report(r.rc == 0 && r.b == 0, "g2 regMr of a base at +8192 inside the allocation: %d, deregMr %d", r.rc, r.b);
  r = ask(OP_REGISTER, 4096, 65536 + 100);
  report(r.rc != 0, "g3 regMr of a size that is no multiple of 4096: %d, fd 0 still open %d (%s)", r.rc, r.a, r.text);
  close_conn();
}

static void sc_bench(void) {
  for (int round = 0; round < 2; round++) {
    int size = round ? 1 << 20 : 512 << 10, n = round ? 1000 : 3000;
    open_conn(0);
    tell(OP_STREAM, n, size, NULL);
    void *w[16];
    int posted = 0, tested = 0, rc = 0;
    double t0 = now();
    while (tested < n && !rc && now() - t0 < 60) {
      while (posted < n && posted - tested < 16 && !rc) { if (!(rc = post(size, &w[posted % 16]))) posted++; }
      int done = 0;
      if (!rc) rc = P->test(w[tested % 16], &done, NULL);
      if (done) { rc = P->irecvConsumed(recv_comm, 1, w[tested % 16]); tested++; }
    }
    double t = now() - t0;
    struct reply r = hear();
    report(tested == n && !rc && !r.rc ? -1 : 0, "k %d messages of %d KiB, window 16: %.2f GB/s (%.2f s, rc %d, sender rc %d)", tested, size >> 10, (double)tested * size / t * 1e-9, t, rc, r.rc);
    close_conn();
    }
}

static void sc_stress(void) { /* 16 in flight on each side, random sizes up to one chunk, every byte checked */
  int n = 600, posted = 0, tested = 0, consumed = 0, rc = 0;
  open_conn(0);
  tell(OP_PATTERNS, n, 0, NULL);
  void *w[16];
  char why[600] = "";
  uint64_t odd = 0, bytes = 0;
  double t0 = now();
  long e = 1;
  while (consumed < n && !rc && e > 0 && now() - t0 < 100) {
    while (posted < n && posted - consumed < 16 && !rc) { if (!(rc = post(524288, &w[posted % 16]))) posted++; }
    int done = 0;
    if (!rc && tested < posted) rc = P->test(w[tested % 16], &done, NULL);
    if (done) tested++;
    while (!rc && e > 0 && consumed < tested && (tested - consumed > 8 || tested == n || posted - consumed == 16)) { /* late, on purpose */
      uint32_t size = size_of(consumed);
      e = check(consumed, consumed, size, why, &odd);
      bytes += size;
      if (e > 0) rc = P->irecvConsumed(recv_comm, 1, w[consumed % 16]);
      if (e > 0) consumed++;
    }
  }
  if (consumed < n) kill(peer, SIGKILL);
  report(consumed == n, "s %d of %d messages of random size, %lu bytes, 16 in flight, each right (rc %d, %s)", consumed, n, bytes, rc, why);
  if (consumed < n) return;
  struct reply r = hear();
  report(!r.rc && r.a == n, "s sender: %d, %d done", r.rc, r.a);
  close_conn();
}

static void sc_split(void) { /* messages of several chunks */
  open_conn(0);
  void *qs[8];
  uint32_t ms[8];
  char why[600] = "";
  uint64_t odd = 0;
  int bad = 0, size = 3 << 20;
  for (int i = 0; i < 8; i++) { ms[i] = m_next++; ask(OP_SEND_DEVICE, ms[i], size); bad |= post(size, &qs[i]); }
  tell(OP_TEST_ALL, 20000, 0, NULL);
  for (int i = 0; i < 8; i++) bad |= wait_done(qs[i], 20, NULL);
  struct reply r = hear();
  for (int i = 0; i < 8; i++) { long e = check(k_recv++, ms[i], size, why, &odd); bad |= e < 0; bad |= P->irecvConsumed(recv_comm, 1, qs[i]); }
  uint64_t back = 0;
  for (int k = 0; k < 8; k++) {
    uint64_t cnt = 0;
    static struct meta en[ENTRIES];
    cuDtoH(&cnt, d_meta + (uint64_t)SLOTS * ENTRIES * 16 + k * 8, 8);
    cuDtoH(en, d_meta + (uint64_t)k * ENTRIES * 16, cnt * 16);
    for (uint64_t i = 1; i < cnt; i++) back += en[i].dst_off < en[i - 1].dst_off;
  }
  report(-1, "m0 the entries step back in dst_off %lu times in 8 messages", back);
  report(!bad && !r.rc && !r.a, "m1 8 messages of 3 MiB, each in 48 chunks over the sockets: bytes right %s", why);
  close_conn();
}

static void sc_host(void) {
  open_conn(0);
  char *buf = malloc(1 << 20), *want = malloc(1 << 20);
  void *hm = NULL;
  int rc = P->regMr(recv_comm, buf, 1 << 20, 1, &hm), bad = 0;
  for (int i = 0; i < 5 && !rc && !bad; i++) {
    void *d[1] = {buf}, *q = NULL, *mm[1] = {hm};
    int size = i * 1000 + 10, tag[1] = {0}, sz[1] = {size};
    uint32_t m = m_next++;
    ask(i % 2 ? OP_SEND_DEVICE : OP_SEND_HOST, m, size);
    bad |= P->irecv(recv_comm, 1, d, sz, tag, mm, &q);
    tell(OP_TEST_ALL, 2000, 0, NULL);
    rc = wait_done(q, 2, NULL);
    struct reply r = hear();
    uint64_t cnt = 99;
    cuDtoH(&cnt, d_meta + (uint64_t)SLOTS * ENTRIES * 16 + (k_recv++ % SLOTS) * 8, 8);
    fill(want, m, size);
    int same = !memcmp(buf, want, size);
    report(-1, "i host receive %d of %d B from %s memory: test %d, bytes right %d, sender left %d, cnt[slot] %lu (%s)", i, size, i % 2 ? "CUDA" : "host", rc, same, r.a, cnt, last_warn);
    if (!rc) bad |= P->irecvConsumed(recv_comm, 1, q);
  }
  report(-1, "i receives in host memory: the last test gives %d; they never complete where the kernel answers EFAULT for device memory", rc);
}

static void sc_no_chunk_size(void) {
  open_conn(0);
  void *q;
  ask(OP_SEND_DEVICE, m_next++, 65536);
  int rc = post(65536, &q);
  tell(OP_TEST_ALL, 3000, 0, NULL);
  rc = rc ? rc : wait_done(q, 3, NULL);
  struct reply r = hear();
  report(rc != 0 ? -1 : 0, "o without NCCL_DYNAMIC_CHUNK_SIZE a 64 KiB message: receiver %d, sender %d with %d left (%s)", rc, r.rc, r.a, last_warn);
}

static void sc_no_device_handle(void) { /* accept without a device handle */
  unsigned char h[128] = {0};
  if (P->listen(0, h, &listen_comm)) die("listen");
  tell(OP_CONNECT, 0, 0, h);
  int rc = 0;
  double t0 = now();
  while (!rc && !recv_comm && now() - t0 < 30) { rc = P->accept(listen_comm, &recv_comm, NULL); usleep(1000); }
  struct reply r = hear();
  report(-1, "q accept without a device handle: %d, comm %d, connect %d", rc, recv_comm != NULL, r.rc);
  cuMemAlloc(&small_buf, 65536 + 4096);
  small_buf = (small_buf + 4095) & ~4095ull;
  rc = P->regMr(recv_comm, (void *)small_buf, 65536, 2, &mhandle);
  void *q;
  fflush(stdout);
  pid_t p = fork(); /* it may crash: the child tries (no CUDA calls in it) */
  if (!p) { alarm(5); rc = post(4096, &q); tell(OP_SEND_DEVICE, 1, 4096, NULL); hear(); tell(OP_TEST_ALL, 3000, 0, NULL); rc = rc ? rc : wait_done(q, 3, NULL); _exit(rc == 0 ? 0 : 7); }
  int st;
  waitpid(p, &st, 0);
  report(-1, "q a receive on it: %s %d", WIFSIGNALED(st) ? "the process dies of signal" : "exit status", WIFSIGNALED(st) ? WTERMSIG(st) : WEXITSTATUS(st));
}
static void sc_driver_ranges(void) { /* what the driver itself answers */
  int (*real)(void *, dptr, size_t, int, dptr);
  *(void **)&real = dlsym(dlopen("libcuda.so.1", RTLD_NOW), "cuMemGetHandleForAddressRange");
  dptr b;
  cu_must(cuMemAlloc(&b, 8 << 20), "alloc");
  static const struct { const char *what; long off, size; } t[] = {
    {"4096-aligned base and size", 4096, 65536}, {"base at +512", 512, 65536}, {"size 65636", 0, 65636},
    {"size 100", 0, 100}, {"beyond the allocation", 0, 64 << 20}, {"all of it", 0, 8 << 20}};
  for (int i = 0; i < 6; i++) {
    int fd = -777, rc = real(&fd, b + t[i].off, t[i].size, 1, 0);
    report(-1, "the driver's cuMemGetHandleForAddressRange, %s: %d, fd %s", t[i].what, rc, fd == -777 ? "untouched" : fd < 0 ? "negative" : "given");
    if (fd >= 0) close(fd);
  }
}
static void watch(const char *what, void *q, double limit) {
  int rc = 0, done = 0;
  double t0 = now();
  long calls = 0;
  last_warn[0] = 0;
  while (!rc && !done && now() - t0 < limit) { rc = P->test(q, &done, NULL); calls++; usleep(100); }
  report(-1, "l %s: test %s %d, done %d, after %.3f s and %ld calls (%s)", what, rc ? "FAILS with" : "keeps giving", rc, done, now() - t0, calls, last_warn);
}
static void sc_sender_killed(void) {
  open_conn(0);
  void *q, *q2;
  if (post(4096, &q) || post(4096, &q2)) die("irecv");
  watch("receiver, sender alive and silent", q, 0.5);
  kill(peer, SIGKILL);
  watch("receiver, sender killed, nothing of the receive announced yet", q, 3);
  watch("receiver, again", q, 0.5);
}
static volatile int pipes;
static void on_pipe(int s) { pipes++; }
static void sc_receiver_killed(void) { /* roles the other way round: the child receives and dies; this process sends */
  signal(SIGPIPE, on_pipe);
  load("sender");
  unsigned char h[128];
  if (read(S, h, 128) != 128) die("no handle");
  void *comm = NULL, *m = NULL, *q[8] = {0};
  double t0 = now();
  int rc = 0;
  while (!rc && !comm && now() - t0 < 30) { rc = P->connect(0, h, &comm, NULL); usleep(1000); }
  if (!comm) die("connect %d", rc);
  dptr b;
  cu_must(cuMemAlloc(&b, 1 << 20), "alloc");
  if ((rc = P->regMr(comm, (void *)b, 1 << 20, 2, &m))) die("regMr %d", rc);
  char c;
  if (read(S, &c, 1) != 1) die("receiver");
  kill(peer, SIGKILL);
  waitpid(peer, NULL, 0);
  usleep(200000);
  for (int i = 0; i < 4; i++) {
    rc = P->isend(comm, (void *)b, 65536, 0, m, &q[i]);
    report(-1, "l sender, receiver killed: isend %d gives %d", i, rc);
    watch("sender", q[0], 1);
  }
  report(-1, "l sender: SIGPIPE arrived %d times (a program that does not ignore it dies)", pipes);
}
static void doomed_receiver(int s) {
  load("receiver");
  unsigned char h[128] = {0};
  if (P->listen(0, h, &listen_comm)) die("listen");
  if (write(s, h, 128) != 128) die("pipe");
  devh_t d, *pd = &d;
  int rc = 0;
  while (!rc && !recv_comm) { rc = P->accept(listen_comm, &recv_comm, &pd); usleep(1000); }
  if (rc) die("accept %d", rc);
  if (write(s, "x", 1) != 1) die("pipe");
  pause();
  exit(0);
}

/* ---- the scenarios ---- */
static void describe(void) {
  props_t p;
  memset(&p, 0, sizeof p);
  P->getProperties(0, &p);
  report(-1, "plugin %s: NIC %s, pci %s, speed %d, ptrSupport %d, maxRecvs %d, device type %d version %d, regMrDmaBuf %s, %d NICs", P->name, p.name, p.pciPath ? p.pciPath : "NULL", p.speed, p.ptrSupport, p.maxRecvs, p.devType, p.devVersion, P->regMrDmaBuf ? "set" : "NULL", nnics);
}

static const struct scenario {
  const char *name;
  void (*play)(void);
  void (*other)(int);       /* what the other process is; the sender where nothing else is said */
  const char *chunk_size;   /* NCCL_DYNAMIC_CHUNK_SIZE; "" takes it out of the environment */
  const char *about;
} scenarios[] = {
  {"main", sc_main, NULL, NULL, "set-up, order of tests and consumes, windows, sizes, registrations"},
  {"stress", sc_stress, NULL, NULL, "messages of random sizes, 16 in flight, every byte compared"},
  {"bench", sc_bench, NULL, NULL, "rates of large messages"},
  {"split", sc_split, NULL, "65536", "messages of several chunks of the plugin"},
  {"host", sc_host, NULL, NULL, "receives into host memory"},
  {"no_chunk_size", sc_no_chunk_size, NULL, "", "without NCCL_DYNAMIC_CHUNK_SIZE"},
  {"no_device_handle", sc_no_device_handle, NULL, NULL, "an accept that is given no device handle"},
  {"driver_ranges", sc_driver_ranges, NULL, NULL, "which ranges the driver exports as DMA-BUF"},
  {"sender_killed", sc_sender_killed, NULL, NULL, "what a receiver sees when its sender is killed"},
  {"receiver_killed", sc_receiver_killed, doomed_receiver, NULL, "what a sender sees when its receiver is killed"},
};
#define SCENARIOS (sizeof scenarios / sizeof *scenarios)

static int run(const struct scenario *sc) {
  scenario = sc->name;
  fails = 0;
  int sv[2];
  if (socketpair(AF_UNIX, SOCK_STREAM, 0, sv)) die("socketpair");
  if (sc->chunk_size && !*sc->chunk_size) unsetenv("NCCL_DYNAMIC_CHUNK_SIZE");
  else if (sc->chunk_size) setenv("NCCL_DYNAMIC_CHUNK_SIZE", sc->chunk_size, 1);
  peer = fork();
  if (!peer) {
    close(sv[0]);
    if (sc->other) sc->other(sv[1]);
    else sender(sv[1]);
  }
  close(sv[1]);
  S = sv[0];
  if (!sc->other) load("receiver");
  if (sc->play == sc_main) describe();
  sc->play();
  kill(peer, SIGKILL);
  return fails;
}

static int usage(void) {
  fprintf(stderr, "usage: contract_probe [SCENARIO...] PLUGIN.so      default: all of them\n");
  for (size_t i = 0; i < SCENARIOS; i++) fprintf(stderr, "  %-18s %s\n", scenarios[i].name, scenarios[i].about);
  return 2;
}

static const struct scenario *find(const char *name) {
  for (size_t i = 0; i < SCENARIOS; i++) if (!strcmp(scenarios[i].name, name)) return &scenarios[i];
  return NULL;
}

int main(int argc, char **argv) {
  if (argc < 2) return usage();
  plugin_path = argv[argc - 1];
  int named = argc - 2, n = named ? named : (int)SCENARIOS, bad = 0;
  for (int i = 0; i < named; i++) if (!find(argv[i + 1])) return usage();
  for (int i = 0; i < n; i++) {
    const struct scenario *sc = named ? find(argv[i + 1]) : &scenarios[i];
    pid_t p = fork();
    if (!p) { signal(SIGPIPE, SIG_IGN); alarm(150); exit(run(sc) ? 1 : 0); }
    int st = 0;
    waitpid(p, &st, 0);
    if (WIFSIGNALED(st)) printf("FAIL [%s] ended by signal %d\n", sc->name, WTERMSIG(st));
    else if (WEXITSTATUS(st)) printf("---- [%s] exit status %d\n", sc->name, WEXITSTATUS(st));
    if (st) bad = 1;
    fflush(stdout);
  }
  return bad;
}
