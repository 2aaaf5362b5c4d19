/* Log lines that go to a function of the application. */
#include "support.h"

#include <pthread.h>
#include <stdatomic.h>

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

/* A call that logs a line: the handle was never given out. */
static void log_a_line(void)
{
    static char here;
    uccl_engine_conn_destroy((uccl_conn_t *)&here);
}

CASE(lines_come_to_the_callback)
{
    CHECK(setenv("UCCL_P2P_LOG_LEVEL", "info", 1) == 0);
    lines l = LINES;
    /* Before there is an engine. */
    CHECK_OK(uccl_engine_set_log_callback(keep, &l));
    uccl_engine_t *engine = engine_start();
    CHECK_MSG(l.count > 0 && l.level == UCCL_LOG_INFO, "%d lines, the last of level %d: %s", l.count, l.level, l.last);
    int before = l.count;
    log_a_line();
    CHECK_EQ(l.count, before + 1);
    CHECK_EQ(l.level, UCCL_LOG_ERROR);
    CHECK_MSG(strstr(l.last, "destroyed twice, or never created"), "%s", l.last);
    lines other = LINES;
    CHECK_OK(uccl_engine_set_log_callback(keep, &other));
    log_a_line();
    CHECK(l.count == before + 1 && other.count == 1);
    CHECK_OK(uccl_engine_set_log_callback(NULL, NULL));
    log_a_line();
    CHECK(l.count == before + 1 && other.count == 1);
    uccl_engine_destroy(engine);
}

/* Standard error holds what no callback takes, and nothing of what one takes. */
CASE(null_restores_standard_error)
{
    CHECK(setenv("UCCL_P2P_LOG_LEVEL", "warn", 1) == 0);
    int ends[2], saved = dup(2);
    lines l = LINES;
    CHECK(saved >= 0 && pipe(ends) == 0 && dup2(ends[1], 2) == 2);
    CHECK_OK(uccl_engine_set_log_callback(keep, &l));
    log_a_line();
    int taken = l.count;
    CHECK_OK(uccl_engine_set_log_callback(NULL, NULL));
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
    lines l = LINES;
    CHECK_OK(uccl_engine_set_log_callback(call_back, &l));
    log_a_line();
    log_a_line();
    CHECK_EQ(l.count, 2);
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

/* Once a callback is replaced, it is not called any more, and its argument may be freed. */
CASE(a_replaced_callback_is_never_called)
{
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
