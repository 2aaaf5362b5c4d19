/* A simulated NCCL net plugin with a table of one version, which checks its arguments and refuses what the contract forbids. It has one device;
 * what is sent on it arrives in the same process.
 *
 * VERSION=n       the version of its table, 7 to 12
 * OLDER=n         a table of an older version beside it, whose init fails
 * FULL            it has iflush and irecvConsumed; otherwise all members that may be null are
 * MOVES           it carries an engine's transfers: from several threads, with registrations that serve all comms. With FULL a receive that is
 *                 done has wrong bytes until it was flushed */
#include "net_tables.h"
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#define PASTE_(A, B) A##B
#define PASTE(A, B) PASTE_(A, B)
#define TEXT_(A) #A
#define TEXT(A) TEXT_(A)

#if VERSION < 10
#define INIT_ARGUMENTS logger_fn logger
#elif VERSION < 11
#define INIT_ARGUMENTS logger_fn logger, profiler_fn profiler
#else
#define INIT_ARGUMENTS void **context, uint64_t id, comm_config *config, logger_fn logger, profiler_fn profiler
#endif
#if VERSION < 11
#define CONTEXT_ARGUMENT
#else
#define CONTEXT_ARGUMENT void *context,
#endif
#if VERSION == 10
#define CONFIG_ARGUMENT comm_config *config,
#else
#define CONFIG_ARGUMENT
#endif
#if VERSION < 8
typedef int registered_size;
#else
typedef size_t registered_size;
#endif
#if VERSION < 9
typedef int message_size;
#else
typedef size_t message_size;
#endif
#if VERSION < 10
#define PROFILED(TYPE)
#else
#define PROFILED(TYPE) TYPE profiler_handle,
#endif

/* Messages above this are not copied: a test need not have so much memory. */
#define COPIED (1 << 20)

typedef struct comm comm;
typedef struct request {
  comm *of;
  char *data;
  size_t size;
  int tag, tests, is_flush, received;
  struct request *next;
} request;
struct comm {
  enum { LISTEN = 77, SEND, RECV } kind;
  comm *peer; /* a listen comm's: the send comm that has connected */
  request *posted;
  int asked, unconsumed, closed;
  char *unflushed; /* the bytes of the last receive */
};
typedef struct {
  comm *of;
  char *data;
  size_t size;
} registration;

static logger_fn say;
#if VERSION >= 11
static char the_context;
#endif
/* What a test asks the plugin for, since the size in `test` is an int in all versions. */
size_t net_table_last_size;

#ifdef MOVES
#define SERVES(REGISTRATION, COMM) (REGISTRATION)
#else
#define SERVES(REGISTRATION, COMM) ((REGISTRATION)->of == (COMM))
#endif

