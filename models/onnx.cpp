// ONNX graphs describe inference; the importer makes the training graph that has it as its forward
// pass. Operators: https://github.com/onnx/onnx/blob/main/docs/Operators.md
#include <fmt/format.h>
#include <google/protobuf/io/coded_stream.h>
#include <google/protobuf/io/zero_copy_stream_impl_lite.h>
#include <onnx/onnx_pb.h>
#include <onnx/shape_inference/implementation.h>

#include <algorithm>
#include <array>
#include <climits>
#include <filesystem>
#include <map>
#include <set>
#include <string_view>

#include "base/error.h"
#include "base/yaml.h"
#include "models/models.h"
#include "models/overrides.h"

namespace partita {
namespace {

using Dims = std::vector<std::int64_t>;

std::string text(const Dims& dims) { return fmt::format("[{}]", fmt::join(dims, ", ")); }

std::int64_t product(const Dims& dims, std::size_t from = 0) {
  std::int64_t n = 1;
  for (std::size_t i = from; i < dims.size(); ++i) n *= dims[i];
  return n;
}

Dims without_ones(const Dims& dims, std::size_t from) {
  Dims all;
  for (std::size_t i = from; i < dims.size(); ++i) {
    if (dims[i] != 1) all.push_back(dims[i]);
  }
  return all;
}

constexpr std::array<std::string_view, 30> kSupported{"Add",
                                                      "AveragePool",
                                                      "BatchNormalization",
                                                      "Concat",
                                                      "Conv",
                                                      "Dropout",
                                                      "Flatten",
                                                      "Gather",
                                                      "Gelu",
                                                      "Gemm",
                                                      "GlobalAveragePool",
                                                      "GlobalMaxPool",
                                                      "Identity",
                                                      "LRN",
                                                      "LayerNormalization",
                                                      "LogSoftmax",
                                                      "MatMul",
                                                      "MaxPool",
                                                      "Mul",
                                                      "Relu",
                                                      "Reshape",
                                                      "Sigmoid",
                                                      "Silu",
                                                      "Softmax",
                                                      "Squeeze",
                                                      "Sum",
                                                      "Swish",
                                                      "Tanh",
                                                      "Unsqueeze",
                                                      "Constant"};

/// A tensor of our graph as ONNX sees it. Flattening and extents of 1 exist only in ONNX's view: an
/// image that was flattened is still an image here, and a linear operator contracts all its
/// dimensions.
struct Value {
  TensorId tensor;
  Dims dims;
};

class Importer {
 public:
  Importer(const std::string& path, const ModelOptions& options)
      : path_(path), options_(options), b_(std::filesystem::path(path).stem().string()) {
    parse();
  }

  Graph import() {
    name_constants();
    refuse_unsupported();
    infer_shapes();
    find_output();
    find_folds();
    make_inputs();
    for (const auto& node : graph().node()) {
      if (is_constant(node)) continue;
      place_ = fmt::format("{}: {} '{}'", path_, node.op_type(), label(node));
      convert(node);
      check_extents(node);
    }
    return finish();
  }

 private:
  const onnx::GraphProto& graph() const { return model_.graph(); }

  [[noreturn]] void refuse(const std::string& message) const { throw InputError(place_, message); }

  void parse() {
    place_ = path_;
    const std::string body = read_file(path_);
    if (body.empty()) refuse("is empty");
    if (body.size() > static_cast<std::size_t>(INT_MAX)) {
      refuse("is larger than 2 GiB; store its weights as external data");
    }
    google::protobuf::io::ArrayInputStream bytes(body.data(), static_cast<int>(body.size()));
    google::protobuf::io::CodedInputStream coded(&bytes);
    if (!model_.ParseFromCodedStream(&coded) || !coded.ConsumedEntireMessage()) {
      refuse("is no ONNX file: its bytes are not a protobuf message of onnx.ModelProto");
    }
    if (!model_.has_graph() || graph().node_size() == 0) refuse("holds no graph with operators");
    if (model_.opset_import_size() == 0) refuse("names no operator set (opset_import)");
  }

  /// A name for messages and operators.
  static std::string label(const onnx::NodeProto& node) {
    if (!node.name().empty()) return node.name();
    return node.output_size() > 0 ? node.output(0) : node.op_type();
  }

  /// Initializers, and whatever is computed from them alone or from shapes alone, are no
  /// activations.
  void name_constants() {
    for (const auto& t : graph().initializer()) {
      constants_.insert(t.name());
    }
    for (const auto& node : graph().node()) {
      bool all = node.op_type() != "Dropout";
      for (const auto& in : node.input()) all = all && (in.empty() || constants_.count(in) > 0);
      if (node.op_type() == "Shape" || node.op_type() == "Size") all = true;
      if (!all) continue;
      for (const auto& out : node.output()) constants_.insert(out);
      const std::string& op = node.op_type();
      if ((op == "Transpose" || op == "Identity" || op == "Reshape") && !node.input(0).empty())
        made_from_[node.output(0)] = initializer_of(node.input(0));
    }
  }

  /// The initializer whose numbers a constant has, in whatever order.
  std::string initializer_of(const std::string& name) const {
    const auto it = made_from_.find(name);
    return it != made_from_.end() ? it->second : name;
  }

