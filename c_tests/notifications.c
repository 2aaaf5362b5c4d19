/* Notifications: whole, in order, never before the data that was complete before them, and handed out once. */
#include "support.h"

#include <sys/resource.h>
#include <unistd.h>

#define NOTIF_LIMIT (64 * MIB)

typedef struct text {
    const void *bytes;
    size_t len;
} text;

static text notif_name(const uccl_notif_t *notif)
{
    text t = {.len = 99};
    t.bytes = uccl_engine_notif_name(notif, &t.len);
    CHECK(t.bytes || t.len == 0);
    return t;
}

static text notif_msg(const uccl_notif_t *notif)
{
    text t = {.len = 99};
    t.bytes = uccl_engine_notif_msg(notif, &t.len);
    CHECK(t.bytes || t.len == 0);
    return t;
}

static void check_text(const char *what, text got, const void *want, size_t len)
{
    CHECK_MSG(got.len == len, "%s has %zu bytes, expected %zu", what, got.len, len);
    if (len)
        check_same(what, got.bytes, want, len);
}

static void expect_notif(uccl_engine_t *engine, const void *name, size_t name_len, const void *msg, size_t msg_len)
{
    uccl_notif_t *notif = next_notif(engine);
    check_text("name", notif_name(notif), name, name_len);
    check_text("message", notif_msg(notif), msg, msg_len);
    uccl_engine_notif_free(notif);
}

static void expect_silence(uccl_engine_t *engine)
{
    uccl_notif_t *notif = (uccl_notif_t *)1;
    CHECK_OK(uccl_engine_notif_next(engine, &notif));
    CHECK(notif == NULL);
}

/* A numbered notification of the fixed form; its message is binary. */
static notify_msg_t numbered(int i)
{
    notify_msg_t m;
    memset(&m, 0, sizeof m);
    snprintf(m.name, sizeof m.name, "sender %d", i);
    fill((uint8_t *)m.msg, sizeof m.msg, (uint64_t)i);
    m.msg[i % MSG_SIZE] = 0;
    return m;
}

static void send_numbered(uccl_conn_t *conn, int i)
{
    notify_msg_t m = numbered(i);
    CHECK_OK(uccl_engine_send_notif(conn, &m));
    memset(&m, 0xEE, sizeof m); /* copied by the call */
}

static void expect_numbered(uccl_engine_t *engine, int i)
{
    notify_msg_t m = numbered(i);
    expect_notif(engine, m.name, strlen(m.name), m.msg, sizeof m.msg);
}

#define FIXED 500

static void send_fixed(side *s)
{
    for (int i = 0; i < FIXED; i++)
        send_numbered(s->conn, i);
    notify_msg_t full;
    memset(&full, 'x', sizeof full); /* a name without a NUL */
    CHECK_OK(uccl_engine_send_notif(s->conn, &full));
}

static void receive_fixed(side *s)
{
    char full[MSG_SIZE];
    memset(full, 'x', sizeof full);
    for (int i = 0; i < FIXED; i++)
        expect_numbered(s->engine, i);
    uccl_notif_t *last = next_notif(s->engine);
    CHECK(notif_name(last).len >= MSG_SIZE - 1);
    check_text("message", notif_msg(last), full, sizeof full);
    uccl_engine_notif_free(last);
    expect_silence(s->engine);
    expect_silence(NULL);
}

CASE(fixed_size) { run_pair(PAGE, send_fixed, receive_fixed); }

/* Lengths of name and message; each pair is sent, and must arrive, in this order. */
static const struct lengths {
    size_t name, msg;
} LENGTHS[] = {
    {0, 0},      {0, 1},     {1, 0},     {5, 255},           {255, 256},  {256, 257},
    {300, 4096}, {7, 65535}, {0, 65536}, {1, 512 * KIB + 1}, {70000, 3}, {9, 2 * MIB},
};
#define LENGTHS_N (sizeof LENGTHS / sizeof *LENGTHS)

static uint8_t *letter(uint64_t seed, size_t len)
{
    uint8_t *p = malloc(len + 1);
    CHECK(p);
    fill(p, len, seed);
    if (len > 2)
        p[0] = p[len / 2] = p[len - 1] = 0;
    return p;
}

static void send_variable(side *s)
{
    for (size_t i = 0; i < LENGTHS_N; i++) {
        const struct lengths n = LENGTHS[i];
        uint8_t *name = letter(2 * i, n.name), *msg = letter(2 * i + 1, n.msg);
        CHECK_OK(uccl_engine_send_notif_bytes(s->conn, n.name ? name : NULL, n.name, n.msg ? msg : NULL, n.msg));
        free(name);
        free(msg);
        send_numbered(s->conn, (int)i);
    }
}

