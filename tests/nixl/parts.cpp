// The parts of the plugin that need no network: connection info, and jobs in the background.
//
// SPDX-License-Identifier: Apache-2.0

#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <thread>

#include "../../nixl/src/conn_info.h"
#include "../../nixl/src/jobs.h"

using namespace std::chrono_literals;

namespace {

int failures = 0;

void check(bool condition, const char *what) {
  if (condition) return;
  std::fprintf(stderr, "failed: %s\n", what);
  ++failures;
}

FifoItem item() {
  FifoItem item;
  for (size_t i = 0; i < sizeof item; ++i) reinterpret_cast<unsigned char *>(&item)[i] = static_cast<unsigned char>(i * 37);
  return item;
}

void connection_info_round_trips() {
  for (const char *metadata : {"10.0.0.1:7777?-1", "[::1]:1?0000:4a:00.0", "fe80::1:65535?0"}) {
    const auto info = tcpx::ConnInfo::parse(tcpx::ConnInfo::text(metadata, item()));
    check(info && info->identity, metadata);
    const FifoItem expected = item();
    check(info && info->identity && std::memcmp(&*info->identity, &expected, sizeof expected) == 0, "identity");
  }
  const auto v6 = tcpx::ConnInfo::parse("[fe80::1]:42?0000:4a:00.0");
  check(v6 && v6->host == "fe80::1" && v6->port == 42 && v6->gpu == "0000:4a:00.0" && !v6->identity, "IPv6, PCI address, no identity");
}

void bad_connection_info_is_refused() {
  const std::string good = tcpx::ConnInfo::text("10.0.0.1:7777?-1", item());
  for (size_t length = 0; length < good.size(); ++length) {
    // Any truncation: an error, or metadata without an identity.
    const auto info = tcpx::ConnInfo::parse(good.substr(0, length));
    check(!info || !info->identity, "a text that was cut");
  }
  for (const char *bad : {"", "?", ":1?0", "host", "host:?0", "host:0?0", "host:65536?0", "host:12x?0", "host:-1?0", "host:123456?0", "#", "host:1?0#"}) {
    check(!tcpx::ConnInfo::parse(bad), bad);
  }
  check(!tcpx::ConnInfo::parse(std::string("ho\0st:1?0", 9)), "a NUL inside");
  std::string upper = good;
  upper.back() = 'X';
  check(!tcpx::ConnInfo::parse(upper), "a digit that is none");
  upper.back() = '\0';
  check(!tcpx::ConnInfo::parse(upper), "a NUL as a digit");
  check(!tcpx::ConnInfo::parse(good + "00"), "an identity that is too long");
}

void jobs_run_and_are_waited_for() {
  tcpx::Jobs jobs;
  std::atomic<int> done{0};
  for (int i = 0; i < 500; ++i) check(jobs.run([&done] { ++done; }), "a job");
  check(jobs.wait(10s) && done == 500, "500 jobs");
  check(jobs.run([] { throw 1; }), "a job that throws");
  check(jobs.wait(10s), "its end");
}

void jobs_that_block_are_left_behind() {
  const auto begin = std::chrono::steady_clock::now();
  auto stop = std::make_shared<std::atomic<bool>>(false);
  auto ended = std::make_shared<std::atomic<int>>(0);
  {
    tcpx::Jobs jobs;
    for (int i = 0; i < 100; ++i) {
      jobs.run([stop, ended] {
        while (!*stop) std::this_thread::sleep_for(1ms);
        ++*ended;
      });
    }
    check(!jobs.wait(50ms), "jobs that block");
  }
  check(std::chrono::steady_clock::now() - begin < 5s, "the end of jobs does not wait");
  *stop = true;
  for (int i = 0; i < 5000 && stop.use_count() > 1; ++i) std::this_thread::sleep_for(1ms);
  check(stop.use_count() == 1, "what the jobs owned is given back");
  check(*ended > 0 && *ended < 100, "jobs that had not begun are dropped");
}

}  // namespace

int main() {
  connection_info_round_trips();
  bad_connection_info_is_refused();
  jobs_run_and_are_waited_for();
  jobs_that_block_are_left_behind();
  if (failures == 0) std::puts("4 tests passed");
  return failures == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
