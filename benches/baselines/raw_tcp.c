/* The kernel's TCP over loopback: the ceiling that the library is measured against. Two processes, no protocol beyond an
 * acknowledgement; source and destination memory are distinct and touched before. Prints one JSON object a line.
 *
 *   raw_tcp streams  STREAMS TOTAL SECONDS    TOTAL bytes cut over STREAMS sockets, one thread each at both ends; an iteration ends
 *                                             when every receiver has acknowledged
 *   raw_tcp pingpong BYTES SPIN SECONDS       BYTES one way, 16 bytes back; SPIN 1: both ends poll, 0: both ends sleep
 *   raw_tcp cores                             the round trip of a word from core to core, for the nearest and the farthest two of up to
 *                                             8 cores. A virtual machine does not know that its cores lie on several sockets, but its
 *                                             latencies have several speeds then, and change as the host moves them
 *
 * Congestion control is the system's, so that it is the same as every other system's of the run, unless a fifth word names another. */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <netinet/tcp.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <signal.h>
#include <time.h>
#include <unistd.h>

enum { MAX_STREAMS = 64, WARMUP = 5, MAX_SAMPLES = 1 << 20 };

static int fds[MAX_STREAMS];
static const char *congestion; /* NULL: the system's */
static size_t slice;
static char *memory;
static pthread_barrier_t start, stop;
static volatile int finished;

static double clock_of(clockid_t id) {
  struct timespec t;
  return clock_gettime(id, &t) ? 0 : t.tv_sec + 1e-9 * t.tv_nsec;
}
static double now(void) { return clock_of(CLOCK_MONOTONIC); }
/* CPU seconds of both processes. */
static double cpu(pid_t other) {
  clockid_t id;
  return clock_of(CLOCK_PROCESS_CPUTIME_ID) + (clock_getcpuclockid(other, &id) ? 0 : clock_of(id));
}
static void must(int ok, const char *what) {
  if (!ok) perror(what), exit(1);
}
/* All of n bytes, or 0 at the end of the stream. */
static int move(int fd, char *at, size_t n, int out, int flags) {
  for (size_t done = 0; done < n;) {
    ssize_t r = out ? send(fd, at + done, n - done, flags | MSG_NOSIGNAL) : recv(fd, at + done, n - done, flags);
    if (r > 0) done += (size_t)r;
    else if (r == 0 || !(flags & MSG_DONTWAIT)) return 0;
  }
  return 1;
}
static int by_value(const void *a, const void *b) {
  double x = *(const double *)a, y = *(const double *)b;
  return (x > y) - (x < y);
}

static void *sender(void *arg) {
  long k = (long)arg;
  char ack;
  for (;;) {
    pthread_barrier_wait(&start);
    if (finished) return NULL;
    must(move(fds[k], memory + k * slice, slice, 1, 0) && move(fds[k], &ack, 1, 0, 0), "send");
    pthread_barrier_wait(&stop);
  }
}
static void *receiver(void *arg) {
  long k = (long)arg;
  while (move(fds[k], memory + k * slice, slice, 0, 0)) must(move(fds[k], "a", 1, 1, 0), "acknowledge");
  return NULL;
}

/* On the listening socket it holds for the accepted ones. */
static void set_congestion(int fd) {
  must(!congestion || !setsockopt(fd, IPPROTO_TCP, TCP_CONGESTION, congestion, (socklen_t)strlen(congestion)), "TCP_CONGESTION");
}

/* Connects `n` sockets between this process and a child; returns the child's id, 0 in the child. */
static pid_t pair(int n) {
  struct sockaddr_in a = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
  socklen_t len = sizeof a;
  int one = 1, l = socket(AF_INET, SOCK_STREAM, 0);
  set_congestion(l);
  must(!bind(l, (void *)&a, sizeof a) && !listen(l, MAX_STREAMS) && !getsockname(l, (void *)&a, &len), "listen");
  pid_t child = fork();
  must(child >= 0, "fork");
  if (!child) prctl(PR_SET_PDEATHSIG, SIGKILL);
  for (int k = 0; k < n; k++) {
    if (!child) fds[k] = accept(l, NULL, NULL);
    else {
      must((fds[k] = socket(AF_INET, SOCK_STREAM, 0)) >= 0, "socket");
      set_congestion(fds[k]);
      must(!connect(fds[k], (void *)&a, sizeof a), "connect");
    }
    must(fds[k] >= 0 && !setsockopt(fds[k], IPPROTO_TCP, TCP_NODELAY, &one, sizeof one), "accept");
  }
  close(l);
  return child;
}

static void report(const char *kind, int streams, size_t bytes, double *samples, size_t n, double cpu_seconds) {
  qsort(samples, n, sizeof *samples, by_value);
  double p50 = samples[(n - 1) / 2], p99 = samples[(size_t)(0.99 * (double)(n - 1) + 0.5)];
  printf("{\"kind\": \"%s\", \"streams\": %d, \"total_bytes\": %zu, \"iters\": %zu, \"p50_us\": %.2f, \"p99_us\": %.2f, \"gbytes_per_s\": %.4f, "
         "\"cpu_s_per_gib\": %.4f}\n",
         kind, streams, bytes, n, p50 * 1e6, p99 * 1e6, (double)bytes / p50 / 1e9, cpu_seconds * (double)(1 << 30) / ((double)bytes * (double)n));
}

