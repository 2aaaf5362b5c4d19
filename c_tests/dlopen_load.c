/* The library loaded at run time, as interpreters and plugin hosts do, and unloaded again. Links nothing of the library. */
#define _DEFAULT_SOURCE
#include "check.h"
#include "uccl_engine.h"

#include <dlfcn.h>
#include <string.h>
#include <time.h>

typedef uccl_engine_t *create_fn(int num_cpus, bool in_python);
typedef int get_metadata_fn(uccl_engine_t *engine, char **metadata);
typedef void free_metadata_fn(char *metadata);
typedef void destroy_fn(uccl_engine_t *engine);
typedef const char *last_error_fn(void);

static void resolve(void *library, const char *name, void *function)
{
    void *symbol = dlsym(library, name);
    CHECK_MSG(symbol, "%s: %s", name, dlerror());
    memcpy(function, &symbol, sizeof symbol);
}

static void use(void *library)
{
    create_fn *create;
    get_metadata_fn *get_metadata;
    free_metadata_fn *free_metadata;
    destroy_fn *destroy;
    last_error_fn *last_error;
    resolve(library, "uccl_engine_create", &create);
    resolve(library, "uccl_engine_get_metadata", &get_metadata);
    resolve(library, "uccl_engine_free_metadata", &free_metadata);
    resolve(library, "uccl_engine_destroy", &destroy);
    resolve(library, "uccl_engine_last_error", &last_error);

    uccl_engine_t *engine = create(0, false);
    CHECK_MSG(engine, "%s", last_error());
    char *text = NULL;
    CHECK(get_metadata(engine, &text) == UCCL_OK);
    CHECK(text && strchr(text, ':') && strchr(text, '?'));
    free_metadata(text);
    destroy(engine);
}

/* Threads that outlive their code crash a little later: stay alive long enough to see it. */
static void linger(void)
{
    struct timespec t = {0, 300 * 1000000};
    nanosleep(&t, NULL);
}

int main(int argc, char **argv)
{
    CHECK_MSG(argc == 2, "usage: %s LIBRARY", argv[0]);
    for (int i = 0; i < 3; i++) {
        void *library = dlopen(argv[1], RTLD_NOW | RTLD_LOCAL);
        CHECK_MSG(library, "%s", dlerror());
        use(library);
        CHECK_MSG(dlclose(library) == 0, "%s", dlerror());
        linger();
    }
    return 0;
}
