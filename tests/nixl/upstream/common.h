/* Stands in for the common.h of NIXL's own tests, which needs abseil and CUDA: what error_handling.cpp uses of it. The plugin directory is the
 * caller's choice, and lines in the log are no failures here. */
#pragma once

#include <cstdlib>
#include <memory>
#include <optional>
#include <string>
#include <variant>
#include <vector>

namespace gtest {

struct ScopedEnv {
  void addVar(const std::string &name, const std::string &value) {
    if (name != "NIXL_PLUGIN_DIR") setenv(name.c_str(), value.c_str(), 1);
  }
};

struct LogIgnoreGuard {
  template <class... Any>
  explicit LogIgnoreGuard(Any &&...) {}
};

}  // namespace gtest
