// Attention on the CPU: softmax attention on packed qkv, and its backward. attention_score adds the
// scores of heads, q/k dims and v dims; gated_attention takes some heads and keys, with a gate per
// head.
//
// B batch, N tokens, H heads, L live heads, K head dim; packed qkv is (B, N, 3, H, K).
// One task owns one head of one sample. It copies the head's q, k, v (and dout) into small tiles of
// fp32 (fp64 for fp64) and walks the queries in blocks, so that a block of logits stays in the
// second-level cache:
//   P = exp(scale q k^T - lse)   dS = P (dout v^T - delta)   delta = sum_k out dout
//   dq = scale dS k              dk = scale dS^T q           dv = P^T dout
// A gate g multiplies dq, dk and dv, where out is the output before the gate, and its own gradient
// is the sum of delta, so nothing is divided by it. Keys that are masked are not gathered at all.
// Nothing is summed across tasks, and every sum has one order: over the depth of a product one
// after the other (in parts of kDepth), over a row as kLanes sums and then a fixed tree, over the
// tokens of a score in blocks. So the bits depend on that head alone: not on threads, batch or
// instruction set. Products are fused into sums (one rounding) where `fused` stands, in every
// clone: without it a tile would take twice the instructions on most processors, and with it the
// baseline, which calls the library for each, is for comparison and not for speed.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "cpu/activations.h"
#include "cpu/isa.h"
#include "cpu/lanes.h"
#include "tensors.h"

namespace {

using namespace vitprune;

// rows of a product that stay in registers; what owns rows is padded to a multiple of it
constexpr int64_t kRows = 6;
// queries of a block: 48 rows of 208 logits are 40 KB
constexpr int64_t kBlock = 48;
static_assert(kBlock % kRows == 0);
// a sum over the depth of a product is broken here, so that its error grows with a part of it
constexpr int64_t kDepth = 256;
// e^-64 of the largest weight of a row is far below every rounding error, and its products are
// still normal numbers
constexpr double kLeastExponent = -64;

int64_t round_up(int64_t x, int64_t to) {
  return (x + to - 1) / to * to;
}

// the sum of kLanes numbers as a fixed tree
template <typename Acc>
VP_INLINE Acc tree_sum(Acc* x) {
  for (int64_t half = kLanes<Acc> / 2; half > 0; half /= 2) {
    for (int64_t lane = 0; lane < half; ++lane) x[lane] += x[lane + half];
  }
  return x[0];
}

// c (rows, columns) = a (rows, depth) b (depth, columns), with any strides of a. Rows come in
// kRows, columns in kLanes: what lies beyond the matrices is computed too, from what is there.
template <typename Acc>
struct Multiply {
  template <int kWidth, typename V>
  static VP_INLINE void tile(const Acc* a, int64_t a_row, int64_t a_depth, const Acc* b,
                             int64_t b_depth, Acc* c, int64_t c_row, int64_t depth, bool add) {
    constexpr int64_t lanes = sizeof(V) / sizeof(Acc);
    V sum[kRows][kWidth] = {};
    for (int64_t d = 0; d < depth; ++d) {
      V right[kWidth];
#pragma GCC unroll 8
      for (int w = 0; w < kWidth; ++w) right[w] = load_lanes<V>(b + d * b_depth + w * lanes);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        const V left = a[r * a_row + d * a_depth] - V{};
#pragma GCC unroll 8
        for (int w = 0; w < kWidth; ++w) sum[r][w] = fused(left, right[w], sum[r][w]);
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
      for (int w = 0; w < kWidth; ++w) {
        Acc* to = c + r * c_row + w * lanes;
        store_lanes(to, add ? load_lanes<V>(to) + sum[r][w] : sum[r][w]);
      }
    }
  }

