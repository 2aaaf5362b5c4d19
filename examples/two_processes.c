/* Two processes move memory. The child offers a region; the parent writes to it, sends a notification, and reads back the bytes that the
 * child has reversed.
 *
 *   cc two_processes.c -luccl_p2p -o two_processes && ./two_processes
 *
 * In a real program the two processes run on two hosts, and the offer travels over any connection between them. Here it is a socket pair. */
#include <uccl_engine.h>

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#define SIZE ((size_t)4 << 20)

/* What the target gives to the initiator: the address of its engine, and access to its region. */
struct offer {
    char metadata[256];
    char item[UCCL_FIFO_SIZE];
};

/* Ends the process unless the condition holds, and prints the library's error text. */
static void need(int holds, const char *what)
{
    if (holds)
        return;
    fprintf(stderr, "%s: %s\n", what, uccl_engine_last_error());
    exit(1);
}

static void reverse(unsigned char *bytes, size_t size)
{
    for (size_t i = 0; i < size / 2; i++) {
        unsigned char first = bytes[i];
        bytes[i] = bytes[size - 1 - i];
        bytes[size - 1 - i] = first;
    }
}

/* Waits for the notification with this name. */
static void await(uccl_engine_t *engine, const char *wanted)
{
    for (;;) {
        uccl_notif_t *notif = NULL;
        need(uccl_engine_notif_next(engine, &notif) == UCCL_OK, "notif_next");
        if (!notif) {
            usleep(100);
            continue;
        }
        size_t len;
        const char *name = uccl_engine_notif_name(notif, &len);
        int found = len == strlen(wanted) && memcmp(name, wanted, len) == 0;
        uccl_engine_notif_free(notif);
        if (found)
            return;
    }
}

static void target(int link)
{
    /* [readme] */
    /* On one host, the target offers memory. It sends its metadata (the engine's address) and the FIFO item (the region's address and
     * token) to the initiator by any means, here as a struct. */
    uccl_engine_t *engine = uccl_engine_create(0, false);
    need(engine != NULL, "create");
    unsigned char *buffer = calloc(1, SIZE);
    uccl_mr_t mr;
    need(buffer && uccl_engine_reg(engine, (size_t)buffer, SIZE, &mr) == UCCL_OK, "reg");
    struct offer offer;
    need(uccl_engine_metadata_into(engine, offer.metadata, sizeof offer.metadata, NULL) == UCCL_OK, "metadata_into");
    need(uccl_engine_prepare_fifo(engine, mr, buffer, SIZE, offer.item) == UCCL_OK, "prepare_fifo");
    /* [end] */
    need(write(link, &offer, sizeof offer) == sizeof offer, "sending the offer");

    /* A notification arrives after the data of transfers that were complete when it was sent. */
    char ip[64];
    int gpu;
    uccl_conn_t *conn = uccl_engine_accept(engine, ip, sizeof ip, &gpu);
    need(conn != NULL, "accept");
    await(engine, "written");
    reverse(buffer, SIZE);
    need(uccl_engine_send_notif_bytes(conn, "reversed", 8, NULL, 0) == UCCL_OK, "send_notif_bytes");
    await(engine, "read");

    uccl_engine_conn_destroy(conn);
    uccl_engine_mr_destroy(engine, mr);
    uccl_engine_destroy(engine);
    free(buffer);
}

static void initiator(int link)
{
    /* [readme] */
    /* On the other host, the initiator registers memory of its own... */
    uccl_engine_t *engine = uccl_engine_create(0, false);
    need(engine != NULL, "create");
    unsigned char *buffer = malloc(SIZE);
    uccl_mr_t mr;
    need(buffer && uccl_engine_reg(engine, (size_t)buffer, SIZE, &mr) == UCCL_OK, "reg");
    /* [end] */

    struct offer offer;
    need(recv(link, &offer, sizeof offer, MSG_WAITALL) == sizeof offer, "receiving the offer");
    for (size_t i = 0; i < SIZE; i++)
        buffer[i] = (unsigned char)(i * 7 + i / 251);

    /* [readme] */
    /* ...connects to the engine that the offer names... */
    char ip[64], gpu[512];
    int port;
    need(uccl_engine_parse_metadata(offer.metadata, ip, sizeof ip, &port, gpu, sizeof gpu) == UCCL_OK, "parse_metadata");
    uccl_conn_t *conn = uccl_engine_connect(engine, ip, gpu, port, false);
    need(conn != NULL, "connect");

    /* ...and writes. When wait returns, every byte is in place at the target. */
    FifoItem item;
    memcpy(&item, offer.item, sizeof item);
    uint64_t id;
    need(uccl_engine_write(conn, mr, buffer, SIZE, item, &id) == UCCL_OK, "write");
    need(uccl_engine_wait(conn, id, -1) == UCCL_OK, "the write");
    /* [end] */
    need(uccl_engine_send_notif_bytes(conn, "written", 7, NULL, 0) == UCCL_OK, "send_notif_bytes");

    /* Read the second half of the reversed bytes. */
    await(engine, "reversed");
    unsigned char *copy = malloc(SIZE);
    uccl_mr_t copy_mr;
    need(copy && uccl_engine_reg(engine, (size_t)copy, SIZE, &copy_mr) == UCCL_OK, "reg");
    need(uccl_engine_update_fifo(&item, item.addr + SIZE / 2, SIZE / 2) == UCCL_OK, "update_fifo");
    need(uccl_engine_read(conn, copy_mr, copy + SIZE / 2, SIZE / 2, item, &id) == UCCL_OK, "read");
    need(uccl_engine_wait(conn, id, -1) == UCCL_OK, "the read");
    need(uccl_engine_send_notif_bytes(conn, "read", 4, NULL, 0) == UCCL_OK, "send_notif_bytes");
    reverse(buffer, SIZE);
    need(memcmp(buffer + SIZE / 2, copy + SIZE / 2, SIZE / 2) == 0, "comparing");

    uccl_engine_conn_destroy(conn);
    uccl_engine_mr_destroy(engine, mr);
    uccl_engine_mr_destroy(engine, copy_mr);
    uccl_engine_destroy(engine);
    free(buffer);
    free(copy);
}

int main(void)
{
    int link[2];
    need(socketpair(AF_UNIX, SOCK_STREAM, 0, link) == 0, "socketpair");
    pid_t child = fork();
    need(child >= 0, "fork");
    if (child == 0) {
        close(link[1]);
        target(link[0]);
        return 0;
    }
    close(link[0]);
    initiator(link[1]);
    int status = 0;
    need(waitpid(child, &status, 0) == child && status == 0, "the target");
    printf("%zu bytes written, reversed and read back\n", SIZE);
    return 0;
}
