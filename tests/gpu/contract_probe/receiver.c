/* The receiver: sets the connection up, posts receives, and checks the plugin's descriptions of them. */
#include "probe.h"

int S;
pid_t peer;
void *listen_comm, *recv_comm, *mhandle;
devh_t device_handle;
dptr small_buf, d_meta, d_bounce;
int delivers;
static dptr place;
static void *place_handle;
static uint64_t k_post;
uint64_t k_recv;
uint32_t m_next;

void tell(enum op op, int a, int b, const void *h) {
  struct command c;
  memset(&c, 0, sizeof c);
  c.op = op; c.a = a; c.b = b;
  if (h) memcpy(c.handle, h, 128);
  if (write(S, &c, sizeof c) != sizeof c) die("the sender has ended");
}
struct reply hear(void) {
  struct reply r;
  ssize_t n = read(S, &r, sizeof r);
  if (n != sizeof r) die("no answer from the sender");
  return r;
}
struct reply ask(enum op op, int a, int b) { tell(op, a, b, NULL); return hear(); }

void open_conn(int check) {
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
  /* The software plugin allocates the handle's memory when device memory is first registered. */
  cu_must(cuMemAlloc(&small_buf, 65536 + 4096), "cuMemAlloc");
  if (check) report(-1, "a small cuMemAlloc lies at +%llu of a page: round up before regMr", small_buf % 4096);
  small_buf = (small_buf + 4095) & ~4095ull;
  rc = P->regMr(recv_comm, (void *)small_buf, 65536, 2, &mhandle);
  if (rc) die("regMr: %d (%s)", rc, last_warn);
  device_handle = box.d;
  k_recv = k_post = 0;
  delivers = device_handle.type == 0;
  if (delivers) {
    cu_must(cuMemAlloc(&place, WINDOW * PIECE + 4096), "cuMemAlloc");
    place = (place + 4095) & ~4095ull;
    rc = P->regMr(recv_comm, (void *)place, WINDOW * PIECE, 2, &place_handle);
    if (rc || device_handle.handle || P->irecvConsumed) die("regMr of %d bytes: %d; device handle %p of type 0; irecvConsumed %s", WINDOW * PIECE, rc, device_handle.handle, P->irecvConsumed ? "set" : "NULL");
    return;
  }
  uint64_t h3[3] = {0};
  unsigned type = 0;
  int att = cuPtrAttr(&type, 2 /* memory type */, (dptr)(uintptr_t)device_handle.handle);
  cu_must(cuDtoH(h3, (dptr)(uintptr_t)device_handle.handle, 24), "DtoH of the device handle");
  d_meta = h3[0];
  d_bounce = h3[1];
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
void close_conn(void) {
  struct reply r = ask(OP_CLOSE, 0, 0);
  if (delivers && P->deregMr(recv_comm, place_handle)) report(0, "close: deregMr of the place of receives");
  int rc = P->deregMr(recv_comm, mhandle), c = P->closeRecv(recv_comm), l = P->closeListen(listen_comm);
  if (r.rc || rc || c || l) report(0, "close: closeSend %d deregMr %d closeRecv %d closeListen %d", r.rc, rc, c, l);
}
int post(int size, void **q) {
  /* No such memory: a plugin with bounce buffers never touches the destination. */
  void *d[1] = {delivers ? (void *)(place + k_post++ % WINDOW * PIECE) : (void *)0x1000};
  int sz[1] = {size}, tag[1] = {0};
  void *m[1] = {delivers ? place_handle : mhandle};
  *q = NULL;
  return P->irecv(recv_comm, 1, d, sz, tag, m, q);
}
int wait_done(void *q, double limit, int *size) {
  double t0 = now();
  int done = 0;
  while (!done && now() - t0 < limit) {
    int rc = P->test(q, &done, size);
    if (rc) return rc;
  }
  return done ? 0 : -1;
}
/* Flushes the place of the first receive, which is done. */
int flush_first(void **request) {
  void *d[1] = {(void *)place}, *m[1] = {place_handle};
  int sz[1] = {PIECE};
  return P->iflush(recv_comm, 1, d, sz, m, request);
}
/* Ends receive k, which is done and checked. */
int release(uint64_t k, void *q) {
  if (!delivers) return P->irecvConsumed(recv_comm, 1, q);
  void *d[1] = {(void *)(place + k % WINDOW * PIECE)}, *m[1] = {place_handle}, *flush = NULL;
  int sz[1] = {PIECE};
  int rc = P->iflush ? P->iflush(recv_comm, 1, d, sz, m, &flush) : 0;
  return rc ? rc : flush ? -1 : 0;
}
/* checks slot k % 16 against message m; returns the number of entries or a negative number */
long check(uint64_t k, uint32_t m, uint32_t size, char *why, uint64_t *bytes_not_16) {
  uint64_t cnt = 0;
  static struct meta e[ENTRIES];
  static char *got, *want, *seen;
  if (!got) { got = malloc(REGION); want = malloc(REGION); seen = malloc(REGION); }
  if (delivers) {
    cu_must(cuDtoH(got, place + k % WINDOW * PIECE, size), "message");
    fill(want, m, size);
    if (memcmp(got, want, size)) { sprintf(why, "bytes differ"); return -5; }
    return 1;
  }
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
