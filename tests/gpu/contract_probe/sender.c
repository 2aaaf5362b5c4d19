/* The sender: a process that takes commands over a socket pair. */
#include "probe.h"

/* The sender's state. */
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
  r->rc = P->connect(0, c->handle, &tx.comm, &(devh_t *){NULL});
  r->a = tx.comm == NULL && r->rc == 0;                 /* the result of the first call */
  r->b = memcmp(before, c->handle, 128) != 0;           /* state in the handle */
  for (; !r->rc && !tx.comm && now() - t0 < 30; calls++) {
    usleep(1000);
    r->rc = P->connect(0, c->handle, &tx.comm, &(devh_t *){NULL});
  }
  r->t = now() - t0;
  if (!tx.comm && !r->rc) r->rc = -1;
  if (!r->rc && !tx.mhandle) r->rc = P->regMr(tx.comm, (void *)tx.device, REGION, 2, &tx.mhandle);
  if (!r->rc && takes_host && !tx.host_mhandle) r->rc = P->regMr(tx.comm, tx.host, REGION, 1, &tx.host_mhandle);
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
  tx.comm = tx.mhandle = tx.host_mhandle = NULL;        /* left registered on purpose: the comm is closed */
}

void sender(int s) {
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
