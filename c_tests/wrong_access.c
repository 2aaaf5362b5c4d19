/* What a peer may not do to memory: every wrong access is refused with UCCL_ERR_REMOTE_ACCESS, moves nothing into the target's
 * memory, and leaves the connection usable. */
#include "support.h"

#define TARGET_LEN (256 * KIB)
/* Accesses of this length take the way of large transfers, those of the other one may travel with the control message. */
static const size_t LENGTHS[] = {64, 128 * KIB};

static int transfer_item(const side *s, direction d, size_t len, struct FifoItem item, uint64_t *id)
{
    return d == WRITE ? uccl_engine_write(s->conn, s->mr, s->mine, len, item, id)
                      : uccl_engine_read(s->conn, s->mr, s->mine, len, item, id);
}

/* A legitimate write of the first bytes, taken back, so that the target's memory can be compared as a whole afterwards. */
static void check_usable(const side *s)
{
    for (int i = 0; i < 2; i++) {
        uint64_t id;
        CHECK_OK(start(s, WRITE, 0, 0, LENGTHS[i], &id));
        CHECK_OK(outcome(s->conn, id));
        check_same("write", s->theirs, s->mine, LENGTHS[i]);
        wipe(s->theirs, LENGTHS[i]);
    }
}

static void check_refused_once(const side *s, direction d, const char *what, struct FifoItem item, size_t len)
{
    uint64_t id;
    CHECK_OK(transfer_item(s, d, len, item, &id));
    int status = outcome(s->conn, id);
    CHECK_MSG(status == UCCL_ERR_REMOTE_ACCESS, "%s of %zu bytes, %s: status %d (%s)", direction_name(d), len, what, status,
              uccl_engine_strerror(status));
    CHECK(!uccl_engine_xfer_status(s->conn, id));
    CHECK_STATUS(uccl_engine_poll(s->conn, id, NULL), UCCL_ERR_REMOTE_ACCESS);
    CHECK_MSG(is_wiped(s->theirs, s->len), "%s, %s: target memory was touched", direction_name(d), what);
}

static void check_refused(const side *s, const char *what, struct FifoItem item)
{
    fill(s->mine, s->len, 1);
    for (int i = 0; i < 2; i++)
        for (int d = 0; d < 2; d++)
            check_refused_once(s, DIRECTIONS[d], what, item, LENGTHS[i]);
}

static void forge_tokens(side *s)
{
    wipe(s->theirs, s->len);
    for (size_t i = 0; i < sizeof s->item.padding; i++) {
        struct FifoItem item = s->item;
        char what[32];
        snprintf(what, sizeof what, "opaque byte %zu flipped", i);
        item.padding[i] ^= 0x10;
        check_refused(s, what, item);
    }
    struct FifoItem item = s->item;
    item.idx += 1000;
    check_refused(s, "unknown region", item);
    item = s->item;
    memset(item.padding, 0, sizeof item.padding);
    check_refused(s, "no token", item);
    check_usable(s);
}

CASE(wrong_token) { run_pair(TARGET_LEN, forge_tokens, NULL); }

static void leave_bounds(side *s)
{
    uint64_t first = s->item.addr, end = first + s->len;
    const struct {
        const char *what;
        uint64_t addr;
    } bad[] = {
        {"one byte below", first - 1},
        {"far below", first - 64 * MIB},
        {"one byte beyond the end", end - 63},
        {"at the end", end},
        {"far beyond", end + 64 * MIB},
        {"address 0", 0},
        {"wraps around to 0", UINT64_MAX - 63},
        {"wraps around", UINT64_MAX - 10},
    };
    wipe(s->theirs, s->len);
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        struct FifoItem item = s->item;
        CHECK_OK(uccl_engine_update_fifo(&item, bad[i].addr, 64));
        check_refused(s, bad[i].what, item);
    }
    check_usable(s);
}

CASE(out_of_bounds) { run_pair(TARGET_LEN, leave_bounds, NULL); }

/* One bad segment among good ones refuses the whole transfer. */
static void mix_good_and_bad(side *s)
{
    struct FifoItem bad = their_item(s, s->len - 1, 2);
    struct FifoItem items[] = {s->item, their_item(s, 1000, 100), bad};
    uccl_mr_t mrs[] = {s->mr, s->mr, s->mr};
    void *local[] = {s->mine, s->mine + 1000, s->mine + 2000};
    size_t sizes[] = {100, 100, 2};
    uint64_t id;
    wipe(s->theirs, s->len);
    fill(s->mine, s->len, 2);
    CHECK_OK(uccl_engine_write_vector(s->conn, mrs, local, sizes, items, 3, &id));
    CHECK_STATUS(outcome(s->conn, id), UCCL_ERR_REMOTE_ACCESS);
    CHECK(is_wiped(s->theirs, s->len));
    CHECK_OK(uccl_engine_read_vector(s->conn, mrs, local, sizes, items, 3, &id));
    CHECK_STATUS(outcome(s->conn, id), UCCL_ERR_REMOTE_ACCESS);
    check_usable(s);
}

