#include "runtime/cuda/activity.h"

#if __has_include(<cupti.h>)
#  define PARTITA_CUPTI
#  include <cupti.h>
#  include <dlfcn.h>
#  include <fmt/format.h>

#  include <algorithm>
#  include <atomic>
#  include <cstdlib>
#  include <map>
#  include <mutex>
#endif

namespace partita::cuda {

#ifdef PARTITA_CUPTI
namespace {

#  define PARTITA_CUPTI_FUNCTIONS(f)                                                   \
    f(cuptiActivityRegisterCallbacks) f(cuptiActivityEnable) f(cuptiActivityDisable)   \
        f(cuptiActivityFlushAll) f(cuptiActivityGetNextRecord) f(cuptiGetResultString) \
            f(cuptiActivityPushExternalCorrelationId) f(cuptiActivityPopExternalCorrelationId)

/// Looked up where it is wanted: a run without tracing does not load it.
struct Library {
#  define PARTITA_DECLARE(f) decltype(&::f) f = nullptr;
  PARTITA_CUPTI_FUNCTIONS(PARTITA_DECLARE)
#  undef PARTITA_DECLARE
  decltype(&::cuptiFinalize) finalize = nullptr;  ///< not in all versions
  std::string load() {
    const std::string numbered = fmt::format("libcupti.so.{}", CUPTI_API_VERSION / 10000);
    void* library = nullptr;
    // A toolkit keeps it beside its other libraries, or in a folder that the loader does not
    // search.
    for (const char* folder :
         {"", "/usr/local/cuda/lib64/", "/usr/local/cuda/extras/CUPTI/lib64/"}) {
      if (library == nullptr)
        library = ::dlopen((folder + numbered).c_str(), RTLD_NOW | RTLD_LOCAL);
    }
    if (library == nullptr) library = ::dlopen("libcupti.so", RTLD_NOW | RTLD_LOCAL);
    if (library == nullptr)
      return fmt::format("{} is not found; put its folder into LD_LIBRARY_PATH", numbered);
    const char* missing = nullptr;
#  define PARTITA_FIND(f)                                       \
    f = reinterpret_cast<decltype(&::f)>(::dlsym(library, #f)); \
    if (f == nullptr) missing = #f;
    PARTITA_CUPTI_FUNCTIONS(PARTITA_FIND)
#  undef PARTITA_FIND
    finalize = reinterpret_cast<decltype(&::cuptiFinalize)>(::dlsym(library, "cuptiFinalize"));
    return missing != nullptr ? fmt::format("{} has no {}", numbered, missing) : "";
  }
};

#  if CUPTI_API_VERSION >= 130000
using Kernel = CUpti_ActivityKernel10;
#  else
using Kernel = CUpti_ActivityKernel9;
#  endif

/// What called is told beside records of API calls alone (cupti_activity.h,
/// CUpti_ActivityExternalCorrelation), so these are asked for, though nothing else reads them.
constexpr CUpti_ActivityKind kKinds[] = {CUPTI_ACTIVITY_KIND_CONCURRENT_KERNEL,
                                         CUPTI_ACTIVITY_KIND_MEMCPY,
                                         CUPTI_ACTIVITY_KIND_MEMSET,
                                         CUPTI_ACTIVITY_KIND_RUNTIME,
                                         CUPTI_ACTIVITY_KIND_DRIVER,
                                         CUPTI_ACTIVITY_KIND_EXTERNAL_CORRELATION};

class Cupti : public Activity {
 public:
  Cupti(const Library& library, bool goes) : l_(library), goes_(goes) {}
  ~Cupti() override {
    for (const CUpti_ActivityKind k : kKinds) static_cast<void>(l_.cuptiActivityDisable(k));
    static_cast<void>(l_.cuptiActivityFlushAll(1));
    current = nullptr;
    // While it is attached every later call and launch of this process takes longer.
    if (goes_ && l_.finalize != nullptr && std::getenv("PARTITA_CUPTI_STAYS") == nullptr)
      static_cast<void>(l_.finalize());
  }
  std::string start() {
    current = this;
    CUptiResult r = l_.cuptiActivityRegisterCallbacks(room, filled);
    for (const CUpti_ActivityKind k : kKinds) {
      if (r == CUPTI_SUCCESS) r = l_.cuptiActivityEnable(k);
    }
    if (r == CUPTI_SUCCESS) return "";
    const char* text = nullptr;
    static_cast<void>(l_.cuptiGetResultString(r, &text));
    return text != nullptr ? text : "it does not start";
  }
  void enter(const std::string& called_for) override {
    const auto [it, fresh] = numbers_.try_emplace(called_for, numbers_.size() + 1);
    if (fresh) names_.push_back(called_for);
    static_cast<void>(l_.cuptiActivityPushExternalCorrelationId(
        CUPTI_EXTERNAL_CORRELATION_KIND_CUSTOM0, it->second));
  }
  void leave() override {
    std::uint64_t last = 0;
    static_cast<void>(
        l_.cuptiActivityPopExternalCorrelationId(CUPTI_EXTERNAL_CORRELATION_KIND_CUSTOM0, &last));
  }
  std::vector<KernelRecord> take() override {
    static_cast<void>(l_.cuptiActivityFlushAll(1));
    const std::lock_guard lock(guard_);
    std::vector<KernelRecord> all;
    for (Found& f : found_) {
      const auto caller = callers_.find(f.correlation);
      if (caller != callers_.end() && caller->second >= 1 && caller->second <= names_.size())
        f.record.called_for = names_[static_cast<std::size_t>(caller->second) - 1];
      all.push_back(std::move(f.record));
    }
    found_.clear();
    callers_.clear();
    std::sort(all.begin(), all.end(),
              [](const auto& a, const auto& b) { return a.start < b.start; });
    return all;
  }

 private:
  struct Found {
    KernelRecord record;
    std::uint32_t correlation = 0;
  };
  static constexpr std::size_t kRoom = 8 << 20;
  /// CUPTI's callbacks have no argument of ours.
  static inline std::atomic<Cupti*> current = nullptr;

  static void CUPTIAPI room(std::uint8_t** buffer, std::size_t* size, std::size_t* records) {
    *buffer = static_cast<std::uint8_t*>(std::aligned_alloc(8, kRoom));
    *size = *buffer != nullptr ? kRoom : 0;
    *records = 0;
  }
  static void CUPTIAPI filled(CUcontext, std::uint32_t, std::uint8_t* buffer, std::size_t,
                              std::size_t valid) {
    if (Cupti* c = current; c != nullptr && valid > 0) c->read(buffer, valid);
    std::free(buffer);
  }
  void read(std::uint8_t* buffer, std::size_t valid) {
    const std::lock_guard lock(guard_);
    CUpti_Activity* record = nullptr;
    while (l_.cuptiActivityGetNextRecord(buffer, valid, &record) == CUPTI_SUCCESS) {
      const auto add = [&](const auto* x, const std::string& name) {
        if (x->start == 0 || x->end < x->start) return;  // it could not be timed
        found_.push_back({{name, "", x->streamId, static_cast<std::int64_t>(x->start),
                           static_cast<std::int64_t>(x->end)},
                          x->correlationId});
      };
      switch (record->kind) {
        case CUPTI_ACTIVITY_KIND_CONCURRENT_KERNEL: {
          const auto* x = reinterpret_cast<const Kernel*>(record);
          add(x, x->name != nullptr ? x->name : "kernel");
          break;
        }
        case CUPTI_ACTIVITY_KIND_MEMCPY:
          add(reinterpret_cast<const CUpti_ActivityMemcpy6*>(record), "copy");
          break;
        case CUPTI_ACTIVITY_KIND_MEMSET:
          add(reinterpret_cast<const CUpti_ActivityMemset4*>(record), "fill");
          break;
        case CUPTI_ACTIVITY_KIND_EXTERNAL_CORRELATION: {
          const auto* x = reinterpret_cast<const CUpti_ActivityExternalCorrelation*>(record);
          callers_[x->correlationId] = x->externalId;
          break;
        }
        default:
          break;
      }
    }
  }

  Library l_;
  bool goes_;
  std::map<std::string, std::uint64_t> numbers_;
  std::vector<std::string> names_;
  std::mutex guard_;  ///< of what CUPTI's thread fills
  std::vector<Found> found_;
  std::map<std::uint32_t, std::uint64_t> callers_;
};

}  // namespace

std::unique_ptr<Activity> start_activity(std::string& why, bool goes) {
  Library library;
  why = library.load();
  if (!why.empty()) return nullptr;
  auto cupti = std::make_unique<Cupti>(library, goes);
  why = cupti->start();
  if (!why.empty()) return nullptr;
  return cupti;
}
#else
std::unique_ptr<Activity> start_activity(std::string& why, bool) {
  why = "this build found no header of CUPTI";
  return nullptr;
}
#endif

}  // namespace partita::cuda
