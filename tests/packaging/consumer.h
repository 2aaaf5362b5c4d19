/* Two engines of this process, one write and one read between them: the smallest program that shows that a linked library works.
 * In the common part of C and C++, so that it compiles as both; the error text comes from a call that both have. */
#pragma once

#include "uccl_engine.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define NEED(cond)                                                                                                 \
    do {                                                                                                           \
        if (!(cond)) {                                                                                             \
            fprintf(stderr, "%s:%d: %s: %s\n", __FILE__, __LINE__, #cond, uccl_engine_last_error());               \
            exit(1);                                                                                               \
        }                                                                                                          \
    } while (0)

static int move_data(const char *expected_version)
{
    static char source[100000], target[100000];
    char text[256];
    char item_bytes[FIFO_SIZE];
    char *question, *colon;
    struct FifoItem item;
    uccl_mr_t source_mr, target_mr;
    uint64_t id;
    size_t i;
    uccl_engine_t *a = uccl_engine_create(0, false), *b = uccl_engine_create(0, false);
    uccl_conn_t *conn;

    NEED(a != NULL && b != NULL);
    if (expected_version != NULL && strcmp(expected_version, uccl_engine_version()) != 0) {
        fprintf(stderr, "version %s, expected %s\n", uccl_engine_version(), expected_version);
        return 1;
    }
    NEED(uccl_engine_metadata_into(b, text, sizeof(text), NULL) == UCCL_OK);
    question = strchr(text, '?');
    NEED(question != NULL);
    *question = '\0';
    colon = strrchr(text, ':');
    NEED(colon != NULL);
    *colon = '\0';
    conn = uccl_engine_connect(a, text, question + 1, atoi(colon + 1), true);
    NEED(conn != NULL);

    for (i = 0; i < sizeof(source); ++i)
        source[i] = (char)(i * 7 + i / 256);
    NEED(uccl_engine_reg(a, (size_t)source, sizeof(source), &source_mr) == UCCL_OK);
    NEED(uccl_engine_reg(b, (size_t)target, sizeof(target), &target_mr) == UCCL_OK);
    NEED(uccl_engine_prepare_fifo(b, target_mr, target, sizeof(target), item_bytes) == UCCL_OK);
    memcpy(&item, item_bytes, sizeof(item));
    NEED(uccl_engine_write(conn, source_mr, source, sizeof(source), item, &id) == UCCL_OK);
    NEED(uccl_engine_wait(conn, id, 30000) == UCCL_OK);
    NEED(memcmp(source, target, sizeof(source)) == 0);
    memset(source, 0, sizeof(source));
    NEED(uccl_engine_read(conn, source_mr, source, sizeof(source), item, &id) == UCCL_OK);
    NEED(uccl_engine_wait(conn, id, 30000) == UCCL_OK);
    NEED(memcmp(source, target, sizeof(source)) == 0);

    uccl_engine_conn_destroy(conn);
    uccl_engine_mr_destroy(a, source_mr);
    uccl_engine_mr_destroy(b, target_mr);
    uccl_engine_destroy(a);
    uccl_engine_destroy(b);
    printf("libuccl_p2p %s moved data\n", uccl_engine_version());
    return 0;
}
