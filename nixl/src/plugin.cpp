// What NIXL's plugin manager looks up in the shared object; and the same under the name UCX, for as_ucx.cpp.
//
// SPDX-License-Identifier: Apache-2.0

#include <cstdio>
#include <exception>

#include "backend.h"
#include "interface.h"

namespace {

nixlBackendEngine *create(const nixlBackendInitParams *init, tcpx::Name name) {
  try {
    return new tcpx::Backend(init, name);
  } catch (const std::exception &error) {
    tcpx::log_line("error", std::string("cannot create the backend: ") + error.what());
    return nullptr;
  }
}

nixlBackendEngine *create_engine(const nixlBackendInitParams *init) { return create(init, tcpx::Name::kTcpx); }
nixlBackendEngine *create_engine_as_ucx(const nixlBackendInitParams *init) { return create(init, tcpx::Name::kUcx); }
void destroy_engine(nixlBackendEngine *engine) { delete engine; }
const char *name() { return "TCPX"; }
const char *name_as_ucx() { return "UCX"; }
nixl_mem_list_t memory_kinds() { return {DRAM_SEG, VRAM_SEG}; }

/// The plugin, if this process's NIXL can call it. NIXL leaves out what is NULL.
nixlBackendPlugin *fitting(nixlBackendPlugin *plugin) {
  try {
    const std::string why = tcpx::mismatch();
    if (why.empty()) return plugin;
    tcpx::log_line("error", why);
  } catch (const std::exception &error) {
    tcpx::log_line("error", std::string("cannot look at NIXL's plugins: ") + error.what());
  }
  return nullptr;
}

}  // namespace

extern "C" NIXL_PLUGIN_EXPORT nixlBackendPlugin *nixl_plugin_init() {
  static nixlBackendPlugin plugin = {
      NIXL_PLUGIN_API_VERSION, create_engine, destroy_engine, name, uccl_engine_version, tcpx::default_parameters, memory_kinds};
  return fitting(&plugin);
}

extern "C" NIXL_PLUGIN_EXPORT nixlBackendPlugin *nixl_tcpx_init_as_ucx() {
  static nixlBackendPlugin plugin = {
      NIXL_PLUGIN_API_VERSION, create_engine_as_ucx, destroy_engine, name_as_ucx, uccl_engine_version, tcpx::ucx_parameters, memory_kinds};
  return fitting(&plugin);
}

/// Writes the line that an agent with the backend UCX would log in this environment, cut to fit and NUL-terminated.
extern "C" NIXL_PLUGIN_EXPORT void nixl_tcpx_explain_ucx(char *out, size_t size) {
  try {
    std::snprintf(out, size, "%s", tcpx::from_ucx({}, {}, tcpx::environment(), tcpx::NetDevices::of_this_host()).line.c_str());
  } catch (const std::exception &error) {
    std::snprintf(out, size, "cannot explain: %s", error.what());
  }
}

extern "C" NIXL_PLUGIN_EXPORT void nixl_plugin_fini() {}
