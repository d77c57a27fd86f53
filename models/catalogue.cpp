#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <filesystem>
#include <string_view>

#include "base/error.h"
#include "base/yaml.h"
#include "models/models.h"
#include "models/overrides.h"

namespace partita {
namespace {

struct CodedModel {
  std::string_view name;
  Graph (*build)(const ModelOptions& options);
  std::array<std::string_view, 4> aliases{};
};

double dropout_of(const ModelOptions& o) { return o.dropout > 0 ? o.dropout : 0; }

constexpr std::array<CodedModel, 13> kCodedModels{{
    {"alexnet", [](const ModelOptions& o) { return build_alexnet(o.vocabulary, dropout_of(o)); }},
    {"efficientnet-b0",
     [](const ModelOptions& o) { return build_efficientnet({}, o.vocabulary, dropout_of(o)); },
     {"efficientnet_b0"}},
    {"efficientnet-b4",
     [](const ModelOptions& o) {
       return build_efficientnet({"efficientnet-b4", 1.4, 1.8, 380}, o.vocabulary, dropout_of(o));
     },
     {"efficientnet_b4"}},
    {"efficientnet-b7",
     [](const ModelOptions& o) {
       return build_efficientnet({"efficientnet-b7", 2.0, 3.1, 600}, o.vocabulary, dropout_of(o));
     },
     {"efficientnet_b7"}},
    {"mnist-linear", [](const ModelOptions& o) { return build_mnist_linear(o.vocabulary); }},
    {"resnet-101",
     [](const ModelOptions& o) {
       return build_resnet({"resnet-101", {3, 4, 23, 3}}, o.vocabulary);
     },
     {"resnet101", "rn101"}},
    {"resnet-152",
     [](const ModelOptions& o) {
       return build_resnet({"resnet-152", {3, 8, 36, 3}}, o.vocabulary);
     },
     {"resnet152", "rn152"}},
    {"resnet-18",
     [](const ModelOptions& o) {
       return build_resnet({"resnet-18", {2, 2, 2, 2}, 1, 64, 0, false}, o.vocabulary);
     },
     {"resnet18", "rn18"}},
    {"resnet-34",
     [](const ModelOptions& o) {
       return build_resnet({"resnet-34", {3, 4, 6, 3}, 1, 64, 0, false}, o.vocabulary);
     },
     {"resnet34", "rn34"}},
    {"resnet-50",
     [](const ModelOptions& o) { return build_resnet({}, o.vocabulary); },
     {"resnet50", "rn50", "resnet-50v1.5", "rn50v1.5"}},
    {"resnext-101-32x4d",
     [](const ModelOptions& o) {
       return build_resnet({"resnext-101-32x4d", {3, 4, 23, 3}, 32, 4}, o.vocabulary);
     },
     {"resnext101-32x4d", "resnext101"}},
    {"se-resnext-101-32x4d",
     [](const ModelOptions& o) {
       return build_resnet({"se-resnext-101-32x4d", {3, 4, 23, 3}, 32, 4, 16}, o.vocabulary);
     },
     {"se-resnext101-32x4d", "se-resnext101"}},
    {"vgg-16", [](const ModelOptions& o) { return build_vgg16(o.vocabulary, dropout_of(o)); }},
}};

std::string catalogue_file(const std::string& name) {
  return data_folder("models/catalogue") + "/" + name + ".yaml";
}

}  // namespace

void check_options(const ModelOptions& o) {
  if (o.sequence < 0) {
    throw InputError("sequence", fmt::format("is {}; it must be at least 1 token", o.sequence));
  }
  if (o.layers < 0) {
    throw InputError("layers", fmt::format("is {}; it must be at least 1 block", o.layers));
  }
  if (o.vocabulary < 0) {
    throw InputError("vocabulary", fmt::format("is {}; it must be at least 1", o.vocabulary));
  }
  if (!(o.dropout < 1)) {
    throw InputError("dropout", fmt::format("is {}; it must be below 1", o.dropout));
  }
}

void apply_options(TransformerConfig& c, const ModelOptions& o) {
  if (o.sequence > 0) {
    if (c.image > 0) {
      throw InputError("sequence",
                       fmt::format("{} takes images; its {} tokens follow from their size", c.name,
                                   (c.image / c.patch) * (c.image / c.patch) + 1));
    }
    c.sequence = o.sequence;
  }
  if (o.layers > 0) c.layers = o.layers;
  if (o.vocabulary > 0) c.vocabulary = o.vocabulary;
  if (o.dropout >= 0) c.dropout = o.dropout;
  c.flash_attention = o.flash_attention;
}

void reject_transformer_options(const std::string& what, const ModelOptions& o) {
  if (o.sequence > 0) throw InputError("sequence", fmt::format("{} has no token sequence", what));
  if (o.layers > 0)
    throw InputError("layers", fmt::format("{} has no repeated blocks to count", what));
}

std::vector<std::string> model_catalogue() {
  std::vector<std::string> names;
  for (const auto& model : kCodedModels) names.emplace_back(model.name);
  std::error_code error;
  for (const auto& entry :
       std::filesystem::directory_iterator(data_folder("models/catalogue"), error)) {
    if (entry.path().extension() == ".yaml") names.push_back(entry.path().stem().string());
  }
  if (error) {
    throw InputError(data_folder("models/catalogue"),
                     "cannot be read; set PARTITA_DATA to the folder that holds models/catalogue");
  }
  std::sort(names.begin(), names.end());
  return names;
}

std::vector<KnownModel> known_models() {
  std::vector<KnownModel> all;
  for (const std::string& name : model_catalogue()) {
    const auto coded = std::find_if(kCodedModels.begin(), kCodedModels.end(),
                                    [&](const CodedModel& m) { return m.name == name; });
    if (coded == kCodedModels.end()) {
      all.push_back(known_model(catalogue_file(name)));
      continue;
    }
    KnownModel m;
    m.name = name;
    for (const std::string_view alias : coded->aliases) {
      if (!alias.empty()) m.aliases.emplace_back(alias);
    }
    all.push_back(std::move(m));
  }
  return all;
}

Graph load_model(const std::string& text, const ModelOptions& options) {
  check_options(options);
  const std::filesystem::path path(text);
  const std::string extension = path.extension().string();
  std::error_code ignored;
  if (extension == ".json") return import_hugging_face(text, options);
  if (extension == ".yaml" || extension == ".yml") return load_model_file(text, options);
  const auto reject_edits = [&] {
    if (options.edits.empty()) return;
    throw InputError(options.edits[0].path,
                     fmt::format("{} has no YAML or config.json to change; use a model "
                                 "that has one",
                                 text));
  };
  if (extension == ".onnx") {
    reject_edits();
    return import_onnx(text, options);
  }
  if (std::filesystem::is_directory(path, ignored)) {
    return import_hugging_face((path / "config.json").string(), options);
  }
  for (const auto& model : kCodedModels) {
    if (model.name != text) continue;
    reject_edits();
    reject_transformer_options(text, options);
    return model.build(options);
  }
  const auto names = model_catalogue();
  if (std::binary_search(names.begin(), names.end(), text)) {
    return load_model_file(catalogue_file(text), options);
  }
  throw InputError("model",
                   fmt::format("'{}' is neither in the catalogue nor a config.json, .yaml or .onnx "
                               "file{}; the catalogue has {}",
                               text, did_you_mean(text, names), fmt::join(names, ", ")));
}

}  // namespace partita
