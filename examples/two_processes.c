/* Two processes move memory: the child offers a region, the parent writes to it, tells it so, and reads back what the child made of it.
 *
 *   cc two_processes.c -luccl_p2p -o two_processes && ./two_processes
 *
 * A real program starts its two sides on two hosts; what goes through the pipe here then goes through whatever connects them. */
#include <uccl_engine.h>

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#define SIZE ((size_t)4 << 20)

/* What the target gives to the initiator: where its engine is, and access to its region. */
struct offer {
    char metadata[256];
    char item[UCCL_FIFO_SIZE];
};

/* Ends the process unless the condition holds; the library has the cause in words. */
static void need(int holds, const char *what)
{
    if (holds)
        return;
    fprintf(stderr, "%s: %s\n", what, uccl_engine_last_error());
    exit(1);
}

static void turn_round(unsigned char *bytes, size_t size)
{
    for (size_t i = 0; i < size / 2; i++) {
        unsigned char first = bytes[i];
        bytes[i] = bytes[size - 1 - i];
        bytes[size - 1 - i] = first;
    }
}

/* Waits for the notification of this name. */
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
    uccl_engine_t *engine = uccl_engine_create(0, false);
    need(engine != NULL, "create");

    /* [readme] */
    /* The target offers memory. Its FIFO item carries the permission to read and write it; send both to the initiator by any means. */
    unsigned char *buffer = calloc(1, SIZE);
    uccl_mr_t mr;
    need(buffer && uccl_engine_reg(engine, (size_t)buffer, SIZE, &mr) == UCCL_OK, "reg");
    struct offer offer;
    need(uccl_engine_metadata_into(engine, offer.metadata, sizeof offer.metadata, NULL) == UCCL_OK, "metadata_into");
    need(uccl_engine_prepare_fifo(engine, mr, buffer, SIZE, offer.item) == UCCL_OK, "prepare_fifo");
    /* [end] */
    need(write(link, &offer, sizeof offer) == sizeof offer, "sending the offer");

    /* The data is here when its notification is. */
    char ip[64];
    int gpu;
    uccl_conn_t *conn = uccl_engine_accept(engine, ip, sizeof ip, &gpu);
    need(conn != NULL, "accept");
    await(engine, "written");
    turn_round(buffer, SIZE);
    need(uccl_engine_send_notif_bytes(conn, "turned", 6, NULL, 0) == UCCL_OK, "send_notif_bytes");
    await(engine, "read");

    uccl_engine_conn_destroy(conn);
    uccl_engine_mr_destroy(engine, mr);
    uccl_engine_destroy(engine);
    free(buffer);
}

static void initiator(int link)
{
    uccl_engine_t *engine = uccl_engine_create(0, false);
    need(engine != NULL, "create");
    unsigned char *buffer = malloc(SIZE);
    uccl_mr_t mr;
    need(buffer && uccl_engine_reg(engine, (size_t)buffer, SIZE, &mr) == UCCL_OK, "reg");

    struct offer offer;
    need(recv(link, &offer, sizeof offer, MSG_WAITALL) == sizeof offer, "receiving the offer");
    for (size_t i = 0; i < SIZE; i++)
        buffer[i] = (unsigned char)(i * 7 + i / 251);

    /* [readme] */
    /* The initiator connects to where the offer says. */
    char ip[64], gpu[64];
    int port;
    need(uccl_engine_parse_metadata(offer.metadata, ip, sizeof ip, &port, gpu, sizeof gpu) == UCCL_OK, "parse_metadata");
    uccl_conn_t *conn = uccl_engine_connect(engine, ip, gpu, port, false);
    need(conn != NULL, "connect");

    /* It writes. Complete means that every byte is in place over there. */
    FifoItem item;
    memcpy(&item, offer.item, sizeof item);
    uint64_t id;
    need(uccl_engine_write(conn, mr, buffer, SIZE, item, &id) == UCCL_OK, "write");
    need(uccl_engine_wait(conn, id, -1) == UCCL_OK, "the write");
    /* [end] */
    need(uccl_engine_send_notif_bytes(conn, "written", 7, NULL, 0) == UCCL_OK, "send_notif_bytes");

    /* Read the second half of what the target made of it. */
    await(engine, "turned");
    unsigned char *copy = malloc(SIZE);
    uccl_mr_t copy_mr;
    need(copy && uccl_engine_reg(engine, (size_t)copy, SIZE, &copy_mr) == UCCL_OK, "reg");
    need(uccl_engine_update_fifo(&item, item.addr + SIZE / 2, SIZE / 2) == UCCL_OK, "update_fifo");
    need(uccl_engine_read(conn, copy_mr, copy + SIZE / 2, SIZE / 2, item, &id) == UCCL_OK, "read");
    need(uccl_engine_wait(conn, id, -1) == UCCL_OK, "the read");
    need(uccl_engine_send_notif_bytes(conn, "read", 4, NULL, 0) == UCCL_OK, "send_notif_bytes");
    turn_round(buffer, SIZE);
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
    printf("%zu bytes written, turned round and read back\n", SIZE);
    return 0;
}
