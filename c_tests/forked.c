/* fork in a program that has engines and connections: the child's copies of the handles do nothing to the parent's connections, say
 * whose they are when they are used, and do not keep the child from having engines of its own. */
#include "support.h"

#include <pthread.h>
#include <stdatomic.h>
#include <sys/wait.h>

#define LEN MIB

/* Runs `body` in a child, which must end well within the time of a hang. */
static void in_child(void (*body)(void *), void *argument)
{
    fflush(NULL);
    pid_t pid = fork();
    CHECK(pid >= 0);
    if (pid == 0) {
        body(argument);
        _exit(0);
    }
    int status = 0;
    int64_t deadline = now_ms() + HANG_MS;
    pid_t ended;
    while ((ended = waitpid(pid, &status, WNOHANG)) == 0 && now_ms() < deadline)
        sleep_ms(5);
    CHECK_MSG(ended == pid, "the child hangs");
    CHECK_MSG(WIFEXITED(status) && WEXITSTATUS(status) == 0, "the child ended with wait status 0x%x", status);
}

static void move(side *from, side *to, unsigned seed)
{
    uint64_t id;
    fill(from->mine, from->len, seed);
    CHECK_OK(start(from, WRITE, 0, 0, from->len, &id));
    CHECK_OK(outcome(from->conn, id));
    check_same("write", to->mine, from->mine, from->len);
}

static void pair_ends(side *a, side *b)
{
    side_close(a);
    side_close(b);
}

static void destroy_all(void *argument)
{
    side *sides = argument;
    int64_t start = now_ms();
    for (int i = 0; i < 2; i++) {
        uccl_engine_stop_accept(sides[i].engine);
        uccl_engine_conn_destroy(sides[i].conn);
        uccl_engine_mr_destroy(sides[i].engine, sides[i].mr);
        uccl_engine_destroy(sides[i].engine);
        /* Twice is not worse than once. */
        uccl_engine_conn_destroy(sides[i].conn);
        uccl_engine_destroy(sides[i].engine);
    }
    CHECK_MSG(uccl_engine_last_status() == UCCL_OK, "%s", uccl_engine_last_error());
    CHECK_MSG(now_ms() - start < 5000, "what does nothing took %lld ms", (long long)(now_ms() - start));
}

/* Several times, while data moves and afterwards. */
CASE(destroying_in_the_child_leaves_the_parents_alone)
{
    side sides[2];
    local_pair(&sides[0], &sides[1], 16 * LEN);
    move(&sides[0], &sides[1], 1);
    for (unsigned i = 0; i < 3; i++) {
        uint64_t id;
        fill(sides[0].mine, sides[0].len, 10 + i);
        CHECK_OK(start(&sides[0], WRITE, 0, 0, sides[0].len, &id));
        in_child(destroy_all, sides);
        CHECK_OK(outcome(sides[0].conn, id));
        check_same("write", sides[1].mine, sides[0].mine, sides[0].len);
        CHECK_OK(uccl_engine_conn_status(sides[0].conn));
        CHECK_OK(uccl_engine_conn_status(sides[1].conn));
        move(&sides[1], &sides[0], 20 + i);
    }
    pair_ends(&sides[0], &sides[1]);
}

