// Connections to peers, some of which never answer: these do not delay the others.
//
// SPDX-License-Identifier: Apache-2.0

#include <arpa/inet.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <unistd.h>

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <thread>
#include <vector>

#include "../../nixl/src/peers.h"

namespace {

void need(bool condition, const char *what) {
  if (condition) return;
  std::fprintf(stderr, "failed: %s: %s\n", what, uccl_engine_last_error());
  std::exit(EXIT_FAILURE);
}

uccl_engine_t *engine() {
  uccl_engine_t *engine = uccl_engine_create(0, false);
  need(engine != nullptr, "an engine");
  return engine;
}

std::string metadata(uccl_engine_t *engine) {
  char text[256];
  need(uccl_engine_metadata_into(engine, text, sizeof text, nullptr) == UCCL_OK, "metadata");
  return text;
}

/// A host whose kernel accepts and whose program never answers.
int silent_host(std::string &text) {
  sockaddr_in address{};
  socklen_t size = sizeof address;
  address.sin_family = AF_INET;
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  const int fd = ::socket(AF_INET, SOCK_STREAM, 0);
  need(fd >= 0 && ::bind(fd, reinterpret_cast<sockaddr *>(&address), size) == 0 && ::listen(fd, 512) == 0 &&
           ::getsockname(fd, reinterpret_cast<sockaddr *>(&address), &size) == 0,
       "a listening socket");
  text = "127.0.0.1:" + std::to_string(ntohs(address.sin_port)) + "?-1";
  return fd;
}

void silent_hosts_leave_the_others_alone() {
  using Clock = std::chrono::steady_clock;
  uccl_engine_t *const here = engine(), *const there = engine();
  auto identity = std::make_shared<tcpx::Identity>();
  auto peers = std::make_shared<tcpx::Peers>("here", here, identity);
  std::string silent;
  const int fd = silent_host(silent);
  std::vector<std::thread> threads;
  for (int i = 0; i < 90; ++i) {
    threads.emplace_back([peers, silent, i] {
      const std::string name = "silent" + std::to_string(i);
      need(peers->remember(name, silent) == NIXL_SUCCESS, "remembering a silent host");
      peers->connect(name);
    });
  }
  for (std::thread &thread : threads) thread.join();
  const auto begin = Clock::now();
  need(peers->remember("there", metadata(there)) == NIXL_SUCCESS && peers->connect("there") == NIXL_SUCCESS, "connecting");
  std::shared_ptr<tcpx::Connection> connection;
  need(peers->acquire(*peers->lookup("there"), connection) == NIXL_SUCCESS, "a connection beside silent hosts");
  std::printf("connected beside 90 silent hosts in %.3f s\n", std::chrono::duration<double>(Clock::now() - begin).count());
  connection.reset();
  peers->stop();
  uccl_engine_destroy(here);
  uccl_engine_destroy(there);
  need(peers->wait(std::chrono::seconds(10)), "the end of the attempt");
  ::close(fd);
}

/// A notification that times out does not fail those that were sent after it.
void notifications_wait_for_a_connection_each_for_its_own_time() {
  using std::chrono::milliseconds;
  setenv("UCCL_TCPX_TRANSFER_TIMEOUT_MS", "2000", 1);
  uccl_engine_t *const here = engine();
  auto peers = std::make_shared<tcpx::Peers>("here", here, std::make_shared<tcpx::Identity>());
  std::string silent;
  const int fd = silent_host(silent);
  need(peers->remember("silent", silent) == NIXL_SUCCESS, "remembering a silent host");
  const auto peer = peers->lookup("silent");
  const auto waiting = [&] {
    peers->tend();
    const std::lock_guard<std::mutex> guard(peer->lock);
    return peer->outbox.size();
  };
  need(peers->notify(*peer, "early") == NIXL_SUCCESS, "a notification");
  std::this_thread::sleep_for(milliseconds(1000));
  need(peers->notify(*peer, "late") == NIXL_SUCCESS, "another one");
  need(waiting() == 2, "both wait");
  std::this_thread::sleep_for(milliseconds(1300));
  need(waiting() == 1, "the second waits on");
  {
    const std::lock_guard<std::mutex> guard(peer->lock);
    need(peer->outbox.front().message == "late" && peer->outbox_bytes == 4, "what waits");
  }
  std::this_thread::sleep_for(milliseconds(1200));
  need(waiting() == 0, "none waits for ever");
  peers->stop();
  uccl_engine_destroy(here);
  need(peers->wait(std::chrono::seconds(10)), "the end of the attempt");
  ::close(fd);
  unsetenv("UCCL_TCPX_TRANSFER_TIMEOUT_MS");
}

/// UCCL_TCPX_TRANSFER_TIMEOUT_MS means the same here as to the engine.
void work_waits_as_long_as_a_transfer_may_stand_still() {
  const auto patience = [](const char *text) {
    setenv("UCCL_TCPX_TRANSFER_TIMEOUT_MS", text, 1);
    return std::make_shared<tcpx::Peers>("here", nullptr, nullptr)->patience();
  };
  need(patience("2500") == std::chrono::milliseconds(2500) && patience(" 7 ") == std::chrono::milliseconds(7), "milliseconds");
  need(patience("10K") == std::chrono::milliseconds(10 << 10) && patience("1m") == std::chrono::milliseconds(1 << 20), "a suffix");
  need(patience("") == std::chrono::seconds(10) && patience("0") == std::chrono::seconds(10), "the default");
  unsetenv("UCCL_TCPX_TRANSFER_TIMEOUT_MS");
}

}  // namespace

int main() {
  work_waits_as_long_as_a_transfer_may_stand_still();
  notifications_wait_for_a_connection_each_for_its_own_time();
  silent_hosts_leave_the_others_alone();
  std::puts("3 tests passed");
  return EXIT_SUCCESS;
}
