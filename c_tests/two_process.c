/* Transfers between two processes. The initiator sees the target's memory and checks it the moment a transfer is complete: a
 * write that is reported too early is caught. */
#include "support.h"

#include <limits.h>
#include <pthread.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/time.h>
#include <unistd.h>

/* Sizes around the limits that a transfer can cross: nothing special, a page, the eager limit, the chunk, and far beyond. */
static const struct shape {
    size_t here, there, len;
} SHAPES[] = {
    {0, 0, 1},
    {3, 5, 1},
    {0, 0, 4 * KIB},
    {1, 7, 4 * KIB - 1},
    {13, 2, 4 * KIB + 1},
    {0, 1, 8 * KIB},
    {1, 0, 8 * KIB + 1},
    {4095, 1, 512 * KIB - 1},
    {1, 4095, 512 * KIB + 1},
    {0, 0, MIB},
    {5, 9, MIB - 1},
    {0, 0, 64 * MIB},
    {1, 3, 64 * MIB + 3},
};
#define SHAPES_REGION (64 * MIB + 8 * KIB)

static uint8_t *source(const side *s, direction d)
{
    return d == WRITE ? s->mine : s->theirs;
}

static uint8_t *destination(const side *s, direction d)
{
    return d == WRITE ? s->theirs : s->mine;
}

static void prepare(const side *s, direction d)
{
    fill(source(s, d), s->len, 1 + d);
    wipe(destination(s, d), s->len);
}

/* Everything outside [at, at + len) is as wipe left it. */
static void check_guards(const uint8_t *region, size_t region_len, size_t at, size_t len)
{
    CHECK(is_wiped(region, at));
    CHECK(is_wiped(region + at + len, region_len - at - len));
}

static void check_shape(const side *s, direction d, const struct shape *shape)
{
    size_t from = d == WRITE ? shape->here : shape->there, to = d == WRITE ? shape->there : shape->here;
    uint64_t id;
    prepare(s, d);
    CHECK_OK(start(s, d, shape->here, shape->there, shape->len, &id));
    CHECK_OK(outcome(s->conn, id));
    check_same(direction_name(d), destination(s, d) + to, source(s, d) + from, shape->len);
    check_guards(destination(s, d), s->len, to, shape->len);
}

static void move_shapes(side *s, direction d)
{
    for (size_t i = 0; i < sizeof SHAPES / sizeof *SHAPES; i++)
        check_shape(s, d, &SHAPES[i]);
}

static void write_shapes(side *s) { move_shapes(s, WRITE); }
static void read_shapes(side *s) { move_shapes(s, READ); }

CASE(write_sizes) { run_pair(SHAPES_REGION, write_shapes, NULL); }
CASE(read_sizes) { run_pair(SHAPES_REGION, read_shapes, NULL); }

/* Scattered segments. */

typedef struct segments {
    int n;
    uccl_mr_t *mrs;
    void **local;
    size_t *sizes, *here, *there;
    struct FifoItem *items;
} segments;

static void *array(int n, size_t item)
{
    void *p = calloc((size_t)n + 1, item);
    CHECK(p);
    return p;
}

static void shuffle(int *order, int n, uint64_t *state)
{
    for (int i = 0; i < n; i++)
        order[i] = i;
    for (int i = n - 1; i > 0; i--) {
        int j = (int)(random_next(state) % (uint64_t)(i + 1)), t = order[i];
        order[i] = order[j];
        order[j] = t;
    }
}

/* Gives each segment a place in a region, in an order of its own and with gaps, so that no two places touch. */
static void scatter(size_t *places, const size_t *sizes, int n, size_t region, uint64_t *state)
{
    int *order = array(n, sizeof *order);
    shuffle(order, n, state);
    size_t at = 0;
    for (int i = 0; i < n; i++) {
        at += 1 + random_next(state) % 64;
        places[order[i]] = at;
        at += sizes[order[i]];
    }
    CHECK(at <= region);
    free(order);
}

typedef size_t size_rule(int i, uint64_t *state);

static size_t mixed_sizes(int i, uint64_t *state)
{
    (void)i;
    return random_next(state) % 70001;
}

