// SPDX-License-Identifier: Apache-2.0

#include "from_ucx.h"

#include <fnmatch.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <filesystem>
#include <initializer_list>

namespace tcpx {

namespace {

constexpr char kDisableIpc[] = "UCCL_P2P_DISABLE_IPC";
constexpr char kPrefix[] = "UCX_";
/// More names than these in the line are only counted.
constexpr size_t kNames = 8;

using Words = std::vector<std::string>;

/// The words of a list, which commas and blanks separate.
Words words_of(const std::string &text) {
  constexpr char separators[] = ", \t";
  Words words;
  for (size_t at = text.find_first_not_of(separators); at != std::string::npos;) {
    const size_t end = text.find_first_of(separators, at);
    words.push_back(text.substr(at, end - at));
    at = text.find_first_not_of(separators, end);
  }
  return words;
}

std::string joined(const Words &words, const char *between) {
  std::string text;
  for (const std::string &word : words) text += (text.empty() ? "" : between) + word;
  return text;
}

bool has(const Words &words, const std::string &word) { return std::find(words.begin(), words.end(), word) != words.end(); }

bool has_any(const Words &words, std::initializer_list<const char *> wanted) {
  return std::any_of(wanted.begin(), wanted.end(), [&](const char *word) { return has(words, word); });
}

std::string value_of(const Variables &environment, const char *name) {
  const auto found = environment.find(name);
  return found == environment.end() ? "" : found->second;
}

/// A list of UCX: its words, or all but its words. What follows a colon, a port or a role, has no meaning here.
struct List {
  explicit List(const std::string &text) : all_but(!text.empty() && text.front() == '^'), given(words_of(text.substr(all_but ? 1 : 0))) {
    for (const std::string &word : given) names.push_back(word.substr(0, word.find(':')));
  }