CASE(one_bad_segment) { run_pair(TARGET_LEN, mix_good_and_bad, NULL); }

/* The target registers its memory again, sends access to that, and takes it away on request. */
static void lend_region(side *s)
{
    uccl_mr_t mr = region_add(s->engine, s->mine, s->len);
    struct FifoItem item = region_item(s->engine, mr, s->mine, s->len);
    link_send(s, &item, sizeof item);
    meet(s);
    uccl_engine_mr_destroy(s->engine, mr);
    meet(s);
}

static void use_after_return(side *s)
{
    struct FifoItem lent;
    uint64_t id;
    link_recv(s, &lent, sizeof lent);
    wipe(s->theirs, s->len);
    fill(s->mine, s->len, 3);
    CHECK_OK(transfer_item(s, WRITE, LENGTHS[1], lent, &id));
    CHECK_OK(outcome(s->conn, id));
    check_same("write", s->theirs, s->mine, LENGTHS[1]);
    wipe(s->theirs, s->len);
    meet(s);
    meet(s);
    check_refused(s, "deregistered region", lent);
    check_usable(s);
}

CASE(deregistered_region) { run_pair(TARGET_LEN, use_after_return, lend_region); }

/* Access to another engine's memory does not come with a connection to this one, though both live in one process. */
static void lend_from_other_engine(side *s)
{
    uccl_engine_t *other = engine_start();
    uccl_mr_t mr = region_add(other, s->mine, s->len);
    struct FifoItem item = region_item(other, mr, s->mine, s->len);
    link_send(s, &item, sizeof item);
    meet(s);
    uccl_engine_destroy(other);
}

static void use_wrong_connection(side *s)
{
    struct FifoItem foreign;
    link_recv(s, &foreign, sizeof foreign);
    wipe(s->theirs, s->len);
    check_refused(s, "region of another engine", foreign);
    check_usable(s);
    meet(s);
}

CASE(region_of_another_engine) { run_pair(TARGET_LEN, use_wrong_connection, lend_from_other_engine); }

static const char *access_name(uint32_t access)
{
    const char *const names[] = {"no access", "read-only", "write-only", "read and write"};
    return names[access];
}

/* The target registers its memory again for each kind of access and sends the FIFO item of that. */
static void lend_with_access(side *s)
{
    for (uint32_t access = 0; access <= (UCCL_ACCESS_REMOTE_READ | UCCL_ACCESS_REMOTE_WRITE); access++) {
        uccl_mr_t mr = 0;
        CHECK_OK(uccl_engine_reg_with(s->engine, (size_t)s->mine, s->len, access, &mr));
        struct FifoItem item = region_item(s->engine, mr, s->mine, s->len);
        link_send(s, &item, sizeof item);
        meet(s);
        uccl_engine_mr_destroy(s->engine, mr);
    }
}

/* Reads and writes both ways of travelling: what the region allows happens, the rest is refused and touches nothing. */
static void respect_access(side *s)
{
    for (uint32_t access = 0; access <= (UCCL_ACCESS_REMOTE_READ | UCCL_ACCESS_REMOTE_WRITE); access++) {
        const bool allowed[] = {[READ] = access & UCCL_ACCESS_REMOTE_READ, [WRITE] = access & UCCL_ACCESS_REMOTE_WRITE};
        struct FifoItem lent;
        link_recv(s, &lent, sizeof lent);
        for (int i = 0; i < 2; i++)
            for (int d = 0; d < 2; d++) {
                uint64_t id;
                wipe(s->theirs, s->len);
                fill(s->mine, s->len, 4 + access);
                if (!allowed[DIRECTIONS[d]]) {
                    check_refused_once(s, DIRECTIONS[d], access_name(access), lent, LENGTHS[i]);
                    continue;
                }
                CHECK_OK(transfer_item(s, DIRECTIONS[d], LENGTHS[i], lent, &id));
                CHECK_MSG(outcome(s->conn, id) == UCCL_OK, "%s of %zu bytes, %s", direction_name(DIRECTIONS[d]), LENGTHS[i], access_name(access));
                check_same(direction_name(DIRECTIONS[d]), s->theirs, s->mine, LENGTHS[i]);
            }
        meet(s);
    }
    check_usable(s);
}

CASE(access_of_peers) { run_pair(TARGET_LEN, respect_access, lend_with_access); }
