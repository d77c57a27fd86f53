#include "runtime/cuda/nvml.h"

#include <dlfcn.h>

#include <algorithm>
#include <array>
#include <utility>

namespace partita::cuda {
namespace {

// No header of NVML need be there. Declared as in NVIDIA's nvml.h (stable since its version 2): a
// result of 0 is success, devices are pointers.
using Handle = void*;
constexpr unsigned kClockSm = 1, kClockMemory = 2, kGpuTemperature = 0;
/// nvmlFieldValue_t.
struct FieldValue {
  unsigned field, scope = 0;
  long long timestamp = 0, latency = 0;
  int type = 0, failed = 1;
  union {
    double real;
    unsigned whole;
    unsigned long long wide;
  } value = {};
};
constexpr unsigned kPowerInstant = 186;

class Library : public Nvml {
 public:
  explicit Library(void* library) : library_(library) {}
  ~Library() override {
    if (started_) call<int()>("nvmlShutdown");
    ::dlclose(library_);
  }
  bool start() { return started_ = call<int()>("nvmlInit_v2") == 0; }

  std::string driver() const override {
    std::array<char, 96> text{};
    const auto size = static_cast<unsigned>(text.size());
    if (call<int(char*, unsigned)>("nvmlSystemGetDriverVersion", text.data(), size) != 0) return "";
    return text.data();
  }
  GpuState state(const std::string& bus_id) const override {
    GpuState s;
    Handle device = nullptr;
    if (call<int(const char*, Handle*)>("nvmlDeviceGetHandleByPciBusId_v2", bus_id.c_str(),
                                        &device) != 0)
      return s;
    const auto number = [&](const char* what, auto... arguments) {
      unsigned n = 0;
      const int failed =
          call<int(Handle, decltype(arguments)..., unsigned*)>(what, device, arguments..., &n);
      return failed != 0 ? 0.0 : static_cast<double>(n);
    };
    s.clock_mhz = number("nvmlDeviceGetClockInfo", kClockSm);
    s.memory_clock_mhz = number("nvmlDeviceGetClockInfo", kClockMemory);
    // From Ampere on, but for GA100, nvmlDeviceGetPowerUsage is the mean of the last second
    // (NVIDIA's NVML reference): longer than what is watched.
    FieldValue power{kPowerInstant};
    const bool instant =
        call<int(Handle, int, FieldValue*)>("nvmlDeviceGetFieldValues", device, 1, &power) == 0 &&
        power.failed == 0 && power.value.whole > 0;
    s.power_w = 1e-3 * (instant ? power.value.whole : number("nvmlDeviceGetPowerUsage"));
    s.temperature_c = number("nvmlDeviceGetTemperature", kGpuTemperature);
    struct {
      unsigned long long total, free, used;
    } memory = {};
    if (call<int(Handle, decltype(memory)*)>("nvmlDeviceGetMemoryInfo", device, &memory) == 0)
      s.used_bytes = static_cast<std::int64_t>(memory.used);
    unsigned long long reasons = 0;
    if (call<int(Handle, unsigned long long*)>("nvmlDeviceGetCurrentClocksThrottleReasons", device,
                                               &reasons) == 0) {
      constexpr std::array<std::pair<unsigned long long, const char*>, 5> kReasons{
          {{0x4, "power cap"},
           {0x8, "slowdown"},
           {0x20, "heat"},
           {0x40, "heat"},
           {0x80, "power brake"}}};
      for (const auto& [bit, word] : kReasons) {
        if ((reasons & bit) != 0 && s.throttled.find(word) == std::string::npos)
          s.throttled += (s.throttled.empty() ? "" : ", ") + std::string(word);
      }
    }
    return s;
  }

 private:
  /// 1 where the library has no such function.
  template <class Signature, class... Arguments>
  int call(const char* name, Arguments... arguments) const {
    void* function = ::dlsym(library_, name);
    return function == nullptr ? 1 : reinterpret_cast<Signature*>(function)(arguments...);
  }
  void* library_;
  bool started_ = false;
};

double middle(std::vector<double> values) {
  if (values.empty()) return 0;
  const auto at = values.begin() + static_cast<std::ptrdiff_t>(values.size() / 2);
  std::nth_element(values.begin(), at, values.end());
  return *at;
}

}  // namespace

GpuState at_work(const std::vector<GpuState>& states) {
  double least = 0, most = 0;
  for (const GpuState& s : states) {
    if (s.power_w <= 0) continue;
    least = least > 0 ? std::min(least, s.power_w) : s.power_w;
    most = std::max(most, s.power_w);
  }
  GpuState at;
  std::vector<double> clocks, memory, powers, temperatures;
  for (const GpuState& s : states) {
    if (most > 0 && s.power_w < (least + most) / 2) continue;
    const auto keep = [](std::vector<double>& to, double value) {
      if (value > 0) to.push_back(value);
    };
    keep(clocks, s.clock_mhz);
    keep(memory, s.memory_clock_mhz);
    keep(powers, s.power_w);
    keep(temperatures, s.temperature_c);
    at.used_bytes = std::max(at.used_bytes, s.used_bytes);
    if (!s.throttled.empty() && at.throttled.find(s.throttled) == std::string::npos)
      at.throttled += (at.throttled.empty() ? "" : ", ") + s.throttled;
  }
  at.clock_mhz = middle(std::move(clocks));
  at.memory_clock_mhz = middle(std::move(memory));
  at.power_w = middle(std::move(powers));
  at.temperature_c = middle(std::move(temperatures));
  return at;
}

std::unique_ptr<Nvml> nvml(const std::string& library) {
  void* loaded = ::dlopen(library.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (loaded == nullptr) return nullptr;
  auto all = std::make_unique<Library>(loaded);
  if (!all->start()) return nullptr;
  return all;
}

}  // namespace partita::cuda