  template <int kBytes>
  static VP_INLINE void run(const Acc* a, int64_t a_row, int64_t a_depth, const Acc* b,
                            int64_t b_depth, Acc* c, int64_t c_row, int64_t rows, int64_t columns,
                            int64_t depth, bool add) {
    using V = Vector<Acc, kBytes>;
    constexpr int64_t lanes = kBytes / sizeof(Acc);
    // AVX-512 has 32 registers, the others 16; a panel of b then stays in the first-level cache
    constexpr int width = kBytes == 64 ? 4 : 2;
    for (int64_t first = 0; first < depth; first += kDepth, add = true) {
      const int64_t part = std::min(kDepth, depth - first);
      const Acc *a_part = a + first * a_depth, *b_part = b + first * b_depth;
      int64_t column = 0;
      for (; column + width * lanes <= columns; column += width * lanes) {
        for (int64_t row = 0; row < rows; row += kRows) {
          tile<width, V>(a_part + row * a_row, a_row, a_depth, b_part + column, b_depth,
                         c + row * c_row + column, c_row, part, add);
        }
      }
      for (; column < columns; column += lanes) {
        for (int64_t row = 0; row < rows; row += kRows) {
          tile<1, V>(a_part + row * a_row, a_row, a_depth, b_part + column, b_depth,
                     c + row * c_row + column, c_row, part, add);
        }
      }
    }
  }
};

// e^x for x <= 0, at least e^kLeastExponent; NaN stays
template <typename V>
VP_INLINE V exponential(V x) {
  const V least = constant<V>(kLeastExponent);
  const V e = exp2_of(x > least ? x : least, kLog2E);
  return x == x ? e : x;
}

// Logits become weights before their normaliser; top[r] is the largest logit of a row times scale,
// and total[r] the sum of its weights. Columns up to a multiple of kLanes are written.
template <typename Acc>
struct Weigh {
  template <int kBytes>
  static VP_INLINE void run(Acc* s, int64_t s_row, int64_t rows, int64_t columns, Acc scale,
                            Acc* top, Acc* total) {
    using V = Vector<Acc, kBytes>;
    constexpr int64_t lanes = kBytes / sizeof(Acc);
    const int64_t padded = (columns + kLanes<Acc> - 1) / kLanes<Acc> * kLanes<Acc>;
    // infinity times 0 is no number: the least factor leaves every weight at 1 as well
    const V factor = (scale == 0 ? std::numeric_limits<Acc>::min() : scale) - V{};
    for (int64_t r = 0; r < rows; ++r, s += s_row) {
      for (int64_t n = columns; n < padded; ++n) s[n] = scale < 0 ? INFINITY : -INFINITY;
      V most = constant<V>(-INFINITY);
      for (int64_t n = 0; n < padded; n += lanes) {
        const V x = load_lanes<V>(s + n) * factor;
        most = x > most ? x : most;
      }
      Acc largest = most[0];
      for (int64_t lane = 1; lane < lanes; ++lane) {
        largest = most[lane] > largest ? most[lane] : largest;
      }
      V sums[kLanes<Acc> / lanes] = {};
      for (int64_t n = 0; n < padded; n += kLanes<Acc>) {
        for (int64_t part = 0; part < kLanes<Acc> / lanes; ++part) {
          Acc* at = s + n + part * lanes;
          const V e = exponential(fused(load_lanes<V>(at), factor, -largest - V{}));
          store_lanes(at, e);
          sums[part] += e;
        }
      }
      Acc lane_sums[kLanes<Acc>];
      std::memcpy(lane_sums, sums, sizeof sums);
      top[r] = largest;
      total[r] = tree_sum(lane_sums);
    }
  }
};

// logits become weights P, and dP becomes dS = P (dP - delta)
template <typename Acc>
struct Differentiate {
  template <int kBytes>
  static VP_INLINE void run(Acc* s, Acc* dp, int64_t row_stride, int64_t rows, int64_t columns,
                            Acc scale, const Acc* lse, const Acc* delta) {
    using V = Vector<Acc, kBytes>;
    constexpr int64_t lanes = kBytes / sizeof(Acc);
    const V factor = scale - V{};
    for (int64_t r = 0; r < rows; ++r, s += row_stride, dp += row_stride) {
      const V base = -lse[r] - V{}, mean = delta[r] - V{};
      for (int64_t n = 0; n < columns; n += lanes) {
        const V p = exponential(fused(load_lanes<V>(s + n), factor, base));
        store_lanes(s + n, p);
        store_lanes(dp + n, p * (load_lanes<V>(dp + n) - mean));
      }
    }
  }
};

// rows of a head in any dtype into rows of `to_row` numbers
template <typename In, typename Acc>
struct Gather {
  template <int kBytes>
  static VP_INLINE void run(const In* from, int64_t from_row, int64_t rows, int64_t width, Acc* to,
                            int64_t to_row) {
    using V = Vector<Acc, kBytes>;
    constexpr int64_t lanes = kBytes / sizeof(Acc);
    for (int64_t r = 0; r < rows; ++r, from += from_row, to += to_row) {
      int64_t k = 0;
      for (; k + lanes <= width; k += lanes) store_lanes(to + k, load_lanes<V>(from + k));
      for (; k < width; ++k) to[k] = static_cast<Acc>(from[k]);
    }
  }
};

// the way back, times factors[r * step]
template <typename In, typename Acc>
struct Scatter {
  template <int kBytes>
  static VP_INLINE void run(const Acc* from, int64_t from_row, int64_t rows, int64_t width,
                            const Acc* factors, int64_t step, In* to, int64_t to_row) {
    using V = Vector<Acc, kBytes>;
    constexpr int64_t lanes = kBytes / sizeof(Acc);
    for (int64_t r = 0; r < rows; ++r, from += from_row, to += to_row) {
      const V factor = factors[r * step] - V{};
      int64_t k = 0;
      for (; k + lanes <= width; k += lanes) store_lanes(to + k, load_lanes<V>(from + k) * factor);
      if (k < width) {
        // rows are padded to whole vectors
        In buffer[lanes];
        store_lanes(buffer, load_lanes<V>(from + k) * factor);
        std::memcpy(to + k, buffer, (width - k) * sizeof(In));
      }
    }
  }
};

// to (width, rows) = from (rows, width), in squares that stay in the first-level cache
template <typename Acc>
struct Transpose {
  template <int kBytes>
  static VP_INLINE void run(const Acc* from, int64_t from_row, int64_t rows, int64_t width, Acc* to,
                            int64_t to_row) {
    for (int64_t k_first = 0; k_first < width; k_first += kLanes<Acc>) {
      const int64_t k_last = std::min(k_first + kLanes<Acc>, width);
      for (int64_t r = 0; r < rows; ++r) {
        for (int64_t k = k_first; k < k_last; ++k) to[k * to_row + r] = from[r * from_row + k];
      }
    }
  }
};

// What the rows x and y of a block add to scores: per_dim[k] += sum over rows of x * y, and
// per_row[r] = sum over k of it; with per_token the magnitudes of x * y enter per_dim. Rows are
// padded with zeros.
template <typename Acc>
struct Score {
  template <int kBytes>
  static VP_INLINE void run(const Acc* x, const Acc* y, int64_t row_stride, int64_t rows,
                            int64_t width, bool per_token, Acc* per_dim, Acc* part, Acc* per_row) {
    using V = Vector<Acc, kBytes>;
    constexpr int64_t lanes = kBytes / sizeof(Acc);
    std::fill_n(part, width, Acc(0));
    for (int64_t r = 0; r < rows; ++r, x += row_stride, y += row_stride) {
      V sums[kLanes<Acc> / lanes] = {};
      for (int64_t k = 0; k < width; k += kLanes<Acc>) {
        for (int64_t i = 0; i < kLanes<Acc> / lanes; ++i) {
          const int64_t at = k + i * lanes;
          const V product = load_lanes<V>(x + at) * load_lanes<V>(y + at);
          sums[i] += product;
          store_lanes(part + at,
                      load_lanes<V>(part + at) + (per_token ? absolute(product) : product));
        }
      }
      Acc lane_sums[kLanes<Acc>];
      std::memcpy(lane_sums, sums, sizeof sums);
      per_row[r] = tree_sum(lane_sums);
    }
    for (int64_t k = 0; k < width; ++k) per_dim[k] += part[k];
  }
};

// The natural logarithm, to the last bits of fp64 and with the same bits everywhere:
// log(m 2^e) = e log(2) + 2 atanh((m - 1) / (m + 1)). A sum of weights is 1 at least, or a rounding
// below where one key has all the weight.
double logarithm(double x) {
  // NaN stays NaN
  if (!(x > 0 && x <= 1e300)) return x;
  int exponent;
  double m = std::frexp(x, &exponent);
  if (m < 0.70710678118654752) {
    m *= 2;
    --exponent;
  }
  // |t| <= 0.172, so the first term that is left out is below 1e-18
  const double t = (m - 1) / (m + 1), square = t * t;
  double series = 0;
  for (int power = 23; power >= 1; power -= 2) series = series * square + 1.0 / power;
  return exponent * 0.69314718055994531 + 2 * t * series;
}

// numbers at an address that whole vectors start at, zero at first
template <typename Acc>
class Workspace {
 public:
  explicit Workspace(int64_t size) : numbers_(size + kLanes<Acc>) {
    const auto address = reinterpret_cast<uintptr_t>(numbers_.data());
    next_ = numbers_.data() + (round_up(address, 64) - address) / sizeof(Acc);
  }

