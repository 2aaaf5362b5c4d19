/* Every function of the header, called wrongly: NULL, stale and invented handles, arguments out of range. Each call must fail with
 * a status and a text, leave its outputs alone, and leave the engine usable.
 *
 * A case named like a function tests that function; check_coverage.cmake fails when the header has a function without a case. */
#include "support.h"

#include <limits.h>
#include <pthread.h>

#define LEN (64 * KIB)
#define UNTOUCHED 0x5A5A5A5A5A5A5A5Au
#define MAX_IOVS 1048576

/* An engine connected to itself, with a region, and handles that are no good. */
typedef struct fixture {
    uccl_engine_t *engine;
    uccl_conn_t *conn, *accepted;
    uint8_t *mem;
    uccl_mr_t mr, ended_mr;
    struct FifoItem item;
    uccl_engine_t *bad_engines[4];
    uccl_conn_t *bad_conns[4];
} fixture;

#define FOR_EACH(item, list) \
    for (size_t item##_i = 0; item##_i < sizeof(list) / sizeof *(list) && (item = (list)[item##_i], true); item##_i++)

static uccl_engine_t *ended_engine(void)
{
    uccl_engine_t *engine = engine_start();
    uccl_engine_destroy(engine);
    return engine;
}

static uccl_conn_t *ended_conn(const fixture *f)
{
    address self = engine_address(f->engine);
    uccl_conn_t *out = join(f->engine, &self, true), *in = take_connection(f->engine);
    uccl_engine_conn_destroy(in);
    uccl_engine_conn_destroy(out);
    return out;
}

static fixture fixture_open(void)
{
    fixture f = {.engine = engine_start(), .mem = map_shared(3 * LEN)};
    address self = engine_address(f.engine);
    f.conn = join(f.engine, &self, true);
    f.accepted = take_connection(f.engine);
    f.mem += LEN; /* readable memory on both sides of the region: only the bounds check can refuse it */
    f.ended_mr = region_add(f.engine, f.mem, LEN);
    uccl_engine_mr_destroy(f.engine, f.ended_mr);
    f.mr = region_add(f.engine, f.mem, LEN);
    f.item = region_item(f.engine, f.mr, f.mem, LEN);
    static char here;
    memcpy(f.bad_engines, (uccl_engine_t *[]){NULL, ended_engine(), (void *)f.conn, (void *)&here}, sizeof f.bad_engines);
    memcpy(f.bad_conns, (uccl_conn_t *[]){NULL, ended_conn(&f), (void *)f.engine, (void *)&here}, sizeof f.bad_conns);
    return f;
}

/* Shows that nothing of the misuse stuck: the connection still moves data. */
static void fixture_close(const fixture *f)
{
    uint64_t id;
    fill(f->mem, LEN / 2, 1);
    CHECK_OK(uccl_engine_write(f->conn, f->mr, f->mem, LEN / 2, item_at(f->item, f->mem + LEN / 2, LEN / 2), &id));
    CHECK_OK(outcome(f->conn, id));
    check_same("write", f->mem + LEN / 2, f->mem, LEN / 2);
    uccl_engine_conn_destroy(f->conn);
    uccl_engine_conn_destroy(f->accepted);
    uccl_engine_mr_destroy(f->engine, f->mr);
    uccl_engine_destroy(f->engine);
}

#define WITH_FIXTURE(f) for (fixture f = fixture_open(); f.mem; fixture_close(&f), f.mem = NULL)

/* A failed call leaves a text; the text of an earlier failure does not count. */
static void forget_last_error(void)
{
    CHECK_FAILS(uccl_engine_update_fifo(NULL, 0, 0));
}

static void check_last_error_is_new(void)
{
    const char *text = uccl_engine_last_error();
    CHECK_MSG(*text && !strstr(text, "fifo_item"), "last error: \"%s\"", text);
}

#define CHECK_MISUSE(expr)         \
    do {                           \
        forget_last_error();       \
        CHECK_FAILS(expr);         \
        check_last_error_is_new(); \
    } while (0)
#define CHECK_MISUSE_NULL(expr)    \
    do {                           \
        forget_last_error();       \
        CHECK((expr) == NULL);     \
        check_last_error_is_new(); \
    } while (0)

/* Engines and connections. */

CASE(uccl_engine_create)
{
    static const char *const BAD[][2] = {
        {"UCCL_TCPX_PLUGIN", "carrier-pigeon"},
        {"UCCL_TCPX_OOB_PORT", "65536"},
        {"UCCL_TCPX_CHUNK_BYTES", "many"},
        {"UCCL_TCPX_PLUGIN_PATH", "/nonexistent/libnccl-net.so"},
    };
    for (size_t i = 0; i < sizeof BAD / sizeof *BAD; i++) {
        const char *before = getenv(BAD[i][0]);
        char *saved = before ? strdup(before) : NULL;
        CHECK(setenv(BAD[i][0], BAD[i][1], 1) == 0);
        CHECK_MSG(uccl_engine_create(0, false) == NULL, "%s=%s", BAD[i][0], BAD[i][1]);
        CHECK_MSG(strstr(uccl_engine_last_error(), BAD[i][1]), "last error: %s", uccl_engine_last_error());
        CHECK((saved ? setenv(BAD[i][0], saved, 1) : unsetenv(BAD[i][0])) == 0);
        free(saved);
    }
    int hints[] = {INT_MIN, -1, 0, 1, INT_MAX}, hint;
    FOR_EACH(hint, hints)
    {
        uccl_engine_t *engine = uccl_engine_create(hint, true);
        CHECK_MSG(engine, "%s", uccl_engine_last_error());
        uccl_engine_destroy(engine);
    }
}

CASE(uccl_engine_create_with)
{
    uccl_engine_t *const untouched = (uccl_engine_t *)&untouched, *engine = untouched;
    const uccl_option_t good = {"UCCL_TCPX_NUM_CHANNELS", "2"};
    CHECK_MISUSE(uccl_engine_create_with(NULL, 1, &engine));
    CHECK_MISUSE(uccl_engine_create_with(&good, SIZE_MAX, &engine));
    CHECK_MISUSE(uccl_engine_create_with(&good, 1, NULL));
    const uccl_option_t bad[] = {
        {NULL, "1"},
        {"", "1"},
        {"PATH", "/"},
        {"UCCL_TCPX_NO_SUCH_VARIABLE", "1"},
        {"uccl_tcpx_num_channels", "1"},
        {"UCCL_TCPX_NUM_CHANNELS", "many"},
        {"UCCL_TCPX_NUM_CHANNELS", "\xff\xfe"},
        {"\xff\xfe", "1"},
        {"UCCL_TCPX_PLUGIN", "carrier-pigeon"},
        {"UCCL_TCPX_OOB_PORT", "65536"},
        {"UCCL_P2P_LOG_LEVEL", "debug"}, /* of the process, not of an engine */
        {"NCCL_DYNAMIC_CHUNK_SIZE", "65536"},
    };
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        const uccl_option_t both[] = {good, bad[i]};
        forget_last_error();
        CHECK_MSG(uccl_engine_create_with(both, 2, &engine) == UCCL_ERR_INVALID_ARGUMENT, "option %zu", i);
        check_last_error_is_new();
    }
    CHECK(engine == untouched);
    CHECK_OK(uccl_engine_create_with(NULL, 0, &engine));
    uccl_engine_destroy(engine);
}

CASE(uccl_engine_destroy)
{
    WITH_FIXTURE(f)
    {
        uccl_engine_t *engine;
        FOR_EACH(engine, f.bad_engines) uccl_engine_destroy(engine);
    }
}

