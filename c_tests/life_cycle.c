/* Engines, connections and regions: made, used, ended in every order and at bad moments. One process throughout. */
#include "support.h"

#include <arpa/inet.h>
#include <dirent.h>
#include <pthread.h>
#include <sys/socket.h>

/* Nothing is left behind. */

static int entries(const char *path)
{
    int n = 0;
    DIR *dir = opendir(path);
    CHECK(dir);
    while (readdir(dir))
        n++;
    closedir(dir);
    return n;
}

/* Closing may take a moment longer inside the plugin than the call that asked for it. */
static void check_settles_at(const char *path, int want)
{
    int64_t end = now_ms() + 10000;
    int n;
    while ((n = entries(path)) > want && now_ms() < end)
        sleep_ms(10);
    CHECK_MSG(n <= want, "%s has %d entries, %d before", path, n, want);
}

static void move_once(const side *s)
{
    for (int d = 0; d < 2; d++) {
        uint64_t id;
        fill(s->mine, s->len, 1);
        fill(s->theirs, s->len, 2);
        CHECK_OK(start(s, DIRECTIONS[d], 0, 0, s->len, &id));
        CHECK_OK(outcome(s->conn, id));
        check_same(direction_name(DIRECTIONS[d]), s->theirs, s->mine, s->len);
    }
}

static void side_unmap(side *s)
{
    memory_free(s->mine, s->len);
}

static void local_pair_close(side *a, side *b)
{
    side_close(a);
    side_close(b);
    side_unmap(a);
    side_unmap(b);
}

CASE(create_and_destroy_repeatedly)
{
    int files = 0, threads = 0;
    for (int i = 0; i < 20; i++) {
        side a, b;
        local_pair(&a, &b, MIB);
        move_once(&a);
        move_once(&b);
        local_pair_close(&a, &b);
        uccl_engine_destroy(engine_start());
        if (i == 2) { /* what is made once in a process has been made */
            sleep_ms(500);
            files = entries("/proc/self/fd");
            threads = entries("/proc/self/task");
        }
    }
    check_settles_at("/proc/self/fd", files);
    check_settles_at("/proc/self/task", threads);
}

/* Several engines. */

#define ENGINES 4

typedef struct mesh {
    uccl_engine_t *engines[ENGINES];
    uccl_conn_t *out[ENGINES][ENGINES], *in[ENGINES][ENGINES];
    uccl_mr_t mrs[ENGINES];
    struct FifoItem items[ENGINES];
    uint8_t *mem[ENGINES];
} mesh;

static void mesh_open(mesh *m)
{
    for (int i = 0; i < ENGINES; i++) {
        m->engines[i] = engine_start();
        m->mem[i] = memory_new(i, (ENGINES + 1) * MIB);
        m->mrs[i] = region_add(m->engines[i], m->mem[i], (ENGINES + 1) * MIB);
        m->items[i] = region_item(m->engines[i], m->mrs[i], m->mem[i], (ENGINES + 1) * MIB);
        fill(m->mem[i], MIB, (uint64_t)i + 1);
    }
    for (int i = 0; i < ENGINES; i++)
        for (int j = 0; j < ENGINES; j++) {
            address peer = engine_address(m->engines[j]);
            m->out[i][j] = join(m->engines[i], &peer, true);
            m->in[j][i] = take_connection(m->engines[j]);
        }
}

static void mesh_close(mesh *m)
{
    for (int i = 0; i < ENGINES; i++) {
        for (int j = 0; j < ENGINES; j++) {
            uccl_engine_conn_destroy(m->out[i][j]);
            uccl_engine_conn_destroy(m->in[i][j]);
        }
        uccl_engine_mr_destroy(m->engines[i], m->mrs[i]);
        uccl_engine_destroy(m->engines[i]);
    }
}

/* Every engine writes its first MiB to every other and to itself, at once. */
CASE(several_engines_each_to_each)
{
    static mesh m;
    uint64_t ids[ENGINES][ENGINES];
    mesh_open(&m);
    for (int i = 0; i < ENGINES; i++)
        for (int j = 0; j < ENGINES; j++) {
            struct FifoItem to = item_at(m.items[j], m.mem[j] + (size_t)(i + 1) * MIB, MIB);
            CHECK_OK(uccl_engine_write(m.out[i][j], m.mrs[i], m.mem[i], MIB, to, &ids[i][j]));
        }
    for (int i = 0; i < ENGINES; i++)
        for (int j = 0; j < ENGINES; j++) {
            CHECK_OK(outcome(m.out[i][j], ids[i][j]));
            check_same("write", m.mem[j] + (size_t)(i + 1) * MIB, m.mem[i], MIB);
        }
    mesh_close(&m);
}

