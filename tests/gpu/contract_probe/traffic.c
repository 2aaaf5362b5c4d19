/* Traffic scenarios: rates, random sizes, several chunks, host memory, no chunk size. */
#include "probe.h"

void sc_bench(void) {
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

void sc_stress(void) { /* 16 in flight on each side, random sizes up to one chunk, every byte checked */
  int n = getenv("PROBE_MESSAGES") ? atoi(getenv("PROBE_MESSAGES")) : 600, posted = 0, tested = 0, consumed = 0, rc = 0;
  open_conn(0);
  tell(OP_PATTERNS, n, 0, NULL);
  void *w[16];
  char why[600] = "";
  uint64_t odd = 0, bytes = 0;
  double t0 = now();
  long e = 1;
  while (consumed < n && !rc && e > 0 && now() - t0 < 100) {
    while (posted < n && posted - consumed < 16 && !rc) { if (!(rc = post(PIECE, &w[posted % 16]))) posted++; }
    int done = 0;
    if (!rc && tested < posted) rc = P->test(w[tested % 16], &done, NULL);
    if (done) tested++;
    while (!rc && e > 0 && consumed < tested && (tested - consumed > 8 || tested == n || posted - consumed == 16)) { /* late, on purpose */
      uint32_t size = size_of(consumed);
      e = check(consumed, consumed, size, why, &odd);
      bytes += size;
      if (e > 0) rc = release(consumed, w[consumed % 16]);
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

void sc_split(void) { /* messages of several chunks */
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

void sc_host(void) {
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

void sc_no_chunk_size(void) {
  open_conn(0);
  void *q;
  ask(OP_SEND_DEVICE, m_next++, 65536);
  int rc = post(65536, &q);
  tell(OP_TEST_ALL, 3000, 0, NULL);
  rc = rc ? rc : wait_done(q, 3, NULL);
  struct reply r = hear();
  report(rc != 0 ? -1 : 0, "o without NCCL_DYNAMIC_CHUNK_SIZE a 64 KiB message: receiver %d, sender %d with %d left (%s)", rc, r.rc, r.a, last_warn);
}
