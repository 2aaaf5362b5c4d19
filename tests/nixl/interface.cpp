// Loads the plugin as NIXL does, beside a NIXL that is simulated: a libnixl.so, and a plugin of its own with as many virtual functions as STUB_SLOTS.
//   interface PLUGIN LIBNIXL|- loads|refuses      -: no NIXL
//
// SPDX-License-Identifier: Apache-2.0

#ifdef STUB_SLOTS

// What a plugin of that NIXL has: the class, and so its table. Two of the slots are the destructor's.
template <int>
struct Tag {};
class nixlBackendEngine {
 public:
  virtual ~nixlBackendEngine();
#define FIVE(n) \
  virtual void f(Tag<5 * n>) {} \
  virtual void f(Tag<5 * n + 1>) {} \
  virtual void f(Tag<5 * n + 2>) {} \
  virtual void f(Tag<5 * n + 3>) {} \
  virtual void f(Tag<5 * n + 4>) {}
  FIVE(0)
  FIVE(1)
  FIVE(2)
  FIVE(3)
#if STUB_SLOTS >= 27
  FIVE(4)
#endif
#if STUB_SLOTS == 28
  virtual void g() {}
#endif
};
nixlBackendEngine::~nixlBackendEngine() = default;

#else

#include <dlfcn.h>

#include <cstdio>
#include <cstring>
#include <initializer_list>

int main(int argc, char **argv) {
  if (argc != 4) return 2;
  if (std::strcmp(argv[2], "-") != 0 && !::dlopen(argv[2], RTLD_NOW | RTLD_LOCAL)) return std::fprintf(stderr, "%s\n", ::dlerror()), 2;
  void *const plugin = ::dlopen(argv[1], RTLD_NOW | RTLD_LOCAL);
  if (!plugin) return std::fprintf(stderr, "%s\n", ::dlerror()), 2;
  for (const char *name : {"nixl_plugin_init", "nixl_tcpx_init_as_ucx"}) {
    void *const init = ::dlsym(plugin, name);
    if (!init) return std::fprintf(stderr, "%s\n", ::dlerror()), 2;
    const bool loads = reinterpret_cast<void *(*)()>(init)() != nullptr;
    if (loads != (std::strcmp(argv[3], "loads") == 0)) return std::fprintf(stderr, "failed: %s %s\n", name, loads ? "loads" : "refuses"), 1;
  }
}

#endif
