// Whether the NIXL in this process calls a backend by the positions that this plugin has. NIXL compares api_version alone, which stays the same when
// virtual functions are added; a call would then reach another function. Knows NIXL's interface, and nothing of the backend.
//
// SPDX-License-Identifier: Apache-2.0

#pragma once

#include <cstddef>
#include <string>

namespace tcpx {

/// Virtual functions of a backend in this plugin.
size_t own_slots();

/// Virtual functions of a backend in a plugin's file; 0 if the file does not tell.
size_t slots_of(const std::string &file);

/// Why the NIXL in this process cannot use this plugin; empty if it can, or if nothing tells. NIXL's own plugins tell, which lie beside its library.
std::string mismatch();

}  // namespace tcpx
