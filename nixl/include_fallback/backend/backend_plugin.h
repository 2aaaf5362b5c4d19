/* The part of NIXL's backend plugin interface (plugin API version 1, NIXL 1.2 to 1.5) that a backend needs, declared again so
 * that the plugin builds where only NIXL's binary wheels are installed: they ship no headers.
 *
 * Binary contract, not documentation: order, types and sizes of members, and the order of virtual functions, are what libnixl.so
 * was compiled with. abi/layout.cpp compares all of it with NIXL's own headers where those are given. Nothing here may depend on a
 * symbol of libnixl.so: only inline functions and templates are declared, and only what a backend reads.
 *
 * SPDX-License-Identifier: Apache-2.0
 */

#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <optional>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#if !defined(_GLIBCXX_USE_CXX11_ABI) || !_GLIBCXX_USE_CXX11_ABI
#error "NIXL is built with the C++11 ABI of libstdc++ (std::string of 32 bytes); build with _GLIBCXX_USE_CXX11_ABI=1"
#endif

/* ---- Kinds, operations, statuses ------------------------------------------------------------------------------------------ */

enum nixl_mem_t { DRAM_SEG, VRAM_SEG, BLK_SEG, OBJ_SEG, FILE_SEG };

enum nixl_xfer_op_t { NIXL_READ, NIXL_WRITE };

enum nixl_status_t {
  NIXL_IN_PROG = 1,
  NIXL_SUCCESS = 0,
  NIXL_ERR_NOT_POSTED = -1,
  NIXL_ERR_INVALID_PARAM = -2,
  NIXL_ERR_BACKEND = -3,
  NIXL_ERR_NOT_FOUND = -4,
  NIXL_ERR_MISMATCH = -5,
  NIXL_ERR_NOT_ALLOWED = -6,
  NIXL_ERR_REPOST_ACTIVE = -7,
  NIXL_ERR_UNKNOWN = -8,
  NIXL_ERR_NOT_SUPPORTED = -9,
  NIXL_ERR_REMOTE_DISCONNECT = -10,
  NIXL_ERR_CANCELED = -11,
  NIXL_ERR_NO_TELEMETRY = -12
};

enum class nixl_thread_sync_t {
  NIXL_THREAD_SYNC_NONE,
  NIXL_THREAD_SYNC_STRICT,
  NIXL_THREAD_SYNC_RW,
  NIXL_THREAD_SYNC_DEFAULT = NIXL_THREAD_SYNC_NONE,
};

enum class nixl_cost_t { ANALYTICAL_BACKEND = 0 };

using nixl_backend_t = std::string;
using nixl_blob_t = std::string;
using nixl_mem_list_t = std::vector<nixl_mem_t>;
using nixl_b_params_t = std::unordered_map<std::string, std::string>;
using nixl_query_resp_t = std::optional<nixl_b_params_t>;
using nixlMemViewH = void *;
using notif_list_t = std::vector<std::pair<std::string, std::string>>;

/* Options of the caller's API; a backend sees them by pointer only and this one reads none. */
struct nixlAgentOptionalArgs;
using nixl_opt_args_t = nixlAgentOptionalArgs;

/* ---- Descriptors ------------------------------------------------------------------------------------------------------------ */

class nixlBasicDesc {
 public:
  uintptr_t addr;
  size_t len;
  uint64_t devId;
};

class nixlBlobDesc : public nixlBasicDesc {
 public:
  nixl_blob_t metaInfo;
};

class nixlBackendMD;

class nixlMetaDesc : public nixlBasicDesc {
 public:
  nixlBackendMD *metadataP;
};

struct nixlRemoteMetaDesc : public nixlMetaDesc {
  std::string remoteAgent;
};

/* A list made by the agent. A backend only looks at it, so what is virtual or out of line needs no definition here; the virtual
 * functions are listed because they put a table pointer in front of the members. */
template <class T>
class nixlDescList {
 protected:
  nixl_mem_t type;
  std::vector<T> descs;

 public:
  virtual ~nixlDescList() = default;

