#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <vector>

#include "models/models.h"

namespace partita {
namespace {

Shape image(std::int64_t channels, std::int64_t side) {
  return {{Dim::sample, 1}, {Dim::feature, channels}, {Dim::height, side}, {Dim::width, side}};
}

Window window(std::int64_t kernel, std::int64_t stride, std::int64_t pad) {
  return {kernel, stride, pad, pad, 1};
}

Convolution convolution(std::int64_t out, std::int64_t kernel, std::int64_t stride,
                        std::int64_t pad, bool bias) {
  return {out, window(kernel, stride, pad), window(kernel, stride, pad), 1, bias};
}

Pool max_pool(std::int64_t kernel, std::int64_t stride, std::int64_t pad) {
  return {true, window(kernel, stride, pad), window(kernel, stride, pad), true};
}

/// Flattens an image (its three inner dimensions) or takes a vector.
Linear linear(const Shape& from, NamedExtent out) {
  return {from.size() == 4 ? 3 : 1, {out}, true};
}

const Activation kRelu{ActivationKind::relu};

/// Begins block `layer`.
void begin(GraphBuilder& b, int layer) {
  b.set_layer(layer);
  b.set_scope(fmt::format("layers.{}.", layer));
}

Graph with_cross_entropy(GraphBuilder& b, TensorId logits, int layers) {
  b.set_layer(layers);
  b.set_scope("");
  const TensorId labels = b.input("labels", {{Dim::sample, 1}});
  return b.finish(b.add("loss", CrossEntropy{}, {logits, labels}), layers, 0);
}

/// Three fully connected layers with dropout where torchvision puts it. Dropout stands before each
/// of AlexNet's first two and after each of VGG's.
TensorId classifier(GraphBuilder& b, TensorId x, int layer, std::int64_t classes, double dropout,
                    bool dropout_first) {
  const auto drop = [&] {
    if (dropout > 0) x = b.add("dropout", Dropout{dropout}, {x});
  };
  for (int i = 0; i < 2; ++i) {
    begin(b, layer + i);
    if (dropout_first) drop();
    x = b.add("linear", linear(b.shape(x), {Dim::ffn, 4096}), {x});
    x = b.add("activation", kRelu, {x});
    if (!dropout_first) drop();
  }
  begin(b, layer + 2);
  return b.add("linear", linear(b.shape(x), {Dim::vocabulary, classes}), {x});
}

/// Squeeze and excitation: https://arxiv.org/abs/1709.01507, figure 3.
TensorId excited(GraphBuilder& b, TensorId x, std::int64_t features, std::int64_t squeezed,
                 const Activation& activation) {
  TensorId gate = b.add("squeeze", GlobalAveragePool{}, {x});
  gate = b.add("excite_1", Linear{1, {{Dim::ffn, squeezed}}, true}, {gate});
  gate = b.add("excite_activation_1", activation, {gate});
  gate = b.add("excite_2", Linear{1, {{Dim::feature, features}}, true}, {gate});
  gate = b.add("excite_activation_2", Activation{ActivationKind::sigmoid}, {gate});
  return b.add("excite", ScaleFeatures{}, {x, gate});
}

}  // namespace

Graph build_mnist_linear(std::int64_t classes) {
  GraphBuilder b("mnist-linear");
  const TensorId x = b.input("image", image(1, 28));
  begin(b, 0);
  const std::int64_t n = classes > 0 ? classes : 10;
  const TensorId y = b.add("linear", linear(b.shape(x), {Dim::vocabulary, n}), {x});
  b.set_layer(1);
  b.set_scope("");
  const TensorId target = b.input("target", b.shape(y));
  return b.finish(b.add("loss", MeanSquaredError{}, {y, target}), 1, 0);
}

Graph build_resnet(const ResnetConfig& config, std::int64_t classes) {
  GraphBuilder b(config.name);
  TensorId x = b.input("image", image(3, 224));
  const auto normed = [&](const std::string& suffix, const Convolution& c, TensorId in) {
    const TensorId y = b.add("convolution" + suffix, c, {in});
    Normalize norm;
    norm.kind = Normalize::Kind::batch;
    return b.add("norm" + suffix, norm, {y});
  };
  b.set_scope("stem.");
  x = normed("", convolution(64, 7, 2, 3, false), x);
  x = b.add("activation", kRelu, {x});
  x = b.add("max_pool", max_pool(3, 2, 1), {x});

  struct Stage {
    int blocks;
    std::int64_t width, stride;
  };
  // https://arxiv.org/abs/1512.03385, table 1; the stride stands on the 3 x 3 convolution as in
  // torchvision ("ResNet v1.5"), not on the first 1 x 1.
  const auto& n = config.blocks;
  const std::array<Stage, 4> stages{
      {{n[0], 64, 1}, {n[1], 128, 2}, {n[2], 256, 2}, {n[3], 512, 2}}};
  int layer = 0;
  for (const Stage& stage : stages) {
    // https://arxiv.org/abs/1611.05431, table 1: the inner width of 32 groups of 4 is 128 of 64.
    const std::int64_t inner = stage.width * config.groups * config.group_width / 64;
    const std::int64_t out = config.bottleneck ? 4 * stage.width : stage.width;
    const Convolution last =
        config.bottleneck ? convolution(out, 1, 1, 0, false) : convolution(out, 3, 1, 1, false);
    for (int i = 0; i < stage.blocks; ++i, ++layer) {
      begin(b, layer);
      const std::int64_t stride = i == 0 ? stage.stride : 1, before = b.shape(x)[1].extent;
      TensorId y = x;
      if (config.bottleneck) {
        y = normed("_1", convolution(inner, 1, 1, 0, false), y);
        y = b.add("activation_1", kRelu, {y});
      }
      Convolution middle = convolution(inner, 3, stride, 1, false);
      middle.groups = config.groups;
      y = normed("_2", middle, y);
      y = b.add("activation_2", kRelu, {y});
      y = normed("_3", last, y);
      if (config.squeeze > 0) y = excited(b, y, out, out / config.squeeze, kRelu);
      TensorId shortcut = x;
      if (stride > 1 || before != out)
        shortcut = normed("_shortcut", convolution(out, 1, stride, 0, false), x);
      y = b.add("residual", Add{}, {y, shortcut});
      x = b.add("activation_3", kRelu, {y});
    }
  }
  b.set_layer(layer);
  b.set_scope("");
  x = b.add("global_average_pool", GlobalAveragePool{}, {x});
  x = b.add("head", linear(b.shape(x), {Dim::vocabulary, classes > 0 ? classes : 1000}), {x});
  return with_cross_entropy(b, x, layer);
}

Graph build_vgg16(std::int64_t classes, double dropout) {
  GraphBuilder b("vgg-16");
  TensorId x = b.input("image", image(3, 224));
  // https://arxiv.org/abs/1409.1556, table 1, column D; 0 is a pooling layer.
  constexpr std::array<std::int64_t, 18> kWidths{64, 64,  0,   128, 128, 0,   256, 256, 256,
                                                 0,  512, 512, 512, 0,   512, 512, 512, 0};
  int layer = -1;
  for (const std::int64_t width : kWidths) {
    if (width == 0) {
      x = b.add("max_pool", max_pool(2, 2, 0), {x});
      continue;
    }
    begin(b, ++layer);
    x = b.add("convolution", convolution(width, 3, 1, 1, true), {x});
    x = b.add("activation", kRelu, {x});
  }
  x = classifier(b, x, layer + 1, classes > 0 ? classes : 1000, dropout, false);
  return with_cross_entropy(b, x, layer + 4);
}

Graph build_efficientnet(const EfficientNetConfig& config, std::int64_t classes, double dropout) {
  GraphBuilder b(config.name);
  // The nearest multiple of 8, but not below nine tenths.
  const auto widened = [&](std::int64_t channels) {
    const double wanted = static_cast<double>(channels) * config.width;
    const auto nearest = std::max<std::int64_t>(8, static_cast<std::int64_t>(wanted + 4) / 8 * 8);
    return static_cast<double>(nearest) < 0.9 * wanted ? nearest + 8 : nearest;
  };
  constexpr Activation kSilu{ActivationKind::silu};
  const auto normed = [&](const std::string& suffix, std::int64_t out, std::int64_t kernel,
                          std::int64_t stride, std::int64_t groups, TensorId in) {
    Convolution c = convolution(out, kernel, stride, (kernel - 1) / 2, false);
    c.groups = groups;
    Normalize norm;
    norm.kind = Normalize::Kind::batch;
    const TensorId y = b.add("convolution" + suffix, c, {in});
    return b.add("norm" + suffix, norm, {y});
  };
  b.set_scope("stem.");
  std::int64_t channels = widened(32);
  TensorId x = b.input("image", image(3, config.image));
  x = b.add("activation", kSilu, {normed("", channels, 3, 2, 1, x)});

  struct Stage {
    std::int64_t expansion, kernel, stride, out;
    int blocks;
  };
  // Table 1; squeezed to a quarter of the block's input, as in torchvision.
  constexpr std::array<Stage, 7> kStages{{{1, 3, 1, 16, 1},
                                          {6, 3, 2, 24, 2},
                                          {6, 5, 2, 40, 2},
                                          {6, 3, 2, 80, 3},
                                          {6, 5, 1, 112, 3},
                                          {6, 5, 2, 192, 4},
                                          {6, 3, 1, 320, 1}}};
  int layer = 0;
  for (const Stage& stage : kStages) {
    const std::int64_t out = widened(stage.out);
    const int blocks = static_cast<int>(std::ceil(stage.blocks * config.depth));
    for (int i = 0; i < blocks; ++i, ++layer) {
      begin(b, layer);
      const std::int64_t stride = i == 0 ? stage.stride : 1, inner = channels * stage.expansion;
      TensorId y = x;
      if (stage.expansion > 1) y = b.add("activation_1", kSilu, {normed("_1", inner, 1, 1, 1, y)});
      y = b.add("activation_2", kSilu, {normed("_2", inner, stage.kernel, stride, inner, y)});
      y = excited(b, y, inner, std::max<std::int64_t>(1, channels / 4), kSilu);
      y = normed("_3", out, 1, 1, 1, y);
      if (stride == 1 && channels == out) y = b.add("residual", Add{}, {y, x});
      channels = out;
      x = y;
    }
  }
  begin(b, layer);
  x = b.add("activation", kSilu, {normed("", 4 * channels, 1, 1, 1, x)});
  b.set_layer(layer + 1);
  b.set_scope("");
  x = b.add("global_average_pool", GlobalAveragePool{}, {x});
  if (dropout > 0) x = b.add("dropout", Dropout{dropout}, {x});
  x = b.add("head", linear(b.shape(x), {Dim::vocabulary, classes > 0 ? classes : 1000}), {x});
  return with_cross_entropy(b, x, layer + 1);
}

Graph build_alexnet(std::int64_t classes, double dropout) {
  GraphBuilder b("alexnet");
  TensorId x = b.input("image", image(3, 224));
  struct Layer {
    std::int64_t out, kernel, stride, pad;
    bool pooled;
  };
  // https://arxiv.org/abs/1404.5997, one column, as in torchvision.
  constexpr std::array<Layer, 5> kLayers{{{64, 11, 4, 2, true},
                                          {192, 5, 1, 2, true},
                                          {384, 3, 1, 1, false},
                                          {256, 3, 1, 1, false},
                                          {256, 3, 1, 1, true}}};
  int layer = 0;
  for (const Layer& l : kLayers) {
    begin(b, layer++);
    x = b.add("convolution", convolution(l.out, l.kernel, l.stride, l.pad, true), {x});
    x = b.add("activation", kRelu, {x});
    if (l.pooled) x = b.add("max_pool", max_pool(3, 2, 0), {x});
  }
  x = classifier(b, x, layer, classes > 0 ? classes : 1000, dropout, true);
  return with_cross_entropy(b, x, layer + 3);
}

}  // namespace partita
