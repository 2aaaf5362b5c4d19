/* Log lines that go to a function of the application. */
#include "support.h"

#include <pthread.h>
#include <stdatomic.h>
#include <unistd.h>

typedef struct lines {
    pthread_mutex_t mutex;
    int count, inside;
    int level;
    char last[4096];
    atomic_bool ended;
} lines;

#define LINES {.mutex = PTHREAD_MUTEX_INITIALIZER}

static void keep(int level, const char *text, void *user)
{
    lines *l = user;
    CHECK(!atomic_load(&l->ended));
    CHECK(level >= UCCL_LOG_ERROR && level <= UCCL_LOG_TRACE);
    CHECK(text && *text && !strchr(text, '\n'));
    pthread_mutex_lock(&l->mutex);
    l->count++;
    l->level = level;
    snprintf(l->last, sizeof l->last, "%s", text);
    pthread_mutex_unlock(&l->mutex);
}

/* Before anything is logged, whatever level the environment asks for. */
static void log_from(const char *level)
{
    CHECK(setenv("UCCL_P2P_LOG_LEVEL", level, 1) == 0);
}

/* A call that logs a line: the handle was never given out. */
static void log_a_line(void)
{
    static char here;
    uccl_engine_conn_destroy((uccl_conn_t *)&here);
}

/* Lines come from a thread of the library's: what was logged before reaches the callback before another one is set. */
static void settle(uccl_log_callback_t callback, lines *l)
{
    CHECK_OK(uccl_engine_set_log_callback(callback, l));
}

CASE(lines_come_to_the_callback)
{
    log_from("info");
    lines l = LINES;
    /* Before there is an engine. */
    CHECK_OK(uccl_engine_set_log_callback(keep, &l));
    uccl_engine_t *engine = engine_start();
    settle(keep, &l);
    CHECK_MSG(l.count > 0 && l.level == UCCL_LOG_INFO, "%d lines, the last of level %d: %s", l.count, l.level, l.last);
    int before = l.count;
    log_a_line();
    settle(keep, &l);
    CHECK_EQ(l.count, before + 1);
    CHECK_EQ(l.level, UCCL_LOG_ERROR);
    CHECK_MSG(strstr(l.last, "destroyed twice, or never created"), "%s", l.last);
    lines other = LINES;
    CHECK_OK(uccl_engine_set_log_callback(keep, &other));
    log_a_line();
    CHECK_OK(uccl_engine_set_log_callback(NULL, NULL));
    CHECK(l.count == before + 1 && other.count == 1);
    log_a_line();
    CHECK(l.count == before + 1 && other.count == 1);
    uccl_engine_destroy(engine);
}

/* Standard error holds what no callback takes, and nothing of what one takes. */
CASE(null_restores_standard_error)
{
    log_from("warn");
    int ends[2], saved = dup(2);
    lines l = LINES;
    CHECK(saved >= 0 && pipe(ends) == 0 && dup2(ends[1], 2) == 2);
    CHECK_OK(uccl_engine_set_log_callback(keep, &l));
    log_a_line();
    CHECK_OK(uccl_engine_set_log_callback(NULL, NULL));
    int taken = l.count;
    log_a_line();
    CHECK(dup2(saved, 2) == 2);
    char text[8192];
    ssize_t n = read(ends[0], text, sizeof text - 1);
    CHECK(n > 0);
    text[n] = 0;
    CHECK_EQ(taken, 1);
    char *first = strstr(text, "never created");
    CHECK_MSG(first && !strstr(first + 1, "never created"), "standard error: %s", text);
}

static void call_back(int level, const char *text, void *user)
{
    lines *l = user;
    (void)level;
    (void)text;
    CHECK_EQ(l->inside, 0); /* its own lines do not come back */
    l->inside = 1;
    CHECK_STATUS(uccl_engine_set_log_callback(NULL, NULL), UCCL_ERR_INVALID_ARGUMENT);
    log_a_line();
    CHECK(strcmp(uccl_engine_strerror(UCCL_OK), "success") == 0);
    l->inside = 0;
    l->count++;
}