  bool is_constant(const onnx::NodeProto& node) const {
    return node.output_size() > 0 && constants_.count(node.output(0)) > 0;
  }

  void refuse_unsupported() const {
    struct Seen {
      std::string first;
      int times = 0;
    };
    std::map<std::string, Seen> unsupported;
    for (const auto& node : graph().node()) {
      const bool standard = node.domain().empty() || node.domain() == "ai.onnx";
      const bool known =
          std::find(kSupported.begin(), kSupported.end(), node.op_type()) != kSupported.end();
      if (is_constant(node) || (standard && known)) continue;
      Seen& seen = unsupported[standard ? node.op_type()
                                        : fmt::format("{}.{}", node.domain(), node.op_type())];
      if (seen.times++ == 0) seen.first = label(node);
    }
    if (unsupported.empty()) return;
    std::vector<std::string> list;
    for (const auto& [type, seen] : unsupported) {
      list.push_back(
          fmt::format("{} (node '{}'{})", type, seen.first,
                      seen.times > 1 ? fmt::format(" and {} more", seen.times - 1) : ""));
    }
    throw InputError(path_, fmt::format("operators not supported: {}; there are {}",
                                        fmt::join(list, ", "), fmt::join(kSupported, ", ")));
  }

  /// Makes the inputs' extents numbers and lets ONNX infer the rest.
  void infer_shapes() {
    auto& g = *model_.mutable_graph();
    bool has_sequence = options_.sequence == 0;
    for (auto& input : *g.mutable_input()) {
      if (constants_.count(input.name()) > 0 || !input.type().has_tensor_type()) continue;
      auto& type = *input.mutable_type()->mutable_tensor_type();
      if (!type.has_shape()) continue;
      for (int i = 0; i < type.shape().dim_size(); ++i) {
        auto& dim = *type.mutable_shape()->mutable_dim(i);
        if (i == 1) has_sequence |= !dim.has_dim_value() || dim.dim_value() == options_.sequence;
        if (dim.has_dim_value() && dim.dim_value() > 0) continue;
        if (i == 0) dim.set_dim_value(1);
        if (i == 1 && options_.sequence > 0) dim.set_dim_value(options_.sequence);
      }
    }
    if (!has_sequence)
      throw InputError("sequence",
                       fmt::format("{} has no input whose second extent is open; export it with a "
                                   "dynamic axis, or leave the sequence out",
                                   path_));
    try {
      onnx::ShapeInferenceOptions how;
      how.enable_data_propagation = true;
      onnx::shape_inference::InferShapes(model_, onnx::OpSchemaRegistry::Instance(), how);
    } catch (const std::exception& e) {
      throw InputError(path_, fmt::format("its shapes cannot be inferred: {}", e.what()));
    }
    for (const auto& v : g.value_info()) remember(v);
    for (const auto& v : g.output()) remember(v);
    for (const auto& v : g.input()) remember(v);
    for (const auto& t : g.initializer()) {
      remember(t.name(), Dims(t.dims().begin(), t.dims().end()));
    }
  }

  void remember(const onnx::ValueInfoProto& info) {
    if (!info.type().has_tensor_type() || !info.type().tensor_type().has_shape()) return;
    Dims dims;
    for (const auto& d : info.type().tensor_type().shape().dim()) {
      if (!d.has_dim_value()) return;
      dims.push_back(d.dim_value());
    }
    remember(info.name(), std::move(dims));
  }
  /// Extents below zero or beyond any memory are as good as unknown; so products of them cannot
  /// overflow.
  void remember(const std::string& name, Dims dims) {
    double count = 1;
    for (const std::int64_t d : dims) {
      if (d < 0) return;
      count *= static_cast<double>(std::max<std::int64_t>(d, 1));
    }
    if (count < static_cast<double>(kLargest)) dims_[name] = std::move(dims);
  }

  /// The network's output, a last softmax aside: cross entropy contains it.
  void find_output() {
    if (graph().output_size() != 1) {
      throw InputError(path_,
                       fmt::format("has {} outputs; training needs one, so cut the graph to it",
                                   graph().output_size()));
    }
    output_ = graph().output(0).name();
    for (const auto& node : graph().node()) {
      for (const auto& in : node.input()) ++readers_[in];
    }
    ++readers_[output_];
    logits_ = output_;
    static const std::set<std::string_view> kKeeps{"Softmax", "LogSoftmax", "Identity",
                                                   "Reshape", "Flatten",    "Squeeze"};
    for (int i = graph().node_size() - 1; i >= 0; --i) {
      const auto& node = graph().node(i);
      if (node.output_size() < 1 || node.output(0) != logits_ || node.input_size() < 1) continue;
      if (kKeeps.count(node.op_type()) == 0 || readers_[logits_] != 1) break;
      if (node.op_type().find("oftmax") != std::string::npos) last_softmax_.insert(node.output(0));
      logits_ = node.input(0);
    }
  }

