#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <onnx/onnx_pb.h>

#include <algorithm>
#include <cstdlib>
#include <filesystem>
#include <random>

#include "base/error.h"
#include "models/models.h"
#include "tests/models/temporary_file.h"

namespace partita {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;
using ::testing::ThrowsMessage;

/// Writes ONNX files node by node.
class Onnx {
 public:
  Onnx() {
    model_.set_ir_version(8);
    auto& opset = *model_.add_opset_import();
    opset.set_domain("");
    opset.set_version(13);
    model_.mutable_graph()->set_name("test");
  }
  onnx::ModelProto& model() { return model_; }

  Onnx& input(const std::string& name, const std::vector<std::int64_t>& dims, int type = 1) {
    value(*model_.mutable_graph()->add_input(), name, dims, type);
    return *this;
  }
  Onnx& output(const std::string& name) {
    model_.mutable_graph()->add_output()->set_name(name);
    return *this;
  }
  Onnx& weight(const std::string& name, const std::vector<std::int64_t>& dims) {
    auto& t = *model_.mutable_graph()->add_initializer();
    t.set_name(name);
    t.set_data_type(1);
    for (const auto d : dims) t.add_dims(d);
    return *this;
  }
  Onnx& numbers(const std::string& name, const std::vector<std::int64_t>& values) {
    auto& t = *model_.mutable_graph()->add_initializer();
    t.set_name(name);
    t.set_data_type(7);
    t.add_dims(static_cast<std::int64_t>(values.size()));
    for (const auto v : values) t.add_int64_data(v);
    return *this;
  }
  onnx::NodeProto& node(const std::string& type, const std::vector<std::string>& in,
                        const std::string& out) {
    auto& n = *model_.mutable_graph()->add_node();
    n.set_op_type(type);
    for (const auto& i : in) n.add_input(i);
    n.add_output(out);
    return n;
  }
  static void set(onnx::NodeProto& n, const std::string& key, std::int64_t number) {
    auto& a = *n.add_attribute();
    a.set_name(key);
    a.set_type(onnx::AttributeProto::INT);
    a.set_i(number);
  }
  static void set(onnx::NodeProto& n, const std::string& key,
                  const std::vector<std::int64_t>& all) {
    auto& a = *n.add_attribute();
    a.set_name(key);
    a.set_type(onnx::AttributeProto::INTS);
    for (const auto i : all) a.add_ints(i);
  }
  static void set(onnx::NodeProto& n, const std::string& key, const char* word) {
    auto& a = *n.add_attribute();
    a.set_name(key);
    a.set_type(onnx::AttributeProto::STRING);
    a.set_s(word);
  }

  Graph load(const ModelOptions& options = {}) const {
    const TemporaryFile file("model.onnx", model_.SerializeAsString());
    return load_model(file.path(), options);
  }
  std::string error(const ModelOptions& options = {}) const {
    try {
      load(options);
    } catch (const InputError& e) {
      return e.what();
    }
    return "no error";
  }