static size_t extreme_sizes(int i, uint64_t *state)
{
    (void)state;
    return (size_t[]){70000, 0, 1}[i % 3];
}

static size_t small_sizes(int i, uint64_t *state)
{
    (void)i, (void)state;
    return 257;
}

static segments segments_make(const side *s, int n, size_rule *rule)
{
    uint64_t state = (uint64_t)n;
    segments v = {n, array(n, sizeof *v.mrs), array(n, sizeof *v.local), array(n, sizeof *v.sizes), array(n, sizeof *v.here),
                  array(n, sizeof *v.there), array(n, sizeof *v.items)};
    for (int i = 0; i < n; i++)
        v.sizes[i] = rule(i, &state);
    scatter(v.here, v.sizes, n, s->len, &state);
    scatter(v.there, v.sizes, n, s->len, &state);
    for (int i = 0; i < n; i++) {
        v.mrs[i] = s->mr;
        v.local[i] = s->mine + v.here[i];
        v.items[i] = their_item(s, v.there[i], v.sizes[i]);
    }
    return v;
}

static void segments_free(segments *v)
{
    free(v->mrs), free(v->local), free(v->sizes), free(v->here), free(v->there), free(v->items);
}

static int start_vector(const side *s, direction d, const segments *v, uint64_t *id)
{
    return d == WRITE ? uccl_engine_write_vector(s->conn, v->mrs, v->local, v->sizes, v->items, v->n, id)
                      : uccl_engine_read_vector(s->conn, v->mrs, v->local, v->sizes, v->items, v->n, id);
}

/* What the whole destination must look like: the segments, and nothing else. */
static uint8_t *expected_region(const side *s, direction d, const segments *v)
{
    uint8_t *want = malloc(s->len), *sent = copy_of(source(s, d), s->len);
    CHECK(want);
    wipe(want, s->len);
    for (int i = 0; i < v->n; i++) {
        size_t from = d == WRITE ? v->here[i] : v->there[i], to = d == WRITE ? v->there[i] : v->here[i];
        memcpy(want + to, sent + from, v->sizes[i]);
    }
    free(sent);
    return want;
}

static void move_vector(const side *s, direction d, int n, size_rule *rule)
{
    prepare(s, d);
    segments v = segments_make(s, n, rule);
    uint8_t *want = expected_region(s, d, &v);
    uint64_t id;
    CHECK_OK(start_vector(s, d, &v, &id));
    /* The arrays are copied by the call: what happens to them now must not matter. */
    memset(v.local, 0, (size_t)n * sizeof *v.local);
    memset(v.sizes, 0, (size_t)n * sizeof *v.sizes);
    memset(v.items, 0, (size_t)n * sizeof *v.items);
    CHECK_OK(outcome(s->conn, id));
    check_same(direction_name(d), destination(s, d), want, s->len);
    free(want);
    segments_free(&v);
}

static void few_segments(side *s)
{
    for (int d = 0; d < 2; d++) {
        move_vector(s, DIRECTIONS[d], 1, extreme_sizes);
        move_vector(s, DIRECTIONS[d], 3, extreme_sizes);
        move_vector(s, DIRECTIONS[d], 3, mixed_sizes);
    }
}

static void thousand_segments(side *s)
{
    for (int d = 0; d < 2; d++)
        move_vector(s, DIRECTIONS[d], 1000, mixed_sizes);
}

static void many_segments(side *s)
{
    for (int d = 0; d < 2; d++)
        move_vector(s, DIRECTIONS[d], 20000, small_sizes);
}

CASE(vector_few) { run_pair(MIB, few_segments, NULL); }
CASE(vector_thousand_mixed) { run_pair(48 * MIB, thousand_segments, NULL); }
CASE(vector_twenty_thousand) { run_pair(8 * MIB, many_segments, NULL); }