CASE(a_callback_may_call_the_library)
{
    log_from("warn");
    lines l = LINES;
    CHECK_OK(uccl_engine_set_log_callback(call_back, &l));
    log_a_line();
    log_a_line();
    CHECK_OK(uccl_engine_set_log_callback(NULL, NULL));
    CHECK_EQ(l.count, 2);
}

/* Two engines whose connection logs lines: a peer's requests with a wrong token are refused with one. */
typedef struct noisy {
    side from, to;
    atomic_int lines, calls, inside;
    atomic_bool up;
} noisy;

static noisy noise;

static void refused_read(void)
{
    struct FifoItem forged = noise.from.item;
    uint64_t id;
    forged.padding[0] ^= 0x10;
    CHECK_OK(uccl_engine_read(noise.from.conn, noise.from.mr, noise.from.mine, 64, forged, &id));
    CHECK_STATUS(outcome(noise.from.conn, id), UCCL_ERR_REMOTE_ACCESS);
}

static void good_write(void)
{
    uint64_t id;
    CHECK_OK(start(&noise.from, WRITE, 0, 0, 4096, &id));
    CHECK_OK(outcome(noise.from.conn, id));
}

/* Calls what takes the lock of the connection, of the engine, and of both handles. */
static void use_the_engine(int level, const char *text, void *user)
{
    uccl_conn_stats_t stats = {.size = sizeof stats};
    (void)level, (void)text, (void)user;
    atomic_fetch_add(&noise.inside, 1);
    if (atomic_load(&noise.up)) {
        CHECK_OK(uccl_engine_conn_status(noise.to.conn));
        CHECK_OK(uccl_engine_conn_stats(noise.to.conn, &stats));
        notify_msg_t note = {.name = "from the callback"};
        CHECK(uccl_engine_send_notif(noise.to.conn, &note) >= 0);
        uint64_t id;
        CHECK_OK(start(&noise.to, WRITE, 0, 0, 64, &id));
        CHECK_OK(outcome(noise.to.conn, id));
        atomic_fetch_add(&noise.calls, 1);
    }
    atomic_fetch_sub(&noise.inside, 1);
    atomic_fetch_add(&noise.lines, 1);
}

CASE(a_callback_may_use_the_connection_that_logs)
{
    log_from("warn");
    local_pair(&noise.from, &noise.to, 64 * KIB);
    atomic_store(&noise.up, true);
    CHECK_OK(uccl_engine_set_log_callback(use_the_engine, NULL));
    /* What the callback itself causes to be logged does not come back to it: a refusal that it happens to answer goes elsewhere. */
    for (int64_t deadline = now_ms() + HANG_MS; atomic_load(&noise.calls) < 3; sleep_ms(1)) {
        refused_read();
        CHECK(now_ms() < deadline);
    }
    good_write();
    atomic_store(&noise.up, false);
    /* A call that found it up still uses the connection. */
    for (int64_t deadline = now_ms() + HANG_MS; atomic_load(&noise.inside) > 0; sleep_ms(1))
        CHECK(now_ms() < deadline);
    side_close(&noise.from);
    side_close(&noise.to);
    CHECK_OK(uccl_engine_set_log_callback(NULL, NULL));
}

static void count_causes(int level, const char *text, void *user)
{
    atomic_int *causes = user;
    if (level == UCCL_LOG_ERROR && strstr(text, "region 987654321 is not registered"))
        atomic_fetch_add(&causes[0], 1);
    if (level == UCCL_LOG_ERROR && strstr(text, "refused by the peer"))
        atomic_fetch_add(&causes[1], 1);
}

