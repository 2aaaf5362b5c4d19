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

}  // namespace tcpx
