#define _DEFAULT_SOURCE
#include "cases.h"
#include "check.h"

#include <signal.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>

static test_case *first, **end = &first;

void case_register(test_case *c)
{
    *end = c;
    end = &c->next;
}

static const test_case *find(const char *name)
{
    for (const test_case *c = first; c; c = c->next)
        if (strcmp(c->name, name) == 0)
            return c;
    return NULL;
}

/* Its end, or after so many seconds that of a case that hangs. */
#define LIMIT_S 120

static int await(pid_t pid)
{
    int status = 0;
    for (int i = 0; i < LIMIT_S * 100; i++) {
        pid_t ended = waitpid(pid, &status, WNOHANG);
        CHECK(ended == 0 || ended == pid);
        if (ended == pid)
            return status;
        usleep(10000);
    }
    fprintf(stderr, "no end within %d s\n", LIMIT_S);
    CHECK(kill(pid, SIGKILL) == 0 && waitpid(pid, &status, 0) == pid);
    return status;
}

/* A process per case: the library is started fresh, and two-process cases fork before any engine exists. */
static void run_apart(const test_case *c, int *failed, int *skipped)
{
    fflush(NULL);
    pid_t pid = fork();
    CHECK(pid >= 0);
    if (pid == 0) {
        c->run();
        exit(0);
    }
    int status = await(pid);
    bool skip = WIFEXITED(status) && WEXITSTATUS(status) == SKIPPED;
    printf("%-40s %s\n", c->name, status == 0 ? "ok" : skip ? "skipped" : "FAILED");
    *skipped += skip;
    *failed += status != 0 && !skip;
}

int main(int argc, char **argv)
{
    if (argc == 2 && strcmp(argv[1], "--list") == 0) {
        for (const test_case *c = first; c; c = c->next)
            puts(c->name);
        return 0;
    }
    int failed = 0, skipped = 0;
    if (argc == 1) {
        for (const test_case *c = first; c; c = c->next)
            run_apart(c, &failed, &skipped);
    }
    for (int i = 1; i < argc; i++) {
        const test_case *c = find(argv[i]);
        CHECK_MSG(c, "no case is named %s", argv[i]);
        c->run();
    }
    return failed ? 1 : skipped ? SKIPPED : 0;
}