CASE(uccl_engine_connect)
{
    WITH_FIXTURE(f)
    {
        address self = engine_address(f.engine);
        uccl_engine_t *engine;
        FOR_EACH(engine, f.bad_engines) CHECK_MISUSE_NULL(uccl_engine_connect(engine, self.ip, self.gpu, self.port, false));
        int ports[] = {0, -1, 65536, INT_MIN, INT_MAX}, port;
        FOR_EACH(port, ports) CHECK_MISUSE_NULL(uccl_engine_connect(f.engine, self.ip, self.gpu, port, false));
        const char *addresses[] = {NULL, "", "\xff\xfe"}, *ip;
        FOR_EACH(ip, addresses) CHECK_MISUSE_NULL(uccl_engine_connect(f.engine, ip, self.gpu, self.port, false));
        CHECK_MISUSE_NULL(uccl_engine_connect(f.engine, self.ip, "\xff\xfe", self.port, false));
        const char *not_given[] = {NULL, ""}, *gpu;
        FOR_EACH(gpu, not_given)
        {
            uccl_conn_t *conn = uccl_engine_connect(f.engine, self.ip, gpu, self.port, true);
            CHECK_MSG(conn, "%s", uccl_engine_last_error());
            /* Taken while it is up: one that its peer closed is not handed out. */
            uccl_engine_conn_destroy(take_connection(f.engine));
            uccl_engine_conn_destroy(conn);
        }
    }
}

CASE(uccl_engine_accept)
{
    WITH_FIXTURE(f)
    {
        char ip[8];
        int gpu = 77;
        uccl_engine_t *engine;
        FOR_EACH(engine, f.bad_engines)
        {
            memset(ip, 'x', sizeof ip);
            CHECK_MISUSE_NULL(uccl_engine_accept(engine, ip, sizeof ip, &gpu));
            CHECK(ip[0] == 0 && ip[1] == 'x' && gpu == 77);
        }
        ip[0] = 'x';
        CHECK_MISUSE_NULL(uccl_engine_accept(f.engine, ip, 0, &gpu));
        CHECK(ip[0] == 'x');
        CHECK_MISUSE_NULL(uccl_engine_accept(f.engine, NULL, sizeof ip, &gpu));
        CHECK_MISUSE_NULL(uccl_engine_accept(f.engine, ip, sizeof ip, NULL));
        CHECK(gpu == 77);
    }
}

CASE(uccl_engine_accept_for)
{
    WITH_FIXTURE(f)
    {
        char ip[8] = "as was";
        int gpu = 77;
        uccl_conn_t *const untouched = (uccl_conn_t *)&untouched, *conn = untouched;
        uccl_engine_t *engine;
        FOR_EACH(engine, f.bad_engines) CHECK_MISUSE(uccl_engine_accept_for(engine, -1, ip, sizeof ip, &gpu, &conn));
        CHECK_MISUSE(uccl_engine_accept_for(f.engine, -1, ip, 0, &gpu, &conn));
        CHECK_MISUSE(uccl_engine_accept_for(f.engine, -1, NULL, sizeof ip, &gpu, &conn));
        CHECK_MISUSE(uccl_engine_accept_for(f.engine, -1, ip, sizeof ip, NULL, &conn));
        CHECK_MISUSE(uccl_engine_accept_for(f.engine, -1, ip, sizeof ip, &gpu, NULL));
        CHECK_STATUS(uccl_engine_accept_for(f.engine, 0, ip, sizeof ip, &gpu, &conn), UCCL_IN_PROGRESS);
        CHECK(strcmp(ip, "as was") == 0 && gpu == 77 && conn == untouched);
        /* Beyond what a clock shows: without limit, and one waits already. */
        address self = engine_address(f.engine);
        uccl_conn_t *out = join(f.engine, &self, true);
        CHECK_OK(uccl_engine_accept_for(f.engine, INT64_MAX, ip, sizeof ip, &gpu, &conn));
        CHECK(strcmp(ip, "127.0.0") == 0 && gpu != 77);
        uccl_engine_conn_destroy(conn);
        uccl_engine_conn_destroy(out);
    }
}

CASE(uccl_engine_event_fd)
{
    WITH_FIXTURE(f)
    {
        int fd = 77;
        uccl_engine_t *engine;
        FOR_EACH(engine, f.bad_engines) CHECK_MISUSE(uccl_engine_event_fd(engine, &fd));
        CHECK_MISUSE(uccl_engine_event_fd(f.engine, NULL));
        CHECK_MISUSE(uccl_engine_event_fd(f.engine, (int *)((char *)&fd + 1)));
        CHECK(fd == 77);
    }
}

CASE(uccl_engine_stop_accept)
{
    WITH_FIXTURE(f)
    {
        uccl_engine_t *engine;
        FOR_EACH(engine, f.bad_engines) uccl_engine_stop_accept(engine);
        uccl_engine_stop_accept(f.engine);
        uccl_engine_stop_accept(f.engine);
    }
}

CASE(uccl_engine_start_listener)
{
    WITH_FIXTURE(f)
    {
        uccl_conn_t *conn;
        FOR_EACH(conn, f.bad_conns) CHECK_MISUSE(uccl_engine_start_listener(conn));
        CHECK_OK(uccl_engine_start_listener(f.conn));
        CHECK_STATUS(uccl_engine_start_listener(f.conn), -1);
        CHECK_OK(uccl_engine_start_listener(f.accepted));
    }
}

CASE(uccl_engine_stop_listener)
{
    WITH_FIXTURE(f)
    {
        uccl_conn_t *conn;
        FOR_EACH(conn, f.bad_conns) CHECK_MISUSE(uccl_engine_stop_listener(conn));
        CHECK_OK(uccl_engine_stop_listener(f.conn));
        CHECK_OK(uccl_engine_start_listener(f.conn));
        CHECK_OK(uccl_engine_stop_listener(f.conn));
        CHECK_OK(uccl_engine_stop_listener(f.conn));
        CHECK_OK(uccl_engine_start_listener(f.conn));
    }
}

CASE(uccl_engine_conn_destroy)
{
    WITH_FIXTURE(f)
    {
        uccl_conn_t *conn;
        FOR_EACH(conn, f.bad_conns) uccl_engine_conn_destroy(conn);
    }
}

CASE(uccl_engine_conn_is_local)
{
    WITH_FIXTURE(f)
    {
        uccl_conn_t *conn;
        FOR_EACH(conn, f.bad_conns) CHECK(!uccl_engine_conn_is_local(conn));
        CHECK(uccl_engine_conn_is_local(f.conn));
        CHECK(uccl_engine_conn_is_local(f.accepted));
    }
}

CASE(uccl_engine_conn_peer_name)
{
    WITH_FIXTURE(f)
    {
        char name[40] = "untouched";
        uccl_conn_t *conn;
        FOR_EACH(conn, f.bad_conns) CHECK_MISUSE(uccl_engine_conn_peer_name(conn, name, sizeof name));
        CHECK_MISUSE(uccl_engine_conn_peer_name(f.conn, NULL, sizeof name));
        CHECK_MISUSE(uccl_engine_conn_peer_name(f.conn, name, 0));
        CHECK(strcmp(name, "untouched") == 0);
        /* No key, no name. */
        CHECK_OK(uccl_engine_conn_peer_name(f.conn, name, 1));
        CHECK(*name == 0);
        CHECK_OK(uccl_engine_conn_peer_name(f.accepted, name, sizeof name));
        CHECK(*name == 0);
    }
}

CASE(uccl_engine_conn_status)
{
    WITH_FIXTURE(f)
    {
        uccl_conn_t *conn;
        FOR_EACH(conn, f.bad_conns) CHECK_MISUSE(uccl_engine_conn_status(conn));
        CHECK(uccl_engine_conn_status(f.conn) == UCCL_OK);
        CHECK(uccl_engine_conn_status(f.accepted) == UCCL_OK);
    }
}

CASE(uccl_engine_last_status)
{
    forget_last_error();
    CHECK(uccl_engine_last_status() == UCCL_ERR_INVALID_ARGUMENT);
    uccl_engine_t *engine = uccl_engine_create(0, false);
    CHECK(engine);
    CHECK(!uccl_engine_connect(engine, "127.0.0.1", "", 1, false));
    CHECK(uccl_engine_last_status() == UCCL_ERR_UNREACHABLE);
    uccl_engine_destroy(engine);
}

/* Statistics. */

