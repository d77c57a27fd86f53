// A library with NVML's names: one GPU at 00000000:0F:00.0, 1755 MHz, under a power cap; it does
// not say its temperature. PARTITA_FAKE_NVML_SLOW="LINES FILE...": 1700 MHz while these files have
// so many lines together, and nothing but the cap; with PARTITA_FAKE_NVML_FREE not even that.
// With PARTITA_FAKE_NVML_MEAN it knows the last second's power only.
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <sstream>
#include <string>

namespace {
bool is_slow() {
  const char* text = std::getenv("PARTITA_FAKE_NVML_SLOW");
  if (text == nullptr) return false;
  std::istringstream words(text);
  int wanted = 0, lines = 0;
  words >> wanted;
  for (std::string file, line; words >> file;) {
    for (std::ifstream in(file); std::getline(in, line);) ++lines;
  }
  return lines == wanted;
}
}  // namespace

extern "C" {
int nvmlInit_v2() { return 0; }
int nvmlShutdown() { return 0; }
int nvmlSystemGetDriverVersion(char* to, unsigned size) {
  std::strncpy(to, "580.95.05", size);
  return 0;
}
int nvmlDeviceGetHandleByPciBusId_v2(const char* bus, void** device) {
  if (std::strcmp(bus, "00000000:0F:00.0") != 0) return 6;
  static int it = 0;
  *device = &it;
  return 0;
}
int nvmlDeviceGetClockInfo(void*, unsigned type, unsigned* mhz) {
  if (type != 1 && type != 2) return 2;
  *mhz = type == 2 ? 2619 : is_slow() ? 1700 : 1755;
  return 0;
}
int nvmlDeviceGetPowerUsage(void*, unsigned* mw) {
  *mw = 350000;  // the last second's
  return 0;
}
struct FieldValue {
  unsigned field, scope;
  long long timestamp, latency;
  int type, failed;
  unsigned whole, rest;
};
int nvmlDeviceGetFieldValues(void*, int count, FieldValue* values) {
  for (int k = 0; k < count; ++k) {
    // Another field's, as a GPU without a reading at once has it.
    values[k].failed =
        values[k].field == 186 && std::getenv("PARTITA_FAKE_NVML_MEAN") == nullptr ? 0 : 3;
    values[k].type = 1, values[k].whole = 698123, values[k].rest = 0;
  }
  return 0;
}
int nvmlDeviceGetMemoryInfo(void*, unsigned long long* total_free_used) {
  total_free_used[0] = 80ull << 30, total_free_used[1] = 79ull << 30, total_free_used[2] = 1 << 30;
  return 0;
}
int nvmlDeviceGetTemperature(void*, unsigned, unsigned*) { return 3; }
int nvmlDeviceGetCurrentClocksThrottleReasons(void*, unsigned long long* reasons) {
  *reasons = std::getenv("PARTITA_FAKE_NVML_FREE") != nullptr   ? 0
             : std::getenv("PARTITA_FAKE_NVML_SLOW") != nullptr ? 0x4
                                                                : 0x4 | 0x20 | 0x40;
  return 0;
}
}
