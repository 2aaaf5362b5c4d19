#include "consumer.h"

#include <string>

int main(int argc, char** argv) {
  // Only in the C++ interface.
  uccl_engine_t* engine = uccl_engine_create(0, false);
  char* metadata = nullptr;
  NEED(engine != nullptr);
  NEED(uccl_engine_get_metadata(engine, &metadata) == 0);
  NEED(std::string(metadata).find('?') != std::string::npos);
  delete[] metadata;
  NEED(uccl_engine_get_notifs().empty());
  uccl_engine_destroy(engine);
  return move_data(argc > 1 ? argv[1] : nullptr);
}