  /// Products with, and sums of, one constant per channel right after a batch norm (its scale and
  /// bias by another name), and sums right after a convolution without bias.
  void find_folds() {
    std::map<std::string, std::string> kind;  // value -> what made it: "norm", "conv"
    for (const auto& node : graph().node()) {
      if (node.output_size() < 1 || is_constant(node)) continue;
      const std::string& type = node.op_type();
      if (type == "BatchNormalization") kind[node.output(0)] = "norm";
      if (type == "Conv" && (node.input_size() < 3 || node.input(2).empty())) {
        kind[node.output(0)] = "conv";
      }
      if ((type != "Mul" && type != "Add") || node.input_size() != 2) continue;
      for (int side = 0; side < 2; ++side) {
        const std::string& x = node.input(side);
        const auto made = kind.find(x);
        if (made == kind.end() || constants_.count(node.input(1 - side)) == 0 || readers_[x] != 1)
          continue;
        const bool conv = made->second == "conv";
        if (!per_channel(node, node.input(1 - side), x) || (conv && type == "Mul")) continue;
        folded_[node.output(0)] = x;
        if (conv) biased_.insert(x);
        if (!conv) kind[node.output(0)] = "norm";
      }
    }
  }

  /// True when `constant` holds one value for each of x's channels (dimension 1).
  bool per_channel(const onnx::NodeProto& node, const std::string& constant,
                   const std::string& x) const {
    const auto c = dims_.find(constant), v = dims_.find(x);
    if (c == dims_.end() || v == dims_.end() || v->second.size() < 2) return false;
    const Dims dims = aligned(node, c->second, v->second.size());
    if (dims.size() != v->second.size()) return false;
    for (std::size_t i = 0; i < dims.size(); ++i) {
      if (dims[i] != (i == 1 ? v->second[1] : 1)) return false;
    }
    return true;
  }

  /// A constant's extents padded with ones to `rank`. Before version 7, `axis` said where they
  /// belong.
  Dims aligned(const onnx::NodeProto& node, Dims dims, std::size_t rank) const {
    const std::int64_t axis = integer(node, "axis", -1);
    if (integer(node, "broadcast", 0) != 0 && axis >= 0) {
      Dims out(static_cast<std::size_t>(std::min<std::int64_t>(axis, 8)), 1);
      out.insert(out.end(), dims.begin(), dims.end());
      dims = out;
      while (dims.size() < rank) dims.push_back(1);
    }
    while (dims.size() < rank) dims.insert(dims.begin(), 1);
    return dims;
  }

  static const onnx::AttributeProto* attribute(const onnx::NodeProto& node, std::string_view name) {
    for (const auto& a : node.attribute()) {
      if (a.name() == name) return &a;
    }
    return nullptr;
  }
  static std::int64_t integer(const onnx::NodeProto& node, std::string_view name,
                              std::int64_t otherwise) {
    const auto* a = attribute(node, name);
    return a == nullptr ? otherwise : a->i();
  }
  static double real(const onnx::NodeProto& node, std::string_view name, double otherwise) {
    const auto* a = attribute(node, name);
    return a == nullptr ? otherwise : static_cast<double>(a->f());
  }
  Dims integers(const onnx::NodeProto& node, std::string_view name, std::size_t count,
                std::int64_t otherwise) const {
    const auto* a = attribute(node, name);
    Dims all(count, otherwise);
    if (a == nullptr || a->ints_size() == 0) return all;
    if (a->ints_size() != static_cast<int>(count)) {
      refuse(fmt::format("{} has {} numbers; only images of two dimensions are supported, with {}",
                         name, a->ints_size(), count));
    }
    all.assign(a->ints().begin(), a->ints().end());
    for (const std::int64_t n : all) {
      if (n < 0 || n > 1'000'000) refuse(fmt::format("{} holds {}", name, n));
    }
    return all;
  }

  void make_inputs() {
    for (const auto& input : graph().input()) {
      if (constants_.count(input.name()) > 0) continue;
      place_ = fmt::format("{}: input '{}'", path_, input.name());
      const auto it = dims_.find(input.name());
      if (it == dims_.end()) {
        refuse(
            "its extents are not all known; export the model with fixed ones (a symbolic first one "
            "is "
            "the batch, a symbolic second one can be given as the sequence)");
      }
      const Dims& dims = it->second;
      const int type = input.type().tensor_type().elem_type();
      const bool ids = type == onnx::TensorProto::INT64 || type == onnx::TensorProto::INT32;
      if (ids && dims.size() == 2) sequence_ = std::max(sequence_, dims[1]);
      if (!ids && dims.size() == 3) sequence_ = std::max(sequence_, dims[1]);
      values_[input.name()] = {b_.input(input.name(), shape_of(dims)), dims};
    }
    if (values_.empty()) throw InputError(path_, "has no inputs besides its weights");
  }

  /// One sample of a tensor with these extents.
  Shape shape_of(const Dims& dims) const {
    static const std::array<std::vector<Dim>, 4> kLabels{
        {{Dim::sample},
         {Dim::sample, Dim::feature},
         {Dim::sample, Dim::sequence, Dim::feature},
         {Dim::sample, Dim::feature, Dim::height, Dim::width}}};
    if (dims.empty() || dims.size() > 4) {
      refuse(fmt::format(
          "extents {} are not supported: one to four dimensions, the first the batch", text(dims)));
    }
    Shape shape;
    for (std::size_t i = 0; i < dims.size(); ++i) {
      if (dims[i] < 1) refuse(fmt::format("extents {} must be at least 1", text(dims)));
      shape.push_back({kLabels[dims.size() - 1][i], i == 0 ? 1 : dims[i]});
    }
    return shape;
  }