CASE(uccl_engine_stats)
{
    WITH_FIXTURE(f)
    {
        uccl_stats_t stats = {.size = sizeof stats};
        uccl_engine_t *engine;
        FOR_EACH(engine, f.bad_engines) CHECK_MISUSE(uccl_engine_stats(engine, &stats));
        CHECK_MISUSE(uccl_engine_stats(f.engine, NULL));
        CHECK_MISUSE(uccl_engine_stats(f.engine, (uccl_stats_t *)((char *)&stats + 1)));
        uccl_stats_t small = {.size = 0, .connections = UNTOUCHED};
        CHECK_MISUSE(uccl_engine_stats(f.engine, &small));
        CHECK_EQ(stats.uptime_ms, 0);
        /* A caller of an older version has a smaller structure: what lies behind it is not its own. */
        small.size = offsetof(uccl_stats_t, connections);
        CHECK_OK(uccl_engine_stats(f.engine, &small));
        CHECK_EQ(small.size, offsetof(uccl_stats_t, connections));
        CHECK_EQ(small.connections, UNTOUCHED);
        /* One of a later version has a larger one. */
        struct {
            uccl_stats_t known;
            uint64_t later;
        } large = {.known.size = sizeof large, .later = UNTOUCHED};
        CHECK_OK(uccl_engine_stats(f.engine, &large.known));
        CHECK_EQ(large.known.size, sizeof(uccl_stats_t));
        CHECK_EQ(large.later, UNTOUCHED);
        CHECK_OK(uccl_engine_stats(f.engine, &stats));
        CHECK(stats.connections == 2 && stats.setups_in >= 1 && stats.setups_out >= 1);
    }
}

/* Bytes sent directly, over channels, or inside control frames. */
static uint64_t data_sent(const uccl_totals_t *totals)
{
    return totals->sent_bytes + totals->eager_sent_bytes;
}

CASE(uccl_engine_conn_stats)
{
    WITH_FIXTURE(f)
    {
        uccl_conn_stats_t stats = {.size = sizeof stats};
        uccl_conn_t *conn;
        FOR_EACH(conn, f.bad_conns) CHECK_MISUSE(uccl_engine_conn_stats(conn, &stats));
        CHECK_MISUSE(uccl_engine_conn_stats(f.conn, NULL));
        stats.size = 8;
        CHECK_MISUSE(uccl_engine_conn_stats(f.conn, &stats));
        stats.size = sizeof stats;
        uint64_t id;
        CHECK_OK(uccl_engine_write(f.conn, f.mr, f.mem, LEN / 2, item_at(f.item, f.mem + LEN / 2, LEN / 2), &id));
        CHECK_OK(outcome(f.conn, id));
        CHECK_OK(uccl_engine_conn_stats(f.conn, &stats));
        CHECK(stats.up == 1 && stats.channels > 0 && stats.totals.transfers_completed == 1);
        CHECK_EQ(data_sent(&stats.totals), LEN / 2);
        CHECK_EQ(stats.totals.refused_by_peer, 0);
        /* The engine has no other transfer. */
        uccl_stats_t all = {.size = sizeof all};
        CHECK_OK(uccl_engine_stats(f.engine, &all));
        CHECK_EQ(all.totals.transfers_completed, 1);
        CHECK_EQ(data_sent(&all.totals), LEN / 2);
        /* A direct transfer needs no control stream, a notification does. */
        notify_msg_t message = {.name = "name", .msg = "message"};
        CHECK_OK(uccl_engine_send_notif(f.conn, &message));
        CHECK_OK(uccl_engine_conn_stats(f.conn, &stats));
        CHECK(stats.totals.control_sent_bytes > 0);
    }
}

CASE(uccl_engine_channel_stats)
{
    WITH_FIXTURE(f)
    {
        uccl_channel_stats_t stats = {.size = sizeof stats};
        uccl_conn_stats_t all = {.size = sizeof all};
        uccl_conn_t *conn;
        FOR_EACH(conn, f.bad_conns) CHECK_MISUSE(uccl_engine_channel_stats(conn, 0, &stats));
        CHECK_MISUSE(uccl_engine_channel_stats(f.conn, 0, NULL));
        CHECK_OK(uccl_engine_conn_stats(f.conn, &all));
        CHECK_STATUS(uccl_engine_channel_stats(f.conn, all.channels, &stats), UCCL_ERR_NOT_FOUND);
        CHECK_STATUS(uccl_engine_channel_stats(f.conn, SIZE_MAX, &stats), UCCL_ERR_NOT_FOUND);
        for (size_t i = 0; i < all.channels; i++) {
            CHECK_OK(uccl_engine_channel_stats(f.conn, i, &stats));
            CHECK(stats.nic[0] && stats.window > 0 && stats.lost == 0);
            CHECK(stats.plugin[0] && (strcmp(stats.plugin, "direct") == 0) == (strcmp(stats.nic, "local") == 0));
            CHECK(stats.carrier[0] && (strcmp(stats.plugin, "TCPX-soft") == 0) == (strcmp(stats.carrier, "tcp") == 0));
            CHECK((strcmp(stats.plugin, "direct") == 0) == (strcmp(stats.carrier, "direct") == 0));
            CHECK(stats.nvlink_bytes <= stats.sent_bytes + stats.received_bytes);
            /* The software plugin always reports TCP statistics; on one host there are none. */
            const char *plugin = getenv("UCCL_TCPX_PLUGIN_PATH");
            CHECK(stats.segments > 0 || strcmp(stats.nic, "local") == 0 || (plugin && !strstr(plugin, "tcpx_soft")));
            /* A program that was built before the structure had the channel's plugin. */
            uccl_channel_stats_t older = {.size = offsetof(uccl_channel_stats_t, lost), .lost = UNTOUCHED, .plugin = "untouched"};
            CHECK_OK(uccl_engine_channel_stats(f.conn, i, &older));
            CHECK_EQ(older.size, offsetof(uccl_channel_stats_t, lost));
            CHECK(older.lost == UNTOUCHED && strcmp(older.plugin, "untouched") == 0);
        }
    }
}

CASE(uccl_engine_stats_text)
{
    WITH_FIXTURE(f)
    {
        static char buf[64 * KIB];
        size_t needed = UNTOUCHED;
        uccl_engine_t *engine;
        FOR_EACH(engine, f.bad_engines) CHECK_MISUSE(uccl_engine_stats_text(engine, buf, sizeof buf, &needed));
        CHECK(needed == UNTOUCHED);
        CHECK_MISUSE(uccl_engine_stats_text(f.engine, NULL, sizeof buf, NULL));
        CHECK_STATUS(uccl_engine_stats_text(f.engine, NULL, 0, &needed), UCCL_ERR_RESOURCE);
        CHECK(needed > 100 && needed < sizeof buf);
        CHECK_OK(uccl_engine_stats_text(f.engine, buf, sizeof buf, &needed));
        CHECK_EQ(strlen(buf) + 1, needed);
        CHECK(strstr(buf, "channel 0") && strstr(buf, "connection 1 to "));
    }
}

/* Memory. */

CASE(uccl_engine_reg)
{
    WITH_FIXTURE(f)
    {
        uccl_mr_t mr = UNTOUCHED;
        uccl_engine_t *engine;
        FOR_EACH(engine, f.bad_engines) CHECK_MISUSE(uccl_engine_reg(engine, (size_t)f.mem, LEN, &mr));
        CHECK_MISUSE(uccl_engine_reg(f.engine, (size_t)f.mem, LEN, NULL));
        CHECK_STATUS(uccl_engine_reg(f.engine, 0, LEN, &mr), UCCL_ERR_INVALID_ARGUMENT);
        CHECK_STATUS(uccl_engine_reg(f.engine, (size_t)f.mem, 0, &mr), UCCL_ERR_INVALID_ARGUMENT);
        CHECK_STATUS(uccl_engine_reg(f.engine, (size_t)f.mem, SIZE_MAX, &mr), UCCL_ERR_INVALID_ARGUMENT);
        CHECK_STATUS(uccl_engine_reg(f.engine, SIZE_MAX - 10, 100, &mr), UCCL_ERR_INVALID_ARGUMENT);
        CHECK(mr == UNTOUCHED);
        /* Overlapping and repeated registrations are not misuse, and each is a region of its own. */
        uccl_mr_t again = region_add(f.engine, f.mem, LEN), part = region_add(f.engine, f.mem + 1, 1);
        CHECK(again != f.mr && part != f.mr && part != again);
        uccl_engine_mr_destroy(f.engine, again);
        uccl_engine_mr_destroy(f.engine, part);
    }
}

