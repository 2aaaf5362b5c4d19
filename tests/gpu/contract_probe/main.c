/* contract_probe: runs a NCCL net plugin's ncclNetPlugin_v7 (GPUDirect-TCPX, or the software plugin; stress and the scenarios in_place also
 * GPUDirect-TCPXO) between two processes with GPU memory and checks the behaviour that an engine relies on. Prints PASS, FAIL or INFO lines;
 * exit status 1 if any FAIL. Letters in front of a check name its group. Without arguments it lists the scenarios.
 *
 *   gcc -O2 -o contract_probe *.c -ldl -lpthread
 *   contract_probe [SCENARIO...] PLUGIN.so
 *
 * $PROBE_MESSAGES: how many messages stress moves, 600 by default. The plugin's log goes to $PROBE_LOG.SCENARIO.ROLE when PROBE_LOG is
 * set. Check g3 makes GPUDirect-TCPX close descriptor 0. */
#include "probe.h"

static void describe(void) {
  props_t p;
  memset(&p, 0, sizeof p);
  P->getProperties(0, &p);
  report(-1, "plugin %s: NIC %s, pci %s, speed %d, ptrSupport %d, maxRecvs %d, device type %d version %d, regMrDmaBuf %s, %d NICs", P->name, p.name, p.pciPath ? p.pciPath : "NULL", p.speed, p.ptrSupport, p.maxRecvs, p.devType, p.devVersion, P->regMrDmaBuf ? "set" : "NULL", nnics);
}

static const struct scenario {
  const char *name;
  void (*play)(void);
  void (*other)(int);       /* the role of the other process; by default the sender */
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
  {"in_place", sc_in_place, NULL, NULL, "a plugin that delivers in place: order of tests, flush, host memory"},
  {"in_place_sender_killed", sc_in_place_sender_killed, NULL, NULL, "the same: its receiver gets an error when the sender is killed"},
  {"in_place_receiver_killed", sc_in_place_receiver_killed, doomed_receiver, NULL, "the same: its sender gets an error when the receiver is killed"},
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
  for (size_t i = 0; i < SCENARIOS; i++) fprintf(stderr, "  %-26s %s\n", scenarios[i].name, scenarios[i].about);
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