  nixl_mem_t getType() const { return type; }
  int descCount() const { return static_cast<int>(descs.size()); }
  bool isEmpty() const noexcept { return descs.empty(); }
  const T &operator[](size_t index) const { return descs[index]; }
  typename std::vector<T>::const_iterator begin() const { return descs.begin(); }
  typename std::vector<T>::const_iterator end() const { return descs.end(); }

  virtual void resize(const size_t &count);
  virtual void addDesc(const T &desc);
  virtual int getIndex(const nixlBasicDesc &query) const;
};

using nixl_reg_dlist_t = nixlDescList<nixlBlobDesc>;
using nixl_meta_dlist_t = nixlDescList<nixlMetaDesc>;
using nixl_remote_meta_dlist_t = nixlDescList<nixlRemoteMetaDesc>;

/* ---- What the agent and a backend hand each other ---------------------------------------------------------------------------- */

struct nixlBackendOptionalArgs {
  nixl_blob_t notifMsg;
  bool hasNotif = false;
  nixl_blob_t customParam;
};
using nixl_opt_b_args_t = nixlBackendOptionalArgs;

class nixlBackendInitParams {
 public:
  std::string localAgent;
  nixl_backend_t type;
  nixl_b_params_t *customParams = nullptr;
  bool enableProgTh = false;
  uint64_t pthrDelay = 0;
  nixl_thread_sync_t syncMode;
  bool enableTelemetry_ = false;
};

/* Base of a backend's request handle. */
class nixlBackendReqH {
 public:
  nixlBackendReqH() {}
  virtual ~nixlBackendReqH() {}
};

/* Base of a backend's metadata, of local memory (private) and of memory as others address it. */
class nixlBackendMD {
 protected:
  bool isPrivateMD;

 public:
  explicit nixlBackendMD(bool is_private) { isPrivateMD = is_private; }
  virtual ~nixlBackendMD() {}
};

enum class nixl_telemetry_event_type_t : uint32_t {};

struct nixlTelemetryEvent {
  nixl_telemetry_event_type_t eventType_;
  uint64_t value_;
};

/* ---- The backend -------------------------------------------------------------------------------------------------------------- */

class nixlBackendEngine {
 private:
  nixl_backend_t backendType;
  nixl_b_params_t customParams;
  std::vector<nixlTelemetryEvent> telemetryEvents_;
  std::mutex telemetryEventsMutex_;

 protected:
  bool initErr = false;
  const std::string localAgent;
  const bool enableTelemetry_;

 public:
  explicit nixlBackendEngine(const nixlBackendInitParams *init)
      : backendType(init->type),
        customParams(*init->customParams),
        localAgent(init->localAgent),
        enableTelemetry_(init->enableTelemetry_) {}

  nixlBackendEngine(const nixlBackendEngine &) = delete;
  void operator=(const nixlBackendEngine &) = delete;
  virtual ~nixlBackendEngine() = default;

  bool getInitErr() const noexcept { return initErr; }
  const nixl_backend_t &getType() const noexcept { return backendType; }
  const nixl_b_params_t &getCustomParams() const noexcept { return customParams; }

  /* From here on the order is the contract: the agent calls by position. */
  virtual bool supportsRemote() const = 0;
  virtual bool supportsLocal() const = 0;
  virtual bool supportsNotif() const = 0;
  virtual nixl_mem_list_t getSupportedMems() const = 0;

  virtual nixl_status_t registerMem(const nixlBlobDesc &mem, const nixl_mem_t &nixl_mem, nixlBackendMD *&out) = 0;
  virtual nixl_status_t deregisterMem(nixlBackendMD *meta) = 0;
  virtual nixl_status_t connect(const std::string &remote_agent) = 0;
  virtual nixl_status_t disconnect(const std::string &remote_agent) = 0;
  virtual nixl_status_t unloadMD(nixlBackendMD *input) = 0;