  // the next `size` of them, from the start of a line on
  Acc* take(int64_t size) {
    Acc* taken = next_;
    next_ += round_up(size, kLanes<Acc>);
    return taken;
  }

 private:
  std::vector<Acc> numbers_;
  Acc* next_;
};

// Sizes of one head, and how far its rows lie apart in the workspace.
struct Head {
  int64_t tokens, dims;
  int64_t dims_row;    // rows of dims, in whole vectors
  int64_t tokens_row;  // rows of logits, in whole vectors and in whole kRows
  int64_t columns;     // of them that are computed
  int64_t rows;        // rows of tokens that are computed

  template <typename Acc>
  static Head of(int64_t tokens, int64_t dims) {
    const int64_t rows = round_up(tokens, kRows);
    return {tokens,
            dims,
            round_up(dims, kLanes<Acc>),
            round_up(rows, kLanes<Acc>),
            round_up(tokens, kLanes<Acc>),
            rows};
  }
};

// Which heads and keys are computed.
struct Selected {
  std::vector<int64_t> heads;  // the live ones, in order
  std::optional<Tensor> gate;  // (H,), contiguous, fp32 or fp64; none for 1
  std::optional<Tensor> keys;  // (B, N), contiguous, bool; none for all
  bool compact;                // whether the output has the live heads alone

