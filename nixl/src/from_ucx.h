// What a program that names UCX asks for, in this library's settings. It asks in UCX's environment variables and in the parameters of NIXL's
// UCX backend. Knows nothing of backends or engines.
//
// SPDX-License-Identifier: Apache-2.0

#pragma once

#include <map>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

namespace tcpx {

using Variables = std::map<std::string, std::string>;
using Parameters = std::unordered_map<std::string, std::string>;

/// The environment of this process.
Variables environment();

/// The names that UCX_NET_DEVICES may use on a host.
struct NetDevices {
  std::vector<std::string> interfaces;
  /// RDMA devices, each with its interfaces.
  std::map<std::string, std::vector<std::string>> adapters;

  static NetDevices of_this_host();
};

/// The variable that chooses the data NICs. The network plugin reads it when it starts, so it holds for the whole process.
inline constexpr char kDataNics[] = "NCCL_GPUDIRECTTCPX_SOCKET_IFNAME";

struct FromUcx {
  /// Settings of an engine, by the names of their variables.
  std::vector<std::pair<std::string, std::string>> settings;
  /// What kDataNics is to be; empty where that is not asked for.
  std::string nics;
  /// One line that says what was understood, what it does, and what was ignored.
  std::string line;
};

/// The parameters that NIXL's UCX backend lists, with its defaults.
Parameters ucx_parameters();

/// `own`: parameters that are this library's and are not looked at. A variable of this library that is set counts before UCX's.
FromUcx from_ucx(const Parameters &parameters, const Parameters &own, const Variables &environment, const NetDevices &devices);

/// Connection info as it goes out under the name UCX: behind an address of UCX's form that has no device. A real UCX takes it for an address and finds the
/// peer unreachable; other texts may fail a check that ends its process.
std::string as_ucx_address(const std::string &text);
/// What stands behind that address; the text itself where there is none.
std::string behind_ucx_address(const std::string &text);

}  // namespace tcpx
