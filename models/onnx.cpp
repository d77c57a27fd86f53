#include "base/error.h"
#include "models/models.h"

namespace partita {
Graph import_onnx(const std::string& path, const ModelOptions&) {
  throw InputError(path, "is not supported yet");
}
}  // namespace partita