  template <typename Acc>
  Acc gate_of(int64_t head) const {
    return gate ? static_cast<const Acc*>(gate->data_ptr())[head] : Acc(1);
  }
};

// The keys of a sample that are attended, as runs [first, last) of adjacent tokens.
struct Keys {
  std::vector<std::pair<int64_t, int64_t>> runs;
  int64_t count = 0;

  Keys(const std::optional<Tensor>& mask, int64_t sample, int64_t tokens) {
    if (!mask) {
      runs.emplace_back(0, tokens);
      count = tokens;
      return;
    }
    const bool* attended = static_cast<const bool*>(mask->data_ptr()) + sample * tokens;
    for (int64_t n = 0; n < tokens; ++n) {
      if (!attended[n]) continue;
      const bool continues = n > 0 && attended[n - 1];
      if (!continues) runs.emplace_back(n, n);
      runs.back().second = n + 1;
      ++count;
    }
  }

  // their rows of a head, one after the other
  template <typename In, typename Acc>
  void gather(const In* from, int64_t from_row, int64_t width, Acc* to, int64_t to_row) const {
    for (const auto& [first, last] : runs) {
      run<Gather<In, Acc>>(from + first * from_row, from_row, last - first, width, to, to_row);
      to += (last - first) * to_row;
    }
  }