/* Functions that return nothing, or a bool, leave the cause in the log: once, however often a transfer is asked for. */
CASE(causes_that_no_status_tells)
{
    log_from("error");
    atomic_int causes[2] = {0};
    local_pair(&noise.from, &noise.to, 64 * KIB);
    CHECK_OK(uccl_engine_set_log_callback(count_causes, causes));
    uccl_engine_mr_destroy(noise.from.engine, 987654321);
    struct FifoItem forged = noise.from.item;
    uint64_t id;
    forged.padding[0] ^= 0x10;
    CHECK_OK(uccl_engine_read(noise.from.conn, noise.from.mr, noise.from.mine, 64, forged, &id));
    CHECK_STATUS(outcome(noise.from.conn, id), UCCL_ERR_REMOTE_ACCESS);
    for (int i = 0; i < 100; i++)
        CHECK(!uccl_engine_xfer_status(noise.from.conn, id));
    CHECK_OK(uccl_engine_set_log_callback(NULL, NULL));
    CHECK_MSG(causes[0] == 1 && causes[1] == 1, "%d lines of the region, %d of the transfer", causes[0], causes[1]);
    side_close(&noise.from);
    side_close(&noise.to);
}

static void sleep_long(int level, const char *text, void *user)
{
    (void)level, (void)text, (void)user;
    atomic_fetch_add(&noise.lines, 1);
    sleep_ms(2000);
}

/* Lines that a peer causes are handed to a callback that sleeps: neither the peer nor this process's own transfers wait for it. */
CASE(a_callback_that_sleeps_holds_nobody_up)
{
    log_from("warn");
    local_pair(&noise.from, &noise.to, 64 * KIB);
    CHECK_OK(uccl_engine_set_log_callback(sleep_long, NULL));
    int64_t began = now_ms();
    for (int i = 0; i < 20; i++) {
        refused_read();
        good_write();
    }
    int64_t took = now_ms() - began;
    CHECK_MSG(took < 1500, "%lld ms", (long long)took);
    for (int64_t deadline = now_ms() + HANG_MS; atomic_load(&noise.lines) == 0; sleep_ms(1))
        CHECK(now_ms() < deadline);
    /* The lines that wait are given up after a second, and the call that runs is waited for. */
    began = now_ms();
    CHECK_OK(uccl_engine_set_log_callback(NULL, NULL));
    took = now_ms() - began;
    CHECK_MSG(took < 8000, "%lld ms", (long long)took);
    int lines = atomic_load(&noise.lines);
    refused_read();
    sleep_ms(100);
    CHECK_EQ(atomic_load(&noise.lines), lines);
    side_close(&noise.from);
    side_close(&noise.to);
}

static atomic_int flood_lines;

static void count_slowly(int level, const char *text, void *user)
{
    (void)level, (void)user;
    if (atomic_fetch_add(&flood_lines, 1) == 0)
        sleep_ms(500);
    if (strstr(text, "the log callback is too slow"))
        atomic_store((atomic_bool *)user, true);
}

/* A callback that is too slow learns how many lines it has missed; they take no memory. */
CASE(a_flood_of_lines_is_bounded_and_counted)
{
    log_from("warn");
    atomic_bool reported = false;
    CHECK_OK(uccl_engine_set_log_callback(count_slowly, &reported));
    for (int i = 0; i < 20000; i++)
        log_a_line();
    for (int64_t deadline = now_ms() + HANG_MS; !atomic_load(&reported); sleep_ms(1))
        CHECK(now_ms() < deadline);
    CHECK_OK(uccl_engine_set_log_callback(NULL, NULL));
    CHECK_MSG(atomic_load(&flood_lines) < 10000, "%d lines were kept", atomic_load(&flood_lines));
}

static void nothing(int level, const char *text, void *user)
{
    (void)level, (void)text;
    atomic_fetch_add((atomic_int *)user, 1);
}

