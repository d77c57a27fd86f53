// tests/runtime/cuda/octet_problems.h: rows of whole octets, which kernels move sixteen bytes at a
// time, of more than one octet and of more than a warp has lanes for.
#pragma once

#include <array>
#include <vector>

#include "tests/runtime/reference/problems.h"

namespace partita::cuda {

inline std::vector<reference::Problem> octet_problems(reference::Rng& rng) {
  std::vector<reference::Problem> list;
  const auto add = [&](std::string label, Operation op, std::vector<Shape> shapes) {
    list.push_back(
        reference::make_problem("octets, " + std::move(label), std::move(op), shapes, rng));
  };
  const NamedExtent sample{Dim::sample, 2}, sequence{Dim::sequence, 3}, head{Dim::head, 2};
  for (const std::int64_t width : {16, 24, 520}) {
    const Shape tokens{sample, sequence, {Dim::feature, width}};
    Normalize norm;
    add("layer norm", norm, {tokens});
    norm.kind = Normalize::Kind::rms, norm.bias = false;
    add("rms norm", norm, {tokens});
    norm.kind = Normalize::Kind::batch, norm.bias = true;
    add("batch norm", norm, {{sample, {Dim::feature, 3}, {Dim::height, 2}, {Dim::width, width}}});
    // Channels that several blocks share, of a mean that is not 0.
    if (width == 24) {
      add("batch norm of large planes", norm,
          {{sample, {Dim::feature, 2}, {Dim::height, 200}, {Dim::width, width * 2 + 1}}});
      for (double& x : list.back().inputs[0].values) x += 3;
    }
    add("dropout", Dropout{0.4}, {tokens});
    add("dropout of heads", Dropout{0.4}, {{sample, sequence, head, {Dim::head_feature, width}}});
    add("softmax", Softmax{}, {tokens});
    add("cross entropy", CrossEntropy{},
        {{sample, sequence, {Dim::vocabulary, width}}, {sample, sequence}});
    add("embedding", Embedding{7, width}, {{sample, sequence}});
    add("embedding of many tokens", Embedding{7, width}, {{sample, {Dim::sequence, 300}}});
    add("embedding of few", Embedding{2, width}, {{sample, sequence}});
    add("embedding of few, of many tokens", Embedding{3, width}, {{sample, {Dim::sequence, 70}}});
    add("position embedding", PositionEmbedding{5}, {tokens});
    add("addition", Add{}, {tokens, tokens});
  }
  for (const std::int64_t width : {1, 5, 16, 33}) {
    const Shape image{sample, {Dim::feature, 3}, {Dim::height, 9}, {Dim::width, width}};
    for (const auto& [kernel, stride, dilation, pad] :
         {std::array{1, 1, 1, 0}, {3, 1, 1, 1}, {3, 2, 1, 1}, {2, 3, 1, 0}, {3, 2, 2, 2}}) {
      const Window window{kernel, stride, pad, pad, dilation};
      if (width + 2 * pad < dilation * (kernel - 1) + 1) continue;
      add("largest of windows", Pool{true, window, window, true}, {image});
      add("mean of windows", Pool{false, window, window, true}, {image});
      add("mean of windows without padding", Pool{false, window, window, false}, {image});
    }
    Convolution convolution;
    convolution.out = 5;
    convolution.bias = true;
    convolution.height = convolution.width = Window{1, 1, 0, 0, 1};
    add("convolution with a bias", convolution, {image});
    add("mean of planes", GlobalAveragePool{}, {image});
  }
  // Channels whose gradients several blocks share.
  Convolution wide;
  wide.out = 2;
  wide.bias = true;
  wide.height = wide.width = Window{1, 1, 0, 0, 1};
  add("convolution of large planes with a bias", wide,
      {{sample, {Dim::feature, 1}, {Dim::height, 110}, {Dim::width, 79}}});
  for (const std::int64_t turned : {16, 48})
    add("rotary", Rotary{turned, turned, 100},
        {{sample, sequence, head, {Dim::head_feature, 2 * turned}}});
  return list;
}

/// Operators whose kernels make their statistics themselves, of rows of every kind: less than an
/// octet, one, more, odd ones; more than the lanes of a row keep in registers.
inline std::vector<reference::Problem> row_problems(reference::Rng& rng) {
  std::vector<reference::Problem> list;
  const auto add = [&](std::string label, Operation op, std::vector<Shape> shapes) {
    list.push_back(
        reference::make_problem("rows, " + std::move(label), std::move(op), shapes, rng));
  };
  const NamedExtent sample{Dim::sample, 2}, sequence{Dim::sequence, 3};
  for (const std::int64_t width : {1, 7, 8, 9, 31, 32, 33, 40, 257, 1032, 20000}) {
    const Shape tokens{sample, sequence, {Dim::feature, width}};
    Normalize norm;
    add("layer norm", norm, {tokens});
    // A small deviation beside a large mean.
    if (width > 1)
      for (double& x : list.back().inputs[0].values) x = 100 + x / 4;
    norm.bias = false;
    add("layer norm without a bias", norm, {tokens});
    norm.kind = Normalize::Kind::rms;
    add("rms norm", norm, {tokens});
    norm.scale = false;
    add("rms norm without a scale", norm, {tokens});
    add("softmax", Softmax{}, {tokens});
    add("cross entropy", CrossEntropy{},
        {{sample, sequence, {Dim::vocabulary, width}}, {sample, sequence}});
    if (width > 100) continue;
    for (const auto kind : {ActivationKind::relu, ActivationKind::gelu, ActivationKind::gelu_tanh,
                            ActivationKind::silu, ActivationKind::tanh}) {
      add("activation", Activation{kind}, {tokens});
      add("gated activation", GatedActivation{kind}, {tokens, tokens});
    }
    norm.scale = true, norm.group = width;
    add("rms norm of heads", norm, {{sample, sequence, {Dim::feature, 3 * width}}});
  }
  return list;
}

}  // namespace partita::cuda