  // the way back, times a factor
  template <typename In, typename Acc>
  void scatter(const Acc* from, int64_t from_row, int64_t width, Acc factor, In* to,
               int64_t to_row) const {
    for (const auto& [first, last] : runs) {
      run<Scatter<In, Acc>>(from, from_row, last - first, width, static_cast<const Acc*>(&factor),
                            int64_t(0), to + first * to_row, to_row);
      from += (last - first) * from_row;
    }
  }
};

template <typename In, typename Acc>
void forward(const Selected& selected,
             const Tensor& qkv,  // (B, N, 3, H, K)
             Acc scale,
             Tensor& out,    // (B, N, L or H, K), contiguous
             Tensor* raw,    // (B, N, L, K), contiguous, before the gate; or none
             Tensor& lse) {  // (B, L, N), contiguous
  const int64_t batch = qkv.size(0), num_live = selected.heads.size(), num_out = out.size(2);
  const Head head = Head::of<Acc>(qkv.size(1), qkv.size(4));
  const In* from = static_cast<const In*>(qkv.data_ptr());
  In* to = static_cast<In*>(out.data_ptr());
  In* raw_to = raw ? static_cast<In*>(raw->data_ptr()) : nullptr;
  Acc* normalisers = static_cast<Acc*>(lse.data_ptr());
  const int64_t part = qkv.stride(2), token = qkv.stride(1);
  const int64_t row = head.dims_row, s_row = head.tokens_row;

  torch::stable::parallel_for(0, batch * num_live, 1, [&](int64_t begin, int64_t end) {
    Workspace<Acc> space(2 * head.rows * row + head.dims * s_row + kBlock * (row + s_row + 3) +
                         8 * kLanes<Acc>);
    Acc *q = space.take(head.rows * row), *v = space.take(head.rows * row);
    Acc* k_transposed = space.take(head.dims * s_row);
    Acc *s = space.take(kBlock * s_row), *o = space.take(kBlock * row);
    Acc *top = space.take(kBlock), *total = space.take(kBlock), *inverse = space.take(kBlock);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t b = task / num_live, slot = task % num_live, h = selected.heads[slot];
      const int64_t place = selected.compact ? slot : h;
      const Acc gate = selected.gate_of<Acc>(h);
      const Keys keys(selected.keys, b, head.tokens);
      const int64_t columns = round_up(keys.count, kLanes<Acc>);
      const In* q_in = from + b * qkv.stride(0) + h * qkv.stride(3);
      // v's place is free until k is transposed
      keys.gather(q_in + part, token, head.dims, v, row);
      run<Transpose<Acc>>(static_cast<const Acc*>(v), row, keys.count, head.dims, k_transposed,
                          s_row);
      run<Gather<In, Acc>>(q_in, token, head.tokens, head.dims, q, row);
      keys.gather(q_in + 2 * part, token, head.dims, v, row);
      for (int64_t first = 0; first < head.tokens; first += kBlock) {
        const int64_t rows = std::min(kBlock, head.tokens - first);
        const int64_t padded = round_up(rows, kRows);
        if (keys.count > 0) {
          run<Multiply<Acc>>(q + first * row, row, int64_t(1), k_transposed, s_row, s, s_row,
                             padded, columns, head.dims, false);
          run<Weigh<Acc>>(s, s_row, rows, keys.count, scale, top, total);
          run<Multiply<Acc>>(s, s_row, int64_t(1), v, row, o, row, padded, row, keys.count, false);
        } else {
          // without a key the output is 0, and so is every weight that backward computes again
          std::fill_n(o, kBlock * row, Acc(0));
          std::fill_n(top, kBlock, Acc(INFINITY));
          std::fill_n(total, kBlock, Acc(1));
        }
        for (int64_t r = 0; r < rows; ++r) {
          inverse[r] = 1 / total[r];
          normalisers[task * head.tokens + first + r] =
              static_cast<Acc>(top[r] + logarithm(total[r]));
        }
        if (raw_to) {
          run<Scatter<In, Acc>>(static_cast<const Acc*>(o), row, rows, head.dims,
                                static_cast<const Acc*>(inverse), int64_t(1),
                                raw_to + ((b * head.tokens + first) * num_live + slot) * head.dims,
                                num_live * head.dims);
        }
        for (int64_t r = 0; r < rows; ++r) inverse[r] *= gate;
        run<Scatter<In, Acc>>(static_cast<const Acc*>(o), row, rows, head.dims,
                              static_cast<const Acc*>(inverse), int64_t(1),
                              to + ((b * head.tokens + first) * num_out + place) * head.dims,
                              num_out * head.dims);
      }
    }
  });
}

// which results are asked for; the others are not written
struct Wanted {
  bool qkv, head, qk_dim, v_dim;
};

