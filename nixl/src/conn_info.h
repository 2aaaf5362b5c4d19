// How a peer is reached and which instance it is: the text that agents exchange as connection info. Knows text, no sockets.
//
// SPDX-License-Identifier: Apache-2.0

#pragma once

#include <optional>
#include <string>

#include "uccl_engine.h"

namespace tcpx {

/// "host:port?gpu#identity". The identity is the FIFO item, in hexadecimal, of memory that the engine registers for this purpose: it
/// names one engine, and a peer that was started again at the same address is another one.
struct ConnInfo {
  std::string host;
  int port = 0;
  std::string gpu;
  /// Absent if the text is the engine's metadata alone; the instance is then unknown.
  std::optional<FifoItem> identity;

  static std::optional<ConnInfo> parse(const std::string &text);
  /// The text for an engine's metadata and its identity.
  static std::string text(const std::string &metadata, const FifoItem &identity);
};

}  // namespace tcpx