CASE(engine_to_itself)
{
    uccl_engine_t *engine = engine_start();
    uint8_t *mem = memory_new(0, 2 * MIB);
    uccl_mr_t mr = region_add(engine, mem, 2 * MIB);
    address self = engine_address(engine);
    side out = {.engine = engine, .mine = mem, .theirs = mem + MIB, .len = MIB, .mr = mr}, in = out;
    out.item = in.item = item_at(region_item(engine, mr, mem, 2 * MIB), out.theirs, MIB);
    out.conn = join(engine, &self, true);
    in.conn = take_connection(engine);
    CHECK(uccl_engine_conn_is_local(out.conn) && uccl_engine_conn_is_local(in.conn));
    move_once(&out);
    move_once(&in);
    uint64_t id;
    fill(mem, MIB, 4);
    CHECK_OK(uccl_engine_send(out.conn, mr, mem, MIB, &id));
    CHECK_OK(uccl_engine_recv(in.conn, mr, mem + MIB, MIB));
    CHECK_OK(outcome(out.conn, id));
    check_same("message", mem + MIB, mem, MIB);
    uccl_engine_conn_destroy(in.conn);
    side_close(&out);
}

/* Accept. */

static void *accept_nothing(void *engine)
{
    char ip[46] = "x";
    int gpu = 77;
    CHECK(uccl_engine_accept(engine, ip, sizeof ip, &gpu) == NULL);
    CHECK(ip[0] == 0 && gpu == 77);
    return NULL;
}

#define WAITERS 3

static void check_accept_is_woken_by(uccl_engine_t *engine, void (*wake)(uccl_engine_t *engine))
{
    pthread_t waiters[WAITERS];
    for (int i = 0; i < WAITERS; i++)
        CHECK(pthread_create(&waiters[i], NULL, accept_nothing, engine) == 0);
    sleep_ms(200);
    wake(engine);
    for (int i = 0; i < WAITERS; i++)
        CHECK(pthread_join(waiters[i], NULL) == 0);
    accept_nothing(engine); /* a later one does not block either */
}

CASE(accept_is_woken)
{
    uccl_engine_t *engine = engine_start();
    check_accept_is_woken_by(engine, uccl_engine_stop_accept);
    uccl_engine_destroy(engine);
    check_accept_is_woken_by(engine_start(), uccl_engine_destroy);
}

/* stop_accept ends accepting, not the connections that exist. */
CASE(connections_survive_stop_accept)
{
    side a, b;
    local_pair(&a, &b, MIB);
    uccl_engine_stop_accept(a.engine);
    uccl_engine_stop_accept(b.engine);
    move_once(&a);
    move_once(&b);
    local_pair_close(&a, &b);
}

CASE(data_moves_before_accept)
{
    side a, b;
    local_pair(&a, &b, MIB);
    address peer = engine_address(b.engine);
    uccl_conn_t *first = a.conn;
    a.conn = join(a.engine, &peer, true);
    move_once(&a);
    uccl_engine_conn_destroy(first);
    uccl_engine_conn_destroy(take_connection(b.engine));
    local_pair_close(&a, &b);
}

CASE(accept_tells_the_address)
{
    static const struct {
        size_t len;
        const char *want;
    } BUFFERS[] = {{1, ""}, {4, "127"}, {9, "127.0.0."}, {10, LOOPBACK}, {46, LOOPBACK}};
    uccl_engine_t *engine = engine_start();
    address self = engine_address(engine);
    for (size_t i = 0; i < sizeof BUFFERS / sizeof *BUFFERS; i++) {
        char ip[48];
        int gpu = 77;
        wipe((uint8_t *)ip, sizeof ip);
        uccl_conn_t *out = join(engine, &self, true);
        uccl_conn_t *in = uccl_engine_accept(engine, ip, BUFFERS[i].len, &gpu);
        CHECK(in);
        CHECK_MSG(strcmp(ip, BUFFERS[i].want) == 0, "\"%s\", expected \"%s\"", ip, BUFFERS[i].want);
        CHECK(is_wiped((uint8_t *)ip + BUFFERS[i].len, sizeof ip - BUFFERS[i].len));
        CHECK_MSG(gpu == -1 || strcmp(self.gpu, "-1") != 0, "gpu %d of a host without", gpu);
        uccl_engine_conn_destroy(out);
        uccl_engine_conn_destroy(in);
    }
    uccl_engine_destroy(engine);
}

