/* Plugins that write to the posted address, as GPUDirect-TCPXO does. A request is gone once a test has said that it is done, or that it
 * failed: it is never tested again. */
#include "probe.h"

#define MESSAGES 8

static void must_deliver(void) {
  if (!delivers) die("plugin %s does not deliver in place: device handle of type %d", P->name, device_handle.type);
}

static void described(void) {
  props_t p;
  memset(&p, 0, sizeof p);
  int rc = P->getProperties(0, &p);
  report(!rc && p.devType == 0 && device_handle.type == 0 && !device_handle.handle && !P->irecvConsumed, "t device type of the NIC %d, of the device handle %d, handle %p, irecvConsumed %s: nothing is unpacked", p.devType, device_handle.type, device_handle.handle, P->irecvConsumed ? "set" : "NULL");
  report(p.ptrSupport & 2, "t memory that the NIC takes: %#x (1 host, 2 CUDA, 4 DMA-BUF)", p.ptrSupport);
}

/* Messages that are shorter than their receives, tested from the last to the first, at both ends in an order of its own. */
static void any_order(void) {
  void *q[MESSAGES];
  char why[600] = "";
  uint64_t odd = 0;
  int right = 0, sizes = 0;
  for (int i = 0; i < MESSAGES; i++) if (post(PIECE, &q[i]) || !q[i]) die("irecv %d", i);
  for (int i = 0; i < MESSAGES; i++) if (ask(OP_SEND_DEVICE, i, 1000 * i + 1).rc) die("isend %d", i);
  struct reply sent = ask(OP_TEST_ALL, 10000, 0);
  for (int i = MESSAGES - 1; i >= 0; i--) {
    int size = -1, rc = wait_done(q[i], 10, &size);
    if (rc) { sprintf(why, "test of receive %d: %d", i, rc); break; }
    sizes += size == 1000 * i + 1;
    right += check(i, i, 1000 * i + 1, why, &odd) > 0;
  }
  report(!sent.rc && !sent.a && right == MESSAGES && sizes == MESSAGES, "u %d of %d messages right and %d with their size, tested from the last to the first (%s)", right, MESSAGES, sizes, why);
}

/* The plugin may leave the request as it was, so it is NULL before: NULL after it means that the flush is done. */
static void flush(void) {
  if (!P->iflush) { report(-1, "v no iflush"); return; }
  void *request = NULL;
  int rc = flush_first(&request);
  report(!rc && !request, "v iflush: %d, a request that was NULL is %p", rc, request);
}

/* Refused is an error or the end of the process, which a child tries. */
static void host_memory(void) {
  fflush(stdout);
  static char host[65536];
  void *m = NULL;
  int reg = P->regMr(recv_comm, host, sizeof host, 1, &m);
  pid_t p = fork();
  if (!p) {
    alarm(5);
    void *d[1] = {host}, *q = NULL, *mh[1] = {m};
    int size[1] = {4096}, tag[1] = {0};
    _exit(reg || P->irecv(recv_comm, 1, d, size, tag, mh, &q) || !q ? 0 : 7);
  }
  int st;
  waitpid(p, &st, 0);
  int accepted = WIFEXITED(st) && WEXITSTATUS(st) == 7;
  report(!accepted, "w regMr of host memory %d, irecv into it: %s", reg, accepted ? "accepted" : WIFSIGNALED(st) ? "ends the process" : "an error");
  tell(OP_SEND_HOST, 0, 4096, NULL);
  struct reply r = {0};
  int ended = read(S, &r, sizeof r) != sizeof r;
  report(ended || r.rc, "w isend of host memory: %s %d (%s)", ended ? "ends the process" : "gives", r.rc, r.text);
}

void sc_in_place(void) {
  open_conn(0);
  must_deliver();
  described();
  any_order();
  flush();
  host_memory();
}

/* Tests a request until it is done or fails. */
static int watched(void *q, double limit, double *after) {
  int rc = 0, done = 0;
  double t0 = now();
  while (!rc && !done && now() - t0 < limit) { rc = P->test(q, &done, NULL); usleep(100); }
  *after = now() - t0;
  return rc ? rc : done ? 0 : -1;
}

void sc_in_place_sender_killed(void) {
  open_conn(0);
  must_deliver();
  void *q;
  double after;
  if (post(4096, &q) || !q) die("irecv");
  int alive = watched(q, 0.5, &after);
  report(alive == -1, "x receiver, sender alive and silent: %d (-1: not done)", alive);
  kill(peer, SIGKILL);
  int rc = alive == -1 ? watched(q, 20, &after) : alive;
  report(rc > 0, "x receiver, sender killed: test gives %d after %.3f s", rc, after);
}

void sc_in_place_receiver_killed(void) { /* reversed roles, as in receiver_killed */
  load("sender");
  unsigned char h[128];
  if (read(S, h, 128) != 128) die("no handle");
  void *comm = NULL, *m = NULL;
  double t0 = now(), after = 0;
  int rc = 0;
  while (!rc && !comm && now() - t0 < 30) { rc = P->connect(0, h, &comm, &(devh_t *){NULL}); usleep(1000); }
  if (!comm) die("connect %d", rc);
  dptr b;
  cu_must(cuMemAlloc(&b, 1 << 20), "alloc");
  b = (b + 4095) & ~4095ull;
  if ((rc = P->regMr(comm, (void *)b, 1 << 19, 2, &m))) die("regMr %d", rc);
  char c;
  if (read(S, &c, 1) != 1) die("receiver");
  kill(peer, SIGKILL);
  waitpid(peer, NULL, 0);
  usleep(200000);
  int sent = 0;
  for (t0 = now(); !rc && now() - t0 < 20; sent++) {
    void *q = NULL;
    rc = P->isend(comm, (void *)b, 65536, 0, m, &q);
    if (!rc && q) rc = watched(q, 20, &after);
  }
  report(rc > 0, "x sender, receiver killed: isend or test gives %d with message %d, %.3f s after it", rc, sent, after);
}
