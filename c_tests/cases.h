/* Named test cases. CASE(name) { ... } defines and registers one; main() runs the cases named on its command line in this
 * process, or without arguments each in a process of its own; --list prints the names. Status 77: something was skipped, nothing failed. */
#pragma once

#include <stddef.h>

typedef struct test_case {
    const char *name;
    void (*run)(void);
    struct test_case *next;
} test_case;

void case_register(test_case *c);

#define CASE(id)                                                                            \
    static void case_##id(void);                                                            \
    __attribute__((constructor)) static void case_register_##id(void)                       \
    {                                                                                       \
        static test_case c = {#id, case_##id, NULL};                                        \
        case_register(&c);                                                                  \
    }                                                                                       \
    static void case_##id(void)