/* Connecting in vain. */

#define CONNECT_DEADLINE "2000"
#define CONNECT_LIMIT_MS 15000

/* A TCP port of loopback, open or not; *fd is to be closed when no longer needed. */
static int loopback_port(int *fd, bool listening)
{
    struct sockaddr_in a = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t len = sizeof a;
    *fd = socket(AF_INET, SOCK_STREAM, 0);
    CHECK(*fd >= 0);
    CHECK(bind(*fd, (struct sockaddr *)&a, sizeof a) == 0);
    CHECK(!listening || listen(*fd, 16) == 0);
    CHECK(getsockname(*fd, (struct sockaddr *)&a, &len) == 0);
    return ntohs(a.sin_port);
}

static void check_connect_fails(uccl_engine_t *engine, int port)
{
    char digits[16];
    snprintf(digits, sizeof digits, "%d", port);
    int64_t begin = now_ms();
    CHECK(uccl_engine_connect(engine, LOOPBACK, "-1", port, false) == NULL);
    CHECK_MSG(now_ms() - begin < CONNECT_LIMIT_MS, "it took %lld ms", (long long)(now_ms() - begin));
    const char *why = uccl_engine_last_error();
    CHECK_MSG(strstr(why, LOOPBACK) && strstr(why, digits), "last error: \"%s\"", why);
}

CASE(connect_to_nobody)
{
    int bound, silent, closed;
    CHECK(setenv("UCCL_TCPX_CONNECT_TIMEOUT_MS", CONNECT_DEADLINE, 1) == 0);
    uccl_engine_t *engine = engine_start();
    check_connect_fails(engine, loopback_port(&bound, false));
    check_connect_fails(engine, loopback_port(&silent, true)); /* the kernel answers, but no engine does */
    int port = loopback_port(&closed, true);
    close(closed);
    check_connect_fails(engine, port);
    close(bound);
    close(silent);
    uccl_engine_destroy(engine);
}

static void check_listens_on_port_of(const char *variable)
{
    int fd;
    char digits[16];
    snprintf(digits, sizeof digits, "%d", loopback_port(&fd, false));
    close(fd);
    CHECK(setenv(variable, digits, 1) == 0);
    uccl_engine_t *engine = engine_start();
    address a = engine_address(engine);
    CHECK_MSG(a.port == atoi(digits), "%s=%s, and the port is %d", variable, digits, a.port);
    CHECK(uccl_engine_create(0, false) == NULL); /* taken */
    CHECK_MSG(strstr(uccl_engine_last_error(), digits), "last error: \"%s\"", uccl_engine_last_error());
    uccl_engine_destroy(engine);
    uccl_engine_destroy(engine_start()); /* and free again at once */
    CHECK(unsetenv(variable) == 0);
}

CASE(port_from_the_environment)
{
    check_listens_on_port_of("UCCL_TCPX_OOB_PORT");
    check_listens_on_port_of("UCCL_TCP_OOB_PORT");
}

/* Every order of ending. */

enum { END_CONN, END_MR, END_ENGINE, ENDS };
static const int ORDERS[][ENDS] = {
    {END_CONN, END_MR, END_ENGINE}, {END_CONN, END_ENGINE, END_MR}, {END_MR, END_CONN, END_ENGINE},
    {END_MR, END_ENGINE, END_CONN}, {END_ENGINE, END_CONN, END_MR}, {END_ENGINE, END_MR, END_CONN},
};
#define ORDERS_N (sizeof ORDERS / sizeof *ORDERS)
#define IN_FLIGHT 6
/* What goes on when the ending begins. */
typedef enum load { IDLE, STARTED, MOVING } load;

static void end_one(const side *s, int what)
{
    switch (what) {
    case END_CONN: uccl_engine_conn_destroy(s->conn); break;
    case END_MR: uccl_engine_mr_destroy(s->engine, s->mr); break;
    default: uccl_engine_destroy(s->engine);
    }
}

