#include "consumer.h"

int main(int argc, char **argv)
{
    /* Only in the C interface. */
    uccl_engine_t *engine = uccl_engine_create(0, false);
    char *metadata = NULL;
    NEED(engine != NULL);
    NEED(uccl_engine_get_metadata(engine, &metadata) == UCCL_OK);
    NEED(strchr(metadata, '?') != NULL);
    uccl_engine_free_metadata(metadata);
    uccl_engine_destroy(engine);
    return move_data(argc > 1 ? argv[1] : NULL);
}