#define CHECK_PARENTS(expr)                                                                       \
    do {                                                                                          \
        CHECK_STATUS(expr, UCCL_ERR_NOT_FOUND);                                                   \
        CHECK_MSG(strstr(uccl_engine_last_error(), "belongs to the parent process"), "%s: \"%s\"", #expr, uccl_engine_last_error()); \
    } while (0)

static void use_all(void *argument)
{
    side *s = argument;
    uint64_t id = 0;
    uccl_mr_t mr = 0;
    char text[256], ip[64];
    int gpu;
    bool has_ipc;
    uccl_notif_t *notif = NULL;
    notify_msg_t message = {"child", "hello"};
    size_t count = 99;
    CHECK_PARENTS(uccl_engine_conn_status(s->conn));
    CHECK_PARENTS(uccl_engine_start_listener(s->conn));
    CHECK_PARENTS(uccl_engine_stop_listener(s->conn));
    CHECK_PARENTS(start(s, WRITE, 0, 0, 64, &id));
    CHECK_PARENTS(start(s, READ, 0, 0, 64, &id));
    CHECK_PARENTS(uccl_engine_send(s->conn, s->mr, s->mine, 64, &id));
    CHECK_PARENTS(uccl_engine_recv(s->conn, s->mr, s->mine, 64));
    CHECK_PARENTS(uccl_engine_recv_async(s->conn, s->mr, s->mine, 64, &id));
    CHECK_PARENTS(uccl_engine_poll(s->conn, 1, NULL));
    CHECK_PARENTS(uccl_engine_wait(s->conn, 1, -1));
    CHECK_PARENTS(uccl_engine_send_notif(s->conn, &message));
    CHECK_PARENTS(uccl_engine_send_notif_bytes(s->conn, "a", 1, "b", 1));
    CHECK_PARENTS(uccl_engine_reg(s->engine, (size_t)s->mine, 64, &mr));
    CHECK_PARENTS(uccl_engine_prepare_fifo(s->engine, s->mr, s->mine, 64, text));
    CHECK_PARENTS(uccl_engine_get_ipc_info(s->engine, (size_t)s->mine, text, &has_ipc));
    CHECK_PARENTS(uccl_engine_metadata_into(s->engine, text, sizeof text, NULL));
    CHECK_PARENTS(uccl_engine_notif_next(s->engine, &notif));
    CHECK_PARENTS(uccl_engine_notif_wait(s->engine, -1, &notif));
    int fd;
    CHECK_PARENTS(uccl_engine_event_fd(s->engine, &fd));
    CHECK(!uccl_engine_connect(s->engine, LOOPBACK, "0", 80, false) && uccl_engine_last_status() == UCCL_ERR_NOT_FOUND);
    CHECK(!uccl_engine_accept(s->engine, ip, sizeof ip, &gpu) && uccl_engine_last_status() == UCCL_ERR_NOT_FOUND);
    uccl_conn_t *conn;
    CHECK_PARENTS(uccl_engine_accept_for(s->engine, -1, ip, sizeof ip, &gpu, &conn));
    CHECK(!uccl_engine_xfer_status(s->conn, 1) && !uccl_engine_conn_is_local(s->conn));
    /* What waits in the parent is the parent's. */
    CHECK_OK(uccl_engine_get_notifs(&message, 1, &count));
    CHECK_EQ(count, 0);
    CHECK_OK(uccl_engine_notif_next(NULL, &notif));
    CHECK(!notif);
    CHECK(id == 0 && mr == 0);
}

CASE(using_inherited_handles_is_an_error)
{
    side sides[2];
    local_pair(&sides[0], &sides[1], LEN);
    notify_msg_t message = {"parent", "hello"};
    CHECK_OK(uccl_engine_send_notif(sides[1].conn, &message));
    sleep_ms(200);
    in_child(use_all, &sides[0]);
    size_t count = 0;
    for (int64_t deadline = now_ms() + HANG_MS; count == 0;) {
        CHECK_OK(uccl_engine_get_notifs(&message, 1, &count));
        CHECK(now_ms() < deadline);
    }
    CHECK(strcmp(message.name, "parent") == 0);
    move(&sides[0], &sides[1], 3);
    pair_ends(&sides[0], &sides[1]);
}

/* In the child: engines of its own, which may meet the numbers of the parent's and do not. */
static void own_engines(void *argument)
{
    side *parents = argument, mine[2];
    local_pair(&mine[0], &mine[1], LEN);
    CHECK(mine[0].engine != parents[0].engine && mine[0].conn != parents[0].conn);
    move(&mine[0], &mine[1], 5);
    move(&mine[1], &mine[0], 6);
    uccl_engine_conn_destroy(parents[0].conn);
    uccl_engine_destroy(parents[0].engine);
    move(&mine[0], &mine[1], 7);
    pair_ends(&mine[0], &mine[1]);
}

CASE(a_child_has_engines_of_its_own)
{
    side sides[2];
    local_pair(&sides[0], &sides[1], LEN);
    move(&sides[0], &sides[1], 1);
    in_child(own_engines, sides);
    move(&sides[0], &sides[1], 2);
    in_child(own_engines, sides);
    pair_ends(&sides[0], &sides[1]);
    /* And when the parent has ended its own. */
    in_child(own_engines, sides);
}

/* A child registers memory of its own, and not that of a GPU of the parent, which means nothing there. */
static void register_in_a_child(void *argument)
{
    side *parents = argument;
    uint8_t own[64];
    uccl_engine_t *engine = engine_start();
    uccl_mr_t mr;
    CHECK_FAILS(uccl_engine_reg(engine, (size_t)parents->mine, 64, &mr));
    CHECK_OK(uccl_engine_reg(engine, (size_t)own, sizeof own, &mr));
    uccl_engine_mr_destroy(engine, mr);
    uccl_engine_destroy(engine);
}

CASE(a_child_has_no_memory_of_the_parents_gpu)
{
    if (!memory_is_gpu())
        SKIP("needs UCCL_TEST_MEMORY=gpu");
    side sides[2];
    local_pair(&sides[0], &sides[1], LEN);
    in_child(register_in_a_child, sides);
    move(&sides[0], &sides[1], 1);
    pair_ends(&sides[0], &sides[1]);
}

/* And the child's child. */
static void fork_again(void *argument)
{
    side *parents = argument, mine[2];
    local_pair(&mine[0], &mine[1], 4 * KIB);
    move(&mine[0], &mine[1], 5);
    in_child(destroy_all, parents);
    in_child(destroy_all, mine);
    in_child(use_all, &mine[0]);
    in_child(use_all, &parents[0]);
    move(&mine[0], &mine[1], 6);
    pair_ends(&mine[0], &mine[1]);
}

CASE(a_childs_child)
{
    side sides[2];
    local_pair(&sides[0], &sides[1], 4 * KIB);
    in_child(fork_again, sides);
    move(&sides[0], &sides[1], 2);
    pair_ends(&sides[0], &sides[1]);
}

/* Other threads are inside the library when the process forks: what they held must not stop the child. */
static atomic_bool stop_calling;

static void *keep_calling(void *argument)
{
    side *s = argument;
    while (!atomic_load(&stop_calling)) {
        uccl_engine_t *engine = NULL;
        uccl_mr_t mr;
        CHECK_OK(uccl_engine_reg(s->engine, (size_t)s->mine, 64, &mr));
        uccl_engine_mr_destroy(s->engine, mr);
        CHECK_FAILS(uccl_engine_conn_status((uccl_conn_t *)&engine));
        uccl_engine_conn_destroy((uccl_conn_t *)&engine);
        notify_msg_t message;
        size_t count;
        CHECK_OK(uccl_engine_get_notifs(&message, 1, &count));
    }
    return NULL;
}

CASE(forking_while_others_call)
{
    side sides[2];
    pthread_t threads[3];
    local_pair(&sides[0], &sides[1], 4 * KIB);
    for (int i = 0; i < 3; i++)
        CHECK(pthread_create(&threads[i], NULL, keep_calling, &sides[i % 2]) == 0);
    for (int i = 0; i < 50; i++) {
        in_child(destroy_all, sides);
        in_child(use_all, &sides[0]);
    }
    atomic_store(&stop_calling, true);
    for (int i = 0; i < 3; i++)
        CHECK(pthread_join(threads[i], NULL) == 0);
    move(&sides[0], &sides[1], 4);
    pair_ends(&sides[0], &sides[1]);
}

/* And inside a plugin's set-up calls, of which the child makes its own. */
static void connect_and_move(void *argument)
{
    (void)argument;
    side sides[2];
    local_pair(&sides[0], &sides[1], 4 * KIB);
    move(&sides[0], &sides[1], 7);
    pair_ends(&sides[0], &sides[1]);
}

static void *keep_connecting(void *argument)
{
    while (!atomic_load(&stop_calling))
        connect_and_move(argument);
    return NULL;
}

CASE(forking_while_others_connect)
{
    pthread_t thread;
    atomic_store(&stop_calling, false);
    CHECK(pthread_create(&thread, NULL, keep_connecting, NULL) == 0);
    for (int i = 0; i < 10; i++)
        in_child(connect_and_move, NULL);
    atomic_store(&stop_calling, true);
    CHECK(pthread_join(thread, NULL) == 0);
}

/* Lines of the log go to a pipe that is mostly full: threads of the parent are about to write one nearly always. */
static int slow_log[2];

static void *read_slowly(void *argument)
{
    (void)argument;
    char lines[1024];
    while (read(slow_log[0], lines, sizeof lines) > 0)
        usleep(500);
    return NULL;
}

static void *keep_logging(void *argument)
{
    (void)argument;
    while (!atomic_load(&stop_calling)) {
        uccl_engine_destroy(engine_start());
    }
    return NULL;
}

static void log_and_end(void *argument)
{
    (void)argument;
    uccl_engine_destroy(engine_start());
}

CASE(forking_while_others_log)
{
    pthread_t reader, threads[3];
    int console = dup(STDERR_FILENO);
    CHECK(console >= 0 && pipe(slow_log) == 0);
    /* The library writes to the descriptor; what checks say goes on to the console. */
    FILE *checks = fdopen(console, "w");
    CHECK(checks != NULL);
    stderr = checks;
    setenv("UCCL_P2P_LOG_LEVEL", "trace", 1);
    CHECK(dup2(slow_log[1], STDERR_FILENO) == STDERR_FILENO && close(slow_log[1]) == 0);
    CHECK(pthread_create(&reader, NULL, read_slowly, NULL) == 0);
    atomic_store(&stop_calling, false);
    for (int i = 0; i < 3; i++)
        CHECK(pthread_create(&threads[i], NULL, keep_logging, NULL) == 0);
    for (int i = 0; i < 20; i++)
        in_child(log_and_end, NULL);
    atomic_store(&stop_calling, true);
    for (int i = 0; i < 3; i++)
        CHECK(pthread_join(threads[i], NULL) == 0);
    CHECK(dup2(console, STDERR_FILENO) == STDERR_FILENO);
    CHECK(pthread_join(reader, NULL) == 0);
}