  const Value& value(const onnx::NodeProto& node, int i) const {
    const std::string name = node.input_size() > i ? node.input(i) : "";
    const auto it = values_.find(name);
    if (it == values_.end()) {
      refuse(
          constants_.count(name) > 0
              ? fmt::format("its input {} is the constant '{}'; an activation is needed", i, name)
              : fmt::format("its input {} ('{}') is no value of the graph", i, name));
    }
    return it->second;
  }
  bool is_value(const onnx::NodeProto& node, int i) const {
    return node.input_size() > i && values_.count(node.input(i)) > 0;
  }
  bool has_input(const onnx::NodeProto& node, int i) const {
    return node.input_size() > i && !node.input(i).empty();
  }

  /// The value whose extents our tensor has too: neither flattened nor padded with ones.
  const Value& plain(const onnx::NodeProto& node, int i) const {
    const Value& v = value(node, i);
    const Shape& shape = b_.shape(v.tensor);
    bool same = shape.size() == v.dims.size();
    for (std::size_t d = 1; same && d < shape.size(); ++d) same = shape[d].extent == v.dims[d];
    if (!same) {
      refuse(fmt::format(
          "its input is {} reshaped to {}; this is supported before linear operators only",
          partita::text(shape), text(v.dims)));
    }
    return v;
  }

  Dims constant_dims(const onnx::NodeProto& node, int i, const char* what) const {
    const std::string name = node.input_size() > i ? node.input(i) : "";
    if (constants_.count(name) == 0) {
      refuse(fmt::format("its {} must be an initializer or computed from initializers", what));
    }
    const auto it = dims_.find(name);
    if (it == dims_.end()) refuse(fmt::format("the extents of its {} are not known", what));
    return it->second;
  }

  const Dims* known_output(const onnx::NodeProto& node) const {
    const auto it = node.output_size() > 0 ? dims_.find(node.output(0)) : dims_.end();
    return it == dims_.end() ? nullptr : &it->second;
  }

  void alias(const onnx::NodeProto& node, const Value& v) { set(node, v.tensor, v.dims); }
  void set(const onnx::NodeProto& node, TensorId tensor, Dims dims) {
    if (node.output_size() < 1) refuse("it has no output");
    values_[node.output(0)] = {tensor, std::move(dims)};
  }

  std::string unique_name(const onnx::NodeProto& node) {
    std::string name = label(node);
    if (!names_.insert(name).second) {
      name = fmt::format("{}#{}", name, names_.size());
      names_.insert(name);
    }
    return name;
  }

  /// Adds an operator and gives its first output the node's first name. A weight that another
  /// operator reads already is shared, as long as it is the operator's first parameter.
  TensorId add(const onnx::NodeProto& node, Operation op, std::vector<TensorId> in,
               const std::string& read = "") {
    const std::string weight = initializer_of(read);
    std::vector<ParameterId> shared;
    if (const auto it = parameters_.find(weight); !weight.empty() && it != parameters_.end()) {
      shared = {it->second};
    }
    TensorId y;
    try {
      y = b_.add(unique_name(node), std::move(op), std::move(in), shared);
    } catch (const InputError& e) {
      refuse(e.message());
    }
    const auto& made = b_.op(b_.last()).parameters;
    if (!weight.empty() && !made.empty()) parameters_.emplace(weight, made[0]);
    return y;
  }
  void emit(const onnx::NodeProto& node, Operation op, std::vector<TensorId> in,
            const std::string& weight = "") {
    const TensorId y = add(node, std::move(op), std::move(in), weight);
    const std::int64_t batch = value(node, first_value(node)).dims[0];
    Dims dims{batch};
    const Shape& shape = b_.shape(y);
    for (std::size_t i = 1; i < shape.size(); ++i) dims.push_back(shape[i].extent);
    set(node, y, dims);
  }
  int first_value(const onnx::NodeProto& node) const {
    for (int i = 0; i < node.input_size(); ++i) {
      if (values_.count(node.input(i)) > 0) return i;
    }
    refuse("none of its inputs is an activation");
  }

  /// What we infer must be what ONNX infers.
  void check_extents(const onnx::NodeProto& node) const {
    const Dims* known = known_output(node);
    const auto it = values_.find(node.output(0));
    if (known == nullptr || it == values_.end() || *known == it->second.dims) return;
    refuse(fmt::format("its output would be {}, but by ONNX's rules it is {}",
                       text(it->second.dims), text(*known)));
  }

