// CUPTI's activity records. The library is found under CUPTI's name by a link beside it.
#include <cupti.h>

#include <algorithm>
#include <array>
#include <cstdlib>
#include <cstring>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "tests/runtime/cuda/emulated/gpu.h"

namespace {

#if CUPTI_API_VERSION >= 130000
using Kernel = CUpti_ActivityKernel10;
#else
using Kernel = CUpti_ActivityKernel9;
#endif

struct Recorder {
  CUpti_BuffersCallbackRequestFunc room = nullptr;
  CUpti_BuffersCallbackCompleteFunc filled = nullptr;
  std::set<CUpti_ActivityKind> kinds;
  std::uint8_t* buffer = nullptr;
  std::size_t size = 0, used = 0;
  std::uint32_t correlations = 0;
  std::set<std::string> names;  ///< what records point to
};
Recorder& recorder() {
  static Recorder& r = *new Recorder;
  return r;
}
thread_local std::vector<std::uint64_t> callers;

void flush() {
  Recorder& r = recorder();
  if (r.buffer == nullptr) return;
  r.filled(nullptr, 0, std::exchange(r.buffer, nullptr), r.size, r.used);
}
template <class T>
void put(const T& record) {
  Recorder& r = recorder();
  if (r.kinds.count(record.kind) == 0) return;
  if (r.buffer != nullptr && r.used + sizeof(T) > r.size) flush();
  if (r.buffer == nullptr) {
    std::size_t most = 0;
    r.room(&r.buffer, &r.size, &most);
    r.used = 0;
  }
  if (r.buffer == nullptr || r.size < sizeof(T)) return;
  std::memcpy(r.buffer + r.used, &record, sizeof(T));
  r.used += sizeof(T);
}
std::size_t size_of(CUpti_ActivityKind kind) {
  switch (kind) {
    case CUPTI_ACTIVITY_KIND_CONCURRENT_KERNEL:
      return sizeof(Kernel);
    case CUPTI_ACTIVITY_KIND_MEMCPY:
      return sizeof(CUpti_ActivityMemcpy6);
    case CUPTI_ACTIVITY_KIND_MEMSET:
      return sizeof(CUpti_ActivityMemset4);
    case CUPTI_ACTIVITY_KIND_EXTERNAL_CORRELATION:
      return sizeof(CUpti_ActivityExternalCorrelation);
    default:
      return sizeof(CUpti_ActivityAPI);
  }
}
template <class T>
T timed(CUpti_ActivityKind kind, const emulated::Record& from) {
  T t;
  std::memset(&t, 0, sizeof t);
  t.kind = kind;
  t.start = from.start;
  t.end = from.end;
  t.streamId = from.stream;
  t.correlationId = from.correlation;
  return t;
}

void listen() {
  emulated::on_api_call = [] {
    Recorder& r = recorder();
    const std::uint32_t number = ++r.correlations;
    CUpti_ActivityAPI api;
    std::memset(&api, 0, sizeof api);
    api.kind = CUPTI_ACTIVITY_KIND_RUNTIME;
    api.correlationId = number;
    // Who called is told beside records of calls alone.
    if (r.kinds.count(api.kind) > 0 && !callers.empty()) {
      CUpti_ActivityExternalCorrelation e;
      std::memset(&e, 0, sizeof e);
      e.kind = CUPTI_ACTIVITY_KIND_EXTERNAL_CORRELATION;
      e.externalKind = CUPTI_EXTERNAL_CORRELATION_KIND_CUSTOM0;
      e.externalId = callers.back();
      e.correlationId = number;
      put(e);
    }
    put(api);
    return number;
  };
  emulated::on_record = [](const emulated::Record& from) {
    if (from.kind == emulated::Call::Kind::kernel) {
      auto k = timed<Kernel>(CUPTI_ACTIVITY_KIND_CONCURRENT_KERNEL, from);
      k.name = recorder().names.insert(from.name).first->c_str();
      put(k);
    } else if (from.kind == emulated::Call::Kind::copy) {
      put(timed<CUpti_ActivityMemcpy6>(CUPTI_ACTIVITY_KIND_MEMCPY, from));
    } else {
      put(timed<CUpti_ActivityMemset4>(CUPTI_ACTIVITY_KIND_MEMSET, from));
    }
  };
}

}  // namespace

extern "C" {

CUptiResult CUPTIAPI cuptiGetResultString(CUptiResult, const char** text) {
  *text = "a refusal of the emulated CUPTI";
  return CUPTI_SUCCESS;
}
CUptiResult CUPTIAPI cuptiActivityRegisterCallbacks(CUpti_BuffersCallbackRequestFunc room,
                                                    CUpti_BuffersCallbackCompleteFunc filled) {
  const std::lock_guard lock(emulated::guard());
  recorder().room = room;
  recorder().filled = filled;
  return CUPTI_SUCCESS;
}
CUptiResult CUPTIAPI cuptiActivityEnable(CUpti_ActivityKind kind) {
  const std::lock_guard lock(emulated::guard());
  if (recorder().room == nullptr) return CUPTI_ERROR_UNKNOWN;
  recorder().kinds.insert(kind);
  listen();
  return CUPTI_SUCCESS;
}
CUptiResult CUPTIAPI cuptiActivityDisable(CUpti_ActivityKind kind) {
  const std::lock_guard lock(emulated::guard());
  recorder().kinds.erase(kind);
  if (recorder().kinds.empty()) emulated::on_record = nullptr, emulated::on_api_call = nullptr;
  return CUPTI_SUCCESS;
}
CUptiResult CUPTIAPI cuptiActivityFlushAll(uint32_t) {
  const std::lock_guard lock(emulated::guard());
  flush();
  return CUPTI_SUCCESS;
}
CUptiResult CUPTIAPI cuptiActivityGetNextRecord(uint8_t* buffer, size_t valid,
                                                CUpti_Activity** record) {
  if (valid == 0) return CUPTI_ERROR_MAX_LIMIT_REACHED;
  auto* at = reinterpret_cast<std::uint8_t*>(*record);
  at = at == nullptr ? buffer : at + size_of((*record)->kind);
  if (at >= buffer + valid) return CUPTI_ERROR_MAX_LIMIT_REACHED;
  *record = reinterpret_cast<CUpti_Activity*>(at);
  return CUPTI_SUCCESS;
}
CUptiResult CUPTIAPI cuptiActivityPushExternalCorrelationId(CUpti_ExternalCorrelationKind,
                                                            uint64_t id) {
  callers.push_back(id);
  return CUPTI_SUCCESS;
}
CUptiResult CUPTIAPI cuptiActivityPopExternalCorrelationId(CUpti_ExternalCorrelationKind,
                                                           uint64_t* last) {
  if (callers.empty()) return CUPTI_ERROR_QUEUE_EMPTY;
  *last = callers.back();
  callers.pop_back();
  return CUPTI_SUCCESS;
}

/// Whoever has not fetched what is recorded has lost it, and registers again.
CUptiResult CUPTIAPI cuptiFinalize(void) {
  const std::lock_guard lock(emulated::guard());
  Recorder& r = recorder();
  if (r.buffer != nullptr || !r.kinds.empty()) std::abort();
  r.room = nullptr;
  r.filled = nullptr;
  return CUPTI_SUCCESS;
}

}  // extern "C"