// Heads that are not selected, and keys, are not written: dqkv has to be 0 there.
template <typename In, typename Acc>
void backward(const Selected& selected, Wanted wanted,
              const Tensor& grad,  // (B, N, L or H, K)
              const Tensor& qkv,   // (B, N, 3, H, K)
              const Tensor& out,   // (B, N, L, K), before the gate
              const Tensor& lse,   // (B, L, N), contiguous
              Acc scale, bool per_token,
              Tensor& dqkv,      // (B, N, 3, H, K), contiguous
              Tensor& heads,     // (B, L)
              Tensor& qk_dims,   // (B, L, K)
              Tensor& v_dims) {  // (B, L, K)
  const int64_t batch = qkv.size(0), num_heads = qkv.size(3), num_live = selected.heads.size();
  const Head head = Head::of<Acc>(qkv.size(1), qkv.size(4));
  const In* from = static_cast<const In*>(qkv.data_ptr());
  const In* grad_from = static_cast<const In*>(grad.data_ptr());
  const In* out_from = static_cast<const In*>(out.data_ptr());
  const Acc* normalisers = static_cast<const Acc*>(lse.data_ptr());
  In* to = static_cast<In*>(dqkv.data_ptr());
  Acc* head_scores = static_cast<Acc*>(heads.data_ptr());
  Acc* qk_scores = static_cast<Acc*>(qk_dims.data_ptr());
  Acc* v_scores = static_cast<Acc*>(v_dims.data_ptr());
  const int64_t part = qkv.stride(2), token = qkv.stride(1);
  const int64_t row = head.dims_row, s_row = head.tokens_row;
  const int64_t to_part = num_heads * head.dims, to_token = 3 * to_part;
  const bool attends = wanted.qkv || wanted.qk_dim;

  torch::stable::parallel_for(0, batch * num_live, 1, [&](int64_t begin, int64_t end) {
    Workspace<Acc> space(6 * head.rows * row + 2 * head.dims * s_row +
                         kBlock * (2 * row + 2 * s_row + 1) + 3 * row + 16 * kLanes<Acc>);
    Acc *q = space.take(head.rows * row), *k = space.take(head.rows * row);
    Acc *v = space.take(head.rows * row), *dout = space.take(head.rows * row);
    Acc *dk = space.take(head.rows * row), *dv = space.take(head.rows * row);
    Acc* k_transposed = space.take(head.dims * s_row);
    Acc* v_transposed = space.take(head.dims * s_row);
    Acc *s = space.take(kBlock * s_row), *ds = space.take(kBlock * s_row);
    Acc *o = space.take(kBlock * row), *dq = space.take(kBlock * row);
    Acc* delta = space.take(kBlock);
    Acc *per_dim = space.take(row), *qk_score = space.take(row), *v_score = space.take(row);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t b = task / num_live, slot = task % num_live, h = selected.heads[slot];
      const Acc gate = selected.gate_of<Acc>(h), factor = scale * gate;
      const Keys keys(selected.keys, b, head.tokens);
      const int64_t columns = round_up(keys.count, kLanes<Acc>);
      const In* q_in = from + b * qkv.stride(0) + h * qkv.stride(3);
      const In* grad_in =
          grad_from + b * grad.stride(0) + (selected.compact ? slot : h) * grad.stride(2);
      const In* out_in = out_from + b * out.stride(0) + slot * out.stride(2);
      In* dq_out = to + b * head.tokens * to_token + h * head.dims;
      run<Gather<In, Acc>>(grad_in, grad.stride(1), head.tokens, head.dims, dout, row);
      if (attends) {
        run<Gather<In, Acc>>(q_in, token, head.tokens, head.dims, q, row);
        keys.gather(q_in + part, token, head.dims, k, row);
        keys.gather(q_in + 2 * part, token, head.dims, v, row);
        run<Transpose<Acc>>(static_cast<const Acc*>(k), row, keys.count, head.dims, k_transposed,
                            s_row);
        run<Transpose<Acc>>(static_cast<const Acc*>(v), row, keys.count, head.dims, v_transposed,
                            s_row);
      }
      Acc head_score = 0;
      std::fill_n(qk_score, row, Acc(0));
      std::fill_n(v_score, row, Acc(0));
      for (int64_t first = 0; first < head.tokens; first += kBlock) {
        const int64_t rows = std::min(kBlock, head.tokens - first);
        const int64_t padded = round_up(rows, kRows);
        const Acc *q_block = q + first * row, *dout_block = dout + first * row;
        run<Gather<In, Acc>>(out_in + first * out.stride(1), out.stride(1), rows, head.dims, o,
                             row);
        run<Score<Acc>>(static_cast<const Acc*>(o), dout_block, row, rows, row, per_token, v_score,
                        per_dim, delta);
        Acc block_score = 0;
        for (int64_t r = 0; r < rows; ++r) {
          block_score += per_token ? std::abs(delta[r]) : delta[r];
        }
        head_score += block_score;
        if (!attends || keys.count == 0) continue;
        run<Multiply<Acc>>(q_block, row, int64_t(1), static_cast<const Acc*>(k_transposed), s_row,
                           s, s_row, padded, columns, head.dims, false);
        run<Multiply<Acc>>(dout_block, row, int64_t(1), static_cast<const Acc*>(v_transposed),
                           s_row, ds, s_row, padded, columns, head.dims, false);
        run<Differentiate<Acc>>(s, ds, s_row, rows, columns, scale,
                                normalisers + task * head.tokens + first,
                                static_cast<const Acc*>(delta));
        run<Multiply<Acc>>(static_cast<const Acc*>(ds), s_row, int64_t(1),
                           static_cast<const Acc*>(k), row, dq, row, padded, row, keys.count,
                           false);
        if (wanted.qk_dim) {
          run<Score<Acc>>(q_block, static_cast<const Acc*>(dq), row, rows, row, per_token, qk_score,
                          per_dim, delta);
        }
        if (!wanted.qkv) continue;
        run<Scatter<In, Acc>>(static_cast<const Acc*>(dq), row, rows, head.dims, &factor,
                              int64_t(0), dq_out + first * to_token, to_token);
        run<Multiply<Acc>>(static_cast<const Acc*>(ds), int64_t(1), s_row, q_block, row, dk, row,
                           head.rows, row, rows, first > 0);
        run<Multiply<Acc>>(static_cast<const Acc*>(s), int64_t(1), s_row, dout_block, row, dv, row,
                           head.rows, row, rows, first > 0);
      }
      if (wanted.head) head_scores[task] = head_score;
      if (wanted.v_dim) std::copy_n(v_score, head.dims, v_scores + task * head.dims);
      for (int64_t d = 0; wanted.qk_dim && d < head.dims; ++d) {
        // q dq without the factor of dq, which is the same for every token
        qk_scores[task * head.dims + d] = qk_score[d] * (per_token ? std::abs(scale) : scale);
      }
      if (wanted.qkv) {
        keys.scatter(static_cast<const Acc*>(dk), row, head.dims, factor, dq_out + to_part,
                     to_token);
        keys.scatter(static_cast<const Acc*>(dv), row, head.dims, gate, dq_out + 2 * to_part,
                     to_token);
      }
    }
  });
}

