/* A long wire: forwards IP packets between TUN devices of two network namespaces with a rate, a delay and a bounded queue, each way.
 *
 *   relay NETNS_A NETNS_B DEVICE MBIT DELAY_MS QUEUE_BYTES
 *
 * Packets come with a virtio header, so that one may represent many segments; on the wire it counts as all of them with their headers.
 * A packet that would wait behind more than QUEUE_BYTES is dropped, as a router does. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/if_tun.h>
#include <linux/virtio_net.h>
#include <net/if.h>
#include <poll.h>
#include <sched.h>
#include <stdint.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <time.h>
#include <unistd.h>

enum { LARGEST = 66 << 10, BATCH = 64 };

struct packet {
  struct packet *next;
  int64_t due;
  size_t len;
  char bytes[];
};
struct wire {
  int from, to;
  int64_t busy_until;
  struct packet *first, **last;
  uint64_t forwarded, dropped;
};

static double ns_per_byte;
static int64_t delay_ns, queue_ns;
static volatile sig_atomic_t ending;

static int64_t now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec * 1000000000LL + t.tv_nsec;
}
static void must(int ok, const char *what) {
  if (!ok) perror(what), exit(1);
}
static void end(int signal) {
  (void)signal;
  ending = 1;
}

static int tun_in(const char *netns, const char *device) {
  char path[256];
  snprintf(path, sizeof path, "/run/netns/%s", netns);
  int ns = open(path, O_RDONLY | O_CLOEXEC);
  must(ns >= 0 && !setns(ns, CLONE_NEWNET), path);
  close(ns);
  int fd = open("/dev/net/tun", O_RDWR | O_NONBLOCK | O_CLOEXEC);
  must(fd >= 0, "/dev/net/tun");
  struct ifreq request = {.ifr_flags = IFF_TUN | IFF_NO_PI | IFF_VNET_HDR};
  snprintf(request.ifr_name, sizeof request.ifr_name, "%s", device);
  int header = sizeof(struct virtio_net_hdr);
  must(!ioctl(fd, TUNSETIFF, &request) && !ioctl(fd, TUNSETVNETHDRSZ, &header), "TUNSETIFF");
  must(!ioctl(fd, TUNSETOFFLOAD, TUN_F_CSUM | TUN_F_TSO4), "TUNSETOFFLOAD");
  return fd;
}

/* Bytes of a packet on the wire: each segment has its own headers. */
static size_t wire_bytes(const char *bytes, size_t len) {
  const struct virtio_net_hdr *h = (const void *)bytes;
  size_t ip = len - sizeof *h;
  if ((h->gso_type & ~VIRTIO_NET_HDR_GSO_ECN) == VIRTIO_NET_HDR_GSO_NONE || !h->gso_size) return ip;
  const unsigned char *packet = (const unsigned char *)bytes + sizeof *h;
  size_t headers = (size_t)(packet[0] & 15) * 4;
  headers += (size_t)(packet[headers + 12] >> 4) * 4;
  size_t segments = (ip - headers + h->gso_size - 1) / h->gso_size;
  return ip + (segments ? segments - 1 : 0) * headers;
}

static void take(struct wire *w) {
  static char buffer[LARGEST];
  for (int i = 0; i < BATCH; i++) {
    ssize_t n = read(w->from, buffer, sizeof buffer);
    if (n <= (ssize_t)sizeof(struct virtio_net_hdr)) return;
    int64_t t = now();
    int64_t start = w->busy_until > t ? w->busy_until : t;
    int64_t sent = start + (int64_t)((double)wire_bytes(buffer, (size_t)n) * ns_per_byte);
    if (sent - t > queue_ns) {
      w->dropped++;
      continue;
    }
    struct packet *p = malloc(sizeof *p + (size_t)n);
    must(p != NULL, "malloc");
    w->busy_until = sent;
    p->next = NULL;
    p->due = sent + delay_ns;
    p->len = (size_t)n;
    memcpy(p->bytes, buffer, (size_t)n);
    *w->last = p;
    w->last = &p->next;
  }
}

static void give(struct wire *w) {
  int64_t t = now();
  while (w->first && w->first->due <= t) {
    struct packet *p = w->first;
    if (write(w->to, p->bytes, p->len) < 0 && errno == EAGAIN) return;
    w->forwarded++;
    w->first = p->next;
    if (!w->first) w->last = &w->first;
    free(p);
  }
}

int main(int argc, char **argv) {
  if (argc != 7) return fprintf(stderr, "usage: %s NETNS_A NETNS_B DEVICE MBIT DELAY_MS QUEUE_BYTES\n", argv[0]), 2;
  ns_per_byte = 8e3 / atof(argv[4]);
  delay_ns = (int64_t)(atof(argv[5]) * 1e6);
  queue_ns = (int64_t)(atof(argv[6]) * ns_per_byte);
  struct sigaction action = {.sa_handler = end};
  sigaction(SIGTERM, &action, NULL);
  sigaction(SIGINT, &action, NULL);
  int a = tun_in(argv[1], argv[3]), b = tun_in(argv[2], argv[3]);
  struct wire wires[2] = {{.from = a, .to = b}, {.from = b, .to = a}};
  for (int i = 0; i < 2; i++) wires[i].last = &wires[i].first;
  puts("ready");
  fflush(stdout);
  while (!ending) {
    int64_t next = now() + 100000000;
    for (int i = 0; i < 2; i++)
      if (wires[i].first && wires[i].first->due < next) next = wires[i].first->due;
    int64_t wait = next - now();
    struct timespec limit = {.tv_sec = 0, .tv_nsec = wait > 0 ? wait % 1000000000 : 0};
    struct pollfd fds[2] = {{.fd = a, .events = POLLIN}, {.fd = b, .events = POLLIN}};
    ppoll(fds, 2, &limit, NULL);
    for (int i = 0; i < 2; i++) {
      take(&wires[i]);
      give(&wires[i]);
    }
  }
  fprintf(stderr, "relay: forwarded %llu and %llu packets, dropped %llu and %llu\n", (unsigned long long)wires[0].forwarded,
          (unsigned long long)wires[1].forwarded, (unsigned long long)wires[0].dropped, (unsigned long long)wires[1].dropped);
  return 0;
}
