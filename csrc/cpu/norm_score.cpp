// norm_score on the CPU: backward of LayerNorm or RMSNorm, and the score of removing each channel.
//
// B batch, N tokens, C channels. With x_hat = (x - mean) * scale, scale = 1 / sqrt(var + eps):
//   c1 = mean(weight * dy * x_hat)   c2 = mean(weight * dy)
//   dx = (weight * dy - c2 - x_hat * c1) * scale
//   score[b, c] = sum over n of [y * dy] - x_hat * c2 - (x_hat^2 - var * scale^2) * c1 / 2
// RMSNorm has mean 0 and c2 0. A row is summed in one fixed order: lanes of four vectors, then a
// fixed tree; the tokens of a sample in parts of 32, whose sums are added in order. So the bits
// depend on the B-th sample alone: not on threads, batch, lane or instruction set.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <optional>
#include <tuple>
#include <vector>

#include "cpu/isa.h"
#include "cpu/lanes.h"
#include "tensors.h"

namespace {

using namespace vitprune;
constexpr const char* kOp = "norm_score";

// vectors summed side by side, so that an addition need not wait for the one before it
constexpr int64_t kSums = 4;

// what is the same for every token of every sample
template <typename Acc>
struct Norm {
  const Acc* weight;  // (C,), then zeros up to a whole number of vectors
  const Acc* bias;    // the same
  int64_t channels;
  Acc eps;
  bool rms;
};

// the first `count` lanes of v, then zeros
template <typename V>
VP_INLINE V keep_first(V v, int64_t count) {
  using Acc = std::remove_reference_t<decltype(v[0])>;
  constexpr int64_t lanes = kLanes<Acc>;
  if (count >= lanes) return v;
  Acc x[lanes];
  store_lanes(x, v);
  std::fill(x + std::max<int64_t>(count, 0), x + lanes, Acc(0));
  return load_lanes(x);
}

template <typename V>
VP_INLINE auto total(const V (&sums)[kSums]) {
  return sum_lanes((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

// one token: writes its dx and adds its share to `score`; `x_hat` and `grad_x_hat` are scratch
template <bool kOutput, typename In, typename Acc>
VP_INLINE void one_token(const In* x, const In* grad_y, In* grad_x, const Norm<Acc>& norm,
                         Acc* x_hat, Acc* grad_x_hat, Acc* score) {
  using V = decltype(load_lanes(x));
  constexpr int64_t lanes = kLanes<Acc>, step = kSums * lanes;
  const Acc *weight = norm.weight, *bias = norm.bias;
  const int64_t channels = norm.channels;
  const int64_t whole = channels / step * step;

  Acc mean = 0;
  if (!norm.rms) {
    V sums[kSums] = {};
    int64_t c = 0;
    for (; c < whole; c += step) {
      for (int64_t i = 0; i < kSums; ++i) sums[i] += load_lanes(x + c + i * lanes);
    }
    for (int64_t i = 0; c < channels; c += lanes, ++i) sums[i] += load_first(x + c, channels - c);
    mean = total(sums) / static_cast<Acc>(channels);
  }

  V squares[kSums] = {};
  int64_t c = 0;
  for (; c < whole; c += step) {
    for (int64_t i = 0; i < kSums; ++i) {
      const V centred = load_lanes(x + c + i * lanes) - mean;
      store_lanes(x_hat + c + i * lanes, centred);
      squares[i] += centred * centred;
    }
  }
  for (int64_t i = 0; c < channels; c += lanes, ++i) {
    const V centred = keep_first(load_first(x + c, channels - c) - mean, channels - c);
    store_lanes(x_hat + c, centred);
    squares[i] += centred * centred;
  }
  const Acc variance = total(squares) / static_cast<Acc>(channels);
  const Acc scale = Acc(1) / std::sqrt(variance + norm.eps);
  const Acc share = variance * scale * scale;

  V products[kSums] = {}, gradients[kSums] = {};
  const auto add = [&](int64_t at, int64_t i, V dy) VP_ALWAYS_INLINE {
    const V hat = load_lanes(x_hat + at) * scale;
    const V gradient = dy * load_lanes(weight + at);
    store_lanes(x_hat + at, hat);
    store_lanes(grad_x_hat + at, gradient);
    products[i] += gradient * hat;
    gradients[i] += gradient;
  };
  for (c = 0; c < whole; c += step) {
    for (int64_t i = 0; i < kSums; ++i) add(c + i * lanes, i, load_lanes(grad_y + c + i * lanes));
  }
  for (int64_t i = 0; c < channels; c += lanes, ++i) {
    add(c, i, load_first(grad_y + c, channels - c));
  }
  const Acc c1 = total(products) / static_cast<Acc>(channels);
  const Acc c2 = norm.rms ? Acc(0) : total(gradients) / static_cast<Acc>(channels);
  const Acc half_c1 = c1 / 2;

  const auto finish = [&](int64_t at, V dy) VP_ALWAYS_INLINE {
    const V hat = load_lanes(x_hat + at);
    V added = load_lanes(score + at) - hat * c2 - (hat * hat - share) * half_c1;
    if constexpr (kOutput) {
      added += (hat * load_lanes(weight + at) + load_lanes(bias + at)) * dy;
    }
    store_lanes(score + at, added);
    return (load_lanes(grad_x_hat + at) - c2 - hat * c1) * scale;
  };
  for (c = 0; c + lanes <= channels; c += lanes) {
    store_lanes(grad_x + c, finish(c, load_lanes(grad_y + c)));
  }
  if (c < channels) {
    store_first(grad_x + c, finish(c, load_first(grad_y + c, channels - c)), channels - c);
  }
}

struct Tokens {
  int64_t count, x_stride, grad_y_stride;
};

// score[c] = sum over some tokens; `scratch` is two rows more
template <bool kOutput, typename In, typename Acc>
struct SomeTokens {
  template <int kBytes>
  static VP_INLINE void run(const In* x, const In* grad_y, In* grad_x, Tokens tokens,
                            Norm<Acc> norm, Acc* scratch, int64_t row, Acc* score) {
    std::fill_n(score, row, Acc(0));
    for (int64_t n = 0; n < tokens.count; ++n) {
      one_token<kOutput>(x + n * tokens.x_stride, grad_y + n * tokens.grad_y_stride,
                         grad_x + n * norm.channels, norm, scratch, scratch + row, score);
    }
  }
};

// a row of `size` numbers: those of the parameter, or `missing` for all channels; then zeros
template <typename In, typename Acc>
std::vector<Acc> widened(const std::optional<Tensor>& parameter, Acc missing, int64_t channels,
                         int64_t size) {
  std::vector<Acc> row(size, Acc(0));
  if (!parameter) {
    std::fill_n(row.begin(), channels, missing);
    return row;
  }
  const In* from = static_cast<const In*>(parameter->data_ptr());
  const int64_t stride = parameter->stride(0);
  for (int64_t c = 0; c < channels; ++c) row[c] = static_cast<Acc>(from[c * stride]);
  return row;
}

template <bool kOutput, typename In, typename Acc>
void score(const Tensor& x,       // (B, N, C)
           const Tensor& grad_y,  // (B, N, C)
           const std::optional<Tensor>& weight, const std::optional<Tensor>& bias, double eps,
           bool rms,
           Tensor& grad_x,  // (B, N, C)
           Tensor& out) {   // (B, C)
  const int64_t batch = x.size(0), num_tokens = x.size(1), channels = x.size(2);
  if (batch == 0 || channels == 0) return;
  const In* x_first = static_cast<const In*>(x.data_ptr());
  const In* grad_y_first = static_cast<const In*>(grad_y.data_ptr());
  In* grad_x_first = static_cast<In*>(grad_x.data_ptr());
  Acc* result = static_cast<Acc*>(out.data_ptr());
  const int64_t x_sample = x.stride(0), x_token = x.stride(1);
  const int64_t grad_y_sample = grad_y.stride(0), grad_y_token = grad_y.stride(1);

  const int64_t lanes = kLanes<Acc>;
  const int64_t row = (channels + lanes - 1) / lanes * lanes;
  const std::vector<Acc> weights = widened<In, Acc>(weight, Acc(1), channels, row);
  const std::vector<Acc> biases = widened<In, Acc>(bias, Acc(0), channels, row);
  const Norm<Acc> norm{weights.data(), biases.data(), channels, static_cast<Acc>(eps), rms};

  // one part per task: enough tasks for small batches, and little scratch
  const int64_t parts = (num_tokens + kTokensPerPart - 1) / kTokensPerPart;
  std::vector<Acc> sums(batch * parts * row);
  torch::stable::parallel_for(0, batch * parts, 1, [&](int64_t begin, int64_t end) {
    std::vector<Acc> scratch(2 * row);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t b = task / parts, n = task % parts * kTokensPerPart;
      const Tokens tokens{std::min(kTokensPerPart, num_tokens - n), x_token, grad_y_token};
      run<SomeTokens<kOutput, In, Acc>>(x_first + b * x_sample + n * x_token,
                                        grad_y_first + b * grad_y_sample + n * grad_y_token,
                                        grad_x_first + (b * num_tokens + n) * channels, tokens,
                                        norm, scratch.data(), row, sums.data() + task * row);
    }
  });
  torch::stable::parallel_for(0, batch, 1, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      Acc* to = result + b * channels;
      std::fill_n(to, channels, Acc(0));
      for (int64_t part = 0; part < parts; ++part) {
        const Acc* from = sums.data() + (b * parts + part) * row;
        for (int64_t c = 0; c < channels; ++c) to[c] += from[c];
      }
    }
  });
}

std::tuple<Tensor, Tensor> norm_score(Tensor x, Tensor grad_y, std::optional<Tensor> weight,
                                      std::optional<Tensor> bias, double eps, bool rms,
                                      bool output) {
  VP_CHECK(x.dim() == 3, kOp, "x_BNC", "have 3 dimensions", x.dim());
  const int64_t batch = x.size(0), num_tokens = x.size(1), channels = x.size(2);
  const ScalarType type = x.scalar_type();
  check_tensor(kOp, "grad_y_BNC", grad_y, {batch, num_tokens, channels}, type);
  if (weight) check_tensor(kOp, "weight_C", *weight, {channels}, type);
  if (bias) check_tensor(kOp, "bias_C", *bias, {channels}, type);
  x = with_adjacent_columns(x);
  grad_y = with_adjacent_columns(grad_y);
  Tensor grad_x = torch::stable::new_empty(x, {batch, num_tokens, channels});
  Tensor out = torch::stable::new_empty(x, {batch, channels}, wide_type(x));
  for_dtype(kOp, "x_BNC", x, [&](auto in, auto acc) {
    using In = decltype(in);
    using Acc = decltype(acc);
    const auto run_all = output ? score<true, In, Acc> : score<false, In, Acc>;
    run_all(x, grad_y, weight, bias, eps, rms, grad_x, out);
  });
  return {grad_x, out};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(vitprune_fast, CPU, m) {
  m.impl("norm_score", TORCH_BOX(&norm_score));
}