  void convert(const onnx::NodeProto& node) {
    const std::string& type = node.op_type();
    if (node.output_size() > 0 && folded_.count(node.output(0)) > 0) {
      const auto it = values_.find(folded_[node.output(0)]);
      if (it == values_.end()) refuse("its input is no value of the graph");
      return alias(node, Value(it->second));
    }
    if (type == "Identity") return alias(node, Value(value(node, 0)));
    if (type == "Dropout") {
      if (options_.dropout <= 0) return alias(node, Value(value(node, 0)));
      return element_wise(node, Dropout{options_.dropout});
    }
    if (type == "Relu") return element_wise(node, Activation{ActivationKind::relu});
    if (type == "Sigmoid") return element_wise(node, Activation{ActivationKind::sigmoid});
    if (type == "Tanh") return element_wise(node, Activation{ActivationKind::tanh});
    if (type == "Gelu") return element_wise(node, Activation{ActivationKind::gelu});
    if (type == "Silu" || type == "Swish")
      return element_wise(node, Activation{ActivationKind::silu});
    if (type == "Conv") return convolution(node);
    if (type == "BatchNormalization") {
      Normalize n;
      n.kind = Normalize::Kind::batch;
      n.epsilon = real(node, "epsilon", 1e-5);
      constant_dims(node, 1, "scale");
      constant_dims(node, 2, "bias");
      return emit(node, n, {plain(node, 0).tensor}, node.input(1));
    }
    if (type == "LRN") return local_response(node);
    if (type == "LayerNormalization") return layer_norm(node);
    if (type == "MaxPool" || type == "AveragePool") return pool(node, type == "MaxPool");
    if (type == "GlobalAveragePool" || type == "GlobalMaxPool") return global_pool(node);
    if (type == "Gemm") return gemm(node);
    if (type == "MatMul") return matmul(node);
    if (type == "Add" || type == "Sum") return add_values(node);
    if (type == "Mul") return multiply(node);
    if (type == "Flatten" || type == "Reshape" || type == "Squeeze" || type == "Unsqueeze") {
      return reshape(node);
    }
    if (type == "Softmax" || type == "LogSoftmax") return softmax(node);
    if (type == "Concat") return concat(node);
    if (type == "Gather") return gather(node);
    refuse("is not supported here");
  }

  void element_wise(const onnx::NodeProto& node, Operation op) {
    const Value v = value(node, 0);
    set(node, add(node, std::move(op), {v.tensor}), v.dims);
  }

  /// Height's and width's windows from kernel, strides, pads, dilations, auto_pad and ceil_mode.
  std::array<Window, 2> windows(const onnx::NodeProto& node, const Dims& kernel,
                                const Value& x) const {
    if (x.dims.size() != 4) {
      refuse(fmt::format("its input {} must have batch, channels, height and width", text(x.dims)));
    }
    const Dims strides = integers(node, "strides", 2, 1),
               dilations = integers(node, "dilations", 2, 1);
    const Dims pads = integers(node, "pads", 4, 0);
    const auto* a = attribute(node, "auto_pad");
    const std::string automatic = a == nullptr || a->s().empty() ? "NOTSET" : a->s();
    const bool rounded_up = integer(node, "ceil_mode", 0) != 0;
    std::array<Window, 2> w;
    for (std::size_t i = 0; i < 2; ++i) {
      w[i].kernel = kernel[i];
      w[i].stride = strides[i];
      w[i].dilation = dilations[i];
      if (w[i].kernel < 1 || w[i].stride < 1 || w[i].dilation < 1) {
        refuse("kernel, strides and dilations must be at least 1");
      }
      const std::int64_t extent = x.dims[i + 2];
      const std::int64_t reach = w[i].dilation * (w[i].kernel - 1) + 1;
      if (automatic == "NOTSET") {
        w[i].pad_before = pads[i];
        w[i].pad_after = pads[i + 2];
        if (rounded_up) {
          const std::int64_t room =
              std::max<std::int64_t>(extent + pads[i] + pads[i + 2] - reach, 0);
          // The last window may hang over the edge, but must begin inside the input.
          std::int64_t outputs = ceil_div(room, w[i].stride) + 1;
          if ((outputs - 1) * w[i].stride >= extent + pads[i]) --outputs;
          const std::int64_t needed = (outputs - 1) * w[i].stride + reach - extent - pads[i];
          w[i].pad_after = std::max<std::int64_t>(needed, 0);
        }
      } else if (automatic == "SAME_UPPER" || automatic == "SAME_LOWER") {
        const std::int64_t outputs = ceil_div(extent, w[i].stride);
        const std::int64_t total =
            std::max<std::int64_t>((outputs - 1) * w[i].stride + reach - extent, 0);
        const std::int64_t less = total / 2;
        w[i].pad_before = automatic == "SAME_UPPER" ? less : total - less;
        w[i].pad_after = total - w[i].pad_before;
      } else if (automatic != "VALID") {
        refuse(fmt::format("auto_pad '{}' is not supported", automatic));
      }
    }
    return w;
  }

