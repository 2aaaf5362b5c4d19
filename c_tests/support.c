#include "support.h"

#include <errno.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <time.h>

int64_t now_ms(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000 + t.tv_nsec / 1000000;
}

void sleep_ms(int ms)
{
    struct timespec t = {ms / 1000, (long)(ms % 1000) * 1000000};
    nanosleep(&t, NULL);
}

uint8_t *map_shared(size_t len)
{
    void *p = mmap(NULL, len, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    CHECK_MSG(p != MAP_FAILED, "no %zu bytes of memory", len);
    return p;
}

/* The finaliser of splitmix64: a bijection, so no two words of a pattern are equal. */
static uint64_t mix(uint64_t x)
{
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
    return x ^ (x >> 31);
}

void fill(uint8_t *p, size_t len, uint64_t seed)
{
    for (size_t i = 0; i < len; i += 8) {
        uint64_t word = mix((seed << 40) + i / 8 + 1);
        memcpy(p + i, &word, len - i < 8 ? len - i : 8);
    }
}

void wipe(uint8_t *p, size_t len)
{
    memset(p, GUARD, len);
}

bool is_wiped(const uint8_t *p, size_t len)
{
    return len == 0 || (p[0] == GUARD && memcmp(p, p + 1, len - 1) == 0);
}

void check_same(const char *what, const uint8_t *got, const uint8_t *want, size_t len)
{
    if (memcmp(got, want, len) == 0)
        return;
    size_t i = 0;
    while (got[i] == want[i])
        i++;
    CHECK_MSG(got[i] == want[i], "%s: byte %zu of %zu is 0x%02x, expected 0x%02x", what, i, len, got[i], want[i]);
}

uint64_t random_next(uint64_t *state)
{
    return mix(*state += 0x9E3779B97F4A7C15u);
}

uccl_engine_t *engine_start(void)
{
    uccl_engine_t *engine = uccl_engine_create(0, false);
    CHECK_MSG(engine, "%s", uccl_engine_last_error());
    return engine;
}

static address parse_metadata(const char *text)
{
    address a;
    const char *colon = strchr(text, ':'), *mark = strchr(text, '?');
    CHECK_MSG(colon && mark && colon < mark, "metadata is %s", text);
    char *end = NULL;
    a.port = (int)strtol(colon + 1, &end, 10);
    CHECK_MSG(end == mark && a.port >= 1 && a.port <= 65535, "metadata is %s", text);
    snprintf(a.ip, sizeof a.ip, "%.*s", (int)(colon - text), text);
    snprintf(a.gpu, sizeof a.gpu, "%s", mark + 1);
    CHECK_MSG(*a.ip && *a.gpu, "metadata is %s", text);
    return a;
}

address engine_address(uccl_engine_t *engine)
{
    char *text = NULL;
    CHECK_OK(uccl_engine_get_metadata(engine, &text));
    CHECK(text);
    address a = parse_metadata(text);
    uccl_engine_free_metadata(text);
    return a;
}

uccl_conn_t *join(uccl_engine_t *engine, const address *peer, bool same_process)
{
    uccl_conn_t *conn = uccl_engine_connect(engine, peer->ip, peer->gpu, peer->port, same_process);
    CHECK_MSG(conn, "connect to %s:%d: %s", peer->ip, peer->port, uccl_engine_last_error());
    return conn;
}

uccl_conn_t *take_connection(uccl_engine_t *engine)
{
    char ip[46];
    int gpu = -77;
    uccl_conn_t *conn = uccl_engine_accept(engine, ip, sizeof ip, &gpu);
    CHECK_MSG(conn, "accept: %s", uccl_engine_last_error());
    CHECK(gpu >= -1);
    return conn;
}

uccl_mr_t region_add(uccl_engine_t *engine, const void *p, size_t len)
{
    uccl_mr_t mr = 0;
    CHECK_OK(uccl_engine_reg(engine, (size_t)p, len, &mr));
    CHECK(mr != 0);
    return mr;
}

struct FifoItem region_item(uccl_engine_t *engine, uccl_mr_t mr, const void *p, size_t len)
{
    struct FifoItem item;
    CHECK_EQ(sizeof item, FIFO_SIZE);
    CHECK_OK(uccl_engine_prepare_fifo(engine, mr, p, len, (char *)&item));
    CHECK(item.addr == (uint64_t)(uintptr_t)p);
    /* Host or device memory: an emulated run that does not emulate would prove nothing. */
    CHECK_EQ(item.rkey, getenv("UCCL_TCPX_EMULATE_DEVICE") ? 2 : 1);
    return item;
}

struct FifoItem item_at(struct FifoItem item, const void *addr, size_t len)
{
    CHECK_OK(uccl_engine_update_fifo(&item, (uint64_t)(uintptr_t)addr, (uint32_t)len));
    return item;
}

void link_send(const side *s, const void *data, size_t len)
{
    /* MSG_NOSIGNAL: a dead peer is a failed check here, and SIGPIPE stays a sign of the library. */
    ssize_t n = send(s->link, data, len, MSG_NOSIGNAL);
    CHECK_MSG(n == (ssize_t)len, "the other process is gone");
}

void link_recv(const side *s, void *data, size_t len)
{
    ssize_t n = recv(s->link, data, len, MSG_WAITALL);
    CHECK_MSG(n == (ssize_t)len, "the other process is gone");
}

void meet(const side *s)
{
    char byte = 'm';
    link_send(s, &byte, 1);
    link_recv(s, &byte, 1);
    CHECK_EQ(byte, 'm');
}

static void side_register(side *s)
{
    s->engine = engine_start();
    s->mr = region_add(s->engine, s->mine, s->len);
}

static struct FifoItem side_item(const side *s)
{
    return region_item(s->engine, s->mr, s->mine, s->len);
}

/* Connects to the other process, or accepts its connection, and exchanges access to the regions. */
static void side_open(side *s, bool connects)
{
    side_register(s);
    address peer = engine_address(s->engine);
    struct FifoItem item = side_item(s);
    link_send(s, &peer, sizeof peer);
    link_send(s, &item, sizeof item);
    link_recv(s, &peer, sizeof peer);
    link_recv(s, &s->item, sizeof s->item);
    s->conn = connects ? join(s->engine, &peer, false) : take_connection(s->engine);
}

void side_close(side *s)
{
    uccl_engine_conn_destroy(s->conn);
    uccl_engine_mr_destroy(s->engine, s->mr);
    uccl_engine_destroy(s->engine);
}

static void target_process(side *s, role *target)
{
    /* A child must not outlive a parent that failed a check or ran into its timeout. */
    CHECK(prctl(PR_SET_PDEATHSIG, SIGKILL) == 0);
    side_open(s, false);
    if (target)
        target(s);
    meet(s);
    side_close(s);
    exit(0);
}

void pair_start(side *s, size_t len, role *target)
{
    uint8_t *initiator_region = map_shared(len), *target_region = map_shared(len);
    int sockets[2];
    CHECK(socketpair(AF_UNIX, SOCK_STREAM, 0, sockets) == 0);
    fflush(NULL);
    pid_t child = fork();
    CHECK(child >= 0);
    *s = (side){.mine = child ? initiator_region : target_region,
                .theirs = child ? target_region : initiator_region,
                .len = len,
                .link = sockets[child ? 0 : 1],
                .child = child};
    CHECK(close(sockets[child ? 1 : 0]) == 0);
    if (child == 0)
        target_process(s, target);
    side_open(s, true);
}

static void check_exit(pid_t child)
{
    int status = 0;
    CHECK(waitpid(child, &status, 0) == child);
    CHECK_MSG(WIFEXITED(status) && WEXITSTATUS(status) == 0, "the target process ended with wait status 0x%x", status);
}

void pair_end(side *s)
{
    meet(s);
    side_close(s);
    check_exit(s->child);
}

void run_pair(size_t len, role *initiator, role *target)
{
    side s;
    pair_start(&s, len, target);
    if (initiator)
        initiator(&s);
    pair_end(&s);
}

void local_pair(side *initiator, side *target, size_t len)
{
    *initiator = (side){.mine = map_shared(len), .theirs = map_shared(len), .len = len, .link = -1};
    *target = (side){.mine = initiator->theirs, .theirs = initiator->mine, .len = len, .link = -1};
    side_register(initiator);
    side_register(target);
    initiator->item = side_item(target);
    target->item = side_item(initiator);
    address peer = engine_address(target->engine);
    initiator->conn = join(initiator->engine, &peer, true);
    target->conn = take_connection(target->engine);
}

const char *direction_name(direction d)
{
    return d == WRITE ? "write" : "read";
}

int start(const side *s, direction d, size_t here, size_t there, size_t len, uint64_t *id)
{
    struct FifoItem item = item_at(s->item, s->theirs + there, len);
    return d == WRITE ? uccl_engine_write(s->conn, s->mr, s->mine + here, len, item, id)
                      : uccl_engine_read(s->conn, s->mr, s->mine + here, len, item, id);
}

int outcome(uccl_conn_t *conn, uint64_t id)
{
    int status = uccl_engine_wait(conn, id, HANG_MS);
    CHECK_MSG(status != UCCL_IN_PROGRESS, "transfer %llu hangs", (unsigned long long)id);
    return status;
}
