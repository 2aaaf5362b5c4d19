/* The memory of the tests: patterns, guards, and what engines register and move. The latter is host memory, or with
 * UCCL_TEST_MEMORY=gpu memory of the first and of the last GPU, where programs skip (status 77) when there is none. Every function
 * that fills, compares or copies takes either kind. Knows nothing of engines.
 *
 * Host memory always: null_and_misuse (which is about handles and arguments, and needs readable memory around its region), dlopen_load
 * (which moves nothing), and what the library copies at the call: names and messages of notifications. */
#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define KIB ((size_t)1 << 10)
#define MIB ((size_t)1 << 20)
#define PAGE ((size_t)4096)
/* The byte of memory that nothing may have written. */
#define GUARD 0xA5

/* Host memory, shared with processes forked later, so that either one sees what arrived at the other. */
uint8_t *map_shared(size_t len);

bool memory_is_gpu(void);
/* Memory to register. GPUs: an even number gets the first, an odd one the last. */
uint8_t *memory_new(int number, size_t len);
void memory_free(uint8_t *p, size_t len);
/* From here on nothing may touch the memory. A page fault tells, or for a GPU, where only writes can be told, memory_allow or memory_free. */
void memory_forbid(uint8_t *p, size_t len);
void memory_allow(uint8_t *p, size_t len);
/* The FIFO item's name of where p lies. */
int memory_rkey(const uint8_t *p);

/* Memory of a GPU as another process sees it. A process forks before its first memory_new: CUDA does not survive a fork. */
typedef struct memory_handle {
    char bytes[64];
} memory_handle;

memory_handle memory_lend(const uint8_t *p);
/* `number` and `len` are those of the lender's memory_new. */
uint8_t *memory_borrow(const memory_handle *handle, int number, size_t len);

/* A pattern in which every eight bytes differ from all others, of this seed and of others. */
void fill(uint8_t *p, size_t len, uint64_t seed);
void wipe(uint8_t *p, size_t len);
bool is_wiped(const uint8_t *p, size_t len);
void check_same(const char *what, const uint8_t *got, const uint8_t *want, size_t len);
/* A copy in host memory, to be freed. */
uint8_t *copy_of(const uint8_t *p, size_t len);
uint64_t random_next(uint64_t *state);
