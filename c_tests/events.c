/* Waiting without polling in a loop: the descriptor of an engine, and the waits with a timeout. */
#include "support.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <unistd.h>

#define LEN (4 * MIB)

static int descriptor(uccl_engine_t *engine)
{
    int fd = -1;
    CHECK_OK(uccl_engine_event_fd(engine, &fd));
    CHECK(fd >= 0 && (fcntl(fd, F_GETFL) & O_NONBLOCK) && (fcntl(fd, F_GETFD) & FD_CLOEXEC));
    return fd;
}

static bool readable(int fd, int ms)
{
    struct pollfd p = {.fd = fd, .events = POLLIN};
    int n = poll(&p, 1, ms);
    CHECK(n == 0 || (n == 1 && p.revents == POLLIN));
    return n == 1;
}

/* Sleeps until something has happened. */
static void sleep_until_event(int fd)
{
    uint64_t count;
    CHECK_MSG(readable(fd, HANG_MS), "nothing happened");
    CHECK(read(fd, &count, sizeof count) == sizeof count && count > 0);
}

static void reset(int fd)
{
    uint64_t count;
    CHECK(read(fd, &count, sizeof count) == sizeof count || errno == EAGAIN);
}

/* A transfer as an event loop drives it: looked at only when the descriptor is readable. */
static int outcome_by_events(uccl_conn_t *conn, uint64_t id, int fd)
{
    int status;
    while ((status = uccl_engine_poll(conn, id, NULL)) == UCCL_IN_PROGRESS)
        sleep_until_event(fd);
    return status;
}

#define TRANSFERS 20

static void move_by_events(side *s)
{
    int fd = descriptor(s->engine);
    CHECK_MSG(readable(fd, 0), "it shows nothing of what happened before, so it is readable at first");
    for (int i = 0; i < TRANSFERS; i++) {
        uint64_t id;
        fill(s->mine, s->len, (uint64_t)i);
        CHECK_OK(start(s, i % 2 ? READ : WRITE, 0, 0, i % 3 ? s->len : 100, &id));
        CHECK_OK(outcome_by_events(s->conn, id, fd));
    }
    notify_msg_t m = {.name = "last", .msg = ""};
    CHECK_OK(uccl_engine_send_notif(s->conn, &m));
    CHECK(close(fd) == 0);
}

static void notified_by_events(side *s)
{
    int fd = descriptor(s->engine);
    uccl_notif_t *notif = NULL;
    for (;;) {
        CHECK_OK(uccl_engine_notif_next(s->engine, &notif));
        if (notif)
            break;
        sleep_until_event(fd);
    }
    uccl_engine_notif_free(notif);
    CHECK(close(fd) == 0);
}

CASE(transfers_and_notifications) { run_pair(LEN, move_by_events, notified_by_events); }

/* The first transfer of a new connection, and no call that drives it. */
typedef void idle(side *s, uint64_t id, int fd);

static void look_and_sleep(side *s, uint64_t id, int fd) { CHECK_OK(outcome_by_events(s->conn, id, fd)); }

static void sleep_and_look(side *s, uint64_t id, int fd)
{
    sleep_until_event(fd);
    CHECK_OK(uccl_engine_poll(s->conn, id, NULL));
}

static void deregister(side *s, uint64_t id, int fd)
{
    (void)fd;
    uccl_engine_mr_destroy(s->engine, s->mr);
    CHECK_OK(uccl_engine_poll(s->conn, id, NULL));
    s->mr = region_add(s->engine, s->mine, s->len);
}

static int64_t first_transfer_ms(direction d, idle *wait)
{
    side a, b;
    uint64_t id;
    local_pair(&a, &b, LEN);
    int fd = descriptor(a.engine);
    reset(fd);
    int64_t begin = now_ms();
    CHECK_OK(start(&a, d, 0, 0, a.len, &id));
    wait(&a, id, fd);
    int64_t ms = now_ms() - begin;
    CHECK(close(fd) == 0);
    side_close(&a);
    side_close(&b);
    return ms;
}

/* Without a drive, the timers of the connection would end it, a third of the peer timeout later: three times in
 * a row that is no accident. */
CASE(no_thread_has_to_poll)
{
    idle *waits[] = {look_and_sleep, sleep_and_look, deregister};
    for (size_t w = 0; w < sizeof waits / sizeof *waits; w++)
        for (int d = 0; d < 2; d++) {
            int64_t best = HANG_MS;
            for (int i = 0; i < 3 && best > 2000; i++) {
                int64_t ms = first_transfer_ms(DIRECTIONS[d], waits[w]);
                best = ms < best ? ms : best;
            }
            CHECK_MSG(best <= 2000, "%s, wait %zu: %lld ms", direction_name(DIRECTIONS[d]), w, (long long)best);
        }
}

/* The end of a transfer that fails is an event, and so is the end of a connection on which nothing moves. */
CASE(failures)
{
    side a, b;
    local_pair(&a, &b, LEN);
    int fds[] = {descriptor(a.engine), descriptor(b.engine)};
    uint64_t id;
    CHECK_OK(uccl_engine_recv_async(a.conn, a.mr, a.mine, a.len, &id));
    reset(fds[0]);
    reset(fds[1]);
    CHECK(!readable(fds[0], 20) && !readable(fds[1], 20));
    uccl_engine_conn_destroy(b.conn);
    CHECK_FAILS(outcome_by_events(a.conn, id, fds[0]));
    reset(fds[0]);
    /* The engine's end, too; the descriptor outlives it. */
    uccl_engine_destroy(a.engine);
    CHECK(readable(fds[0], 0));
    CHECK(close(fds[0]) == 0 && close(fds[1]) == 0);
    uccl_engine_conn_destroy(a.conn);
    uccl_engine_destroy(b.engine);
}

