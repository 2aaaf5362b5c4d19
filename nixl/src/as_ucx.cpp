// libtcpx_as_ucx.so: the same backend under the name UCX. NIXL takes a plugin's name from its file's: `python -m nixl_tcpx as-ucx` links this
// one as libplugin_UCX.so beside libplugin_TCPX.so. Knows nothing of NIXL.
//
// SPDX-License-Identifier: Apache-2.0

#include <dlfcn.h>

#include <cstdio>
#include <string>

namespace {

constexpr char kPlugin[] = "libplugin_TCPX.so", kInit[] = "nixl_tcpx_init_as_ucx";

void *fail() {
  const char *error = ::dlerror();
  std::fprintf(stderr, "[TCPX backend] error: cannot stand for UCX: %s\n", error ? error : "the plugin is not found");
  return nullptr;
}

}  // namespace

extern "C" __attribute__((visibility("default"))) void *nixl_plugin_init() {
  Dl_info own{};
  if (::dladdr(reinterpret_cast<void *>(&nixl_plugin_init), &own) == 0 || !own.dli_fname) return fail();
  const std::string path(own.dli_fname);
  const size_t slash = path.rfind('/');
  const std::string plugin = slash == std::string::npos ? kPlugin : path.substr(0, slash + 1) + kPlugin;
  void *const library = ::dlopen(plugin.c_str(), RTLD_NOW | RTLD_LOCAL);
  void *const init = library ? ::dlsym(library, kInit) : nullptr;
  return init ? reinterpret_cast<void *(*)()>(init)() : fail();
}

extern "C" __attribute__((visibility("default"))) void nixl_plugin_fini() {}
