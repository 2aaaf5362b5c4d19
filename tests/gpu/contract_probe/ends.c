/* Failure scenarios: no device handle, ranges that the driver refuses, a process that is killed. */
#include "probe.h"

void sc_no_device_handle(void) { /* accept without a device handle */
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
void sc_driver_ranges(void) { /* the driver's own results */
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
void sc_sender_killed(void) {
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
void sc_receiver_killed(void) { /* reversed roles: the child receives and dies; this process sends */
  signal(SIGPIPE, on_pipe);
  load("sender");
  unsigned char h[128];
  if (read(S, h, 128) != 128) die("no handle");
  void *comm = NULL, *m = NULL, *q[8] = {0};
  double t0 = now();
  int rc = 0;
  while (!rc && !comm && now() - t0 < 30) { rc = P->connect(0, h, &comm, &(devh_t *){NULL}); usleep(1000); }
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
void doomed_receiver(int s) {
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
