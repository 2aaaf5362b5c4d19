// SPDX-License-Identifier: Apache-2.0

#include "conn_info.h"

#include <cstdlib>
#include <cstring>

namespace tcpx {

namespace {

constexpr char kDigits[] = "0123456789abcdef";

bool read_item(const std::string &text, FifoItem &item) {
  unsigned char bytes[FIFO_SIZE];
  if (text.size() != 2 * sizeof bytes) return false;
  for (size_t i = 0; i < sizeof bytes; ++i) {
    const char *high = std::strchr(kDigits, text[2 * i]), *low = std::strchr(kDigits, text[2 * i + 1]);
    // strchr finds the NUL at the end of the digits too.
    if (!high || !low || !*high || !*low) return false;
    bytes[i] = static_cast<unsigned char>((high - kDigits) << 4 | (low - kDigits));
  }
  std::memcpy(&item, bytes, sizeof bytes);
  return true;
}

}  // namespace

std::optional<ConnInfo> ConnInfo::parse(const std::string &text) {
  ConnInfo info;
  const size_t hash = text.find('#');
  if (hash != std::string::npos) {
    info.identity.emplace();
    if (!read_item(text.substr(hash + 1), *info.identity)) return std::nullopt;
  }
  const std::string metadata = text.substr(0, hash);
  const size_t question = metadata.find('?');
  const std::string address = metadata.substr(0, question);
  info.gpu = question == std::string::npos ? "" : metadata.substr(question + 1);
  // The host may be an IPv6 address, bare or in brackets, and the GPU's PCI address has colons too.
  const size_t colon = address.rfind(':');
  if (colon == std::string::npos || colon == 0) return std::nullopt;
  info.host = address.substr(0, colon);
  if (info.host.size() > 2 && info.host.front() == '[' && info.host.back() == ']') info.host = info.host.substr(1, info.host.size() - 2);
  const std::string digits = address.substr(colon + 1);
  if (digits.empty() || digits.size() > 5 || digits.find_first_not_of("0123456789") != std::string::npos) return std::nullopt;
  info.port = std::atoi(digits.c_str());
  if (info.port < 1 || info.port > 65535 || metadata.find('\0') != std::string::npos) return std::nullopt;
  return info;
}

std::string ConnInfo::text(const std::string &metadata, const FifoItem &identity) {
  unsigned char bytes[FIFO_SIZE];
  std::memcpy(bytes, &identity, sizeof bytes);
  std::string text = metadata + '#';
  for (const unsigned char byte : bytes) {
    text += kDigits[byte >> 4];
    text += kDigits[byte & 15];
  }
  return text;
}

}  // namespace tcpx