CASE(uccl_engine_reg_with)
{
    const uint32_t both = UCCL_ACCESS_REMOTE_READ | UCCL_ACCESS_REMOTE_WRITE;
    WITH_FIXTURE(f)
    {
        uccl_mr_t mr = UNTOUCHED;
        uccl_engine_t *engine;
        FOR_EACH(engine, f.bad_engines) CHECK_MISUSE(uccl_engine_reg_with(engine, (size_t)f.mem, LEN, both, &mr));
        CHECK_MISUSE(uccl_engine_reg_with(f.engine, (size_t)f.mem, LEN, both, NULL));
        CHECK_STATUS(uccl_engine_reg_with(f.engine, (size_t)f.mem, LEN, 4, &mr), UCCL_ERR_INVALID_ARGUMENT);
        CHECK_STATUS(uccl_engine_reg_with(f.engine, (size_t)f.mem, LEN, UINT32_MAX, &mr), UCCL_ERR_INVALID_ARGUMENT);
        CHECK_STATUS(uccl_engine_reg_with(f.engine, 0, LEN, both, &mr), UCCL_ERR_INVALID_ARGUMENT);
        CHECK_STATUS(uccl_engine_reg_with(f.engine, (size_t)f.mem, 0, both, &mr), UCCL_ERR_INVALID_ARGUMENT);
        CHECK(mr == UNTOUCHED);
        /* wrong_access.c shows that the limits are kept. */
        for (uint32_t access = 0; access < both; access++) {
            CHECK_OK(uccl_engine_reg_with(f.engine, (size_t)f.mem, LEN, access, &mr));
            uccl_engine_mr_destroy(f.engine, mr);
        }
        CHECK_OK(uccl_engine_reg_with(f.engine, (size_t)f.mem, LEN, both, &mr));
        uccl_engine_mr_destroy(f.engine, mr);
    }
}

CASE(uccl_engine_mr_destroy)
{
    WITH_FIXTURE(f)
    {
        uccl_engine_t *engine;
        FOR_EACH(engine, f.bad_engines) uccl_engine_mr_destroy(engine, f.mr);
        uccl_mr_t unknown[] = {0, f.ended_mr, UINT64_MAX}, mr;
        FOR_EACH(mr, unknown) uccl_engine_mr_destroy(f.engine, mr);
    }
}

CASE(uccl_engine_prepare_fifo)
{
    WITH_FIXTURE(f)
    {
        char buf[FIFO_SIZE];
        wipe((uint8_t *)buf, sizeof buf);
        uccl_engine_t *engine;
        FOR_EACH(engine, f.bad_engines) CHECK_MISUSE(uccl_engine_prepare_fifo(engine, f.mr, f.mem, LEN, buf));
        uccl_mr_t unknown[] = {0, f.ended_mr, UINT64_MAX}, mr;
        FOR_EACH(mr, unknown) CHECK_STATUS(uccl_engine_prepare_fifo(f.engine, mr, f.mem, LEN, buf), UCCL_ERR_NOT_FOUND);
        CHECK_MISUSE(uccl_engine_prepare_fifo(f.engine, f.mr, f.mem, LEN, NULL));
        CHECK_STATUS(uccl_engine_prepare_fifo(f.engine, f.mr, NULL, 1, buf), UCCL_ERR_INVALID_ARGUMENT);
        CHECK_STATUS(uccl_engine_prepare_fifo(f.engine, f.mr, f.mem - 1, 1, buf), UCCL_ERR_INVALID_ARGUMENT);
        CHECK_STATUS(uccl_engine_prepare_fifo(f.engine, f.mr, f.mem, LEN + 1, buf), UCCL_ERR_INVALID_ARGUMENT);
        CHECK_STATUS(uccl_engine_prepare_fifo(f.engine, f.mr, f.mem + LEN, 1, buf), UCCL_ERR_INVALID_ARGUMENT);
        CHECK_STATUS(uccl_engine_prepare_fifo(f.engine, f.mr, f.mem + 1, SIZE_MAX, buf), UCCL_ERR_INVALID_ARGUMENT);
        CHECK(is_wiped((uint8_t *)buf, sizeof buf));
        char shifted[FIFO_SIZE + 1]; /* the buffer need not be aligned */
        CHECK_OK(uccl_engine_prepare_fifo(f.engine, f.mr, f.mem, LEN, shifted + 1));
        CHECK(memcmp(shifted + 1, &f.item, FIFO_SIZE) == 0);
    }
}

/* Needs no engine: that is part of the contract. */
CASE(uccl_engine_update_fifo)
{
    struct FifoItem item, before;
    fill((uint8_t *)&item, sizeof item, 9);
    before = item;
    CHECK_STATUS(uccl_engine_update_fifo(NULL, 1, 2), UCCL_ERR_INVALID_ARGUMENT);
    CHECK_OK(uccl_engine_update_fifo(&item, 0x123456789ABCDEFu, UINT32_MAX));
    CHECK(item.addr == 0x123456789ABCDEFu && item.size == UINT32_MAX);
    item.addr = before.addr;
    item.size = before.size;
    CHECK(memcmp(&item, &before, sizeof item) == 0);
    CHECK_OK(uccl_engine_update_fifo(&item, 0, 0));
    CHECK(item.addr == 0 && item.size == 0);
}

CASE(uccl_engine_get_ipc_info)
{
    WITH_FIXTURE(f)
    {
        char buf[IPC_INFO_SIZE], zeros[IPC_INFO_SIZE] = {0};
        bool has_ipc = true;
        wipe((uint8_t *)buf, sizeof buf);
        uccl_engine_t *engine;
        FOR_EACH(engine, f.bad_engines) CHECK_MISUSE(uccl_engine_get_ipc_info(engine, (size_t)f.mem, buf, &has_ipc));
        size_t outside[] = {0, (size_t)f.mem - 1, (size_t)f.mem + LEN, SIZE_MAX}, addr;
        FOR_EACH(addr, outside) CHECK_STATUS(uccl_engine_get_ipc_info(f.engine, addr, buf, &has_ipc), UCCL_ERR_NOT_FOUND);
        CHECK_MISUSE(uccl_engine_get_ipc_info(f.engine, (size_t)f.mem, NULL, &has_ipc));
        CHECK_MISUSE(uccl_engine_get_ipc_info(f.engine, (size_t)f.mem, buf, NULL));
        CHECK(is_wiped((uint8_t *)buf, sizeof buf) && has_ipc);
        CHECK_OK(uccl_engine_get_ipc_info(f.engine, (size_t)f.mem + LEN - 1, buf, &has_ipc));
        CHECK(memcmp(buf, zeros, sizeof buf) == 0 && !has_ipc);
    }
}

CASE(uccl_engine_update_ipc_info)
{
    char buf[IPC_INFO_SIZE];
    wipe((uint8_t *)buf, sizeof buf);
    CHECK_STATUS(uccl_engine_update_ipc_info(NULL, 100, 100, 1), UCCL_ERR_INVALID_ARGUMENT);
    CHECK_STATUS(uccl_engine_update_ipc_info(buf, 99, 100, 1), UCCL_ERR_INVALID_ARGUMENT);
    CHECK_STATUS(uccl_engine_update_ipc_info(buf, SIZE_MAX, 100, 2), UCCL_ERR_INVALID_ARGUMENT);
    CHECK_OK(uccl_engine_update_ipc_info(buf, 100, 100, 1));
    CHECK(is_wiped((uint8_t *)buf, sizeof buf));
}

/* Metadata. */

CASE(uccl_engine_get_metadata)
{
    WITH_FIXTURE(f)
    {
        char mark, *text = &mark;
        uccl_engine_t *engine;
        FOR_EACH(engine, f.bad_engines) CHECK_MISUSE(uccl_engine_get_metadata(engine, &text));
        CHECK(text == &mark);
        CHECK_MISUSE(uccl_engine_get_metadata(f.engine, NULL));
        address a = engine_address(f.engine), b = engine_address(f.engine);
        CHECK(strcmp(a.ip, b.ip) == 0 && strcmp(a.gpu, b.gpu) == 0 && a.port == b.port);
        CHECK_MSG(strcmp(a.ip, LOOPBACK) == 0, "the control interface is lo, the address %s", a.ip);
    }
}

CASE(uccl_engine_free_metadata)
{
    uccl_engine_free_metadata(NULL);
    WITH_FIXTURE(f)
    {
        char *text = NULL;
        CHECK_OK(uccl_engine_get_metadata(f.engine, &text));
        uccl_engine_free_metadata(text);
    }
}

