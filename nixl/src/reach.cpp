// SPDX-License-Identifier: Apache-2.0

#include "reach.h"

#include <netdb.h>
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <memory>

namespace tcpx {

namespace {

/// On its own host a connect to a port where nothing listens may meet itself, when the system picks that port for this end.
bool met_itself(int fd) {
  sockaddr_storage mine{}, theirs{};
  socklen_t mine_size = sizeof mine, theirs_size = sizeof theirs;
  if (::getsockname(fd, reinterpret_cast<sockaddr *>(&mine), &mine_size) != 0) return false;
  if (::getpeername(fd, reinterpret_cast<sockaddr *>(&theirs), &theirs_size) != 0) return false;
  return mine_size == theirs_size && std::memcmp(&mine, &theirs, mine_size) == 0;
}

Reach reach_address(const addrinfo &address, std::chrono::milliseconds limit) {
  const int fd = ::socket(address.ai_family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
  if (fd < 0) return Reach::kSilent;
  int error = 0;
  if (::connect(fd, address.ai_addr, address.ai_addrlen) != 0) {
    error = errno;
    if (error == EINPROGRESS) {
      pollfd waiting{fd, POLLOUT, 0};
      socklen_t size = sizeof error;
      if (::poll(&waiting, 1, static_cast<int>(limit.count())) != 1 || ::getsockopt(fd, SOL_SOCKET, SO_ERROR, &error, &size) != 0) {
        error = ETIMEDOUT;
      }
    }
  }
  if (error == 0 && met_itself(fd)) error = ECONNREFUSED;
  ::close(fd);
  return error == 0 ? Reach::kAnswers : error == ECONNREFUSED ? Reach::kRefused : Reach::kSilent;
}

}  // namespace

Reach reach(const std::string &host, int port, std::chrono::milliseconds limit) {
  addrinfo hints{}, *list = nullptr;
  hints.ai_socktype = SOCK_STREAM;
  hints.ai_flags = AI_NUMERICSERV;
  if (::getaddrinfo(host.c_str(), std::to_string(port).c_str(), &hints, &list) != 0) return Reach::kSilent;
  const std::unique_ptr<addrinfo, decltype(&::freeaddrinfo)> owner(list, ::freeaddrinfo);
  Reach best = Reach::kRefused;
  for (const addrinfo *address = list; address; address = address->ai_next) {
    const Reach answer = reach_address(*address, limit);
    if (answer == Reach::kAnswers) return answer;
    if (answer == Reach::kSilent) best = answer;
  }
  return best;
}

}  // namespace tcpx
