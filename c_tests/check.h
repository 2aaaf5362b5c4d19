/* Checks that a release build keeps: a failing one prints where and what, and ends the process with status 1. */
#pragma once

#include <stdio.h>
#include <unistd.h>

/* _exit: a failing test must not run exit handlers of a library that may be the cause. */
#define CHECK_MSG(cond, ...)                                                        \
    do {                                                                            \
        if (!(cond)) {                                                              \
            fprintf(stderr, "%s:%d: CHECK(%s) failed: ", __FILE__, __LINE__, #cond); \
            fprintf(stderr, __VA_ARGS__);                                           \
            fputc('\n', stderr);                                                    \
            fflush(NULL);                                                           \
            _exit(1);                                                               \
        }                                                                           \
    } while (0)

/* For a test that needs what the machine lacks. */
#define SKIPPED 77
#define SKIP(...)                        \
    do {                                 \
        fputs("SKIPPED: ", stderr);      \
        fprintf(stderr, __VA_ARGS__);    \
        fputc('\n', stderr);             \
        fflush(NULL);                    \
        _exit(SKIPPED);                  \
    } while (0)

#define CHECK(cond) CHECK_MSG(cond, "pid %ld", (long)getpid())

#define CHECK_EQ(a, b)                                                              \
    do {                                                                            \
        long long check_a = (long long)(a), check_b = (long long)(b);               \
        CHECK_MSG(check_a == check_b, "%s is %lld, %s is %lld", #a, check_a, #b, check_b); \
    } while (0)
