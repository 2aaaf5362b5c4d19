// The parts of the plugin that need no network: connection info, jobs in the background, and what is understood of UCX.
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
#include "../../nixl/src/from_ucx.h"
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

/// A host with two NICs, one of them an RDMA device too.
tcpx::FromUcx asked(const tcpx::Parameters &parameters, const tcpx::Variables &environment) {
  return tcpx::from_ucx(parameters, {{"num_channels", ""}}, environment, {{"eth0", "eth1", "lo"}, {{"mlx5_0", {"eth1"}}, {"mlx5_1", {}}}});
}

bool direct(const std::string &transports) { return asked({}, {{"UCX_TLS", transports}}).settings.empty(); }

std::string nics(const std::string &devices) { return asked({}, {{"UCX_NET_DEVICES", devices}}).nics; }

void check_equal(const std::string &actual, const std::string &expected, const char *what) {
  check(actual == expected, (std::string(what) + ": '" + actual + "', expected '" + expected + "'").c_str());
}

void ucx_names_of_transports_choose_the_paths() {
  for (const char *with : {"all", "rc,cuda_copy,cuda_ipc", "^ib", "^xpmem", "tcp,sm,self", "cuda", "tcp,cuda_ipc:aux", "^tcp"}) check(direct(with), with);
  for (const char *without : {"^cuda_ipc", "^ib,cuda_ipc", "tcp", "tcp,cuda_copy", "tcp,sm,cuda_copy", "^sm", "^cma", "^cuda", "rc_x,self", "^all"}) {
    check(!direct(without), without);
  }
  check(direct(""), "no transports named");
  const auto off = asked({}, {{"UCX_TLS", "tcp"}});
  check(off.settings.size() == 1 && off.settings[0].first == "UCCL_P2P_DISABLE_IPC" && off.settings[0].second == "1", "the setting");
  const auto own = asked({}, {{"UCX_TLS", "tcp"}, {"UCCL_P2P_DISABLE_IPC", "0"}});
  check(own.settings.empty(), "a variable of this library counts first");
  check_equal(own.line, "as UCX: understood nothing; ignored 1: UCX_TLS (UCCL_P2P_DISABLE_IPC=0 counts)", "and the line says so");
}

void ucx_names_of_devices_choose_the_nics() {
  check_equal(nics("eth0"), "=eth0", "an interface");
  check_equal(nics("mlx5_0:1,eth0:1"), "=eth1,eth0", "an RDMA device, and ports");
  check_equal(nics("eth0,ib7"), "=eth0", "a device that is not here");
  check_equal(nics("eth*"), "=eth0,eth1", "a pattern");
  check_equal(nics("mlx5_0:1,eth1"), "=eth1", "one NIC under two names");
  check_equal(nics("^lo"), "^=lo", "all but one");
  for (const char *none : {"all", "", "ib7", "mlx5_1:1", "^", ","}) check_equal(nics(none), "", none);
  check_equal(asked({{"device_list", "eth1, eth0"}}, {{"UCX_NET_DEVICES", "lo"}}).nics, "=eth1,eth0", "a list of devices counts before the variable");
  check_equal(asked({{"ucx_devices", "eth1"}}, {}).nics, "=eth1", "the parameter of that name");
  const auto own = asked({}, {{"UCX_NET_DEVICES", "eth0"}, {tcpx::kDataNics, "eth1"}});
  check_equal(own.nics, "", "a variable of this library counts first");
  check(own.line.find("counts") != std::string::npos, own.line.c_str());
  const auto same = asked({}, {{"UCX_NET_DEVICES", "eth0"}, {tcpx::kDataNics, "=eth0"}});
  check(same.line.find("ignored 0") != std::string::npos, same.line.c_str());
}

void one_line_says_what_was_understood() {
  check_equal(asked({}, {{"PATH", "/bin"}, {"UCXX", "1"}}).line, "as UCX: the program sets nothing of UCX", "nothing");
  check_equal(asked(tcpx::ucx_parameters(), {}).line, "as UCX: the program sets nothing of UCX", "the parameters as NIXL lists them");
  check_equal(asked({{"num_workers", "4"}, {"num_channels", "2"}, {"split_batch_size", ""}, {"strange", "1"}},
                    {{"UCX_TLS", "^cuda_ipc"}, {"UCX_NET_DEVICES", "mlx5_0:1,x"}, {"UCX_RNDV_THRESH", "inf"}})
                  .line,
              "as UCX: understood UCX_NET_DEVICES=mlx5_0:1,x (data NICs eth1; not here: x), UCX_TLS=^cuda_ipc (no direct transfers); "
              "ignored 3: UCX_RNDV_THRESH, num_workers, strange",
              "all kinds");
  check_equal(asked({{"engine_config", "TLS=tcp,MAX_RMA_RAILS=4,=,x"}}, {}).line,
              "as UCX: understood engine_config TLS=tcp (no direct transfers); ignored 1: engine_config MAX_RMA_RAILS", "engine_config");
  check_equal(asked({{"engine_config", "TLS=all"}}, {{"UCX_TLS", "tcp"}}).line, "as UCX: understood UCX_TLS=tcp (no direct transfers); ignored 0",
              "a variable counts before engine_config");
  tcpx::Variables many;
  for (char c = 'A'; c <= 'Z'; ++c) many[std::string("UCX_") + c] = "1";
  const std::string line = asked({}, many).line;
  check(line.find("ignored 26: UCX_A, ") != std::string::npos && line.find("UCX_H and 18 more") != std::string::npos, line.c_str());
}

void ucx_addresses_go_before_connection_info() {
  for (const std::string text : {"10.0.0.1:7777?-1#00", ""}) {
    check(tcpx::as_ucx_address(text) != text && tcpx::behind_ucx_address(tcpx::as_ucx_address(text)) == text, "there and back");
    check(tcpx::behind_ucx_address(text) == text, "a text without an address of UCX's form");
  }
}

}  // namespace

int main() {
  connection_info_round_trips();
  bad_connection_info_is_refused();
  jobs_run_and_are_waited_for();
  jobs_that_block_are_left_behind();
  ucx_names_of_transports_choose_the_paths();
  ucx_names_of_devices_choose_the_nics();
  one_line_says_what_was_understood();
  ucx_addresses_go_before_connection_info();
  if (failures == 0) std::puts("8 tests passed");
  return failures == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