/* Calls on a handle that ended, or whose engine ended, fail and touch nothing. */
static void check_conn_is_dead(const side *s)
{
    uint64_t id = 77;
    notify_msg_t m = {.name = "n"};
    CHECK_FAILS(start(s, WRITE, 0, 0, 1, &id));
    CHECK_FAILS(start(s, READ, 0, 0, 1, &id));
    CHECK_FAILS(uccl_engine_send(s->conn, s->mr, s->mine, 1, &id));
    CHECK_FAILS(uccl_engine_recv(s->conn, s->mr, s->mine, 1));
    CHECK_FAILS(uccl_engine_send_notif(s->conn, &m));
    CHECK_FAILS(uccl_engine_poll(s->conn, UINT64_MAX, NULL));
    CHECK(id == 77);
}

static void check_engine_is_dead(const side *s)
{
    char *text = NULL;
    uccl_mr_t mr = 77;
    CHECK_STATUS(uccl_engine_get_metadata(s->engine, &text), UCCL_ERR_NOT_FOUND);
    CHECK_STATUS(uccl_engine_reg(s->engine, (size_t)s->mine, s->len, &mr), UCCL_ERR_NOT_FOUND);
    CHECK(uccl_engine_connect(s->engine, LOOPBACK, "-1", 1, false) == NULL);
    accept_nothing(s->engine);
    CHECK(text == NULL && mr == 77);
}

static void check_is_dead(const side *s, int what)
{
    uint64_t id = 77;
    if (what == END_CONN || what == END_ENGINE)
        check_conn_is_dead(s);
    if (what == END_ENGINE)
        check_engine_is_dead(s);
    if (what == END_MR)
        CHECK_FAILS(start(s, WRITE, 0, 0, 1, &id));
    CHECK(id == 77);
    end_one(s, what); /* once more */
}

static void take_off(const side *s, uint64_t *ids)
{
    for (int i = 0; i < IN_FLIGHT; i++) {
        size_t part = s->len / IN_FLIGHT, at = (size_t)i * part;
        CHECK_OK(start(s, DIRECTIONS[i % 2], at, at, part, &ids[i]));
    }
}

static void await_first_bytes(const side *s, uint64_t id)
{
    uccl_xfer_info_t info = {0};
    int64_t end = now_ms() + HANG_MS;
    while (info.bytes_done == 0) {
        CHECK(uccl_engine_poll(s->conn, id, &info) >= 0);
        CHECK_MSG(now_ms() < end, "nothing moves");
    }
}

static void load_pair(side *a, side *b, load how, uint64_t *ids)
{
    local_pair(a, b, how == IDLE ? MIB : 66 * MIB);
    if (how != IDLE)
        take_off(a, ids);
    if (how == MOVING)
        await_first_bytes(a, ids[0]);
}

/* After the first thing of a side ended, the library must not touch its memory. */
static void end_in_order(side *s, const int *order)
{
    for (int i = 0; i < ENDS; i++) {
        end_one(s, order[i]);
        if (i == 0)
            memory_forbid(s->mine, s->len);
        check_is_dead(s, order[i]);
    }
}

/* The side that stays: its transfers end, some perhaps well, and it can be closed. */
static void check_survivor(side *s, const uint64_t *ids)
{
    for (int i = 0; ids && i < IN_FLIGHT; i++) {
        int status = outcome(s->conn, ids[i]);
        CHECK_MSG(status <= 0, "status %d", status);
    }
    side_close(s);
}

static void end_initiator(const int *order, load how)
{
    side a, b;
    uint64_t ids[IN_FLIGHT];
    load_pair(&a, &b, how, ids);
    end_in_order(&a, order);
    check_survivor(&b, NULL);
    side_unmap(&a);
    side_unmap(&b);
}

static void end_target(const int *order, load how)
{
    side a, b;
    uint64_t ids[IN_FLIGHT];
    load_pair(&a, &b, how, ids);
    end_in_order(&b, order);
    check_survivor(&a, how == IDLE ? NULL : ids);
    side_unmap(&a);
    side_unmap(&b);
}

static void end_in_every_order(void (*end)(const int *order, load how), load how)
{
    for (size_t i = 0; i < ORDERS_N; i++)
        end(ORDERS[i], how);
}