enum { ROUNDS = 200, BATCHES = 20, CORES = 8 };
static _Atomic int word;

static void stay_on(long core) {
  cpu_set_t set;
  CPU_ZERO(&set);
  CPU_SET((size_t)core, &set);
  must(!sched_setaffinity(0, sizeof set, &set), "sched_setaffinity");
}
static void *answer(void *arg) {
  stay_on((long)arg);
  for (int i = 0; i < ROUNDS * BATCHES; i++) {
    while (atomic_load(&word) != 2 * i + 1) continue;
    atomic_store(&word, 2 * i + 2);
  }
  return NULL;
}
/* The best of some batches: others may use the cores too. */
static double distance(long a, long b) {
  pthread_t other;
  double best = 1;
  atomic_store(&word, 0);
  stay_on(a);
  must(!pthread_create(&other, NULL, answer, (void *)b), "thread");
  for (int i = 0; i < BATCHES; i++) {
    double began = now();
    for (int k = i * ROUNDS; k < (i + 1) * ROUNDS; k++) {
      atomic_store(&word, 2 * k + 1);
      while (atomic_load(&word) != 2 * k + 2) continue;
    }
    double took = (now() - began) / ROUNDS;
    if (took < best) best = took;
  }
  pthread_join(other, NULL);
  return best;
}
static int cores(void) {
  cpu_set_t mine;
  long list[CORES], n = 0;
  double near = 1, far = 0;
  must(!sched_getaffinity(0, sizeof mine, &mine), "sched_getaffinity");
  for (long core = 0; core < CPU_SETSIZE && n < CORES; core++)
    if (CPU_ISSET((size_t)core, &mine)) list[n++] = core;
  for (long a = 0; a < n; a++)
    for (long b = a + 1; b < n; b++) {
      double d = distance(list[a], list[b]);
      if (d < near) near = d;
      if (d > far) far = d;
    }
  if (n < 2) return fprintf(stderr, "there is one core only\n"), 1;
  printf("{\"kind\": \"cores\", \"near_ns\": %.0f, \"far_ns\": %.0f}\n", near * 1e9, far * 1e9);
  return 0;
}

int main(int argc, char **argv) {
  if (argc == 2 && !strcmp(argv[1], "cores")) return cores();
  if (argc != 5 && argc != 6)
    return fprintf(stderr, "usage: %s streams STREAMS TOTAL SECONDS [CONGESTION] | pingpong BYTES SPIN SECONDS [CONGESTION] | cores\n", argv[0]), 2;
  congestion = argv[5];
  int streaming = !strcmp(argv[1], "streams"), streams = streaming ? atoi(argv[2]) : 1, spin = streaming ? 0 : atoi(argv[3]);
  size_t total = strtoull(argv[streaming ? 3 : 2], NULL, 10), n = 0;
  double seconds = atof(argv[4]);
  if (streams < 1 || streams > MAX_STREAMS || total < (size_t)streams) return 2;
  slice = total / (size_t)streams;
  pid_t child = pair(streams);
  memory = malloc(total + 64);
  must(memory != NULL, "malloc");
  memset(memory, 1, total + 64);
  double *samples = malloc(MAX_SAMPLES * sizeof *samples);
  pthread_t threads[MAX_STREAMS];
  int flags = spin ? MSG_DONTWAIT : 0;

  if (!child) {
    if (!streaming)
      while (move(fds[0], memory, total, 0, flags)) must(move(fds[0], memory, 16, 1, flags), "acknowledge");
    for (long k = 0; streaming && k < streams; k++) pthread_create(&threads[k], NULL, receiver, (void *)k);
    for (long k = 0; streaming && k < streams; k++) pthread_join(threads[k], NULL);
    _exit(0);
  }
  pthread_barrier_init(&start, NULL, (unsigned)streams + 1);
  pthread_barrier_init(&stop, NULL, (unsigned)streams + 1);
  for (long k = 0; streaming && k < streams; k++) pthread_create(&threads[k], NULL, sender, (void *)k);
  double used = 0, until = 0;
  for (size_t i = 0; i < 10 + WARMUP || (now() < until && n < MAX_SAMPLES); i++) {
    if (i == WARMUP) used = cpu(child), until = now() + seconds;
    double began = now();
    if (streaming) {
      pthread_barrier_wait(&start);
      pthread_barrier_wait(&stop);
    } else {
      must(move(fds[0], memory, total, 1, flags) && move(fds[0], memory, 16, 0, flags), "ping");
    }
    if (i >= WARMUP) samples[n++] = now() - began;
  }
  used = cpu(child) - used;
  finished = 1;
  if (streaming) pthread_barrier_wait(&start);
  for (long k = 0; streaming && k < streams; k++) pthread_join(threads[k], NULL);
  for (int k = 0; k < streams; k++) shutdown(fds[k], SHUT_RDWR);
  report(streaming ? "streams" : spin ? "pingpong spin" : "pingpong sleep", streams, slice * (size_t)streams, samples, n, used);
  fflush(stdout);
  kill(child, SIGTERM);
  waitpid(child, NULL, 0);
  return 0;
}
