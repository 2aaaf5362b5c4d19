#define _DEFAULT_SOURCE
#include "cases.h"
#include "check.h"

#include <signal.h>
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

/* A process per case: the library is started fresh, and two-process cases fork before any engine exists. */
static int run_apart(const test_case *c)
{
    fflush(NULL);
    pid_t pid = fork();
    CHECK(pid >= 0);
    if (pid == 0) {
        c->run();
        exit(0);
    }
    int status = 0;
    CHECK(waitpid(pid, &status, 0) == pid);
    printf("%-40s %s\n", c->name, status == 0 ? "ok" : "FAILED");
    return status != 0;
}

int main(int argc, char **argv)
{
    if (argc == 2 && strcmp(argv[1], "--list") == 0) {
        for (const test_case *c = first; c; c = c->next)
            puts(c->name);
        return 0;
    }
    int failed = 0;
    if (argc == 1) {
        for (const test_case *c = first; c; c = c->next)
            failed += run_apart(c);
    }
    for (int i = 1; i < argc; i++) {
        const test_case *c = find(argv[i]);
        CHECK_MSG(c, "no case is named %s", argv[i]);
        c->run();
    }
    return failed != 0;
}
