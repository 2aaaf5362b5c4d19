/* A check that a release build keeps: a failing one prints where and what, and ends the process with status 1. */
#pragma once

#include <unistd.h>
#include <cstdio>
#include <cstring>

/* _exit: a failing test must not run exit handlers of a library that may be the cause. */
#define CHECK(cond)                                                                                             \
  do {                                                                                                          \
    if (!(cond)) {                                                                                              \
      std::fprintf(stderr, "%s:%d: CHECK(%s) failed; last error: %s\n", __FILE__, __LINE__, #cond,              \
                   check_last_error());                                                                         \
      std::fflush(nullptr);                                                                                     \
      _exit(1);                                                                                                 \
    }                                                                                                           \
  } while (0)

/* Each test defines how to get the library's last error. */
static char const* check_last_error();