CASE(any_order_initiator_idle) { end_in_every_order(end_initiator, IDLE); }
CASE(any_order_initiator_started) { end_in_every_order(end_initiator, STARTED); }
CASE(any_order_initiator_moving) { end_in_every_order(end_initiator, MOVING); }
CASE(any_order_target_idle) { end_in_every_order(end_target, IDLE); }
CASE(any_order_target_started) { end_in_every_order(end_target, STARTED); }
CASE(any_order_target_moving) { end_in_every_order(end_target, MOVING); }

/* What waiting threads and transfers in flight say when their connection or engine is closed here or by the peer. */

typedef struct waiter {
    const side *s;
    int want;
} waiter;

static void *wait_until_it_ends(void *argument)
{
    const waiter *w = argument;
    uint64_t id;
    CHECK_OK(uccl_engine_recv_async(w->s->conn, w->s->mr, w->s->mine, w->s->len, &id));
    CHECK_STATUS(uccl_engine_wait(w->s->conn, id, -1), w->want);
    return NULL;
}

static void *receive_until_it_ends(void *argument)
{
    const waiter *w = argument;
    CHECK_STATUS(uccl_engine_recv(w->s->conn, w->s->mr, w->s->mine, w->s->len), w->want);
    return NULL;
}

/* Two threads wait on s for messages that never come; ending `what` of `ended` must wake them and say why. */
static void check_waiters_wake(const side *s, const side *ended, int what)
{
    pthread_t waiting, receiving;
    waiter w = {s, s == ended ? UCCL_ERR_CANCELED : UCCL_ERR_REMOTE_DISCONNECT};
    CHECK(pthread_create(&waiting, NULL, wait_until_it_ends, &w) == 0);
    CHECK(pthread_create(&receiving, NULL, receive_until_it_ends, &w) == 0);
    sleep_ms(200);
    end_one(ended, what);
    CHECK(pthread_join(waiting, NULL) == 0);
    CHECK(pthread_join(receiving, NULL) == 0);
}

CASE(waiting_threads_wake)
{
    static const int WHAT[] = {END_CONN, END_ENGINE};
    for (int i = 0; i < 2; i++) {
        side a, b;
        local_pair(&a, &b, MIB);
        check_waiters_wake(&a, &a, WHAT[i]);
        local_pair_close(&a, &b);
        local_pair(&a, &b, MIB);
        check_waiters_wake(&a, &b, WHAT[i]);
        local_pair_close(&a, &b);
    }
}

static void *move_until_cancelled(void *user)
{
    const side *s = user;
    for (;;) {
        uint64_t id;
        notify_msg_t note = {.name = "still here"};
        CHECK_OK(start(s, WRITE, 0, 0, s->len, &id));
        CHECK_OK(uccl_engine_wait(s->conn, id, -1));
        CHECK_OK(uccl_engine_send_notif(s->conn, &note));
        size_t taken;
        CHECK_OK(uccl_engine_get_notifs(&note, 1, &taken));
        pthread_testcancel();
    }
}

/* A thread that is cancelled while it is in a call is so once the call has ended: neither the process nor the connection suffers. */
CASE(cancelled_threads)
{
    side a, b;
    local_pair(&a, &b, MIB);
    for (int i = 0; i < 40; i++) {
        pthread_t moving;
        void *result;
        CHECK(pthread_create(&moving, NULL, move_until_cancelled, &a) == 0);
        sleep_ms(i % 8);
        CHECK(pthread_cancel(moving) == 0);
        CHECK(pthread_join(moving, &result) == 0 && result == PTHREAD_CANCELED);
    }
    move_once(&a);
    local_pair_close(&a, &b);
}

/* The connection's handle outlives its engine and still tells how the transfers ended. */
CASE(engine_ended_with_transfers_in_flight)
{
    side a, b;
    uint64_t ids[IN_FLIGHT], unmatched;
    local_pair(&a, &b, 66 * MIB);
    CHECK_OK(uccl_engine_recv_async(a.conn, a.mr, a.mine, 1, &unmatched));
    take_off(&a, ids);
    uccl_engine_destroy(a.engine);
    CHECK_STATUS(uccl_engine_poll(a.conn, unmatched, NULL), UCCL_ERR_CANCELED);
    for (int i = 0; i < IN_FLIGHT; i++) {
        int status = uccl_engine_poll(a.conn, ids[i], NULL);
        CHECK_MSG(status == UCCL_OK || status == UCCL_ERR_CANCELED, "status %d", status);
        CHECK(uccl_engine_xfer_status(a.conn, ids[i]) == (status == UCCL_OK));
    }
    local_pair_close(&a, &b);
}