  const bool all_but;
  const Words given;
  Words names;
};

/// What became of something that the program asks for.
struct Verdict {
  bool understood;
  /// What it does; or why it is ignored, where that is not plain.
  std::string text;
};

Verdict choose_nics(const std::string &value, const Variables &environment, const NetDevices &devices, FromUcx &out) {
  const List list(value);
  Words found, missing;
  for (size_t i = 0; i < list.names.size(); ++i) {
    const auto matches = [&](const std::string &name) { return ::fnmatch(list.names[i].c_str(), name.c_str(), 0) == 0; };
    bool here = false;
    const auto take = [&](const std::string &interface) {
      here = true;
      if (!has(found, interface)) found.push_back(interface);
    };
    std::for_each(devices.interfaces.begin(), devices.interfaces.end(), [&](const auto &name) { if (matches(name)) take(name); });
    for (const auto &[name, interfaces] : devices.adapters) {
      if (matches(name)) std::for_each(interfaces.begin(), interfaces.end(), take);
    }
    if (!here) missing.push_back(list.given[i]);
  }
  if (has(list.names, "all") && !list.all_but) return {true, "every NIC"};
  if (found.empty()) return {false, "no such NIC here"};
  const std::string names = joined(found, ","), filter = (list.all_but ? "^=" : "=") + names, set = value_of(environment, kDataNics);
  if (!set.empty() && set != filter) return {false, std::string(kDataNics) + "=" + set + " counts"};
  out.nics = filter;
  return {true, (list.all_but ? "data NICs without " : "data NICs ") + names + (missing.empty() ? "" : "; not here: " + joined(missing, ","))};
}

/// Whether a list of transports admits copies from process to process. One setting turns off those of host memory and those of GPU memory:
/// a list that admits one and leaves out the other counts as a prohibition.
bool admits_direct(const List &list) {
  if (list.all_but) return !has_any(list.names, {"all", "cuda", "cuda_ipc", "sm", "shm", "cma"});
  if (has_any(list.names, {"all", "cuda", "cuda_ipc"})) return true;
  return has_any(list.names, {"sm", "shm", "mm", "posix", "sysv", "cma", "knem", "xpmem"}) && !has_any(list.names, {"cuda_copy", "gdr_copy"});
}

Verdict choose_paths(const std::string &value, const Variables &environment, FromUcx &out) {
  const List list(value);
  if (list.names.empty()) return {false, ""};
  if (const std::string set = value_of(environment, kDisableIpc); !set.empty()) return {false, std::string(kDisableIpc) + "=" + set + " counts"};
  if (admits_direct(list)) return {true, "direct transfers stay"};
  out.settings.emplace_back(kDisableIpc, "1");
  return {true, "no direct transfers"};
}

/// Something that the program asks for.
struct Wish {
  std::string value;
  /// Where it says so.
  std::string where;
};

/// By UCX's name without its prefix. As NIXL has it, a variable counts before engine_config, and a list of devices before both.
std::map<std::string, Wish> wishes_of(const Variables &parameters, const Variables &environment) {
  std::map<std::string, Wish> wishes;
  for (const auto &[name, value] : environment) {
    if (name.rfind(kPrefix, 0) == 0) wishes[name.substr(std::strlen(kPrefix))] = {value, name};
  }
  for (const std::string &entry : words_of(value_of(parameters, "engine_config"))) {
    const size_t equals = entry.find('=');
    if (equals == std::string::npos || equals == 0) continue;
    const std::string name = entry.substr(0, equals);
    wishes.emplace(name, Wish{entry.substr(equals + 1), "engine_config " + name});
  }
  for (const char *name : {"ucx_devices", "device_list"}) {
    if (const std::string value = value_of(parameters, name); !value.empty()) wishes["NET_DEVICES"] = {value, name};
  }
  return wishes;
}

std::string line_of(const Words &understood, const Words &ignored) {
  if (understood.empty() && ignored.empty()) return "as UCX: the program sets nothing of UCX";
  std::string line = "as UCX: understood " + (understood.empty() ? "nothing" : joined(understood, ", "));
  line += "; ignored " + std::to_string(ignored.size());
  if (!ignored.empty()) line += ": " + joined({ignored.begin(), ignored.begin() + std::min(ignored.size(), kNames)}, ", ");
  if (ignored.size() > kNames) line += " and " + std::to_string(ignored.size() - kNames) + " more";
  return line;
}

/// The names in a directory, in order; none where it cannot be read.
Words entries(const std::filesystem::path &folder) {
  Words names;
  std::error_code error;
  for (std::filesystem::directory_iterator at(folder, error), end; !error && at != end; at.increment(error)) {
    names.push_back(at->path().filename().string());
  }
  std::sort(names.begin(), names.end());
  return names;
}

/// Version 1 without flags; then 0xff, which stands for "no more devices" wherever the end of the fixed fields is.
const std::string kNoDevice = std::string(1, '\0') + std::string(31, '\xff');

}  // namespace

Variables environment() {
  Variables variables;
  for (char **at = ::environ; at && *at; ++at) {
    if (const char *equals = std::strchr(*at, '=')) variables.emplace(std::string(*at, static_cast<size_t>(equals - *at)), equals + 1);
  }
  return variables;
}

NetDevices NetDevices::of_this_host() {
  NetDevices devices;
  devices.interfaces = entries("/sys/class/net");
  const std::filesystem::path adapters("/sys/class/infiniband");
  for (const std::string &name : entries(adapters)) devices.adapters[name] = entries(adapters / name / "device" / "net");
  return devices;
}

Parameters ucx_parameters() { return {{"ucx_devices", ""}, {"num_workers", "1"}, {"ucx_error_handling_mode", "peer"}}; }

FromUcx from_ucx(const Parameters &parameters, const Parameters &own, const Variables &environment, const NetDevices &devices) {
  FromUcx out;
  Words understood, ignored;
  const Variables sorted(parameters.begin(), parameters.end());
  for (const auto &[name, wish] : wishes_of(sorted, environment)) {
    Verdict verdict{false, ""};
    if (name == "NET_DEVICES") verdict = choose_nics(wish.value, environment, devices, out);
    if (name == "TLS") verdict = choose_paths(wish.value, environment, out);
    const std::string why = verdict.text.empty() ? "" : " (" + verdict.text + ")";
    if (verdict.understood) {
      understood.push_back(wish.where + "=" + wish.value + why);
    } else {
      ignored.push_back(wish.where + why);
    }
  }
  const Parameters defaults = ucx_parameters();
  for (const auto &[name, value] : sorted) {
    const auto standard = defaults.find(name);
    const bool says_nothing = value.empty() || (standard != defaults.end() && standard->second == value);
    if (says_nothing || own.count(name) != 0 || name == "engine_config" || name == "device_list" || name == "ucx_devices") continue;
    ignored.push_back(name);
  }
  out.line = line_of(understood, ignored);
  return out;
}

std::string as_ucx_address(const std::string &text) { return kNoDevice + text; }

std::string behind_ucx_address(const std::string &text) {
  return text.compare(0, kNoDevice.size(), kNoDevice) == 0 ? text.substr(kNoDevice.size()) : text;
}

}  // namespace tcpx
