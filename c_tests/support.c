#include "support.h"

#include <errno.h>
#include <signal.h>
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
    /* Host or device memory: a run over another kind than it says would prove nothing. */
    CHECK_EQ(item.rkey, memory_rkey(p));
    return item;
}

struct FifoItem item_at(struct FifoItem item, const void *addr, size_t len)
{
    CHECK_OK(uccl_engine_update_fifo(&item, (uint64_t)(uintptr_t)addr, (uint32_t)len));
    return item;
}

struct FifoItem their_item(const side *s, size_t there, size_t len)
{
    return item_at(s->item, (const uint8_t *)(uintptr_t)s->item.addr + there, len);
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

/* Memory of a GPU is made by each process for itself, after the fork, and lent to the other for checks. */
static void side_memory(side *s, uint8_t *const shared[2])
{
    int self = s->child ? 0 : 1, other = !self;
    if (!memory_is_gpu()) {
        s->mine = shared[self];
        s->theirs = shared[other];
        return;
    }
    s->mine = memory_new(self, s->len);
    memory_handle handle = memory_lend(s->mine);
    link_send(s, &handle, sizeof handle);
    link_recv(s, &handle, sizeof handle);
    s->theirs = memory_borrow(&handle, other, s->len);
}

static void target_process(side *s, uint8_t *const shared[2], role *target)
{
    /* A child must not outlive a parent that failed a check or ran into its timeout. */
    CHECK(prctl(PR_SET_PDEATHSIG, SIGKILL) == 0);
    side_memory(s, shared);
    side_open(s, false);
    if (target)
        target(s);
    meet(s);
    side_close(s);
    exit(0);
}

void pair_start(side *s, size_t len, role *target)
{
    uint8_t *shared[2] = {NULL, NULL};
    if (!memory_is_gpu()) {
        shared[0] = map_shared(len);
        shared[1] = map_shared(len);
    }
    int sockets[2];
    CHECK(socketpair(AF_UNIX, SOCK_STREAM, 0, sockets) == 0);
    fflush(NULL);
    pid_t child = fork();
    CHECK(child >= 0);
    *s = (side){.len = len, .link = sockets[child ? 0 : 1], .child = child};
    CHECK(close(sockets[child ? 1 : 0]) == 0);
    if (child == 0)
        target_process(s, shared, target);
    side_memory(s, shared);
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
    *initiator = (side){.mine = memory_new(0, len), .theirs = memory_new(1, len), .len = len, .link = -1};
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
    struct FifoItem item = their_item(s, there, len);
    return d == WRITE ? uccl_engine_write(s->conn, s->mr, s->mine + here, len, item, id)
                      : uccl_engine_read(s->conn, s->mr, s->mine + here, len, item, id);
}

int outcome(uccl_conn_t *conn, uint64_t id)
{
    int status = uccl_engine_wait(conn, id, HANG_MS);
    CHECK_MSG(status != UCCL_IN_PROGRESS, "transfer %llu hangs", (unsigned long long)id);
    return status;
}

uccl_notif_t *next_notif(uccl_engine_t *engine)
{
    uccl_notif_t *notif = NULL;
    int64_t end = now_ms() + HANG_MS;
    for (;;) {
        CHECK_OK(uccl_engine_notif_next(engine, &notif));
        if (notif)
            return notif;
        CHECK_MSG(now_ms() < end, "no notification came");
        sleep_ms(1);
    }
}
