// What NIXL's plugin manager looks up in the shared object.
//
// SPDX-License-Identifier: Apache-2.0

#include <exception>

#include "backend.h"

namespace {

nixlBackendEngine *create_engine(const nixlBackendInitParams *init) {
  try {
    return new tcpx::Backend(init);
  } catch (const std::exception &error) {
    tcpx::log_line("error", std::string("cannot create the backend: ") + error.what());
    return nullptr;
  }
}

void destroy_engine(nixlBackendEngine *engine) { delete engine; }
const char *name() { return "TCPX"; }
nixl_mem_list_t memory_kinds() { return {DRAM_SEG, VRAM_SEG}; }

}  // namespace

extern "C" NIXL_PLUGIN_EXPORT nixlBackendPlugin *nixl_plugin_init() {
  static nixlBackendPlugin plugin = {
      NIXL_PLUGIN_API_VERSION, create_engine, destroy_engine, name, uccl_engine_version, tcpx::default_parameters, memory_kinds};
  return &plugin;
}

extern "C" NIXL_PLUGIN_EXPORT void nixl_plugin_fini() {}