/* What an engine logged has been handed over when its destroy returns. */
CASE(destroy_hands_over_what_was_logged)
{
    log_from("info");
    atomic_int count = 0;
    CHECK_OK(uccl_engine_set_log_callback(nothing, &count));
    uccl_engine_t *engine = engine_start();
    log_a_line();
    uccl_engine_destroy(engine);
    CHECK(atomic_load(&count) >= 2);
    CHECK_OK(uccl_engine_set_log_callback(NULL, NULL));
}

static int lines_of(lines *l)
{
    pthread_mutex_lock(&l->mutex);
    int count = l->count;
    pthread_mutex_unlock(&l->mutex);
    return count;
}

static atomic_bool stop_logging;

static void *log_lines(void *unused)
{
    while (!atomic_load(&stop_logging))
        log_a_line();
    return unused;
}

/* Once a callback is replaced, it is no longer called, and its argument may be freed. */
CASE(a_replaced_callback_is_never_called)
{
    log_from("warn");
    pthread_t threads[4];
    lines *current = malloc(sizeof *current);
    CHECK(current);
    *current = (lines)LINES;
    CHECK_OK(uccl_engine_set_log_callback(keep, current));
    for (int i = 0; i < 4; i++)
        CHECK(pthread_create(&threads[i], NULL, log_lines, NULL) == 0);
    for (int i = 0; i < 300; i++) {
        lines *next = malloc(sizeof *next);
        CHECK(next);
        *next = (lines)LINES;
        sleep_ms(1);
        CHECK_OK(uccl_engine_set_log_callback(keep, next));
        atomic_store(&current->ended, true);
        memset(current->last, 0xEE, sizeof current->last);
        free(current);
        current = next;
    }
    /* The last one is called, if only later on a busy machine. */
    for (int64_t deadline = now_ms() + HANG_MS; lines_of(current) == 0;)
        CHECK(now_ms() < deadline);
    atomic_store(&stop_logging, true);
    for (int i = 0; i < 4; i++)
        CHECK(pthread_join(threads[i], NULL) == 0);
    CHECK_OK(uccl_engine_set_log_callback(NULL, NULL));
    free(current);
}

typedef struct echo {
    atomic_int calls, answered;
    atomic_bool stop;
} echo;

static void ask_for_another(int level, const char *text, void *user)
{
    echo *e = user;
    (void)level, (void)text;
    atomic_fetch_add(&e->calls, 1);
    /* Another line waits before this call ends, so that there is never none. */
    for (int calls = atomic_load(&e->calls); atomic_load(&e->answered) < calls && !atomic_load(&e->stop);)
        sleep_ms(1);
}

static void *answer_with_a_line(void *user)
{
    echo *e = user;
    while (!atomic_load(&e->stop))
        if (atomic_load(&e->answered) < atomic_load(&e->calls)) {
            log_a_line();
            atomic_fetch_add(&e->answered, 1);
        } else {
            sleep_ms(1);
        }
    return NULL;
}

/* A new callback waits for the lines logged before, not for those that other threads go on logging. */
CASE(a_new_callback_does_not_wait_for_later_lines)
{
    log_from("warn");
    echo e = {0};
    pthread_t thread;
    CHECK_OK(uccl_engine_set_log_callback(ask_for_another, &e));
    for (int i = 0; i < 3; i++)
        log_a_line();
    CHECK(pthread_create(&thread, NULL, answer_with_a_line, &e) == 0);
    /* Each call has one line logged, so that three or four wait at any time: the new callback gets the later ones. */
    for (int i = 0; i < 20; i++) {
        int before = atomic_load(&e.calls);
        CHECK_OK(uccl_engine_set_log_callback(ask_for_another, &e));
        int during = atomic_load(&e.calls) - before;
        CHECK_MSG(during < 100, "%d calls for the four lines that waited", during);
        log_a_line();
        log_a_line();
        log_a_line();
    }
    atomic_store(&e.stop, true);
    CHECK(pthread_join(thread, NULL) == 0);
    CHECK_OK(uccl_engine_set_log_callback(NULL, NULL));
}