  void convolution(const onnx::NodeProto& node) {
    const Dims weight = constant_dims(node, 1, "weight");
    const Value x = value(node, 0);
    if (weight.size() != 4 || x.dims.size() != 4) {
      refuse(fmt::format("weights {} on {}: only images of two dimensions are supported",
                         text(weight), text(x.dims)));
    }
    const bool bias = has_input(node, 2) || biased_.count(node.output(0)) > 0;
    const auto w = windows(node, {weight[2], weight[3]}, x);
    const std::int64_t groups = integer(node, "group", 1);
    // A mean over the plane is a vector here; a 1 x 1 convolution of it is a linear operator.
    if (b_.shape(x.tensor).size() == 2 && weight[2] == 1 && weight[3] == 1 && groups == 1 &&
        product(x.dims, 2) == 1) {
      check_product(node, weight[1], product(x.dims, 1));
      const TensorId y =
          add(node, Linear{1, {{output_label(node), weight[0]}}, bias}, {x.tensor}, node.input(1));
      return set(node, y, {x.dims[0], weight[0], 1, 1});
    }
    if (groups < 1 || weight[1] > kLargest / groups) refuse(fmt::format("group is {}", groups));
    check_product(node, weight[1] * groups, x.dims[1]);
    const Convolution c{weight[0], w[0], w[1], groups, bias};
    emit(node, c, {plain(node, 0).tensor}, node.input(1));
  }

  void check_product(const onnx::NodeProto& node, std::int64_t weight, std::int64_t input) const {
    if (weight != input) {
      refuse(fmt::format("its weight sums over {} values, its input '{}' has {}", weight,
                         node.input(0), input));
    }
  }

  void local_response(const onnx::NodeProto& node) {
    Normalize n;
    n.kind = Normalize::Kind::local;
    n.scale = n.bias = false;
    n.window = integer(node, "size", 0);
    n.alpha = real(node, "alpha", 1e-4);
    n.beta = real(node, "beta", 0.75);
    n.offset = real(node, "bias", 1);
    emit(node, n, {plain(node, 0).tensor});
  }

  void layer_norm(const onnx::NodeProto& node) {
    const Value& x = plain(node, 0);
    const auto rank = static_cast<std::int64_t>(x.dims.size());
    const std::int64_t axis = integer(node, "axis", -1);
    if (axis != -1 && axis != rank - 1)
      refuse(fmt::format("axis {} is not the last dimension", axis));
    Normalize n;
    n.epsilon = real(node, "epsilon", 1e-5);
    constant_dims(node, 1, "scale");
    n.bias = has_input(node, 2);
    emit(node, n, {x.tensor}, node.input(1));
  }

  void pool(const onnx::NodeProto& node, bool maximum) {
    if (node.output_size() > 1) refuse("its second output (indices) is not supported");
    const Value& x = plain(node, 0);
    if (attribute(node, "kernel_shape") == nullptr) refuse("it has no kernel_shape");
    const auto w = windows(node, integers(node, "kernel_shape", 2, 1), x);
    emit(node, Pool{maximum, w[0], w[1], integer(node, "count_include_pad", 0) != 0}, {x.tensor});
  }

  void global_pool(const onnx::NodeProto& node) {
    const Value x = plain(node, 0);
    if (x.dims.size() != 4) refuse(fmt::format("its input {} is no image", text(x.dims)));
    if (node.op_type() == "GlobalMaxPool") {
      return emit(node, Pool{true, {x.dims[2], 1, 0, 0, 1}, {x.dims[3], 1, 0, 0, 1}, true},
                  {x.tensor});
    }
    set(node, add(node, GlobalAveragePool{}, {x.tensor}), {x.dims[0], x.dims[1], 1, 1});
  }

  /// Classes for the operator that gives the network's output.
  Dim output_label(const onnx::NodeProto& node) const {
    if (node.output(0) == logits_) return Dim::vocabulary;
    // A sum with a bias may follow the product.
    for (const auto& next : graph().node()) {
      if (next.op_type() != "Add" || next.output_size() < 1 || next.output(0) != logits_) continue;
      for (const auto& in : next.input()) {
        if (in == node.output(0)) return Dim::vocabulary;
      }
    }
    return Dim::feature;
  }

  void linear(const onnx::NodeProto& node, const Value& x, std::int64_t in, std::int64_t out,
              bool bias) {
    const Shape& shape = b_.shape(x.tensor);
    // ONNX multiplies along its last dimension; what was flattened into it are our last ones.
    std::size_t contracted = 0;
    std::int64_t summed = 1;
    while (contracted + 1 < shape.size() && (contracted == 0 || summed < x.dims.back())) {
      summed *= shape[shape.size() - 1 - contracted++].extent;
    }
    if (x.dims.size() < 2 || contracted < 1 || summed != x.dims.back()) {
      refuse(fmt::format("its input {} reshaped to {} has no dimensions that make up {}",
                         partita::text(shape), text(x.dims), x.dims.empty() ? 0 : x.dims.back()));
    }
    check_product(node, in, summed);
    const Linear op{static_cast<int>(contracted), {{output_label(node), out}}, bias};
    const Dims before = x.dims;
    const TensorId y = add(node, op, {x.tensor}, node.input(1));
    Dims dims = before;
    dims.back() = out;
    set(node, y, dims);
  }