static void receive_variable(side *s)
{
    for (size_t i = 0; i < LENGTHS_N; i++) {
        uint8_t *name = letter(2 * i, LENGTHS[i].name), *msg = letter(2 * i + 1, LENGTHS[i].msg);
        expect_notif(s->engine, name, LENGTHS[i].name, msg, LENGTHS[i].msg);
        free(name);
        free(msg);
        expect_numbered(s->engine, (int)i);
    }
}

CASE(variable_size) { run_pair(PAGE, send_variable, receive_variable); }

/* The limit counts name and message together. */
static void send_largest(side *s)
{
    uint8_t *p = letter(1, NOTIF_LIMIT + 1);
    CHECK_STATUS(uccl_engine_send_notif_bytes(s->conn, NULL, 0, p, NOTIF_LIMIT + 1), UCCL_ERR_INVALID_ARGUMENT);
    CHECK_STATUS(uccl_engine_send_notif_bytes(s->conn, p, 10, p, NOTIF_LIMIT - 9), UCCL_ERR_INVALID_ARGUMENT);
    CHECK_STATUS(uccl_engine_send_notif_bytes(s->conn, p, SIZE_MAX / 4, p, 1), UCCL_ERR_INVALID_ARGUMENT);
    CHECK_OK(uccl_engine_send_notif_bytes(s->conn, p, 10, p + 10, NOTIF_LIMIT - 10));
    free(p);
    send_numbered(s->conn, 1);
}

static void receive_largest(side *s)
{
    uint8_t *p = letter(1, NOTIF_LIMIT + 1);
    expect_notif(s->engine, p, 10, p + 10, NOTIF_LIMIT - 10);
    expect_numbered(s->engine, 1);
    free(p);
}

CASE(largest) { run_pair(PAGE, send_largest, receive_largest); }

/* A notification sent after a write was complete must find the data in place. A block per round, so that the rounds need not wait
 * for each other and the next write is under way while a notification travels. */
#define ROUNDS 200
#define BLOCK (96 * KIB)

static void write_then_notify(side *s)
{
    fill(s->mine, s->len, 8);
    meet(s);
    for (int i = 0; i < ROUNDS; i++) {
        uint64_t id;
        size_t len = i % 2 ? BLOCK : 64; /* both the long way and inside the control message */
        CHECK_OK(start(s, WRITE, (size_t)i * BLOCK, (size_t)i * BLOCK, len, &id));
        while (!uccl_engine_xfer_status(s->conn, id))
            CHECK(uccl_engine_poll(s->conn, id, NULL) >= 0);
        send_numbered(s->conn, i);
    }
}

static void check_data_at_notif(side *s)
{
    wipe(s->mine, s->len);
    meet(s);
    for (int i = 0; i < ROUNDS; i++) {
        size_t at = (size_t)i * BLOCK, len = i % 2 ? BLOCK : 64;
        expect_numbered(s->engine, i);
        check_same("data of a write before its notification", s->mine + at, s->theirs + at, len);
        CHECK(is_wiped(s->mine + at + len, BLOCK - len));
    }
}

CASE(after_writes) { run_pair(ROUNDS * BLOCK, write_then_notify, check_data_at_notif); }

/* Little memory. Sanitizers take the address space for themselves, and end the process where there is no more; and what a plugin that is
   no part of the library used and gave back while it connected is room for anything. */
static bool limited(void)
{
#if defined(__SANITIZE_ADDRESS__)
    return false;
#else
    return !getenv("UCCL_TCPX_PLUGIN_PATH");
#endif
}
/* With its name as large as a notification may be; and larger than what malloc keeps of address space for threads that have ended. */
#define LARGE (64 * MIB - 1)

/* From now on, or no longer, this process gets so much more memory only. */
static void limit_memory(rlim_t more)
{
    unsigned long pages = 0;
    struct rlimit limit;
    FILE *file = fopen("/proc/self/statm", "r");
    CHECK(file && fscanf(file, "%lu", &pages) == 1 && fclose(file) == 0);
    CHECK(getrlimit(RLIMIT_AS, &limit) == 0);
    limit.rlim_cur = more == RLIM_INFINITY ? limit.rlim_max : (rlim_t)pages * (rlim_t)sysconf(_SC_PAGESIZE) + more;
    CHECK(setrlimit(RLIMIT_AS, &limit) == 0);
}

static void send_too_large(side *s)
{
    char *message = calloc(1, LARGE);
    CHECK(message);
    if (limited()) {
        limit_memory(24 * MIB);
        CHECK_STATUS(uccl_engine_send_notif_bytes(s->conn, "n", 1, message, LARGE), UCCL_ERR_RESOURCE);
        limit_memory(RLIM_INFINITY);
    }
    send_numbered(s->conn, 7);
    meet(s);
    meet(s);
    /* It may have noticed the end already. */
    uccl_engine_send_notif_bytes(s->conn, "n", 1, message, LARGE);
    free(message);
    meet(s);
}