CASE(uccl_engine_metadata_into)
{
    WITH_FIXTURE(f)
    {
        char buf[256], *text = NULL;
        size_t needed = UNTOUCHED;
        wipe((uint8_t *)buf, sizeof buf);
        uccl_engine_t *engine;
        FOR_EACH(engine, f.bad_engines) CHECK_MISUSE(uccl_engine_metadata_into(engine, buf, sizeof buf, &needed));
        CHECK(needed == UNTOUCHED);
        CHECK_MISUSE(uccl_engine_metadata_into(f.engine, NULL, sizeof buf, NULL));
        CHECK_OK(uccl_engine_get_metadata(f.engine, &text));
        CHECK_STATUS(uccl_engine_metadata_into(f.engine, NULL, 0, &needed), UCCL_ERR_RESOURCE);
        CHECK_EQ(needed, strlen(text) + 1);
        for (size_t len = 0; len < needed; len++) {
            size_t length = 0;
            CHECK_STATUS(uccl_engine_metadata_into(f.engine, buf, len, &length), UCCL_ERR_RESOURCE);
            CHECK_EQ(length, needed);
        }
        CHECK(is_wiped((uint8_t *)buf, sizeof buf));
        CHECK_STATUS(uccl_engine_metadata_into(f.engine, buf, 1, NULL), UCCL_ERR_RESOURCE);
        CHECK_OK(uccl_engine_metadata_into(f.engine, buf, needed, NULL));
        CHECK(strcmp(buf, text) == 0);
        CHECK(is_wiped((uint8_t *)buf + needed, sizeof buf - needed));
        uccl_engine_free_metadata(text);
    }
}

CASE(uccl_engine_parse_metadata)
{
    char ip[64], gpu[512];
    int port = 77;
    wipe((uint8_t *)ip, sizeof ip);
    wipe((uint8_t *)gpu, sizeof gpu);
    const char *const bad[] = {NULL, "", "127.0.0.1", "127.0.0.1:80", "127.0.0.1?0", ":80?0", "127.0.0.1:0?0", "127.0.0.1:65536?0",
                               "127.0.0.1:80?", "::1:80?0", "[::1]?0", "[::1:80?0", "[127.0.0.1]:80?0", "\xff\xfe:80?0"};
    const char *text;
    FOR_EACH(text, bad) CHECK_MISUSE(uccl_engine_parse_metadata(text, ip, sizeof ip, &port, gpu, sizeof gpu));
    const char *good = "127.0.0.1:80?0000:4a:00.0";
    for (size_t len = 0; len < sizeof "127.0.0.1"; len++)
        CHECK_STATUS(uccl_engine_parse_metadata(good, ip, len, &port, gpu, sizeof gpu), UCCL_ERR_RESOURCE);
    for (size_t len = 0; len < sizeof "0000:4a:00.0"; len++)
        CHECK_STATUS(uccl_engine_parse_metadata(good, ip, sizeof ip, &port, gpu, len), UCCL_ERR_RESOURCE);
    CHECK(is_wiped((uint8_t *)ip, sizeof ip) && is_wiped((uint8_t *)gpu, sizeof gpu) && port == 77);
    CHECK_OK(uccl_engine_parse_metadata(good, ip, sizeof "127.0.0.1", &port, gpu, sizeof "0000:4a:00.0"));
    CHECK(strcmp(ip, "127.0.0.1") == 0 && port == 80 && strcmp(gpu, "0000:4a:00.0") == 0);
    CHECK(is_wiped((uint8_t *)ip + sizeof "127.0.0.1", sizeof ip - sizeof "127.0.0.1"));
    CHECK_OK(uccl_engine_parse_metadata("[2001:db8::7]:65535?-1", ip, sizeof ip, &port, NULL, 0));
    CHECK(strcmp(ip, "2001:db8::7") == 0 && port == 65535 && strcmp(gpu, "0000:4a:00.0") == 0);
    CHECK_OK(uccl_engine_parse_metadata(good, NULL, 0, NULL, NULL, 0));
    WITH_FIXTURE(f)
    {
        char *own = NULL;
        CHECK_OK(uccl_engine_get_metadata(f.engine, &own));
        address self = engine_address(f.engine);
        CHECK_OK(uccl_engine_parse_metadata(own, ip, sizeof ip, &port, gpu, sizeof gpu));
        CHECK(strcmp(ip, self.ip) == 0 && port == self.port && strcmp(gpu, self.gpu) == 0);
        uccl_engine_free_metadata(own);
    }
}

/* Pointers that are not aligned for what they point to: refused before anything is read or written. */
CASE(misaligned_pointers)
{
    WITH_FIXTURE(f)
    {
        static _Alignas(16) char bytes[4096];
        address self = engine_address(f.engine);
        uccl_mr_t mrs[1] = {f.mr};
        void *data[1] = {f.mem};
        size_t sizes[1] = {64};
        struct FifoItem items[1] = {f.item};
        char text[256];
        uint64_t id;
        wipe((uint8_t *)bytes, sizeof bytes);
#define BAD(type, shift) ((type *)(void *)(bytes + (shift)))
#define REFUSED(expr) CHECK_STATUS(expr, UCCL_ERR_INVALID_ARGUMENT)
        for (int i = 1; i < 8; i++) {
            REFUSED(uccl_engine_reg(f.engine, (size_t)f.mem, LEN, BAD(uccl_mr_t, i)));
            REFUSED(uccl_engine_reg_with(f.engine, (size_t)f.mem, LEN, 3, BAD(uccl_mr_t, i)));
            REFUSED(uccl_engine_create_with(NULL, 0, BAD(uccl_engine_t *, i)));
            REFUSED(uccl_engine_create_with(BAD(uccl_option_t, i), 1, &f.bad_engines[0]));
            REFUSED(uccl_engine_get_metadata(f.engine, BAD(char *, i)));
            REFUSED(uccl_engine_metadata_into(f.engine, text, sizeof text, BAD(size_t, i)));
            REFUSED(uccl_engine_update_fifo(BAD(struct FifoItem, i), 1, 2));
            REFUSED(uccl_engine_get_notifs(NULL, 0, BAD(size_t, i)));
            REFUSED(uccl_engine_notif_next(NULL, BAD(uccl_notif_t *, i)));
            CHECK_MISUSE_NULL(uccl_engine_notif_name(NULL, BAD(size_t, i)));
            CHECK_MISUSE_NULL(uccl_engine_notif_msg(NULL, BAD(size_t, i)));
            REFUSED(uccl_engine_write(f.conn, f.mr, f.mem, 64, f.item, BAD(uint64_t, i)));
            REFUSED(uccl_engine_read(f.conn, f.mr, f.mem, 64, f.item, BAD(uint64_t, i)));
            REFUSED(uccl_engine_send(f.conn, f.mr, f.mem, 64, BAD(uint64_t, i)));
            REFUSED(uccl_engine_send_async(f.conn, f.mr, f.mem, 64, BAD(uint64_t, i)));
            REFUSED(uccl_engine_recv_async(f.conn, f.mr, f.mem, 64, BAD(uint64_t, i)));
            REFUSED(uccl_engine_poll(f.conn, 1, BAD(uccl_xfer_info_t, i)));
            REFUSED(uccl_engine_write_vector(f.conn, BAD(uccl_mr_t, i), data, sizes, items, 1, &id));
            REFUSED(uccl_engine_write_vector(f.conn, mrs, BAD(void *, i), sizes, items, 1, &id));
            REFUSED(uccl_engine_write_vector(f.conn, mrs, data, BAD(size_t, i), items, 1, &id));
            REFUSED(uccl_engine_write_vector(f.conn, mrs, data, sizes, BAD(struct FifoItem, i), 1, &id));
            REFUSED(uccl_engine_write_vector(f.conn, mrs, data, sizes, items, 1, BAD(uint64_t, i)));
            REFUSED(uccl_engine_read_vector(f.conn, mrs, data, sizes, items, 1, BAD(uint64_t, i)));
            REFUSED(uccl_engine_list_create(mrs, data, sizes, items, 1, BAD(uccl_list_t *, i)));
            REFUSED(uccl_engine_send_vector(f.conn, mrs, (const void *const *)data, sizes, 1, BAD(uint64_t, i)));
            if (i % 4 == 0)
                continue; /* numbers of 4 bytes */
            char ip[64];
            CHECK_MISUSE_NULL(uccl_engine_accept(f.engine, ip, sizeof ip, BAD(int, i)));
            REFUSED(uccl_engine_parse_metadata("127.0.0.1:80?0", ip, sizeof ip, BAD(int, i), NULL, 0));
        }
        CHECK(is_wiped((uint8_t *)bytes, sizeof bytes));
        CHECK(self.port != 0);
    }
}