  void gemm(const onnx::NodeProto& node) {
    const Value x = value(node, 0);
    const Dims weight = constant_dims(node, 1, "weight");
    if (integer(node, "transA", 0) != 0) refuse("a transposed activation is not supported");
    if (weight.size() != 2 || x.dims.size() != 2) {
      refuse(
          fmt::format("it multiplies {} by {}; both must be matrices", text(x.dims), text(weight)));
    }
    const bool bias = has_input(node, 2);
    const bool transposed = integer(node, "transB", 0) != 0;
    const std::int64_t out = transposed ? weight[0] : weight[1];
    if (bias) {
      const Dims b = without_ones(constant_dims(node, 2, "bias"), 0);
      if (b != Dims{out} && !(b.empty() && out == 1)) {
        refuse(fmt::format("a bias of {} is not supported; it must have {} values", text(b), out));
      }
    }
    linear(node, x, transposed ? weight[1] : weight[0], out, bias);
  }

  void matmul(const onnx::NodeProto& node) {
    if (is_value(node, 0) && is_value(node, 1)) {
      const Value &a = plain(node, 0), &c = plain(node, 1);
      const std::size_t rank = a.dims.size();
      if (rank < 3 || c.dims.size() != rank) {
        refuse(fmt::format("it multiplies the activations {} and {}; they need one rank of 3 or 4",
                           text(a.dims), text(c.dims)));
      }
      return emit(node, BatchedProduct{static_cast<int>(rank) - 2}, {a.tensor, c.tensor});
    }
    const Value x = value(node, 0);
    const Dims weight = constant_dims(node, 1, "right side");
    if (weight.size() != 2) refuse(fmt::format("weights {} must be a matrix", text(weight)));
    linear(node, x, weight[0], weight[1], false);
  }

  void add_values(const onnx::NodeProto& node) {
    if (node.input_size() == 1) return alias(node, Value(value(node, 0)));
    if (node.op_type() == "Add" && is_value(node, 0) != is_value(node, 1)) {
      const int at = is_value(node, 0) ? 0 : 1;
      const Value& x = plain(node, at);
      const Dims c = aligned(node, constant_dims(node, 1 - at, "other side"), x.dims.size());
      const bool last = x.dims.size() >= 2 && c.size() == x.dims.size() &&
                        c.back() == x.dims.back() && product(c) == x.dims.back();
      if (!last) {
        refuse(fmt::format(
            "a constant of {} added to {} is not supported; it must have one value for each "
            "index of the last dimension",
            text(c), text(x.dims)));
      }
      return emit(node, AddBias{}, {x.tensor}, node.input(1 - at));
    }
    Value sum = value(node, 0);
    for (int i = 1; i < node.input_size(); ++i) {
      const Value& next = value(node, i);
      if (next.dims != sum.dims) {
        refuse(fmt::format(
            "activations of {} and {} have different extents; broadcasting is not supported",
            text(sum.dims), text(next.dims)));
      }
      sum.tensor = add(node, Add{}, {sum.tensor, next.tensor});
    }
    alias(node, sum);
  }

  void multiply(const onnx::NodeProto& node) {
    if (!is_value(node, 0) || !is_value(node, 1)) {
      refuse(
          "a product with a constant is supported right after a batch norm, with one value for "
          "each "
          "channel");
    }
    const Value a = value(node, 0), c = value(node, 1);
    for (const auto& [x, gate] : {std::pair{a, c}, std::pair{c, a}}) {
      const Shape &image = b_.shape(x.tensor), &vector = b_.shape(gate.tensor);
      if (image.size() == 4 && vector.size() == 2 && gate.dims.size() == 4 &&
          product(gate.dims, 2) == 1 && gate.dims[1] == x.dims[1])
        return set(node, add(node, ScaleFeatures{}, {x.tensor, gate.tensor}), x.dims);
    }
    if (a.dims != c.dims) {
      refuse(fmt::format(
          "activations of {} and {} have different extents; broadcasting is not supported",
          text(a.dims), text(c.dims)));
    }
    set(node, add(node, Multiply{}, {a.tensor, c.tensor}), a.dims);
  }

  void reshape(const onnx::NodeProto& node) {
    const Value x = value(node, 0);
    Dims to;
    if (node.op_type() == "Flatten") {
      if (integer(node, "axis", 1) != 1) refuse("only axis 1 keeps the batch");
      to = {x.dims[0], product(x.dims, 1)};
    } else {
      const Dims* known = known_output(node);
      if (known == nullptr) refuse("its output's extents are not known");
      to = *known;
    }
    const bool flattened = to.size() == 2 && to[0] == x.dims[0] && to[1] == product(x.dims, 1);
    const bool ones =
        !to.empty() && to[0] == x.dims[0] && without_ones(to, 1) == without_ones(x.dims, 1);
    if (!flattened && !ones) {
      refuse(fmt::format(
          "it makes {} of {}; only flattening after the batch and extents of 1 are supported",
          text(to), text(x.dims)));
    }
    set(node, x.tensor, to);
  }

  void softmax(const onnx::NodeProto& node) {
    if (last_softmax_.count(node.output(0)) > 0) return alias(node, Value(value(node, 0)));
    if (node.op_type() == "LogSoftmax") refuse("it is supported as the last operator only");
    const Value& x = plain(node, 0);
    const auto rank = static_cast<std::int64_t>(x.dims.size());
    const std::int64_t axis = integer(node, "axis", opset() < 13 ? 1 : -1);
    if (axis != -1 && axis != rank - 1)
      refuse(fmt::format("axis {} is not the last dimension", axis));
    emit(node, Softmax{}, {x.tensor});
  }