void check_qkv(const char* op, const Tensor& qkv) {
  VP_CHECK(qkv.dim() == 5, op, "qkv_BN3HK", "have 5 dimensions", qkv.dim());
  VP_CHECK(qkv.size(2) == 3 && qkv.size(4) >= 1, op, "qkv_BN3HK",
           "have 3 parts (q, k, v) in dimension 2 and a head dim of at least 1", "others");
}

// What the arguments select, checked.
Selected selection(const char* op, const Tensor& qkv, const std::optional<Tensor>& gate,
                   const std::optional<Tensor>& mask, std::vector<int64_t> live, bool compact) {
  int64_t last = -1;
  for (const int64_t head : live) {
    VP_CHECK(last < head && head < qkv.size(3), op, "live_heads",
             "hold numbers of heads, each once, in ascending order", head);
    last = head;
  }
  Selected selected{std::move(live), std::nullopt, std::nullopt, compact};
  if (gate) {
    check_tensor(op, "gate_H", *gate, {qkv.size(3)}, wide_type(qkv));
    selected.gate = torch::stable::contiguous(*gate);
  }
  if (mask) {
    check_tensor(op, "key_mask_BN", *mask, {qkv.size(0), qkv.size(1)}, ScalarType::Bool);
    selected.keys = torch::stable::contiguous(*mask);
  }
  return selected;
}

// All heads and keys of qkv, without gates.
Selected all_heads(const Tensor& qkv) {
  Selected selected{{}, std::nullopt, std::nullopt, false};
  for (int64_t h = 0; h < qkv.size(3); ++h) selected.heads.push_back(h);
  return selected;
}

// an uninitialised tensor; without elements unless it is wanted
Tensor new_result(const Tensor& like, bool is_wanted, std::vector<int64_t> shape, ScalarType type) {
  if (!is_wanted) shape = {0};
  return torch::stable::new_empty(like, shape, type);
}

void fill_with_zeros(Tensor& x) {
  // no output has gaps
  std::memset(x.data_ptr(), 0, x.numel() * x.element_size());
}