/* The log. */

static void ignore_line(int level, const char *text, void *user)
{
    (void)level;
    (void)text;
    (void)user;
}

/* logging.c tests what it does. */
CASE(uccl_engine_set_log_callback)
{
    CHECK_OK(uccl_engine_set_log_callback(NULL, NULL));
    CHECK_OK(uccl_engine_set_log_callback(ignore_line, NULL));
    WITH_FIXTURE(f) {}
    CHECK_OK(uccl_engine_set_log_callback(NULL, (void *)1));
}

/* Texts. */

static const int STATUSES[] = {
    UCCL_OK,
    UCCL_IN_PROGRESS,
    UCCL_ERR_INVALID_ARGUMENT,
    UCCL_ERR_NOT_FOUND,
    UCCL_ERR_RESOURCE,
    UCCL_ERR_UNSUPPORTED,
    UCCL_ERR_CANCELED,
    UCCL_ERR_TIMED_OUT,
    UCCL_ERR_UNREACHABLE,
    UCCL_ERR_REMOTE_DISCONNECT,
    UCCL_ERR_AUTH,
    UCCL_ERR_PROTOCOL,
    UCCL_ERR_REMOTE_ACCESS,
    UCCL_ERR_TRUNCATED,
    UCCL_ERR_PLUGIN_LOAD,
    UCCL_ERR_PLUGIN,
    UCCL_ERR_GPU,
    UCCL_ERR_SYSTEM,
    UCCL_ERR_INTERNAL,
};
#define STATUSES_N (sizeof STATUSES / sizeof *STATUSES)

static bool is_status(int number)
{
    for (size_t i = 0; i < STATUSES_N; i++)
        if (STATUSES[i] == number)
            return true;
    return false;
}

CASE(uccl_engine_strerror)
{
    for (size_t i = 0; i < STATUSES_N; i++) {
        const char *text = uccl_engine_strerror(STATUSES[i]);
        CHECK(text && *text && strcmp(text, "unknown status") != 0);
        CHECK(text == uccl_engine_strerror(STATUSES[i]));
        for (size_t j = 0; j < i; j++)
            CHECK_MSG(strcmp(text, uccl_engine_strerror(STATUSES[j])) != 0, "%d and %d share a text", STATUSES[i], STATUSES[j]);
    }
    for (int number = -200; number < 200; number++)
        CHECK_MSG(is_status(number) || strcmp(uccl_engine_strerror(number), "unknown status") == 0, "%d", number);
    CHECK(strcmp(uccl_engine_strerror(INT_MIN), "unknown status") == 0);
    CHECK(strcmp(uccl_engine_strerror(INT_MAX), "unknown status") == 0);
}

static void *fail_in_a_thread(void *unused)
{
    CHECK_MSG(*uccl_engine_last_error() == 0, "a new thread starts with \"%s\"", uccl_engine_last_error());
    CHECK_FAILS(uccl_engine_send_notif(NULL, &(notify_msg_t){.name = ""}));
    CHECK(*uccl_engine_last_error() != 0);
    return unused;
}

CASE(uccl_engine_last_error)
{
    CHECK(*uccl_engine_last_error() == 0);
    CHECK_FAILS(uccl_engine_update_fifo(NULL, 0, 0));
    char *mine = strdup(uccl_engine_last_error());
    CHECK(mine && *mine);
    pthread_t thread;
    CHECK(pthread_create(&thread, NULL, fail_in_a_thread, NULL) == 0);
    CHECK(pthread_join(thread, NULL) == 0);
    CHECK_MSG(strcmp(mine, uccl_engine_last_error()) == 0, "\"%s\" became \"%s\"", mine, uccl_engine_last_error());
    struct FifoItem item;
    CHECK_OK(uccl_engine_update_fifo(&item, 0, 0)); /* a success does not erase it */
    CHECK(strcmp(mine, uccl_engine_last_error()) == 0);
    free(mine);
}

CASE(uccl_engine_version)
{
    int major = -1, minor = -1, patch = -1, used = 0;
    const char *text = uccl_engine_version();
    CHECK(text);
    CHECK_MSG(sscanf(text, "%d.%d.%d%n", &major, &minor, &patch, &used) == 3 && text[used] == 0, "version is %s", text);
    CHECK(major >= 0 && minor >= 0 && patch >= 0);
}

/* Notifications. */

CASE(uccl_engine_send_notif)
{
    WITH_FIXTURE(f)
    {
        notify_msg_t m = {.name = "n", .msg = "m"};
        uccl_conn_t *conn;
        FOR_EACH(conn, f.bad_conns) CHECK_MISUSE(uccl_engine_send_notif(conn, &m));
        CHECK_MISUSE(uccl_engine_send_notif(f.conn, NULL));
    }
}

CASE(uccl_engine_send_notif_bytes)
{
    WITH_FIXTURE(f)
    {
        uccl_conn_t *conn;
        FOR_EACH(conn, f.bad_conns) CHECK_MISUSE(uccl_engine_send_notif_bytes(conn, "n", 1, "m", 1));
        CHECK_MISUSE(uccl_engine_send_notif_bytes(f.conn, NULL, 1, "m", 1));
        CHECK_MISUSE(uccl_engine_send_notif_bytes(f.conn, "n", 1, NULL, 1));
        CHECK_STATUS(uccl_engine_send_notif_bytes(f.conn, "n", 1, "m", SIZE_MAX), UCCL_ERR_INVALID_ARGUMENT);
        CHECK_STATUS(uccl_engine_send_notif_bytes(f.conn, "n", SIZE_MAX, "m", 1), UCCL_ERR_INVALID_ARGUMENT);
        CHECK_STATUS(uccl_engine_send_notif_bytes(f.conn, "n", SIZE_MAX / 2 + 1, "m", SIZE_MAX / 2 + 1), UCCL_ERR_INVALID_ARGUMENT);
    }
}

CASE(uccl_engine_get_notifs)
{
    notify_msg_t out[2];
    size_t count = UNTOUCHED;
    CHECK_MISUSE(uccl_engine_get_notifs(out, 2, NULL));
    CHECK_MISUSE(uccl_engine_get_notifs(NULL, 2, &count));
    CHECK(count == UNTOUCHED);
    CHECK_OK(uccl_engine_get_notifs(NULL, 0, &count)); /* not even an engine is needed */
    CHECK_EQ(count, 0);
}

CASE(uccl_engine_notif_next)
{
    WITH_FIXTURE(f)
    {
        char mark;
        uccl_notif_t *notif = (void *)&mark;
        uccl_engine_t *engine;
        FOR_EACH(engine, f.bad_engines)
        {
            if (engine) /* here NULL means the whole process */
                CHECK_MISUSE(uccl_engine_notif_next(engine, &notif));
        }
        CHECK(notif == (void *)&mark);
        CHECK_MISUSE(uccl_engine_notif_next(f.engine, NULL));
        CHECK_MISUSE(uccl_engine_notif_next(NULL, NULL));
        CHECK_OK(uccl_engine_notif_next(f.engine, &notif));
        CHECK(notif == NULL);
    }
}

static uccl_notif_t *some_notif(const fixture *f)
{
    CHECK_OK(uccl_engine_send_notif_bytes(f->conn, "n", 1, "m", 1));
    return next_notif(f->engine);
}

CASE(uccl_engine_notif_wait)
{
    WITH_FIXTURE(f)
    {
        uccl_notif_t *const untouched = (uccl_notif_t *)&untouched, *notif = untouched;
        uccl_engine_t *engine;
        FOR_EACH(engine, f.bad_engines) CHECK_MISUSE(uccl_engine_notif_wait(engine, -1, &notif));
        CHECK_MISUSE(uccl_engine_notif_wait(f.engine, -1, NULL));
        CHECK_STATUS(uccl_engine_notif_wait(f.engine, 0, &notif), UCCL_IN_PROGRESS);
        CHECK(notif == untouched);
    }
}

