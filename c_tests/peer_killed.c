/* A peer that dies or freezes in mid transfer: every transfer ends with an error within the deadline, and so does everything
 * else. A frozen peer is noticed by its silence, so there the deadlines of the library are short; a dead one is noticed at once, long
 * before PATIENCE, which no machine is too busy for. LIMIT_MS is how much later a loaded machine may be. */
#include "support.h"

#include <pthread.h>
#include <signal.h>
#include <sys/wait.h>

#define DEADLINE "2000"
#define PATIENCE "120000"
#define LIMIT_MS 20000

#define BLOCKS 8
#define BLOCK (64 * MIB)
#define REGION (BLOCKS * BLOCK)

typedef struct flight {
    uint64_t ids[BLOCKS + 2];
    direction d;
} flight;

/* Must run before the fork: the library reads its environment when an engine is created. */
static void set_deadlines(const char *silence)
{
    CHECK(setenv("UCCL_TCPX_PEER_TIMEOUT_MS", silence, 1) == 0);
    CHECK(setenv("UCCL_TCPX_TRANSFER_TIMEOUT_MS", silence, 1) == 0);
    CHECK(setenv("UCCL_TCPX_CLOSE_TIMEOUT_MS", DEADLINE, 1) == 0);
}

/* A block each, and a send and a receive without an answer. */
static void take_off(const side *s, direction d, flight *f)
{
    f->d = d;
    for (size_t i = 0; i < BLOCKS; i++)
        CHECK_OK(start(s, d, i * BLOCK, i * BLOCK, BLOCK, &f->ids[i]));
    CHECK_OK(uccl_engine_recv_async(s->conn, s->mr, s->mine, PAGE, &f->ids[BLOCKS]));
    CHECK_OK(uccl_engine_send_async(s->conn, s->mr, s->mine, MIB, &f->ids[BLOCKS + 1]));
}

static void await_first_bytes(const side *s, const flight *f)
{
    uccl_xfer_info_t info = {0};
    int64_t end = now_ms() + LIMIT_MS;
    while (info.bytes_done == 0) {
        CHECK(uccl_engine_poll(s->conn, f->ids[0], &info) >= 0);
        CHECK_MSG(now_ms() < end, "nothing moves");
    }
}

/* A block that is reported complete must be complete; nothing may still be in progress. Returns how many failed. */
static int check_block(const side *s, const flight *f, size_t i, int64_t end)
{
    int64_t left = end - now_ms();
    int status = uccl_engine_wait(s->conn, f->ids[i], left > 0 ? left : 0);
    CHECK_MSG(status != UCCL_IN_PROGRESS, "%s %zu did not end within the deadline", direction_name(f->d), i);
    CHECK(uccl_engine_xfer_status(s->conn, f->ids[i]) == (status == UCCL_OK));
    if (status == UCCL_OK)
        check_same(direction_name(f->d), s->mine + i * BLOCK, s->theirs + i * BLOCK, BLOCK);
    return status < 0;
}

/* Returns how many blocks failed. */
static int check_crash(const side *s, const flight *f)
{
    int64_t end = now_ms() + LIMIT_MS;
    int failed = 0;
    for (size_t i = 0; i < BLOCKS; i++)
        failed += check_block(s, f, i, end);
    for (size_t i = BLOCKS; i < BLOCKS + 2; i++) {
        int64_t left = end - now_ms();
        CHECK_FAILS(uccl_engine_wait(s->conn, f->ids[i], left > 0 ? left : 0));
    }
    return failed;
}

/* On a connection that is lost, new transfers fail as well, whether at the call or later. */
static void check_lost(const side *s)
{
    uint64_t id;
    notify_msg_t m = {.name = "n"};
    int status = start(s, WRITE, 0, 0, PAGE, &id);
    CHECK_FAILS(status == UCCL_OK ? uccl_engine_wait(s->conn, id, LIMIT_MS) : status);
    CHECK_FAILS(uccl_engine_send_notif(s->conn, &m));
    CHECK_FAILS(uccl_engine_recv(s->conn, s->mr, s->mine, PAGE));
}

/* The engine itself is unharmed: it serves a new connection, here to itself. */
static void check_engine_lives(const side *s)
{
    address self = engine_address(s->engine);
    uccl_conn_t *out = join(s->engine, &self, true), *in = take_connection(s->engine);
    struct FifoItem item = region_item(s->engine, s->mr, s->mine + MIB, MIB);
    uint64_t id;
    fill(s->mine, MIB, 11);
    CHECK_OK(uccl_engine_write(out, s->mr, s->mine, MIB, item, &id));
    CHECK_OK(outcome(out, id));
    check_same("write", s->mine + MIB, s->mine, MIB);
    uccl_engine_conn_destroy(out);
    uccl_engine_conn_destroy(in);
}

static void check_close(side *s)
{
    int64_t begin = now_ms();
    side_close(s);
    CHECK_MSG(now_ms() - begin < LIMIT_MS, "closing took %lld ms", (long long)(now_ms() - begin));
}

static void wait_for_kill(side *s)
{
    (void)s;
    for (;;)
        sleep_ms(1000);
}

static void kill_child(const side *s)
{
    CHECK(kill(s->child, SIGKILL) == 0);
}

static void reap_child(const side *s)
{
    int status = 0;
    CHECK(waitpid(s->child, &status, 0) == s->child);
    CHECK_MSG(WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL, "the target ended by itself, wait status 0x%x", status);
}

