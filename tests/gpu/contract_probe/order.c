/* Scenario main: set-up, order of tests and consumes, windows, sizes, registrations. */
#include "probe.h"

static char why[600];   /* the result of check */
static uint64_t odd;    /* entries that are not 16-aligned */

/* b, f, j: one receive after the other */
static void receives_arrive(void) {
  static const int sizes[] = {1, 17, 4096, 5000, 65536, 300001, 524288, 1048576, 3, 131072, 77777, 4095};
  int ok = 1, untouched = 1, n = 40;
  uint64_t entries = 0, odd = 0;
  for (int i = 0; i < n && ok; i++) {
    int size = sizes[i % 12] < largest ? sizes[i % 12] : largest, sz = -12345;
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
  report(ok, "b %d receives of 1 B to %d KiB: receive k in slot k %% 16, lengths add up, bytes right; %lu entries, %lu not 16-aligned %s", n, largest >> 10, entries, odd, why);
  report(ok, "f the mhandle was a 64 KiB buffer's and the destination no memory at all%s", "");
  report(untouched, "j test wrote nothing to size, at both ends");
  if (!ok) die("cannot go on");
}

/* n: the sender first, nothing posted here */
static void sends_before_receives(void) {
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
}

/* d: testing a request that is not the oldest */
static void tests_out_of_order(void) {
  void *qs[20];
  uint32_t ms[20];
  for (int i = 0; i < 3; i++) { ms[i] = m_next++; ask(OP_SEND_DEVICE, ms[i], 8192); if (post(8192, &qs[i])) die("irecv"); }
  int done = 0;
  int rc1 = P->test(qs[1], &done, NULL);
  /* The software plugin always refuses it, TCPX only once the oldest has been announced. */
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
  struct reply r = hear();
  for (int i = 0; i < 3; i++) { bad |= check(k_recv++, ms[i], 8192, why, &odd) < 0; bad |= P->irecvConsumed(recv_comm, 1, qs[i]); }
  report(!bad && !r.rc && !r.a, "d4 all three arrive right afterwards %s", why);
}

/* c: 16 requests at each end, and no more; they are left tested and not consumed */
static void windows_are_full(void *qs[16], uint32_t ms[16]) {
  struct reply r;
  void *q;
  int rc, bad = 0;
  for (int i = 0; i < 16; i++) { ms[i] = m_next++; r = ask(OP_SEND_DEVICE, ms[i], 4096 + i); if (r.rc) die("isend %d", r.rc); }
  r = ask(OP_SEND_DEVICE, m_next, 100);
  report(r.rc == 3, "c1 17th isend: %d (%s)", r.rc, r.text);
  for (int i = 0; i < 16; i++) if ((rc = post(8192, &qs[i]))) die("irecv %d: %d", i, rc);
  rc = post(100, &q);
  report(rc == 3, "c2 17th irecv: %d (%s)", rc, last_warn);
  tell(OP_TEST_ALL, 10000, 0, NULL);
  for (int i = 0; i < 16; i++) bad |= wait_done(qs[i], 10, NULL);
  r = hear();
  report(!bad && !r.rc && !r.a, "c3 the 16 of each side complete (posted 8192, announced 4096..4111)");
}

/* e: the requests that windows_are_full left */
static void consumes_in_order(void *qs[16], const uint32_t ms[16]) {
  void *q;
  int rc = post(100, &q), bad = 0;
  report(rc == 3, "e1 all 16 tested done but none consumed: irecv gives %d", rc);
  int s17 = ask(OP_SEND_DEVICE, m_next, 100).rc;
  report(s17 == 0, "e2 the sender's slots are free once test says done: isend gives %d", s17);
  m_next++;
  rc = P->irecvConsumed(recv_comm, 1, qs[1]);
  report(rc == 3, "e3 irecvConsumed out of order: %d (%s)", rc, last_warn);
  for (int i = 0; i < 16; i++) { if (check(k_recv + i, ms[i], 4096 + i, why, &odd) < 0) bad++; }
  report(!bad, "e4 all 16 receives readable at once, after their tests %s", why);
  bad = 0;
  for (int i = 0; i < 16; i++) { bad |= P->irecvConsumed(recv_comm, 1, qs[i]); if (i == 0) bad |= post(100, &q); }
  k_recv += 16;
  report(!bad, "e5 consumed in order; after the first one irecv works again");
  tell(OP_TEST_ALL, 10000, 0, NULL);
  rc = wait_done(q, 10, NULL);
  hear();
  long e = check(k_recv++, m_next - 1, 100, why, &odd);
  report(!rc && e > 0 && !P->irecvConsumed(recv_comm, 1, q), "e6 that one arrives: %d, %ld %s", rc, e, why);
}

/* p: a receive smaller than the message */
static void small_receive(void) {
  uint32_t m = m_next++;
  void *q;
  ask(OP_SEND_DEVICE, m, 8192);
  if (post(100, &q)) die("irecv");
  tell(OP_TEST_ALL, 10000, 0, NULL);
  int rc = wait_done(q, 10, NULL);
  hear();
  if (is_soft()) {
    report(rc == 3, "p irecv posted with 100 B for a message of 8192 B: the software plugin enforces the posted size: %d", rc);
    return;
  }
  long e = check(k_recv++, m, 8192, why, &odd);
  report(!rc && e > 0 && !P->irecvConsumed(recv_comm, 1, q), "p irecv posted with 100 B for a message of 8192 B: no error, entries for all 8192 B: the posted size counts for nothing %s", why);
}

/* g: registrations */
static void registrations(void) {
  struct reply r = ask(OP_REGISTER, 512, 65536);
  report(r.rc == 3 || (is_soft() && r.rc == 4), "g1 regMr of a base at +512: %d (%s)", r.rc, r.text);
  r = ask(OP_REGISTER, 8192, 65536);
  report(r.rc == 0 && r.b == 0, "g2 regMr of a base at +8192 inside the allocation: %d, deregMr %d", r.rc, r.b);
  r = ask(OP_REGISTER, 4096, 65536 + 100);
  report(r.rc != 0, "g3 regMr of a size that is no multiple of 4096: %d, fd 0 still open %d (%s)", r.rc, r.a, r.text);
}

void sc_main(void) {
  open_conn(1);
  receives_arrive();
  sends_before_receives();
  tests_out_of_order();
  void *qs[16];
  uint32_t ms[16];
  windows_are_full(qs, ms);
  consumes_in_order(qs, ms);
  small_receive();
  registrations();
  close_conn();
}