  virtual nixl_status_t prepXfer(const nixl_xfer_op_t &operation, const nixl_meta_dlist_t &local, const nixl_meta_dlist_t &remote,
                                 const std::string &remote_agent, nixlBackendReqH *&handle,
                                 const nixl_opt_b_args_t *opt_args = nullptr) const = 0;
  virtual nixl_status_t postXfer(const nixl_xfer_op_t &operation, const nixl_meta_dlist_t &local, const nixl_meta_dlist_t &remote,
                                 const std::string &remote_agent, nixlBackendReqH *&handle,
                                 const nixl_opt_b_args_t *opt_args = nullptr) const = 0;
  virtual nixl_status_t checkXfer(nixlBackendReqH *handle) const = 0;
  virtual nixl_status_t releaseReqH(nixlBackendReqH *handle) const = 0;

  virtual nixl_status_t prepMemView(const nixl_remote_meta_dlist_t &, nixlMemViewH &, const nixl_opt_b_args_t * = nullptr) const {
    return NIXL_ERR_NOT_SUPPORTED;
  }
  virtual nixl_status_t prepMemView(const nixl_meta_dlist_t &, nixlMemViewH &, const nixl_opt_b_args_t * = nullptr) const {
    return NIXL_ERR_NOT_SUPPORTED;
  }
  virtual void releaseMemView(nixlMemViewH) const {}

  virtual nixl_status_t getPublicData(const nixlBackendMD *, std::string &) const { return NIXL_ERR_BACKEND; }
  virtual nixl_status_t getConnInfo(std::string &) const { return NIXL_ERR_BACKEND; }
  virtual nixl_status_t loadRemoteConnInfo(const std::string &, const std::string &) { return NIXL_ERR_BACKEND; }
  virtual nixl_status_t loadRemoteMD(const nixlBlobDesc &, const nixl_mem_t &, const std::string &, nixlBackendMD *&) {
    return NIXL_ERR_BACKEND;
  }
  virtual nixl_status_t loadLocalMD(nixlBackendMD *, nixlBackendMD *&) { return NIXL_ERR_BACKEND; }

  virtual nixl_status_t getNotifs(notif_list_t &) { return NIXL_ERR_BACKEND; }
  virtual nixl_status_t genNotif(const std::string &, const std::string &) const { return NIXL_ERR_BACKEND; }

  virtual nixl_status_t queryMem(const nixl_reg_dlist_t &, std::vector<nixl_query_resp_t> &) const { return NIXL_ERR_NOT_SUPPORTED; }
  virtual nixl_status_t estimateXferCost(const nixl_xfer_op_t &, const nixl_meta_dlist_t &, const nixl_meta_dlist_t &,
                                         const std::string &, nixlBackendReqH *const &, std::chrono::microseconds &,
                                         std::chrono::microseconds &, nixl_cost_t &, const nixl_opt_args_t * = nullptr) const {
    return NIXL_ERR_NOT_SUPPORTED;
  }
};

/* ---- What the shared object hands out ----------------------------------------------------------------------------------------- */

#define NIXL_PLUGIN_API_VERSION 1
#define NIXL_PLUGIN_EXPORT __attribute__((visibility("default")))

class nixlBackendPlugin {
 public:
  int api_version;
  nixlBackendEngine *(*create_engine)(const nixlBackendInitParams *init_params);
  void (*destroy_engine)(nixlBackendEngine *engine);
  const char *(*get_plugin_name)();
  const char *(*get_plugin_version)();
  nixl_b_params_t (*get_backend_options)();
  nixl_mem_list_t (*get_backend_mems)();
};

/* Sizes that libnixl.so of the 1.2 to 1.5 wheels was built with, on x86-64 and aarch64 Linux. */
static_assert(sizeof(nixlBasicDesc) == 24 && sizeof(nixlMetaDesc) == 32 && sizeof(nixlBlobDesc) == 56);
static_assert(sizeof(nixl_meta_dlist_t) == 40 && sizeof(nixlBackendOptionalArgs) == 72);
static_assert(sizeof(nixlBackendInitParams) == 96 && sizeof(nixlTelemetryEvent) == 16);
static_assert(sizeof(nixlBackendPlugin) == 56);

extern "C" {
NIXL_PLUGIN_EXPORT nixlBackendPlugin *nixl_plugin_init();
NIXL_PLUGIN_EXPORT void nixl_plugin_fini();
}