/* All descriptors of an engine are one; those of another engine are not. */
CASE(descriptors_are_duplicates)
{
    uccl_engine_t *engine = engine_start(), *other = engine_start();
    int one = descriptor(engine), two = descriptor(engine), theirs = descriptor(other);
    CHECK(one != two && readable(one, 0) && readable(two, 0));
    sleep_until_event(one);
    CHECK(!readable(one, 0) && !readable(two, 0) && readable(theirs, 0));
    CHECK(close(one) == 0);
    uccl_engine_stop_accept(engine);
    sleep_until_event(two);
    CHECK(close(two) == 0 && close(theirs) == 0);
    uccl_engine_destroy(other);
    uccl_engine_destroy(engine);
}

static uccl_conn_t *accept_by_events(uccl_engine_t *engine, int fd)
{
    char ip[64];
    int gpu, status;
    uccl_conn_t *conn = NULL;
    while ((status = uccl_engine_accept_for(engine, 0, ip, sizeof ip, &gpu, &conn)) == UCCL_IN_PROGRESS)
        sleep_until_event(fd);
    CHECK_OK(status);
    CHECK(strcmp(ip, LOOPBACK) == 0);
    return conn;
}

CASE(connections)
{
    uccl_engine_t *engine = engine_start(), *other = engine_start();
    int fd = descriptor(engine);
    reset(fd);
    address self = engine_address(engine);
    for (int i = 0; i < 3; i++) {
        uccl_conn_t *out = join(other, &self, false), *in = accept_by_events(engine, fd);
        reset(fd);
        uccl_engine_conn_destroy(out);
        while (uccl_engine_conn_status(in) == UCCL_OK)
            sleep_until_event(fd);
        uccl_engine_conn_destroy(in);
    }
    CHECK(close(fd) == 0);
    uccl_engine_destroy(other);
    uccl_engine_destroy(engine);
}

CASE(timeouts)
{
    uccl_engine_t *engine = engine_start();
    char ip[64];
    int gpu;
    uccl_conn_t *conn;
    uccl_notif_t *notif;
    int64_t begin = now_ms();
    CHECK_STATUS(uccl_engine_accept_for(engine, 50, ip, sizeof ip, &gpu, &conn), UCCL_IN_PROGRESS);
    CHECK_STATUS(uccl_engine_notif_wait(engine, 50, &notif), UCCL_IN_PROGRESS);
    CHECK(now_ms() - begin >= 100);
    uccl_engine_destroy(engine);
}

typedef struct waiter {
    uccl_engine_t *engine;
    pthread_t thread;
    int status;
    uccl_conn_t *conn;
    uccl_notif_t *notif;
} waiter;

static void *wait_for_connection(void *argument)
{
    waiter *w = argument;
    char ip[64];
    int gpu;
    w->status = uccl_engine_accept_for(w->engine, HANG_MS, ip, sizeof ip, &gpu, &w->conn);
    return NULL;
}

static void *wait_for_notification(void *argument)
{
    waiter *w = argument;
    w->status = uccl_engine_notif_wait(w->engine, HANG_MS, &w->notif);
    return NULL;
}

static void waiter_start(waiter *w, uccl_engine_t *engine, void *(*wait)(void *))
{
    *w = (waiter){.engine = engine};
    CHECK(pthread_create(&w->thread, NULL, wait, w) == 0);
}

static void waiter_end(waiter *w, int status)
{
    CHECK(pthread_join(w->thread, NULL) == 0);
    CHECK_MSG(w->status == status, "the wait ended with %d, expected %d", w->status, status);
}

CASE(blocked_threads_are_woken)
{
    uccl_engine_t *engine = engine_start(), *other = engine_start();
    address self = engine_address(engine);
    waiter connection, notification;
    waiter_start(&connection, engine, wait_for_connection);
    waiter_start(&notification, engine, wait_for_notification);
    sleep_ms(50);
    uccl_conn_t *out = join(other, &self, false);
    waiter_end(&connection, UCCL_OK);
    uccl_conn_t *in = connection.conn;
    notify_msg_t m = {.name = "name", .msg = "message"};
    CHECK_OK(uccl_engine_send_notif(out, &m));
    waiter_end(&notification, UCCL_OK);
    size_t len = 0;
    CHECK(memcmp(uccl_engine_notif_name(notification.notif, &len), "name", 4) == 0 && len == 4);
    uccl_engine_notif_free(notification.notif);

    waiter_start(&connection, engine, wait_for_connection);
    waiter_start(&notification, engine, wait_for_notification);
    sleep_ms(50);
    uccl_engine_stop_accept(engine);
    waiter_end(&connection, UCCL_ERR_CANCELED);
    uccl_engine_conn_destroy(in);
    uccl_engine_conn_destroy(out);
    uccl_engine_destroy(engine);
    waiter_end(&notification, UCCL_ERR_CANCELED);
    uccl_engine_destroy(other);
}
