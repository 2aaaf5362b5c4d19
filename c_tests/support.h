/* What the tests share: links between processes, and pairs of connected engines in one process or in two. */
#pragma once

#ifndef _DEFAULT_SOURCE
#define _DEFAULT_SOURCE
#endif

#include "cases.h"
#include "check.h"
#include "memory.h"
#include "uccl_engine.h"

#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/types.h>

#define LOOPBACK "127.0.0.1"
/* Far beyond any honest duration, below the timeout of CTest: what is not over by then hangs. */
#define HANG_MS 40000

#define CHECK_STATUS(expr, want)                                                                                   \
    do {                                                                                                           \
        int check_got = (expr), check_want = (want);                                                               \
        CHECK_MSG(check_got == check_want, "%s is %d (%s), expected %d; last error: %s", #expr, check_got,         \
                  uccl_engine_strerror(check_got), check_want, uccl_engine_last_error());                          \
    } while (0)
#define CHECK_OK(expr) CHECK_STATUS(expr, UCCL_OK)
#define CHECK_FAILS(expr)                                                                                          \
    do {                                                                                                           \
        int check_got = (expr);                                                                                    \
        CHECK_MSG(check_got < 0, "%s is %d, expected an error", #expr, check_got);                                 \
        CHECK_MSG(*uccl_engine_strerror(check_got), "status %d has no text", check_got);                           \
    } while (0)

int64_t now_ms(void);
void sleep_ms(int ms);

/* Engines. */
typedef struct address {
    char ip[64], gpu[512];
    int port;
} address;

uccl_engine_t *engine_start(void);
address engine_address(uccl_engine_t *engine);
uccl_conn_t *join(uccl_engine_t *engine, const address *peer, bool same_process);
uccl_conn_t *take_connection(uccl_engine_t *engine);
uccl_mr_t region_add(uccl_engine_t *engine, const void *p, size_t len);
struct FifoItem region_item(uccl_engine_t *engine, uccl_mr_t mr, const void *p, size_t len);
struct FifoItem item_at(struct FifoItem item, const void *addr, size_t len);

/* One end of a connection, with a region of memory. */
typedef struct side {
    uccl_engine_t *engine;
    uccl_conn_t *conn;
    uint8_t *mine, *theirs; /* the regions of this side and of the other, as this process sees them */
    size_t len;             /* of each */
    uccl_mr_t mr;           /* of mine */
    struct FifoItem item;   /* gives access to theirs, with its address in the process that registered it */
    int link;               /* two processes: a socket to the other; -1 in one process */
    pid_t child;            /* two processes: the target's, in the initiator */
} side;

typedef void role(side *s);

/* Two processes with an engine each, connected; each runs its role (NULL: nothing), then both close. */
void run_pair(size_t len, role *initiator, role *target);
/* The same in steps, for an initiator that does not close in the usual way. The target runs its role and then waits. */
void pair_start(side *s, size_t len, role *target);
void pair_end(side *s);
/* Two connected engines of this process. */
void local_pair(side *initiator, side *target, size_t len);
void side_close(side *s);

void link_send(const side *s, const void *data, size_t len);
void link_recv(const side *s, void *data, size_t len);
/* Returns when the other process called it as well. */
void meet(const side *s);

/* Transfers. */
typedef enum direction { WRITE, READ } direction;

static const direction DIRECTIONS[] = {WRITE, READ};

const char *direction_name(direction d);
struct FifoItem their_item(const side *s, size_t there, size_t len);
/* Starts a transfer between mine + here and theirs + there. */
int start(const side *s, direction d, size_t here, size_t there, size_t len, uint64_t *id);
/* The status a transfer ends with; it must end within HANG_MS. */
int outcome(uccl_conn_t *conn, uint64_t id);

/* The next notification of an engine (NULL: of the process), waiting for it at most HANG_MS. Its caller frees it. */
uccl_notif_t *next_notif(uccl_engine_t *engine);