/* The peer of a closed connection reads why, and can read it again. */
CASE(closed_by_the_peer)
{
    side a, b;
    uint64_t id;
    local_pair(&a, &b, MIB);
    CHECK_OK(uccl_engine_recv_async(a.conn, a.mr, a.mine, a.len, &id));
    uccl_engine_conn_destroy(b.conn);
    CHECK_STATUS(outcome(a.conn, id), UCCL_ERR_REMOTE_DISCONNECT);
    CHECK_STATUS(uccl_engine_poll(a.conn, id, NULL), UCCL_ERR_REMOTE_DISCONNECT);
    CHECK(!uccl_engine_xfer_status(a.conn, id));
    CHECK_STATUS(uccl_engine_wait(a.conn, id, 0), UCCL_ERR_REMOTE_DISCONNECT);
    CHECK_FAILS(start(&a, WRITE, 0, 0, 1, &id));
    uccl_engine_mr_destroy(a.engine, a.mr);
    local_pair_close(&a, &b);
}

CASE(listener_starts_once)
{
    side a, b;
    local_pair(&a, &b, MIB);
    for (int i = 0; i < 2; i++) {
        CHECK_OK(uccl_engine_start_listener(a.conn));
        CHECK_STATUS(uccl_engine_start_listener(a.conn), -1);
        CHECK_OK(uccl_engine_start_listener(b.conn));
        move_once(&a);
        CHECK_OK(uccl_engine_stop_listener(a.conn));
        CHECK_OK(uccl_engine_stop_listener(b.conn));
        move_once(&b);
    }
    local_pair_close(&a, &b);
}

/* Every call on a connection of an engine that ended fails, also those that move nothing. */
CASE(listener_of_an_ended_engine)
{
    side a, b;
    local_pair(&a, &b, MIB);
    CHECK(uccl_engine_conn_is_local(a.conn));
    uccl_engine_destroy(a.engine);
    CHECK_FAILS(uccl_engine_start_listener(a.conn));
    CHECK_FAILS(uccl_engine_stop_listener(a.conn));
    CHECK(!uccl_engine_conn_is_local(a.conn));
    local_pair_close(&a, &b);
}

/* Deregistration. */

CASE(deregistration_waits_for_own_transfers)
{
    side a, b;
    uint64_t ids[IN_FLIGHT];
    local_pair(&a, &b, 66 * MIB);
    fill(a.mine, a.len, 1);
    fill(b.mine, b.len, 2);
    take_off(&a, ids);
    uccl_engine_mr_destroy(a.engine, a.mr);
    for (int i = 0; i < IN_FLIGHT; i++) /* a write whose bytes have left may still wait for its peer's word */
        CHECK_OK(outcome(a.conn, ids[i]));
    check_same("both directions", a.mine, b.mine, a.len / IN_FLIGHT * IN_FLIGHT);
    local_pair_close(&a, &b);
}

/* What the owner of the region let in before the call is finished, the rest is refused; the connection stays. */
CASE(deregistration_waits_for_the_transfers_of_peers)
{
    side a, b;
    uint64_t ids[IN_FLIGHT];
    local_pair(&a, &b, 66 * MIB);
    take_off(&a, ids);
    uccl_engine_mr_destroy(b.engine, b.mr);
    memory_forbid(b.mine, b.len);
    for (int i = 0; i < IN_FLIGHT; i++) {
        int status = outcome(a.conn, ids[i]);
        CHECK_MSG(status == UCCL_OK || status == UCCL_ERR_REMOTE_ACCESS, "status %d (%s)", status, uccl_engine_strerror(status));
    }
    memory_allow(b.mine, b.len);
    b.mr = region_add(b.engine, b.mine, b.len);
    a.item = region_item(b.engine, b.mr, b.mine, b.len);
    move_once(&a);
    local_pair_close(&a, &b);
}