static void end_child(const side *s)
{
    kill_child(s);
    reap_child(s);
}

static void start_pair(side *s, direction d, const char *silence)
{
    set_deadlines(silence);
    pair_start(s, REGION, wait_for_kill);
    fill(s->mine, s->len, 1 + d);
    fill(s->theirs, s->len, 3 + d);
}

/* Starts each block that has ended again until the connection fails: however fast they are, some are under way then. */
static void keep_up(const side *s, flight *f)
{
    int64_t end = now_ms() + LIMIT_MS;
    for (size_t i = 0;; i = (i + 1) % BLOCKS) {
        int status = uccl_engine_wait(s->conn, f->ids[i], 0);
        if (status == UCCL_OK)
            status = start(s, f->d, i * BLOCK, i * BLOCK, BLOCK, &f->ids[i]);
        if (status < 0)
            return;
        CHECK_MSG(now_ms() < end, "the connection to a dead peer does not fail");
    }
}

static void kill_during(direction d)
{
    side s;
    flight f;
    start_pair(&s, d, PATIENCE);
    take_off(&s, d, &f);
    await_first_bytes(&s, &f);
    kill_child(&s);
    keep_up(&s, &f);
    reap_child(&s);
    CHECK_MSG(check_crash(&s, &f) > 0, "no transfer was under way when the connection failed");
    check_lost(&s);
    check_engine_lives(&s);
    check_close(&s);
}

CASE(killed_during_write) { kill_during(WRITE); }
CASE(killed_during_read) { kill_during(READ); }

/* A pair whose peer is stopped with transfers under way. */
static void start_frozen(side *s, flight *f, direction d, const char *silence)
{
    start_pair(s, d, silence);
    take_off(s, d, f);
    await_first_bytes(s, f);
    CHECK(kill(s->child, SIGSTOP) == 0);
}

static void freeze_during(direction d)
{
    side s;
    flight f;
    start_frozen(&s, &f, d, DEADLINE);
    int failed = check_crash(&s, &f);
    /* What a process of the same host offers can be read while it is stopped. */
    CHECK_MSG(failed > 0 || d == READ, "the peer was stopped too late to prove anything");
    check_lost(&s);
    check_engine_lives(&s);
    check_close(&s);
    end_child(&s);
}

CASE(frozen_during_write) { freeze_during(WRITE); }
CASE(frozen_during_read) { freeze_during(READ); }

/* Everything at once may be closed with the peer just dead, before the library could notice. */
CASE(closed_right_after_the_kill)
{
    side s;
    flight f;
    start_pair(&s, WRITE, PATIENCE);
    take_off(&s, WRITE, &f);
    await_first_bytes(&s, &f);
    end_child(&s);
    check_close(&s);
}

/* An idle connection notices too, and a small transfer to a dead peer is never reported as done. */
CASE(killed_while_idle)
{
    side s;
    start_pair(&s, WRITE, PATIENCE);
    end_child(&s);
    check_lost(&s);
    check_close(&s);
}

/* Destruction with transfers towards a frozen peer returns within the deadline, too. */
CASE(closed_while_frozen)
{
    side s;
    flight f;
    start_frozen(&s, &f, WRITE, DEADLINE);
    check_close(&s);
    end_child(&s);
}

static void *destroy(void *engine)
{
    uccl_engine_destroy(engine);
    return NULL;
}

/* An engine that another thread is destroying uses its regions until the channels are closed: for a peer that does not hang up it waits
 * for a tenth of a second first. Whoever ends a registration meanwhile gets the memory back afterwards, not before. */
CASE(region_of_an_engine_that_ends)
{
    side s;
    flight f;
    pthread_t thread;
    size_t needed;
    start_frozen(&s, &f, WRITE, PATIENCE);
    int64_t begin = now_ms();
    CHECK(pthread_create(&thread, NULL, destroy, s.engine) == 0);
    while (uccl_engine_metadata_into(s.engine, NULL, 0, &needed) != UCCL_ERR_NOT_FOUND)
        CHECK_MSG(now_ms() - begin < LIMIT_MS, "the engine does not end");
    uccl_engine_mr_destroy(s.engine, s.mr);
    int64_t took = now_ms() - begin;
    CHECK_MSG(took >= 80, "the memory was given back after %lld ms, with transfers under way", (long long)took);
    CHECK_MSG(took < LIMIT_MS, "it took %lld ms", (long long)took);
    CHECK(pthread_join(thread, NULL) == 0);
    uccl_engine_conn_destroy(s.conn);
    end_child(&s);
}

/* A sender of notifications must not wait indefinitely for a peer that takes none. */
CASE(notifications_to_a_frozen_peer)
{
    side s;
    int status = UCCL_OK;
    uint8_t *message = map_shared(BLOCK);
    start_pair(&s, WRITE, DEADLINE);
    CHECK(kill(s.child, SIGSTOP) == 0);
    int64_t begin = now_ms();
    for (int i = 0; i < 16 && status == UCCL_OK; i++)
        status = uccl_engine_send_notif_bytes(s.conn, NULL, 0, message, BLOCK);
    CHECK_FAILS(status);
    CHECK_MSG(now_ms() - begin < LIMIT_MS, "it took %lld ms", (long long)(now_ms() - begin));
    check_lost(&s);
    check_close(&s);
    end_child(&s);
}
