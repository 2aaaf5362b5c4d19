// Asks whether a host answers at a port, sooner than a connect of the engine would show. Knows sockets, nothing of engines.
//
// SPDX-License-Identifier: Apache-2.0

#pragma once

#include <chrono>
#include <string>

namespace tcpx {

enum class Reach {
  kAnswers,  ///< Something listens there.
  kRefused,  ///< The host answers and nothing listens: the process has ended.
  kSilent,   ///< No answer, or no way to the host.
};

/// Blocks for the limit at most for each address of the host; name resolution has limits of its own.
Reach reach(const std::string &host, int port, std::chrono::milliseconds limit);

}  // namespace tcpx
