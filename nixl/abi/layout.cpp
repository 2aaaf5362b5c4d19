// Prints sizes, offsets, numbers and table positions of NIXL's plugin interface. Compiled once with NIXL's headers and once with
// include_fallback; the two must print the same.
//
// SPDX-License-Identifier: Apache-2.0

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <sstream>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#ifdef __has_include
#if __has_include("absl/log/log.h")
#include "absl/log/check.h"
#include "absl/log/initialize.h"
#include "absl/log/log.h"
#endif
#endif

// Members of the interface are private and protected; their places are the point of this program.
#define private public
#define protected public
#include "backend/backend_plugin.h"
#undef private
#undef protected

namespace {

// Itanium C++ ABI: a pointer to a virtual member function holds 1 plus its offset in the table (x86-64), or the offset with the mark in
// the other half (aarch64).
template <class Function>
long slot(Function function) {
  std::ptrdiff_t halves[2];
  static_assert(sizeof function == sizeof halves);
  std::memcpy(halves, &function, sizeof halves);
#if defined(__aarch64__)
  return (halves[1] & 1) ? static_cast<long>(halves[0] / sizeof(void *)) : -1;
#else
  return (halves[0] & 1) ? static_cast<long>((halves[0] - 1) / sizeof(void *)) : -1;
#endif
}

}  // namespace

#define SIZE(type) std::printf("sizeof %s = %zu, align %zu\n", #type, sizeof(type), alignof(type))
#define PLACE(type, member) std::printf("%s::%s at %zu, %zu bytes\n", #type, #member, offsetof(type, member), sizeof(type::member))
#define SLOT(name) std::printf("slot %s = %ld\n", #name, slot(&nixlBackendEngine::name))
#define VALUE(name) std::printf("%s = %d\n", #name, static_cast<int>(name))

#pragma GCC diagnostic ignored "-Winvalid-offsetof"

int main() {
  SIZE(nixlBasicDesc);
  PLACE(nixlBasicDesc, addr);
  PLACE(nixlBasicDesc, len);
  PLACE(nixlBasicDesc, devId);
  SIZE(nixlBlobDesc);
  PLACE(nixlBlobDesc, metaInfo);
  SIZE(nixlMetaDesc);
  PLACE(nixlMetaDesc, metadataP);
  SIZE(nixlRemoteMetaDesc);
  PLACE(nixlRemoteMetaDesc, remoteAgent);
  SIZE(nixl_meta_dlist_t);
  PLACE(nixl_meta_dlist_t, type);
  PLACE(nixl_meta_dlist_t, descs);
  SIZE(nixl_reg_dlist_t);
  SIZE(nixl_remote_meta_dlist_t);
  SIZE(nixlBackendOptionalArgs);
  PLACE(nixlBackendOptionalArgs, notifMsg);
  PLACE(nixlBackendOptionalArgs, hasNotif);
  PLACE(nixlBackendOptionalArgs, customParam);
  SIZE(nixlBackendInitParams);
  PLACE(nixlBackendInitParams, localAgent);
  PLACE(nixlBackendInitParams, type);
  PLACE(nixlBackendInitParams, customParams);
  PLACE(nixlBackendInitParams, enableProgTh);
  PLACE(nixlBackendInitParams, pthrDelay);
  PLACE(nixlBackendInitParams, syncMode);
  PLACE(nixlBackendInitParams, enableTelemetry_);
  SIZE(nixlBackendReqH);
  SIZE(nixlBackendMD);
  PLACE(nixlBackendMD, isPrivateMD);
  SIZE(nixlTelemetryEvent);
  SIZE(nixlBackendEngine);
  PLACE(nixlBackendEngine, backendType);
  PLACE(nixlBackendEngine, customParams);
  PLACE(nixlBackendEngine, telemetryEvents_);
  PLACE(nixlBackendEngine, telemetryEventsMutex_);
  PLACE(nixlBackendEngine, initErr);
  PLACE(nixlBackendEngine, localAgent);
  PLACE(nixlBackendEngine, enableTelemetry_);
  SIZE(nixlBackendPlugin);
  PLACE(nixlBackendPlugin, api_version);
  PLACE(nixlBackendPlugin, create_engine);
  PLACE(nixlBackendPlugin, destroy_engine);
  PLACE(nixlBackendPlugin, get_plugin_name);
  PLACE(nixlBackendPlugin, get_plugin_version);
  PLACE(nixlBackendPlugin, get_backend_options);
  PLACE(nixlBackendPlugin, get_backend_mems);

  SLOT(supportsRemote);
  SLOT(supportsLocal);
  SLOT(supportsNotif);
  SLOT(getSupportedMems);
  SLOT(registerMem);
  SLOT(deregisterMem);
  SLOT(connect);
  SLOT(disconnect);
  SLOT(unloadMD);
  SLOT(prepXfer);
  SLOT(postXfer);
  SLOT(checkXfer);
  SLOT(releaseReqH);
  using Engine = nixlBackendEngine;
  nixl_status_t (Engine::*remote_view)(const nixl_remote_meta_dlist_t &, nixlMemViewH &, const nixl_opt_b_args_t *) const = &Engine::prepMemView;
  nixl_status_t (Engine::*local_view)(const nixl_meta_dlist_t &, nixlMemViewH &, const nixl_opt_b_args_t *) const = &Engine::prepMemView;
  std::printf("slot prepMemView(remote) = %ld\nslot prepMemView(local) = %ld\n", slot(remote_view), slot(local_view));
  SLOT(releaseMemView);
  SLOT(getPublicData);
  SLOT(getConnInfo);
  SLOT(loadRemoteConnInfo);
  SLOT(loadRemoteMD);
  SLOT(loadLocalMD);
  SLOT(getNotifs);
  SLOT(genNotif);
  SLOT(queryMem);
  SLOT(estimateXferCost);

  VALUE(NIXL_PLUGIN_API_VERSION);
  VALUE(DRAM_SEG);
  VALUE(VRAM_SEG);
  VALUE(BLK_SEG);
  VALUE(OBJ_SEG);
  VALUE(FILE_SEG);
  VALUE(NIXL_READ);
  VALUE(NIXL_WRITE);
  VALUE(NIXL_IN_PROG);
  VALUE(NIXL_SUCCESS);
  VALUE(NIXL_ERR_NOT_POSTED);
  VALUE(NIXL_ERR_INVALID_PARAM);
  VALUE(NIXL_ERR_BACKEND);
  VALUE(NIXL_ERR_NOT_FOUND);
  VALUE(NIXL_ERR_MISMATCH);
  VALUE(NIXL_ERR_NOT_ALLOWED);
  VALUE(NIXL_ERR_REPOST_ACTIVE);
  VALUE(NIXL_ERR_UNKNOWN);
  VALUE(NIXL_ERR_NOT_SUPPORTED);
  VALUE(NIXL_ERR_REMOTE_DISCONNECT);
  VALUE(NIXL_ERR_CANCELED);
  VALUE(NIXL_ERR_NO_TELEMETRY);
  VALUE(nixl_thread_sync_t::NIXL_THREAD_SYNC_STRICT);
  VALUE(nixl_thread_sync_t::NIXL_THREAD_SYNC_RW);
  VALUE(nixl_cost_t::ANALYTICAL_BACKEND);
}