#define REQUIRE(CONDITION) \
  if (!(CONDITION)) { \
    say(2, 16, __FILE__, __LINE__, "violation: %s", #CONDITION); \
    return 5; \
  }

static int init(INIT_ARGUMENTS) {
  say = logger;
  say(2, 16, __FILE__, __LINE__, "simulated plugin: v%s has %d devices", TEXT(VERSION), 1);
#if VERSION >= 10
  void *event = NULL;
  REQUIRE(profiler(&event, 0, NULL, 0, NULL) == 0 && event == NULL);
#endif
#if VERSION >= 11
  (void)id;
  REQUIRE(context && config && config->trafficClass == -1);
  *context = &the_context;
#endif
  return 0;
}

static int devices(int *n) {
  *n = 1;
  return 0;
}

static int properties(int device, PASTE(properties_v, VERSION) * p) {
  REQUIRE(device == 0);
  p->name = (char *)"ib0";
  p->pciPath = (char *)"/sys/devices/pci0000:00/0000:00:05.0";
  p->guid = 7, p->ptrSupport = 3, p->speed = 400000, p->port = 1, p->latency = 1.5f, p->maxComms = 10, p->maxRecvs = 1;
  p->netDeviceType = 0, p->netDeviceVersion = 0;
#if VERSION >= 8
  p->regIsGlobal = 1;
#endif
#if VERSION >= 9
  p->forceFlush = 1, p->vProps.ndevs = 1, p->vProps.devs[0] = 0, p->maxP2pBytes = 131072, p->maxCollBytes = 1;
#endif
#if VERSION >= 11
  p->maxMultiRequestSize = 1;
#endif
#if VERSION >= 12
  p->railId = -1, p->planeId = -1;
#endif
  return 0;
}

static comm *new_comm(int kind) {
  comm *it = calloc(1, sizeof *it);
  it->kind = kind;
  return it;
}

static int listen_on(CONTEXT_ARGUMENT int device, void *handle, void **out) {
#if VERSION >= 11
  REQUIRE(context == &the_context);
#endif
  REQUIRE(device == 0 && handle && out);
  comm *it = new_comm(LISTEN);
  memcpy(handle, &it, sizeof it);
  *out = it;
  return 0;
}

static int connect_to(CONTEXT_ARGUMENT int device, CONFIG_ARGUMENT void *handle, void **out, device_handle **unused) {
#if VERSION >= 11
  REQUIRE(context == &the_context);
#endif
#if VERSION == 10
  REQUIRE(config && config->trafficClass == -1);
#endif
  REQUIRE(device == 0 && handle && out && unused);
  comm *listening;
  memcpy(&listening, handle, sizeof listening);
  REQUIRE(listening->kind == LISTEN);
  *out = NULL;
  /* The first call leaves its state in the handle. */
  if (((char *)handle)[100]++ == 0)
    return 0;
  REQUIRE(!listening->peer);
  *out = listening->peer = new_comm(SEND);
  return 0;
}

static int accept_on(void *of, void **out, device_handle **filled) {
  comm *listening = of;
  REQUIRE(listening->kind == LISTEN && out && filled && *filled);
  *out = NULL;
  if (listening->asked++ == 0 || !listening->peer)
    return 0;
  comm *it = new_comm(RECV);
  it->peer = listening->peer;
  it->peer->peer = it;
  (*filled)->netDeviceType = 0;
  *out = it;
  return 0;
}

static int reg(void *of, void *data, registered_size size, int kind, void **mhandle) {
  REQUIRE(((comm *)of)->kind >= SEND && data && size > 0 && (kind == 1 || kind == 2) && mhandle);
  registration *it = calloc(1, sizeof *it);
  it->of = of, it->data = data, it->size = net_table_last_size = (size_t)size;
  *mhandle = it;
  return 0;
}

static int dereg(void *of, void *mhandle) {
  REQUIRE(of && SERVES((registration *)mhandle, of));
  free(mhandle);
  return 0;
}

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

static int post(comm *of, void *data, size_t size, int tag, registration *in, void **out) {
  REQUIRE(in && SERVES(in, of) && (char *)data >= in->data && (char *)data + size <= in->data + in->size && out);
  request *it = calloc(1, sizeof *it), **last = &of->posted;
  pthread_mutex_lock(&lock);
  it->of = of, it->data = data, it->size = net_table_last_size = size, it->tag = tag;
  while (*last)
    last = &(*last)->next;
  *last = it;
  *out = it;
  pthread_mutex_unlock(&lock);
  return 0;
}

static int isend(void *of, void *data, message_size size, int tag, void *mhandle, PROFILED(void *) void **out) {
#if VERSION >= 10
  REQUIRE(!profiler_handle);
#endif
  REQUIRE(((comm *)of)->kind == SEND);
  return post(of, data, (size_t)size, tag, mhandle, out);
}

static int irecv(void *of, int n, void **data, message_size *sizes, int *tags, void **mhandles, PROFILED(void **) void **out) {
#if VERSION >= 10
  REQUIRE(profiler_handle && !profiler_handle[0]);
#endif
  REQUIRE(((comm *)of)->kind == RECV && n == 1 && data && sizes && tags && mhandles);
  return post(of, data[0], (size_t)sizes[0], tags[0], mhandles[0], out);
}

#ifdef MOVES
static int step(request *it, int *done, int *sizes) {
  comm *of = it->of;
  if (it->is_flush) {
    memcpy(it->data, of->unflushed, it->size);
    free(of->unflushed);
    of->unflushed = NULL;
  } else if (of->kind == SEND) {
    /* Its memory is in use until then. */
    if (!it->received)
      return of->peer && of->peer->closed ? 2 : 0;
  } else {
    request *sent = of->peer->posted;
    REQUIRE(of->posted == it && !of->unflushed);
    if (!sent)
      return of->peer->closed ? 2 : 0;
    REQUIRE(sent->tag == it->tag && sent->size <= it->size);
    it->size = sent->size;
#ifdef FULL
    of->unflushed = malloc(sent->size);
    memcpy(of->unflushed, sent->data, sent->size);
    memset(it->data, 0xEE, sent->size);
#else
    memcpy(it->data, sent->data, sent->size);
#endif
    of->unconsumed++;
    of->posted = it->next, of->peer->posted = sent->next;
    sent->received = 1;
  }
  *done = 1;
  sizes[0] = (int)it->size;
  free(it);
  return 0;
}

static int test(void *asked, int *done, int *sizes) {
  request *it = asked;
  REQUIRE(it && done && sizes);
  *done = 0;
  pthread_mutex_lock(&lock);
  int result = it->tests++ == 0 ? 0 : step(it, done, sizes);
  pthread_mutex_unlock(&lock);
  return result;
}

static int close_kind(void *of, int kind) {
  REQUIRE(((comm *)of)->kind == (unsigned)kind);
  pthread_mutex_lock(&lock);
  /* The other end may look at it. */
  ((comm *)of)->closed = 1, ((comm *)of)->posted = NULL;
  pthread_mutex_unlock(&lock);
  return 0;
}
#else
static int test(void *asked, int *done, int *sizes) {
  request *it = asked;
  REQUIRE(it && done && sizes);
  comm *of = it->of;
  *done = 0;
  /* A receive waits for its send, which stays posted until then. */
  if (it->tests++ == 0)
    return 0;
  if (!it->is_flush) {
    REQUIRE(of->posted == it);
    request *sent = of->kind == RECV ? of->peer->posted : NULL;
    if (of->kind == RECV && !sent)
      return 0;
    if (sent) {
      REQUIRE(sent->tag == it->tag && sent->size <= it->size);
      if (sent->size <= COPIED)
        memcpy(it->data, sent->data, sent->size);
      it->size = sent->size;
      of->peer->posted = sent->next;
      free(sent);
      of->unconsumed++;
      of->posted = it->next;
    }
    /* A send is finished by the test of its receive. */
  }
  *done = 1;
  sizes[0] = (int)it->size;
  if (of->kind == RECV || it->is_flush)
    free(it);
  return 0;
}

static int close_kind(void *of, int kind) {
  REQUIRE(((comm *)of)->kind == (unsigned)kind);
  free(of);
  return 0;
}
#endif
static int close_send(void *of) { return close_kind(of, SEND); }
static int close_recv(void *of) { return close_kind(of, RECV); }
static int close_listen(void *of) { return close_kind(of, LISTEN); }

#ifdef FULL
static int flush(void *of, int n, void **data, int *sizes, void **mhandles, void **out) {
  registration *in = mhandles[0];
  REQUIRE(((comm *)of)->kind == RECV && n == 1 && SERVES(in, of) && (char *)data[0] >= in->data && sizes[0] > 0 && out);
#ifdef MOVES
  REQUIRE(((comm *)of)->unflushed);
#endif
  request *it = calloc(1, sizeof *it);
  it->of = of, it->data = data[0], it->size = (size_t)sizes[0], it->is_flush = 1;
  *out = it;
  return 0;
}
static int consumed(void *of, int n, void *asked) {
  REQUIRE(n == 1 && asked && ((comm *)of)->unconsumed-- > 0);
  return 0;
}
#else
#define flush NULL
#define consumed NULL
#endif

PASTE(table_v, VERSION)
PASTE(ncclNetPlugin_v, VERSION) = {
    .name = "simulated-v" TEXT(VERSION), .init = init, .devices = devices, .getProperties = properties, .listen = listen_on,
    .connect = connect_to, .accept = accept_on, .regMr = reg, .deregMr = dereg, .isend = isend, .irecv = irecv, .iflush = flush,
    .test = test, .closeSend = close_send, .closeRecv = close_recv, .closeListen = close_listen, .irecvConsumed = consumed,
};

#ifdef OLDER
/* init sits at the same place in all versions. */
static int refuse(void) { return 3; }
void *PASTE(ncclNetPlugin_v, OLDER)[22] = {(void *)"older", (void *)refuse};
#endif