CASE(uccl_engine_notif_name)
{
    WITH_FIXTURE(f)
    {
        size_t len = UNTOUCHED;
        uccl_notif_t *notif = some_notif(&f);
        CHECK_MISUSE_NULL(uccl_engine_notif_name(NULL, &len));
        CHECK_MISUSE_NULL(uccl_engine_notif_name(notif, NULL));
        CHECK(len == UNTOUCHED);
        uccl_engine_notif_free(notif);
    }
}

CASE(uccl_engine_notif_msg)
{
    WITH_FIXTURE(f)
    {
        size_t len = UNTOUCHED;
        uccl_notif_t *notif = some_notif(&f);
        CHECK_MISUSE_NULL(uccl_engine_notif_msg(NULL, &len));
        CHECK_MISUSE_NULL(uccl_engine_notif_msg(notif, NULL));
        CHECK(len == UNTOUCHED);
        uccl_engine_notif_free(notif);
    }
}

CASE(uccl_engine_notif_free)
{
    uccl_engine_notif_free(NULL);
}

/* Transfers. A call of one segment, whatever the function: the checks of local arguments are the same for all. */

typedef struct segment {
    uccl_conn_t *conn;
    uccl_mr_t mr;
    uint8_t *data;
    size_t len;
    struct FifoItem item;
} segment;

typedef int starter(const segment *s, uint64_t *id);

static void check_bad_segments(const fixture *f, starter *start)
{
    const segment good = {f->conn, f->mr, f->mem, 64, f->item};
    const struct {
        uccl_mr_t mr;
        uint8_t *data;
        size_t len;
    } bad[] = {
        {0, good.data, 64},
        {UINT64_MAX, good.data, 64},
        {f->ended_mr, good.data, 64},
        {f->mr, NULL, 64},
        {f->mr, good.data - 1, 64},
        {f->mr, good.data + LEN - 63, 64},
        {f->mr, good.data + LEN, 1},
        {f->mr, good.data, LEN + 1},
        {f->mr, good.data + 1, SIZE_MAX},
        {f->mr, (uint8_t *)(UINTPTR_MAX - 10), 64},
    };
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        segment s = {f->conn, bad[i].mr, bad[i].data, bad[i].len, f->item};
        uint64_t id = UNTOUCHED;
        forget_last_error();
        int status = start(&s, &id);
        CHECK_MSG(status < 0, "bad segment %zu: status %d", i, status);
        CHECK(id == UNTOUCHED);
        check_last_error_is_new();
    }
}

static void check_starter(starter *start)
{
    WITH_FIXTURE(f)
    {
        const segment good = {f.conn, f.mr, f.mem, 64, f.item};
        uccl_conn_t *conn;
        FOR_EACH(conn, f.bad_conns)
        {
            segment s = good;
            uint64_t id = UNTOUCHED;
            s.conn = conn;
            CHECK_MISUSE(start(&s, &id));
            CHECK(id == UNTOUCHED);
        }
        CHECK_MISUSE(start(&good, NULL));
        check_bad_segments(&f, start);
    }
}

/* A vector call, whatever the function. */
typedef struct vector {
    uccl_conn_t *conn;
    const uccl_mr_t *mrs;
    void *const *data;
    const size_t *sizes;
    const struct FifoItem *items; /* NULL where sends have none */
    int n;
} vector;

typedef int vector_starter(const vector *v, uint64_t *id);

static void check_bad_vector(vector_starter *start, vector v, const char *what)
{
    uint64_t id = UNTOUCHED;
    int status = start(&v, &id);
    CHECK_MSG(status < 0, "%s: status %d", what, status);
    CHECK(id == UNTOUCHED);
}

static void check_vector_starter(vector_starter *start, bool has_items)
{
    WITH_FIXTURE(f)
    {
        const uccl_mr_t mrs[] = {f.mr, f.mr};
        void *const data[] = {f.mem, f.mem + 64}, *const outside[] = {f.mem, f.mem + LEN};
        const size_t sizes[] = {64, 64};
        const struct FifoItem items[] = {f.item, f.item};
        const vector good = {f.conn, mrs, data, sizes, items, 2};
        vector v;
#define CHECK_BAD(field, value) (v = good, v.field = (value), check_bad_vector(start, v, #field " = " #value))
        CHECK_BAD(mrs, NULL);
        CHECK_BAD(data, NULL);
        CHECK_BAD(sizes, NULL);
        if (has_items)
            CHECK_BAD(items, NULL);
        CHECK_BAD(n, -1);
        if (has_items)
            CHECK_BAD(n, 0); /* a message of no segments is a message; a write of none is nothing */
        CHECK_BAD(n, INT_MIN);
        CHECK_BAD(n, MAX_IOVS + 1);
        CHECK_BAD(n, INT_MAX);
        CHECK_BAD(data, outside); /* the second segment */
#undef CHECK_BAD
        CHECK_MISUSE(start(&good, NULL));
    }
}

static int do_read(const segment *s, uint64_t *id) { return uccl_engine_read(s->conn, s->mr, s->data, s->len, s->item, id); }
static int do_write(const segment *s, uint64_t *id) { return uccl_engine_write(s->conn, s->mr, s->data, s->len, s->item, id); }
static int do_send(const segment *s, uint64_t *id) { return uccl_engine_send(s->conn, s->mr, s->data, s->len, id); }
static int do_send_async(const segment *s, uint64_t *id) { return uccl_engine_send_async(s->conn, s->mr, s->data, s->len, id); }
static int do_recv_async(const segment *s, uint64_t *id) { return uccl_engine_recv_async(s->conn, s->mr, s->data, s->len, id); }

static int do_read_vector(const vector *v, uint64_t *id)
{
    return uccl_engine_read_vector(v->conn, v->mrs, v->data, v->sizes, v->items, v->n, id);
}

static int do_write_vector(const vector *v, uint64_t *id)
{
    return uccl_engine_write_vector(v->conn, v->mrs, v->data, v->sizes, v->items, v->n, id);
}

static int do_send_vector(const vector *v, uint64_t *id)
{
    return uccl_engine_send_vector(v->conn, v->mrs, (const void *const *)v->data, v->sizes, v->n, id);
}

/* The vector functions with one segment, for the checks of segments. */
static vector one_segment(const segment *s)
{
    return (vector){s->conn, &s->mr, (void *const *)&s->data, &s->len, &s->item, 1};
}

static int do_one_read_vector(const segment *s, uint64_t *id)
{
    vector v = one_segment(s);
    return do_read_vector(&v, id);
}

static int do_one_write_vector(const segment *s, uint64_t *id)
{
    vector v = one_segment(s);
    return do_write_vector(&v, id);
}

static int do_one_send_vector(const segment *s, uint64_t *id)
{
    vector v = one_segment(s);
    return do_send_vector(&v, id);
}

CASE(uccl_engine_read) { check_starter(do_read); }
CASE(uccl_engine_write) { check_starter(do_write); }
CASE(uccl_engine_send) { check_starter(do_send); }
CASE(uccl_engine_send_async) { check_starter(do_send_async); }
CASE(uccl_engine_recv_async) { check_starter(do_recv_async); }

CASE(uccl_engine_read_vector)
{
    check_starter(do_one_read_vector);
    check_vector_starter(do_read_vector, true);
}

CASE(uccl_engine_write_vector)
{
    check_starter(do_one_write_vector);
    check_vector_starter(do_write_vector, true);
}

CASE(uccl_engine_send_vector)
{
    check_starter(do_one_send_vector);
    check_vector_starter(do_send_vector, false);
    /* Two segments of a region larger than any memory, which together have as many bytes as 64 bits can count, and one more. */
    WITH_FIXTURE(f)
    {
        uccl_mr_t huge;
        CHECK_OK(uccl_engine_reg(f.engine, (size_t)f.mem, SIZE_MAX / 2 + 1, &huge));
        const uccl_mr_t mrs[] = {huge, huge};
        void *const data[] = {f.mem, f.mem};
        const size_t sizes[] = {SIZE_MAX / 2 + 1, SIZE_MAX / 2 + 1};
        const vector v = {f.conn, mrs, data, sizes, NULL, 2};
        check_bad_vector(do_send_vector, v, "lengths that wrap around");
        uccl_engine_mr_destroy(f.engine, huge);
    }
}