/* A receive that nothing answers would hold its region indefinitely: it is failed with its connection, and no other with it. */
CASE(deregistration_gives_up_waiting)
{
    side a, b;
    uint64_t id;
    CHECK(setenv("UCCL_TCPX_CLOSE_TIMEOUT_MS", "500", 1) == 0);
    local_pair(&a, &b, MIB);
    uint8_t *other = memory_new(0, MIB);
    uccl_mr_t other_mr = region_add(a.engine, other, MIB);
    CHECK_OK(uccl_engine_recv_async(a.conn, other_mr, other, MIB, &id));
    address peer = engine_address(b.engine);
    side second = a;
    second.conn = join(a.engine, &peer, true);
    uccl_conn_t *second_of_b = take_connection(b.engine);

    int64_t begin = now_ms();
    uccl_engine_mr_destroy(a.engine, other_mr);
    CHECK_MSG(now_ms() - begin < 10000, "it took %lld ms", (long long)(now_ms() - begin));
    CHECK_FAILS(uccl_engine_poll(a.conn, id, NULL));
    move_once(&second);
    uccl_engine_conn_destroy(second.conn);
    uccl_engine_conn_destroy(second_of_b);
    local_pair_close(&a, &b);
}

/* Connections that are not authenticated. */

static int other_client(int port, const char *words)
{
    struct sockaddr_in a = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK), .sin_port = htons((uint16_t)port)};
    int fd = socket(AF_INET, SOCK_STREAM, 0);
    CHECK(fd >= 0 && connect(fd, (struct sockaddr *)&a, sizeof a) == 0);
    CHECK(send(fd, words, strlen(words), MSG_NOSIGNAL) == (ssize_t)strlen(words));
    return fd;
}

/* A client that speaks another protocol, or is silent, delays no other, and accept never returns it. */
CASE(unauthenticated_connections_are_ignored)
{
    uccl_engine_t *engine = engine_start();
    address self = engine_address(engine);
    int silent = other_client(self.port, ""), web = other_client(self.port, "GET / HTTP/1.1\r\n\r\n");
    close(other_client(self.port, ""));
    uccl_conn_t *out = join(engine, &self, true), *in = take_connection(engine);
    uccl_engine_stop_accept(engine);
    accept_nothing(engine);
    uccl_engine_conn_destroy(out);
    uccl_engine_conn_destroy(in);
    uccl_engine_destroy(engine);
    close(silent);
    close(web);
}

/* Settings given at creation override the environment for this engine alone and do not change it. */
CASE(settings_of_one_engine)
{
    /* A port that was free a moment ago; another process may take it first, so a few are tried. */
    uccl_engine_t *engine = NULL;
    char port[16] = "";
    for (int i = 0; i < 20 && !engine; i++) {
        uccl_engine_t *probe = engine_start();
        snprintf(port, sizeof port, "%d", engine_address(probe).port);
        uccl_engine_destroy(probe);
        CHECK(setenv("UCCL_TCPX_OOB_PORT", "no port", 1) == 0);
        const uccl_option_t options[] = {{"UCCL_TCPX_OOB_PORT", "1"}, {"UCCL_TCPX_NUM_CHANNELS", "2"}, {"UCCL_TCPX_OOB_PORT", port}};
        int status = uccl_engine_create_with(options, 3, &engine);
        CHECK_MSG(status == UCCL_OK || status == UCCL_ERR_SYSTEM, "%d: %s", status, uccl_engine_last_error());
        CHECK(strcmp(getenv("UCCL_TCPX_OOB_PORT"), "no port") == 0 && !getenv("UCCL_TCPX_NUM_CHANNELS"));
        CHECK(unsetenv("UCCL_TCPX_OOB_PORT") == 0);
    }
    CHECK_MSG(engine, "%s", uccl_engine_last_error());
    CHECK_EQ(engine_address(engine).port, atoi(port));
    uccl_engine_t *other = engine_start();
    CHECK(engine_address(other).port != atoi(port));

    /* An empty value and NULL unset what the environment says. */
    CHECK(setenv("UCCL_TCPX_OOB_PORT", port, 1) == 0);
    const char *const unset[] = {"", NULL};
    for (int i = 0; i < 2; i++) {
        uccl_engine_t *anywhere = NULL;
        CHECK_OK(uccl_engine_create_with(&(uccl_option_t){"UCCL_TCPX_OOB_PORT", unset[i]}, 1, &anywhere));
        CHECK(engine_address(anywhere).port != atoi(port));
        uccl_engine_destroy(anywhere);
    }
    CHECK(unsetenv("UCCL_TCPX_OOB_PORT") == 0);
    uccl_engine_destroy(engine);
    uccl_engine_destroy(other);
}