static void have_no_room(side *s)
{
    meet(s);
    expect_numbered(s->engine, 7);
    if (limited())
        limit_memory(24 * MIB);
    meet(s);
    if (limited()) {
        for (int64_t end = now_ms() + HANG_MS; uccl_engine_conn_status(s->conn) == UCCL_OK; sleep_ms(1))
            CHECK(now_ms() < end);
        CHECK_STATUS(uccl_engine_conn_status(s->conn), UCCL_ERR_RESOURCE);
        limit_memory(RLIM_INFINITY);
    }
    meet(s);
}

/* Without memory for a notification the call fails, or the connection that brings it; never the process. */
CASE(no_memory_for_a_large_one) { run_pair(PAGE, send_too_large, have_no_room); }

/* Fixed-size draining. */

static size_t drain(notify_msg_t *out, size_t max)
{
    size_t n = 99;
    CHECK_OK(uccl_engine_get_notifs(out, max, &n));
    CHECK(n <= max);
    return n;
}

/* Waits until n came, however many each call gives. */
static void drain_exactly(notify_msg_t *out, size_t n, size_t at_once)
{
    int64_t end = now_ms() + HANG_MS;
    for (size_t have = 0; have < n;) {
        size_t room = n - have < at_once ? n - have : at_once;
        have += drain(out + have, room);
        CHECK_MSG(now_ms() < end, "%zu of %zu notifications came", have, n);
    }
}

static void send_ten(side *s)
{
    for (int i = 0; i < 10; i++)
        send_numbered(s->conn, i);
    meet(s);
}

static void drain_ten_by_three(side *s)
{
    notify_msg_t out[11];
    memset(out, GUARD, sizeof out);
    CHECK_EQ(drain(NULL, 0), 0);
    drain_exactly(out, 10, 3);
    for (int i = 0; i < 10; i++) {
        notify_msg_t want = numbered(i);
        CHECK(memcmp(&out[i], &want, sizeof want) == 0);
    }
    CHECK(is_wiped((uint8_t *)&out[10], sizeof out[10]));
    CHECK_EQ(drain(out, 10), 0);
    meet(s);
}

CASE(fewer_than_wait) { run_pair(PAGE, send_ten, drain_ten_by_three); }

static void send_long(side *s)
{
    uint8_t *p = letter(3, 1000);
    memset(p, 'n', 400);
    CHECK_OK(uccl_engine_send_notif_bytes(s->conn, p, 300, p + 400, 600));
    CHECK_OK(uccl_engine_send_notif_bytes(s->conn, "ab", 2, "c", 1));
    free(p);
}

static void receive_cut(side *s)
{
    notify_msg_t out[2];
    uint8_t *p = letter(3, 1000);
    memset(p, 'n', 400);
    (void)s;
    drain_exactly(out, 2, 2);
    CHECK(memcmp(out[0].name, p, MSG_SIZE - 1) == 0 && out[0].name[MSG_SIZE - 1] == 0);
    CHECK(memcmp(out[0].msg, p + 400, MSG_SIZE) == 0);
    notify_msg_t want = {.name = "ab", .msg = "c"};
    CHECK(memcmp(&out[1], &want, sizeof want) == 0);
    free(p);
}

CASE(long_ones_are_cut_in_fixed_form) { run_pair(PAGE, send_long, receive_cut); }

/* One sender, two receiving engines in this process. */
CASE(per_engine_and_process_wide)
{
    side a, b;
    local_pair(&a, &b, PAGE);
    uccl_engine_t *other = engine_start();
    address where = engine_address(other);
    uccl_conn_t *to_other = join(a.engine, &where, true), *from_a = take_connection(other);
    for (int i = 0; i < 3; i++) {
        send_numbered(to_other, 10 + i);
        send_numbered(a.conn, i);
    }
    for (int i = 0; i < 3; i++)
        expect_numbered(b.engine, i);
    expect_silence(b.engine);
    expect_silence(a.engine);
    expect_numbered(other, 10);
    notify_msg_t out[2];
    drain_exactly(out, 2, 1);
    for (int i = 0; i < 2; i++) {
        notify_msg_t want = numbered(11 + i);
        CHECK(memcmp(&out[i], &want, sizeof want) == 0);
    }
    expect_silence(other);
    send_numbered(b.conn, 20); /* the accepting end sends too */
    expect_numbered(NULL, 20);
    expect_silence(NULL);
    uccl_engine_conn_destroy(to_other);
    uccl_engine_conn_destroy(from_a);
    uccl_engine_destroy(other);
    side_close(&a);
    side_close(&b);
}