// the output and the normalisers; `raw`, where it is given, is written too
std::tuple<Tensor, Tensor> run_forward(const char* op, const Selected& selected, Tensor qkv,
                                       double scale, Tensor* raw) {
  qkv = with_adjacent_columns(qkv);
  const int64_t batch = qkv.size(0), tokens = qkv.size(1), heads = qkv.size(3), dims = qkv.size(4);
  const int64_t live = selected.heads.size(), num_out = selected.compact ? live : heads;
  Tensor out = torch::stable::new_empty(qkv, {batch, tokens, num_out, dims});
  if (num_out > live) fill_with_zeros(out);
  Tensor lse = torch::stable::new_empty(qkv, {batch, live, tokens}, wide_type(qkv));
  for_dtype(op, "qkv_BN3HK", qkv, [&](auto in, auto acc) {
    forward<decltype(in), decltype(acc)>(selected, qkv, scale, out, raw, lse);
  });
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> run_backward(const char* op, const Selected& selected,
                                                        Wanted wanted, Tensor grad, Tensor qkv,
                                                        Tensor out, Tensor lse, double scale,
                                                        bool per_token) {
  const int64_t batch = qkv.size(0), tokens = qkv.size(1), heads = qkv.size(3), dims = qkv.size(4);
  const int64_t live = selected.heads.size(), num_out = selected.compact ? live : heads;
  const ScalarType type = qkv.scalar_type(), wide = wide_type(qkv);
  check_tensor(op, "grad_out_BNHK", grad, {batch, tokens, num_out, dims}, type);
  check_tensor(op, "out_BNLK", out, {batch, tokens, live, dims}, type);
  check_tensor(op, "lse_BLN", lse, {batch, live, tokens}, wide);
  grad = with_adjacent_columns(grad);
  qkv = with_adjacent_columns(qkv);
  out = with_adjacent_columns(out);
  lse = torch::stable::contiguous(lse);
  Tensor dqkv = new_result(qkv, wanted.qkv, {batch, tokens, 3, heads, dims}, type);
  if (selected.keys || live < heads) fill_with_zeros(dqkv);
  Tensor head = new_result(qkv, wanted.head, {batch, live}, wide);
  Tensor qk_dim = new_result(qkv, wanted.qk_dim, {batch, live, dims}, wide);
  Tensor v_dim = new_result(qkv, wanted.v_dim, {batch, live, dims}, wide);
  for_dtype(op, "qkv_BN3HK", qkv, [&](auto in, auto acc) {
    backward<decltype(in), decltype(acc)>(selected, wanted, grad, qkv, out, lse, scale, per_token,
                                          dqkv, head, qk_dim, v_dim);
  });
  return {dqkv, head, qk_dim, v_dim};
}

std::tuple<Tensor, Tensor> attention(Tensor qkv, double scale) {
  check_qkv("attention", qkv);
  return run_forward("attention", all_heads(qkv), qkv, scale, nullptr);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> attention_score(Tensor grad, Tensor qkv, Tensor out,
                                                           Tensor lse, double scale, bool per_token,
                                                           bool needs_qkv, bool needs_head,
                                                           bool needs_qk_dim, bool needs_v_dim) {
  check_qkv("attention_score", qkv);
  const Wanted wanted{needs_qkv, needs_head, needs_qk_dim, needs_v_dim};
  return run_backward("attention_score", all_heads(qkv), wanted, grad, qkv, out, lse, scale,
                      per_token);
}

constexpr const char* kGated = "gated_attention";

std::tuple<Tensor, Tensor, Tensor> gated_attention_fwd(Tensor qkv, std::optional<Tensor> gate,
                                                       std::optional<Tensor> mask,
                                                       std::vector<int64_t> live, double scale,
                                                       bool compact, bool needs_raw) {
  check_qkv(kGated, qkv);
  const Selected selected = selection(kGated, qkv, gate, mask, std::move(live), compact);
  const int64_t num_live = selected.heads.size();
  Tensor raw = new_result(qkv, needs_raw, {qkv.size(0), qkv.size(1), num_live, qkv.size(4)},
                          qkv.scalar_type());
  const auto [out, lse] = run_forward(kGated, selected, qkv, scale, needs_raw ? &raw : nullptr);
  return {out, raw, lse};
}

// out is the output before the gate, (B, N, L, K), or, without a gate, what forward returned
std::tuple<Tensor, Tensor> gated_attention_bwd(Tensor grad, Tensor qkv, std::optional<Tensor> gate,
                                               std::optional<Tensor> mask, Tensor out, Tensor lse,
                                               std::vector<int64_t> live, double scale,
                                               bool compact, bool raw, bool needs_qkv) {
  check_qkv(kGated, qkv);
  const Selected selected = selection(kGated, qkv, gate, mask, std::move(live), compact);
  const int64_t num_live = selected.heads.size();
  VP_CHECK(raw || (!gate && num_live == qkv.size(3)), kGated, "raw",
           "be True with gates or dead heads", "False");
  const auto [dqkv, heads, qk_dims, v_dims] = run_backward(
      kGated, selected, {needs_qkv, true, false, false}, grad, qkv, out, lse, scale, false);
  Tensor dgate = new_result(qkv, raw, {qkv.size(3)}, wide_type(qkv));
  fill_with_zeros(dgate);
  if (!raw) return {dqkv, dgate};
  for_dtype(kGated, "gate_H", dgate, [&, heads = heads](auto, auto zero) {
    using Acc = decltype(zero);
    const Acc* from = static_cast<const Acc*>(heads.data_ptr());
    Acc* to = static_cast<Acc*>(dgate.data_ptr());
    for (int64_t slot = 0; slot < num_live; ++slot) {
      double sum = 0;
      for (int64_t b = 0; b < heads.size(0); ++b) sum += from[b * num_live + slot];
      to[selected.heads[slot]] = static_cast<Acc>(sum);
    }
  });
  return {dqkv, dgate};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(vitprune_fast, CPU, m) {
  m.impl("attention", TORCH_BOX(&attention));
  m.impl("attention_score", TORCH_BOX(&attention_score));
  m.impl("gated_attention_fwd", TORCH_BOX(&gated_attention_fwd));
  m.impl("gated_attention_bwd", TORCH_BOX(&gated_attention_bwd));
}