  std::int64_t opset() const {
    std::int64_t version = 1;
    for (const auto& o : model_.opset_import()) {
      if (o.domain().empty() || o.domain() == "ai.onnx") version = o.version();
    }
    return version;
  }

  void concat(const onnx::NodeProto& node) {
    std::vector<TensorId> in;
    for (int i = 0; i < node.input_size(); ++i) in.push_back(plain(node, i).tensor);
    if (in.empty()) refuse("it joins nothing");
    const auto rank = static_cast<std::int64_t>(value(node, 0).dims.size());
    std::int64_t axis = integer(node, "axis", 1);
    if (axis < 0) axis += rank;
    if (axis < 1 || axis >= rank || (axis != 1 && axis != rank - 1)) {
      refuse(fmt::format("axis {} is neither the second nor the last dimension", axis));
    }
    emit(node, Concat{axis == rank - 1}, in);
  }

  void gather(const onnx::NodeProto& node) {
    const Dims table = constant_dims(node, 0, "table");
    if (integer(node, "axis", 0) != 0 || table.size() != 2) {
      refuse("only look-ups of rows in a table are supported");
    }
    const Value& ids = plain(node, 1);
    emit(node, Embedding{table[0], table[1]}, {ids.tensor}, node.input(0));
  }

  Graph finish() {
    const auto it = values_.find(output_);
    place_ = fmt::format("{}: output '{}'", path_, output_);
    if (it == values_.end()) refuse("no operator gives it");
    Value y = it->second;
    Shape shape = b_.shape(y.tensor);
    if (shape.size() == 4 && shape[2].extent == 1 && shape[3].extent == 1) {
      y.tensor = b_.add("logits", GlobalAveragePool{}, {y.tensor});
      y.dims = {y.dims[0], y.dims[1]};
      shape = b_.shape(y.tensor);
    }
    Dims ours;
    for (const auto& d : shape) ours.push_back(d.extent);
    if (shape.size() < 2 || without_ones(ours, 1) != without_ones(y.dims, 1)) {
      refuse(fmt::format(
          "{} is neither [batch, classes], [batch, tokens, classes] nor an image; a loss needs "
          "one of them",
          text(y.dims)));
    }
    // An image that comes out is compared with an image.
    TensorId loss;
    if (shape.size() == 4) {
      loss = b_.add("loss", MeanSquaredError{}, {y.tensor, b_.input("target", shape)});
    } else {
      shape.pop_back();
      loss = b_.add("loss", CrossEntropy{}, {y.tensor, b_.input("labels", shape)});
    }
    Graph g = b_.finish(loss, 0, sequence_);
    cut_into_layers(g);
    return g;
  }

  /// A pipeline may cut where one tensor alone passes. Every operator with parameters at such a
  /// place begins a layer.
  static void cut_into_layers(Graph& g) {
    std::vector<std::size_t> last(g.tensors.size(), 0);
    for (std::size_t i = 0; i + 1 < g.operators.size(); ++i) {
      for (const TensorId t : g.operators[i].inputs) last[t.index()] = i;
    }
    last[g.operators.back().inputs[0].index()] = g.operators.size() - 1;
    int layer = -1;
    std::set<std::int32_t> live;
    for (const TensorId t : g.inputs) live.insert(t.value);
    for (std::size_t i = 0; i < g.operators.size(); ++i) {
      Operator& op = g.operators[i];
      for (auto at = live.begin(); at != live.end();) {
        at = last[static_cast<std::size_t>(*at)] < i ? live.erase(at) : std::next(at);
      }
      const bool alone = live.size() == 1 && *live.begin() == op.inputs[0].value;
      const bool loss = i + 1 == g.operators.size();
      if (layer < 0 || loss || (alone && is_product(op.operation) && !op.parameters.empty()))
        ++layer;
      op.layer = layer;
      for (const TensorId t : op.outputs) live.insert(t.value);
    }
    g.layers = layer;
  }

  static constexpr std::int64_t kLargest = std::int64_t{1} << 48;

  std::string path_;
  ModelOptions options_;
  onnx::ModelProto model_;
  GraphBuilder b_;
  std::string place_;
  std::set<std::string> constants_;
  std::map<std::string, Dims> dims_;
  std::map<std::string, Value> values_;
  std::map<std::string, int> readers_;
  std::map<std::string, ParameterId> parameters_;
  std::map<std::string, std::string> made_from_;
  std::map<std::string, std::string> folded_;
  std::set<std::string> biased_;
  std::set<std::string> last_softmax_;
  std::set<std::string> names_;
  std::string output_, logits_;
  std::int64_t sequence_ = 0;
};

}  // namespace

Graph import_onnx(const std::string& path, const ModelOptions& options) {
  check_options(options);
  if (options.layers > 0) {
    throw InputError("layers",
                     fmt::format("{} is a fixed graph; its layers cannot be counted", path));
  }
  if (options.vocabulary > 0) {
    throw InputError("vocabulary",
                     fmt::format("{} is a fixed graph; its classes cannot change", path));
  }
  return Importer(path, options).import();
}

}  // namespace partita