/* A copy of a value that ends with a page, and nothing behind it can be read. */
static void *at_the_edge(const void *value, size_t size)
{
    size_t page = (size_t)sysconf(_SC_PAGESIZE);
    uint8_t *pages = mmap(NULL, 2 * page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    CHECK(pages != MAP_FAILED && mprotect(pages + page, page, PROT_NONE) == 0);
    return memcpy(pages + page - size, value, size);
}

/* A count that no transfer may have is refused before anything behind the first segment is looked at. */
static void count_too_many(side *s)
{
    static const int COUNTS[] = {1048577, INT_MAX, -1, INT_MIN};
    void *mine = s->mine;
    size_t size = 64;
    uint64_t id = 77;
    CHECK_OK(start(s, WRITE, 0, 0, s->len, &id));
    CHECK_OK(outcome(s->conn, id));
    uccl_mr_t *mr = at_the_edge(&s->mr, sizeof s->mr);
    void **data = at_the_edge(&mine, sizeof mine);
    size_t *sizes = at_the_edge(&size, sizeof size);
    struct FifoItem *item = at_the_edge(&s->item, sizeof s->item);
    uccl_list_t *list = NULL;
    for (size_t i = 0; i < sizeof COUNTS / sizeof *COUNTS; i++) {
        id = 77;
        CHECK_STATUS(uccl_engine_write_vector(s->conn, mr, data, sizes, item, COUNTS[i], &id), UCCL_ERR_INVALID_ARGUMENT);
        CHECK_STATUS(uccl_engine_read_vector(s->conn, mr, data, sizes, item, COUNTS[i], &id), UCCL_ERR_INVALID_ARGUMENT);
        CHECK_STATUS(uccl_engine_send_vector(s->conn, mr, (const void *const *)data, sizes, COUNTS[i], &id), UCCL_ERR_INVALID_ARGUMENT);
        CHECK_STATUS(uccl_engine_list_create(mr, data, sizes, item, COUNTS[i], &list), UCCL_ERR_INVALID_ARGUMENT);
        CHECK(id == 77 && list == NULL);
    }
}

CASE(a_count_that_is_too_large) { run_pair(MIB, count_too_many, NULL); }

static void check_complete_at_once(const side *s, uint64_t id)
{
    uccl_xfer_info_t info = {.status = 99};
    CHECK(uccl_engine_xfer_status(s->conn, id));
    CHECK_OK(uccl_engine_poll(s->conn, id, &info));
    CHECK(info.status == UCCL_OK && info.bytes_total == 0 && info.bytes_done == 0);
}

static void nothing_to_move(side *s)
{
    for (int i = 0; i < 2; i++) {
        direction d = DIRECTIONS[i];
        segments none = {0}, empty = segments_make(s, 3, extreme_sizes);
        memset(empty.sizes, 0, 3 * sizeof *empty.sizes);
        uint64_t id = 0;
        prepare(s, d);
        CHECK_OK(start(s, d, 1, 1, 0, &id));
        check_complete_at_once(s, id);
        /* No segments are a mistake, as upstream; segments of no length are not. */
        uint64_t before = id;
        CHECK_STATUS(start_vector(s, d, &none, &id), -1);
        CHECK(id == before);
        CHECK_OK(start_vector(s, d, &empty, &id));
        CHECK_OK(outcome(s->conn, id));
        check_guards(destination(s, d), s->len, 0, 0);
        segments_free(&empty);
    }
}

CASE(nothing_to_move) { run_pair(MIB, nothing_to_move, NULL); }

/* Many at once. */

#define SMALL_TRANSFERS 2000
#define SLOT ((size_t)512)

/* Writes go through even slots and reads through odd ones. */
static direction slot_direction(int i)
{
    return i % 2 ? READ : WRITE;
}

static void many_small(side *s)
{
    static uint64_t ids[SMALL_TRANSFERS];
    for (int i = 0; i < SMALL_TRANSFERS; i++) {
        size_t at = (size_t)i * SLOT;
        fill(source(s, slot_direction(i)) + at, SLOT, (uint64_t)i + 1);
        wipe(destination(s, slot_direction(i)) + at, SLOT);
    }
    for (int i = 0; i < SMALL_TRANSFERS; i++)
        CHECK_OK(start(s, slot_direction(i), (size_t)i * SLOT, (size_t)i * SLOT, 1 + (size_t)i * 37 % (SLOT - 1), &ids[i]));
    for (int i = 0; i < SMALL_TRANSFERS; i++) {
        size_t at = (size_t)i * SLOT, len = 1 + (size_t)i * 37 % (SLOT - 1);
        direction d = slot_direction(i);
        CHECK_OK(outcome(s->conn, ids[i]));
        check_same(direction_name(d), destination(s, d) + at, source(s, d) + at, len);
        CHECK(is_wiped(destination(s, d) + at + len, SLOT - len));
    }
}

CASE(many_small_transfers) { run_pair(SMALL_TRANSFERS * SLOT, many_small, NULL); }

#define AREA (16 * MIB)
enum { WRITE_FROM, WRITE_TO, READ_FROM, READ_TO, SEND_FROM, RECV_TO, AREAS };

static uint64_t start_area(const side *s, direction d, size_t at)
{
    uint64_t id;
    int here = d == WRITE ? WRITE_FROM : READ_TO, there = d == WRITE ? WRITE_TO : READ_FROM;
    CHECK_OK(start(s, d, (size_t)here * AREA + at, (size_t)there * AREA + at, AREA / 4, &id));
    return id;
}

/* Run by both sides at once: each writes, reads, sends and receives. */
static void all_directions(side *s)
{
    fill(s->mine, AREAS * AREA, s->child ? 1 : 2);
    wipe(s->mine + WRITE_TO * AREA, AREA);
    wipe(s->mine + READ_TO * AREA, AREA);
    wipe(s->mine + RECV_TO * AREA, AREA);
    meet(s);
    uint64_t ids[10];
    int n = 0;
    CHECK_OK(uccl_engine_recv_async(s->conn, s->mr, s->mine + RECV_TO * AREA, AREA, &ids[n++]));
    for (size_t at = 0; at < AREA; at += AREA / 4) {
        ids[n++] = start_area(s, WRITE, at);
        ids[n++] = start_area(s, READ, at);
    }
    CHECK_OK(uccl_engine_send(s->conn, s->mr, s->mine + SEND_FROM * AREA, AREA, &ids[n++]));
    for (int i = 0; i < n; i++)
        CHECK_OK(outcome(s->conn, ids[i]));
    check_same("write", s->theirs + WRITE_TO * AREA, s->mine + WRITE_FROM * AREA, AREA);
    check_same("read", s->mine + READ_TO * AREA, s->theirs + READ_FROM * AREA, AREA);
    check_same("receive", s->mine + RECV_TO * AREA, s->theirs + SEND_FROM * AREA, AREA);
    meet(s);
}

CASE(both_directions_at_once) { run_pair(AREAS * AREA, all_directions, all_directions); }

/* What poll and xfer_status say. */

static void check_ended_well(const side *s, uint64_t id, size_t len)
{
    uccl_xfer_info_t info = {.status = 99, .reserved = 99};
    CHECK(uccl_engine_xfer_status(s->conn, id));
    CHECK_OK(uccl_engine_poll(s->conn, id, &info));
    CHECK_OK(uccl_engine_wait(s->conn, id, 0));
    CHECK_EQ(info.status, UCCL_OK);
    CHECK_EQ(info.reserved, 0);
    CHECK_EQ(info.bytes_total, len);
    CHECK_EQ(info.bytes_done, len);
}

static void watch_progress(const side *s, uint64_t id, size_t len)
{
    uint64_t done = 0;
    int64_t end = now_ms() + HANG_MS;
    for (;;) {
        uccl_xfer_info_t info;
        int status = uccl_engine_poll(s->conn, id, &info);
        CHECK(status == UCCL_OK || status == UCCL_IN_PROGRESS);
        CHECK_EQ(info.status, status);
        CHECK_EQ(info.bytes_total, len);
        CHECK(info.bytes_done >= done && info.bytes_done <= len);
        done = info.bytes_done;
        if (status == UCCL_OK)
            return;
        CHECK(now_ms() < end);
    }
}

static void poll_tells_progress(side *s)
{
    for (int d = 0; d < 2; d++) {
        uint64_t id;
        CHECK_OK(start(s, DIRECTIONS[d], 0, 0, s->len, &id));
        watch_progress(s, id, s->len);
        check_ended_well(s, id, s->len);
    }
}

CASE(poll_tells_progress) { run_pair(64 * MIB, poll_tells_progress, NULL); }

static void poll_until_true(const side *s, uint64_t id)
{
    int64_t end = now_ms() + HANG_MS;
    while (!uccl_engine_xfer_status(s->conn, id))
        CHECK_MSG(now_ms() < end, "hangs: %s", uccl_engine_last_error());
}

static void done_stays_done(side *s)
{
    uint64_t first, id;
    CHECK_OK(start(s, WRITE, 0, 0, MIB, &first));
    poll_until_true(s, first);
    for (int i = 0; i < 1000; i++)
        CHECK(uccl_engine_xfer_status(s->conn, first));
    for (int i = 0; i < 3000; i++) {
        CHECK_OK(start(s, READ, 0, 0, 64, &id));
        CHECK(id != first);
        poll_until_true(s, id);
    }
    check_ended_well(s, first, MIB);
}

CASE(done_stays_done) { run_pair(MIB, done_stays_done, NULL); }

/* Two-sided messages. */

#define MESSAGES 60
#define LONGEST ((size_t)70000)

static size_t message_len(int i)
{
    return (size_t)i * 1237 % LONGEST;
}

/* Splits a message into the parts of a vector, the first of them empty. */
static int send_in_parts(const side *s, uint8_t *p, size_t len, uint64_t *id)
{
    size_t cut = len / 3;
    const void *parts[] = {p, p, p + cut};
    return uccl_engine_send_vector(s->conn, (uccl_mr_t[]){s->mr, s->mr, s->mr}, parts, (size_t[]){0, cut, len - cut}, 3, id);
}

static int send_some_way(const side *s, int i, uint8_t *p, size_t len, uint64_t *id)
{
    switch (i % 3) {
    case 0: return uccl_engine_send(s->conn, s->mr, p, len, id);
    case 1: return uccl_engine_send_async(s->conn, s->mr, p, len, id);
    default: return send_in_parts(s, p, len, id);
    }
}

static void send_messages(side *s)
{
    uint64_t ids[MESSAGES];
    fill(s->mine, s->len, 5);
    meet(s);
    for (int i = 0; i < MESSAGES; i++)
        CHECK_OK(send_some_way(s, i, s->mine + (size_t)i * LONGEST, message_len(i), &ids[i]));
    for (int i = 0; i < MESSAGES; i++) {
        CHECK_OK(outcome(s->conn, ids[i]));
        check_ended_well(s, ids[i], message_len(i));
    }
    meet(s);
}

static void check_message(const side *s, int i)
{
    size_t at = (size_t)i * LONGEST, len = message_len(i);
    check_same("message", s->mine + at, s->theirs + at, len);
    CHECK(is_wiped(s->mine + at + len, LONGEST - len));
}

static void receive_messages(side *s)
{
    uint64_t ids[MESSAGES];
    wipe(s->mine, s->len);
    meet(s);
    for (int i = 0; i < MESSAGES; i++)
        CHECK_OK(uccl_engine_recv_async(s->conn, s->mr, s->mine + (size_t)i * LONGEST, LONGEST, &ids[i]));
    for (int i = 0; i < MESSAGES; i++) {
        CHECK_OK(outcome(s->conn, ids[i]));
        check_ended_well(s, ids[i], message_len(i));
        check_message(s, i);
    }
    meet(s);
}

static void receive_messages_blocking(side *s)
{
    wipe(s->mine, s->len);
    meet(s);
    for (int i = 0; i < MESSAGES; i++) {
        CHECK_OK(uccl_engine_recv(s->conn, s->mr, s->mine + (size_t)i * LONGEST, LONGEST));
        check_message(s, i);
    }
    meet(s);
}

CASE(messages_in_order) { run_pair(MESSAGES * LONGEST, send_messages, receive_messages); }
CASE(messages_blocking_receive) { run_pair(MESSAGES * LONGEST, send_messages, receive_messages_blocking); }

static void send_one(const side *s, size_t len, int want)
{
    uint64_t id;
    CHECK_OK(uccl_engine_send(s->conn, s->mr, s->mine, len, &id));
    CHECK_STATUS(outcome(s->conn, id), want);
}

static void send_large_early(side *s)
{
    uint64_t id;
    fill(s->mine, s->len, 6);
    CHECK_OK(uccl_engine_send_async(s->conn, s->mr, s->mine, s->len, &id));
    CHECK_STATUS(uccl_engine_wait(s->conn, id, 200), UCCL_IN_PROGRESS);
    meet(s);
    CHECK_OK(outcome(s->conn, id));
    check_ended_well(s, id, s->len);
    CHECK_OK(uccl_engine_send_vector(s->conn, NULL, NULL, NULL, 0, &id));
    CHECK_OK(outcome(s->conn, id));
}

static void receive_late(side *s)
{
    uint64_t id;
    meet(s);
    CHECK_OK(uccl_engine_recv_async(s->conn, s->mr, s->mine, s->len, &id));
    CHECK_OK(outcome(s->conn, id));
    check_same("message", s->mine, s->theirs, s->len);
    wipe(s->mine, s->len);
    CHECK_OK(uccl_engine_recv_async(s->conn, s->mr, s->mine, s->len, &id));
    CHECK_OK(outcome(s->conn, id));
    check_ended_well(s, id, 0);
    CHECK(is_wiped(s->mine, s->len));
}

CASE(late_receive_and_empty_message) { run_pair(64 * MIB, send_large_early, receive_late); }

/* Once small enough to travel with the control message, once too large for that. */
static const size_t TOO_LONG[] = {5000, 3 * MIB};
#define ROOM ((size_t)1000)

static void send_too_long(side *s)
{
    fill(s->mine, s->len, 7);
    for (int i = 0; i < 2; i++) {
        send_one(s, TOO_LONG[i], UCCL_ERR_TRUNCATED);
        send_one(s, TOO_LONG[i], UCCL_ERR_TRUNCATED);
        send_one(s, ROOM, UCCL_OK);
    }
    uint64_t id;
    CHECK_OK(start(s, WRITE, 0, MIB, MIB, &id));
    CHECK_OK(outcome(s->conn, id));
}

static void receive_too_short(side *s)
{
    for (int i = 0; i < 2; i++) {
        uint64_t id;
        wipe(s->mine, s->len);
        CHECK_OK(uccl_engine_recv_async(s->conn, s->mr, s->mine, ROOM, &id));
        CHECK_STATUS(outcome(s->conn, id), UCCL_ERR_TRUNCATED);
        CHECK(!uccl_engine_xfer_status(s->conn, id));
        CHECK_STATUS(uccl_engine_recv(s->conn, s->mr, s->mine, ROOM), UCCL_ERR_TRUNCATED);
        CHECK(is_wiped(s->mine + ROOM, s->len - ROOM));
        CHECK_OK(uccl_engine_recv(s->conn, s->mr, s->mine, ROOM));
        check_same("message", s->mine, s->theirs, ROOM);
    }
}

CASE(truncated_message) { run_pair(4 * MIB, send_too_long, receive_too_short); }

/* A message that finds no partner times out. */

static void check_times_out(const side *s, int started, uint64_t id)
{
    CHECK_OK(started);
    CHECK_STATUS(outcome(s->conn, id), UCCL_ERR_TIMED_OUT);
    CHECK(!uccl_engine_xfer_status(s->conn, id));
}

static void send_in_vain(side *s)
{
    uint64_t id = 0;
    fill(s->mine, s->len, 20);
    int started = uccl_engine_send(s->conn, s->mr, s->mine, s->len, &id);
    check_times_out(s, started, id);
    fill(s->mine, s->len, 21); /* ended, so the memory may change */
    meet(s);
    meet(s);
}

/* The send is over: its message is neither delivered nor waited for. */
static void receive_too_late(side *s)
{
    wipe(s->mine, s->len);
    meet(s);
    CHECK_FAILS(uccl_engine_recv(s->conn, s->mr, s->mine, s->len));
    meet(s);
}

static void send_after_a_meeting(side *s)
{
    fill(s->mine, s->len, 22);
    meet(s);
    send_one(s, s->len, UCCL_OK);
}

/* What follows is matched as if the receive had never been. */
static void receive_in_vain(side *s)
{
    uint64_t id = 0;
    int started = uccl_engine_recv_async(s->conn, s->mr, s->mine, s->len, &id);
    check_times_out(s, started, id);
    meet(s);
    CHECK_OK(uccl_engine_recv(s->conn, s->mr, s->mine, s->len));
    check_same("message", s->mine, s->theirs, s->len);
}

static void match_in_vain(role *initiator, role *target)
{
    CHECK(setenv("UCCL_TCPX_MATCH_TIMEOUT_MS", "500", 1) == 0);
    run_pair(4 * MIB, initiator, target);
}

CASE(unmatched_send) { match_in_vain(send_in_vain, receive_too_late); }
CASE(unmatched_receive) { match_in_vain(send_after_a_meeting, receive_in_vain); }

/* Threads that share a connection, each with an area of its own. */

#define THREADS 4
#define THREAD_ROUNDS 200
#define THREAD_AREA (256 * KIB)

typedef struct worker {
    const side *s;
    int number;
} worker;

static void *work(void *argument)
{
    const worker *w = argument;
    const side *s = w->s;
    size_t area = (size_t)w->number * THREAD_AREA, back = area + THREADS * THREAD_AREA;
    uint64_t state = (uint64_t)w->number, id;
    for (int i = 0; i < THREAD_ROUNDS; i++) {
        size_t at = random_next(&state) % KIB, len = 1 + random_next(&state) % (THREAD_AREA - KIB);
        fill(s->mine + area + at, len, random_next(&state) >> 40);
        CHECK_OK(start(s, WRITE, area + at, area + at, len, &id));
        poll_until_true(s, id);
        CHECK_OK(start(s, READ, back + at, area + at, len, &id));
        CHECK_OK(outcome(s->conn, id));
        check_same("written and read back", s->mine + back + at, s->mine + area + at, len);
    }
    return NULL;
}

static void share_connection(side *s)
{
    pthread_t threads[THREADS];
    worker workers[THREADS];
    for (int i = 0; i < THREADS; i++) {
        workers[i] = (worker){s, i};
        CHECK(pthread_create(&threads[i], NULL, work, &workers[i]) == 0);
    }
    for (int i = 0; i < THREADS; i++)
        CHECK(pthread_join(threads[i], NULL) == 0);
}

CASE(threads_share_a_connection) { run_pair(2 * THREADS * THREAD_AREA, share_connection, NULL); }

/* An application with a timer: signals arrive all the time, in any thread, and interrupt system calls. */

static volatile sig_atomic_t interruptions;

static void interrupt(int number)
{
    (void)number;
    interruptions++;
}

static void start_timer(void)
{
    struct sigaction action = {.sa_handler = interrupt}; /* without SA_RESTART */
    struct itimerval every_ms = {{0, 1000}, {0, 1000}};
    CHECK(sigaction(SIGALRM, &action, NULL) == 0);
    CHECK(setitimer(ITIMER_REAL, &every_ms, NULL) == 0);
}

static void stop_timer(void)
{
    struct itimerval never = {{0, 0}, {0, 0}};
    CHECK(setitimer(ITIMER_REAL, &never, NULL) == 0);
    CHECK(interruptions > 0);
}

static void send_among_signals(side *s)
{
    start_timer();
    for (int d = 0; d < 2; d++) {
        check_shape(s, DIRECTIONS[d], &(struct shape){1, 2, s->len - 2});
        move_vector(s, DIRECTIONS[d], 300, mixed_sizes);
    }
    sleep_ms(100); /* the receiver is to be found waiting */
    send_one(s, s->len, UCCL_OK);
    stop_timer();
}

static void receive_among_signals(side *s)
{
    start_timer();
    CHECK_OK(uccl_engine_recv(s->conn, s->mr, s->mine, s->len));
    check_same("message", s->mine, s->theirs, s->len);
    stop_timer();
}

CASE(signals_interrupt_nothing) { run_pair(16 * MIB, send_among_signals, receive_among_signals); }