/* Lists: what is wrong with the arrays shows when the list is made, the rest when it is started. */
static char no_list[1];

static int do_list(const vector *v, uint64_t *id, bool read)
{
    uccl_list_t *list = (void *)no_list;
    int status = uccl_engine_list_create(v->mrs, v->data, v->sizes, v->items, v->n, &list);
    if (status < 0) {
        CHECK(list == (void *)no_list);
        return status;
    }
    status = read ? uccl_engine_list_read(v->conn, list, id) : uccl_engine_list_write(v->conn, list, id);
    uccl_engine_list_free(list);
    return status;
}

static int do_list_read(const vector *v, uint64_t *id) { return do_list(v, id, true); }
static int do_list_write(const vector *v, uint64_t *id) { return do_list(v, id, false); }

static int do_one_list_read(const segment *s, uint64_t *id)
{
    vector v = one_segment(s);
    return do_list_read(&v, id);
}

static int do_one_list_write(const segment *s, uint64_t *id)
{
    vector v = one_segment(s);
    return do_list_write(&v, id);
}

CASE(uccl_engine_list_create)
{
    WITH_FIXTURE(f)
    {
        const uccl_mr_t mrs[] = {f.mr};
        void *const data[] = {f.mem};
        const size_t sizes[] = {64};
        const struct FifoItem items[] = {f.item};
        CHECK_MISUSE(uccl_engine_list_create(mrs, data, sizes, items, 1, NULL));
    }
}

static void check_list_handles(int (*start)(uccl_conn_t *, const uccl_list_t *, uint64_t *))
{
    WITH_FIXTURE(f)
    {
        uint64_t id = UNTOUCHED;
        CHECK_MISUSE(start(f.conn, NULL, &id));
        CHECK_MISUSE(start(f.conn, (void *)no_list, &id));
        CHECK(id == UNTOUCHED);
    }
}

CASE(uccl_engine_list_read)
{
    check_starter(do_one_list_read);
    check_vector_starter(do_list_read, true);
    check_list_handles(uccl_engine_list_read);
}

CASE(uccl_engine_list_write)
{
    check_starter(do_one_list_write);
    check_vector_starter(do_list_write, true);
    check_list_handles(uccl_engine_list_write);
}

CASE(uccl_engine_list_free)
{
    uccl_engine_list_free(NULL);
    uccl_engine_list_free((void *)no_list);
}

/* Has no id; otherwise as the others. */
static int do_recv(const segment *s, uint64_t *id)
{
    (void)id;
    return uccl_engine_recv(s->conn, s->mr, s->data, s->len);
}

CASE(uccl_engine_recv)
{
    WITH_FIXTURE(f)
    {
        uccl_conn_t *conn;
        FOR_EACH(conn, f.bad_conns) CHECK_MISUSE(uccl_engine_recv(conn, f.mr, f.mem, 64));
        check_bad_segments(&f, do_recv);
    }
}

/* An id that one connection gave means nothing to another, and neither do invented ones. */
CASE(uccl_engine_poll)
{
    WITH_FIXTURE(f)
    {
        uint64_t id;
        uccl_xfer_info_t info, before;
        wipe((uint8_t *)&info, sizeof info);
        before = info;
        CHECK_OK(uccl_engine_write(f.conn, f.mr, f.mem, 64, f.item, &id));
        uccl_conn_t *conn;
        FOR_EACH(conn, f.bad_conns) CHECK_MISUSE(uccl_engine_poll(conn, id, &info));
        CHECK(memcmp(&info, &before, sizeof info) == 0);
        CHECK_STATUS(uccl_engine_poll(f.conn, UINT64_MAX, &info), UCCL_ERR_NOT_FOUND);
        CHECK_STATUS(uccl_engine_poll(f.conn, id + 1000, NULL), UCCL_ERR_NOT_FOUND);
        CHECK_OK(outcome(f.conn, id));
        CHECK_OK(uccl_engine_poll(f.conn, id, NULL));
    }
}

CASE(uccl_engine_xfer_path)
{
    WITH_FIXTURE(f)
    {
        uint64_t id, large;
        uccl_xfer_path_t path = {.size = sizeof path, .channels = UNTOUCHED};
        CHECK_OK(uccl_engine_read(f.conn, f.mr, f.mem, 64, f.item, &id));
        CHECK_OK(outcome(f.conn, id));
        uccl_conn_t *conn;
        FOR_EACH(conn, f.bad_conns) CHECK_MISUSE(uccl_engine_xfer_path(conn, id, &path));
        CHECK_MISUSE(uccl_engine_xfer_path(f.conn, id, NULL));
        CHECK_STATUS(uccl_engine_xfer_path(f.conn, 0, &path), UCCL_ERR_NOT_FOUND);
        CHECK_STATUS(uccl_engine_xfer_path(f.conn, id + 1000, &path), UCCL_ERR_NOT_FOUND);
        path.size = 8;
        CHECK_MISUSE(uccl_engine_xfer_path(f.conn, id, &path));
        CHECK(path.channels == UNTOUCHED);
        path.size = sizeof path;
        CHECK_OK(uccl_engine_xfer_path(f.conn, id, &path));
        CHECK(strcmp(path.carriers, "eager") == 0 || strcmp(path.carriers, "direct") == 0 || path.nics[0]);
        /* What it says of a large transfer is what the channels have counted. */
        CHECK_OK(uccl_engine_write(f.conn, f.mr, f.mem, LEN, f.item, &large));
        CHECK_OK(outcome(f.conn, large));
        CHECK_OK(uccl_engine_xfer_path(f.conn, large, &path));
        CHECK(path.channels != 0 && path.carriers[0] && !strchr(path.carriers, ','));
        for (size_t i = 0; i < 64; i++) {
            uccl_channel_stats_t stats = {.size = sizeof stats};
            if (!(path.channels >> i & 1)) continue;
            CHECK_OK(uccl_engine_channel_stats(f.conn, i, &stats));
            CHECK(stats.sent_bytes > 0 && strcmp(stats.carrier, path.carriers) == 0);
            CHECK(strcmp(stats.carrier, "direct") == 0 || strstr(path.nics, stats.nic));
        }
    }
}

CASE(uccl_engine_wait)
{
    WITH_FIXTURE(f)
    {
        uint64_t id, never;
        CHECK_OK(uccl_engine_write(f.conn, f.mr, f.mem, 64, f.item, &id));
        uccl_conn_t *conn;
        FOR_EACH(conn, f.bad_conns) CHECK_MISUSE(uccl_engine_wait(conn, id, -1));
        CHECK_STATUS(uccl_engine_wait(f.conn, UINT64_MAX, -1), UCCL_ERR_NOT_FOUND);
        CHECK_STATUS(uccl_engine_wait(f.conn, id + 1000, 0), UCCL_ERR_NOT_FOUND);
        CHECK_OK(uccl_engine_wait(f.conn, id, -1));
        CHECK_OK(uccl_engine_wait(f.conn, id, INT64_MIN));
        CHECK_OK(uccl_engine_wait(f.conn, id, INT64_MAX));
        CHECK_OK(uccl_engine_recv_async(f.conn, f.mr, f.mem, 64, &never));
        CHECK_STATUS(uccl_engine_wait(f.conn, never, 0), UCCL_IN_PROGRESS);
        CHECK_STATUS(uccl_engine_wait(f.conn, never, 20), UCCL_IN_PROGRESS);
    }
}

CASE(uccl_engine_xfer_status)
{
    WITH_FIXTURE(f)
    {
        uint64_t id;
        CHECK_OK(uccl_engine_write(f.conn, f.mr, f.mem, 64, f.item, &id));
        CHECK_OK(outcome(f.conn, id));
        uccl_conn_t *conn;
        FOR_EACH(conn, f.bad_conns) CHECK(!uccl_engine_xfer_status(conn, id));
        CHECK(!uccl_engine_xfer_status(f.conn, UINT64_MAX));
        CHECK(!uccl_engine_xfer_status(f.conn, id + 1000));
        CHECK(uccl_engine_xfer_status(f.conn, id));
    }
}