 private:
  static void value(onnx::ValueInfoProto& v, const std::string& name,
                    const std::vector<std::int64_t>& dims, int type) {
    v.set_name(name);
    auto& t = *v.mutable_type()->mutable_tensor_type();
    t.set_elem_type(type);
    t.mutable_shape();
    for (const auto d : dims) {
      auto& dim = *t.mutable_shape()->add_dim();
      if (d < 0) {
        dim.set_dim_param("symbol" + std::to_string(-d));
      } else {
        dim.set_dim_value(d);
      }
    }
  }
  onnx::ModelProto model_;
};

std::vector<std::string> kinds(const Graph& g) {
  std::vector<std::string> all;
  for (const auto& op : g.operators) all.emplace_back(kind_name(op.operation));
  return all;
}

using ::testing::ElementsAre;

TEST(OnnxImport, MakesATrainingGraphOfAClassifier) {
  Onnx m;
  m.input("image", {-1, 3, 8, 8}).weight("w", {4, 3, 3, 3}).weight("b", {4}).weight("f", {10, 64});
  Onnx::set(m.node("Conv", {"image", "w", "b"}, "c"), "pads", {1, 1, 1, 1});
  m.node("Relu", {"c"}, "r");
  auto& pool = m.node("MaxPool", {"r"}, "p");
  Onnx::set(pool, "kernel_shape", {2, 2});
  Onnx::set(pool, "strides", {2, 2});
  m.node("Flatten", {"p"}, "flat");
  Onnx::set(m.node("Gemm", {"flat", "f"}, "logits"), "transB", 1);
  m.node("Softmax", {"logits"}, "y");
  m.output("y");
  const Graph g = m.load();
  EXPECT_THAT(kinds(g),
              ElementsAre("convolution", "activation", "pool", "linear", "cross_entropy"));
  EXPECT_EQ(parameter_count(g), 4 * 27 + 4 + 640);
  EXPECT_EQ(std::get<Linear>(g.operators[3].operation).contracted, 3);
  EXPECT_EQ(g.tensor(g.operators[3].outputs[0]).shape[1].dim, Dim::vocabulary);
  EXPECT_EQ(g.layers, 2);
  EXPECT_EQ(g.operators[2].layer, 0);
  EXPECT_EQ(g.operators[3].layer, 1);
  EXPECT_EQ(g.operators[4].layer, 2);
}

TEST(OnnxImport, TheBatchDoesNotMatter) {
  const auto with_batch = [](std::int64_t n) {
    Onnx m;
    m.input("x", {n, 6}).weight("w", {6, 5});
    m.node("MatMul", {"x", "w"}, "y");
    m.output("y");
    return m.load();
  };
  for (const std::int64_t n : {-1, 1, 7}) {
    const Graph g = with_batch(n);
    EXPECT_EQ(g.tensor(g.operators[0].outputs[0]).shape,
              (Shape{{Dim::sample, 1}, {Dim::vocabulary, 5}}));
    EXPECT_EQ(network_flops(g).forward, network_flops(with_batch(1)).forward);
  }
}

TEST(OnnxImport, ReadsTokensAndTiesTables) {
  Onnx m;
  m.input("ids", {-1, -2}, 7).weight("table", {20, 6}).weight("w", {6, 6});
  m.weight("scale", {6}).weight("bias", {6});
  m.node("Gather", {"table", "ids"}, "e");
  m.node("LayerNormalization", {"e", "scale", "bias"}, "n");
  m.node("MatMul", {"n", "w"}, "a");
  m.node("Add", {"a", "e"}, "r");
  m.node("MatMul", {"r", "w"}, "y");
  m.output("y");
  m.model().mutable_opset_import(0)->set_version(17);
  EXPECT_THAT(m.error(), HasSubstr("input 'ids': its extents are not all known"));
  ModelOptions o;
  o.sequence = 9;
  const Graph g = m.load(o);
  EXPECT_THAT(kinds(g),
              ElementsAre("embedding", "normalize", "linear", "add", "linear", "cross_entropy"));
  EXPECT_EQ(g.sequence, 9);
  EXPECT_EQ(g.operators[2].parameters, g.operators[4].parameters) << "tied";
  EXPECT_EQ(parameter_count(g), 20 * 6 + 12 + 36);
}

TEST(OnnxImport, FoldsScalesIntoTheBatchNormBeforeThem) {
  Onnx m;
  m.input("x", {2, 3, 4, 4})
      .weight("a", {3})
      .weight("b", {3})
      .weight("s", {3, 1, 1})
      .weight("w", {5, 3});
  m.node("BatchNormalization", {"x", "a", "b", "a", "b"}, "n");
  m.node("Mul", {"n", "s"}, "m");
  m.node("Add", {"m", "s"}, "p");
  m.node("GlobalAveragePool", {"p"}, "g");
  m.node("Flatten", {"g"}, "f");
  Onnx::set(m.node("Gemm", {"f", "w"}, "y"), "transB", 1);
  m.output("y");
  const Graph g = m.load();
  EXPECT_THAT(kinds(g), ElementsAre("normalize", "global_average_pool", "linear", "cross_entropy"));
  EXPECT_EQ(parameter_count(g), 6 + 15);
}

TEST(OnnxImport, ScalesFeaturesByAGateInEitherOrder) {
  for (const bool swapped : {false, true}) {
    Onnx m;
    m.input("x", {2, 8, 5, 5}).weight("a", {2, 8, 1, 1}).weight("b", {8, 2, 1, 1});
    m.node("GlobalAveragePool", {"x"}, "p");
    m.node("Conv", {"p", "a"}, "q");
    m.node("Relu", {"q"}, "r");
    m.node("Conv", {"r", "b"}, "s");
    m.node("Sigmoid", {"s"}, "g");
    m.node("Mul", swapped ? std::vector<std::string>{"g", "x"} : std::vector<std::string>{"x", "g"},
           "y");
    m.output("y");
    const Graph g = m.load();
    EXPECT_THAT(kinds(g), ElementsAre("global_average_pool", "linear", "activation", "linear",
                                      "activation", "scale_features", "mean_squared_error"));
    EXPECT_EQ(g.tensor(g.operators[5].outputs[0]).shape[3].extent, 5);
    EXPECT_EQ(parameter_count(g), 32);
  }
  Onnx m;  // of another number of features
  m.input("x", {2, 8, 5, 5}).input("z", {2, 4, 5, 5}).output("y");
  m.node("GlobalAveragePool", {"z"}, "p");
  m.node("Mul", {"x", "p"}, "y");
  EXPECT_THAT(m.error(), HasSubstr("broadcasting is not supported"));
}

TEST(OnnxImport, PadsAsOnnxDoes) {
  // 7 inputs, kernel 3, stride 2: 3 outputs; with ceil_mode 3 too; of 8 inputs 3 and 4.
  for (const bool up : {false, true}) {
    Onnx m;
    m.input("x", {1, 2, 8, 7});
    auto& pool = m.node("MaxPool", {"x"}, "y");
    Onnx::set(pool, "kernel_shape", {3, 3});
    Onnx::set(pool, "strides", {2, 2});
    Onnx::set(pool, "ceil_mode", up ? 1 : 0);
    m.output("y");
    const Graph g = m.load();
    EXPECT_EQ(g.tensor(g.operators[0].outputs[0]).shape[2].extent, up ? 4 : 3);
    EXPECT_EQ(g.tensor(g.operators[0].outputs[0]).shape[3].extent, 3);
  }
  Onnx m;
  m.input("x", {1, 2, 8, 7}).weight("w", {4, 2, 4, 4});
  auto& conv = m.node("Conv", {"x", "w"}, "y");
  Onnx::set(conv, "auto_pad", "SAME_UPPER");
  Onnx::set(conv, "strides", {2, 2});
  m.output("y");
  const Graph g = m.load();
  const auto& c = std::get<Convolution>(g.operators[0].operation);
  // ceil(8 / 2) = 4 outputs reach (4 - 1) · 2 + 4 = 10 inputs: 1 before, 1 after; 7 likewise 10:
  // 1, 2.
  EXPECT_EQ(c.height.pad_before, 1);
  EXPECT_EQ(c.height.pad_after, 1);
  EXPECT_EQ(c.width.pad_before, 1);
  EXPECT_EQ(c.width.pad_after, 2);
  EXPECT_THAT(kinds(g), ElementsAre("convolution", "mean_squared_error"));
}

TEST(OnnxImport, NamesEveryUnsupportedOperatorAtOnce) {
  Onnx m;
  m.input("x", {1, 6});
  m.node("Erf", {"x"}, "a").set_name("first_erf");
  m.node("Erf", {"a"}, "b");
  m.node("Rotate", {"b"}, "y").set_domain("com.example");
  m.output("y");
  EXPECT_THAT(m.error(),
              AllOf(HasSubstr("operators not supported: Erf (node 'first_erf' and 1 more), "
                              "com.example.Rotate (node 'y')"),
                    HasSubstr("there are Add, AveragePool")));
}

TEST(OnnxImport, SaysWhatItRefuses) {
  {
    Onnx m;
    m.input("x", {1, 6}).input("w", {6, 5}).output("y");
    m.node("Gemm", {"x", "w"}, "y").set_name("fc");
    EXPECT_THAT(m.error(), HasSubstr("Gemm 'fc': its weight must be an initializer"));
  }
  {
    Onnx m;
    m.input("x", {1, 6}).weight("w", {7, 5}).output("y");
    m.node("MatMul", {"x", "w"}, "y").set_name("fc");
    EXPECT_THAT(m.error(),
                AllOf(HasSubstr("model.onnx: MatMul 'fc'"), HasSubstr("7"), HasSubstr("6")));
  }
  {
    Onnx m;
    m.input("x", {1, 6, 4}).numbers("to", {1, 4, 6}).output("y");
    m.node("Reshape", {"x", "to"}, "y");
    EXPECT_THAT(m.error(), HasSubstr("it makes [1, 4, 6] of [1, 6, 4]; only flattening"));
  }
  {
    Onnx m;
    m.input("x", {1, 6}).input("z", {1, 1}).output("y");
    m.node("Mul", {"x", "z"}, "y");
    EXPECT_THAT(m.error(), HasSubstr("broadcasting is not supported"));
  }
  {
    Onnx m;
    m.input("x", {1, 6}).output("y").output("x");
    m.node("Relu", {"x"}, "y");
    EXPECT_THAT(m.error(), HasSubstr("has 2 outputs; training needs one"));
  }
  {
    Onnx m;
    m.weight("x", {1, 6}).output("y");
    m.node("Relu", {"x"}, "y");
    EXPECT_THAT(m.error(), HasSubstr("has no inputs besides its weights"));
  }
  {
    Onnx m;
    m.input("x", {1, 6}).output("y");
    m.node("Relu", {"nothing"}, "y");
    EXPECT_THAT(m.error(), HasSubstr("its input 0 ('nothing') is no value of the graph"));
  }
  {
    Onnx m;
    m.input("x", {1, 6}).output("y");
    EXPECT_THAT(m.error(), HasSubstr("holds no graph with operators"));
  }
  {
    Onnx m;
    m.input("x", {1, 6}).output("y");
    m.node("Relu", {"x"}, "y");
    ModelOptions o;
    o.layers = 2;
    EXPECT_THAT(m.error(o), HasSubstr("layers: "));
    o = {};
    o.vocabulary = 2;
    EXPECT_THAT(m.error(o), HasSubstr("vocabulary: "));
  }
}

TEST(OnnxImport, FilesThatAreNoProtobufSaySo) {
  const auto error = [](const std::string& body) {
    const TemporaryFile file("model.onnx", body);
    try {
      load_model(file.path(), {});
    } catch (const InputError& e) {
      return std::string(e.what());
    }
    return std::string("no error");
  };
  EXPECT_THAT(error(""), HasSubstr("model.onnx: is empty"));
  EXPECT_THAT(error("this is not a network"), HasSubstr("is no ONNX file"));
  EXPECT_THAT(error(std::string(100, '\0')), HasSubstr("is no ONNX file"));
  EXPECT_THAT(error("{\"model_type\": \"llama\"}"), HasSubstr("is no ONNX file"));
}

/// Folders with ONNX's own test graphs: of the Debian package libonnx-testdata and, named by
/// PARTITA_ONNX_DATA, onnx/backend/test/data of the Python package onnx.
std::vector<std::string> foreign_graphs() {
  std::vector<std::string> files;
  std::vector<std::string> folders{"/usr/share/libonnx-testdata/data"};
  if (const char* chosen = std::getenv("PARTITA_ONNX_DATA")) folders.emplace_back(chosen);
  for (const auto& folder : folders) {
    std::error_code error;
    for (const auto& entry : std::filesystem::recursive_directory_iterator(folder, error)) {
      if (entry.path().extension() == ".onnx") files.push_back(entry.path().string());
    }
  }
  std::sort(files.begin(), files.end());
  return files;
}

TEST(OnnxImport, EveryForeignGraphImportsOrSaysWhyNot) {
  const auto files = foreign_graphs();
  if (files.empty()) GTEST_SKIP() << "install libonnx-testdata or set PARTITA_ONNX_DATA";
  int imported = 0;
  for (const auto& file : files) {
    SCOPED_TRACE(file);
    try {
      const Graph g = load_model(file, {});
      EXPECT_TRUE(g.loss.valid());
      EXPECT_GE(network_flops(g).forward.count, 0);
      ++imported;
    } catch (const InputError& e) {
      EXPECT_THAT(e.what(), HasSubstr(file));
    }
  }
  EXPECT_GE(imported, 50);
}

TEST(OnnxImport, SurvivesDamagedFiles) {
  const auto files = foreign_graphs();
  if (files.empty()) GTEST_SKIP() << "install libonnx-testdata or set PARTITA_ONNX_DATA";
  std::mt19937_64 rng{5};
  for (std::size_t i = 0; i < files.size(); i += 5) {
    std::string body = read_file(files[i]);
    if (body.empty() || body.size() > 40'000) continue;
    for (int k = 0; k < 4; ++k) {
      const std::size_t at = rng() % body.size();
      if (rng() % 4 == 0) {
        body.erase(at, 1 + rng() % 8);
      } else {
        body[at] = static_cast<char>(rng());
      }
      const TemporaryFile file("model.onnx", body);
      try {
        network_flops(load_model(file.path(), {}));
      } catch (const InputError&) {
      }
      if (body.empty()) break;
    }
  }
}

struct Known {
  const char* file;
  std::int64_t parameters;
  double gmac;  ///< 0: not known
};

TEST(OnnxImport, TheNetworksOfTheOnnxPackageHaveTheirPublishedSizes) {
  const char* folder = std::getenv("PARTITA_ONNX_DATA");
  if (folder == nullptr) {
    GTEST_SKIP() << "set PARTITA_ONNX_DATA to onnx/backend/test/data of the Python package onnx";
  }
  // torchvision's table gives vgg19 143,667,240 and 19.63 GMAC, densenet121 7,978,856 and 2.83,
  // squeezenet1_1 1,235,496 and 0.35, resnet50 25,557,032 and 4.09; BVLC's AlexNet and GoogLeNet
  // have 60,965,224 and 6,998,552. Element-wise work adds up to 2 % to what torchvision counts.
  for (const Known& net :
       {Known{"alexnet", 0, 0}, Known{"bvlc_alexnet", 60'965'224, 0},
        Known{"densenet121", 7'978'856, 2.83}, Known{"inception_v1", 6'998'552, 0},
        Known{"resnet50", 25'557'032, 4.09}, Known{"squeezenet", 1'235'496, 0.35},
        Known{"vgg19", 143'667'240, 19.63}}) {
    const std::string file = std::string(folder) + "/light/light_" + net.file + ".onnx";
    if (!std::filesystem::exists(file)) continue;
    const Graph g = load_model(file, {});
    EXPECT_EQ(parameter_count(g), net.parameters) << net.file;
    if (net.gmac > 0) {
      const double ours = network_flops(g).forward.count / 2e9;
      EXPECT_GE(ours, net.gmac - 0.01) << net.file;
      EXPECT_LE(ours, net.gmac * 1.025) << net.file;
    }
  }
}

TEST(OnnxImport, ResNet50IsTheCataloguesNetwork) {
  const char* folder = std::getenv("PARTITA_ONNX_DATA");
  if (folder == nullptr) {
    GTEST_SKIP() << "set PARTITA_ONNX_DATA to onnx/backend/test/data of the Python package onnx";
  }
  const Graph theirs = load_model(std::string(folder) + "/light/light_resnet50.onnx", {});
  const Graph ours = load_model("resnet-50", {});
  EXPECT_EQ(parameter_count(theirs), parameter_count(ours));
  EXPECT_EQ(theirs.parameters.size(), ours.parameters.size());
}

}  // namespace
}  // namespace partita
