// resize_window: a window of a resized image, with the bits that Pillow gives.
//
// The bits are decided by what Pillow does when: the box is in single precision; every pixel of an
// axis has weights for the pixels it is made of, computed in double precision, divided by their sum
// and rounded to 22 bits behind the point; one axis is resized and rounded to eight bits, then the
// other. Only integers are summed, so the bits depend neither on lane nor on instruction set. The
// sums have 32 bits: 8 of a pixel and 22 of a weight leave a sign and a factor of two for weights
// that exceed one together, and those of these filters stay below 1.3.
//
// One thread: workers that load images run side by side already.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "cpu/isa.h"
#include "tensors.h"

namespace {

using namespace vitprune;
constexpr const char* kOp = "resize_window";

// of a weight, behind the point
constexpr int kWeightBits = 22;
// rows that are resized side by side
constexpr int64_t kRows = 16;

// a function of the distance, in pixels of the coarser of the two images
struct Filter {
  double support;
  double (*weight)(double x);
};

double bilinear(double x) {
  x = std::fabs(x);
  return x < 1 ? 1 - x : 0;
}

double bicubic(double x) {
  constexpr double a = -0.5;
  x = std::fabs(x);
  if (x < 1) return ((a + 2) * x - (a + 3)) * x * x + 1;
  return x < 2 ? (((x - 5) * x + 8) * x - 4) * a : 0;
}

double sinc(double x) {
  if (x == 0) return 1;
  x *= 3.14159265358979323846;
  return std::sin(x) / x;
}

double lanczos(double x) {
  return -3 <= x && x < 3 ? sinc(x) * sinc(x / 3) : 0;
}

Filter find_filter(const std::string& name) {
  if (name == "bilinear") return {1, bilinear};
  if (name == "bicubic") return {2, bicubic};
  VP_CHECK(name == "lanczos", kOp, "resampling", "be bilinear, bicubic or lanczos", name);
  return {3, lanczos};
}

// a pixel of the window along one axis: the pixels it is made of, and where their weights are
struct Taps {
  int64_t first, count, weights;
};

struct Axis {
  // every pixel is one of the image
  bool copied;
  std::vector<Taps> pixels;
  std::vector<int32_t> weights;

  // what is read of the image: neither end of the taps ever goes back, as every operation that
  // computes them is monotonic
  int64_t begin() const { return pixels.front().first; }
  int64_t extent() const { return pixels.back().first + pixels.back().count - begin(); }
  int64_t size() const { return static_cast<int64_t>(pixels.size()); }
};

Axis make_axis(const Filter& filter, int64_t size, float begin, float end, int64_t resized,
               int64_t window, int64_t window_size) {
  Axis axis;
  axis.copied = resized == size && begin == 0 && end == static_cast<double>(size);
  axis.pixels.reserve(window_size);
  if (axis.copied) {
    for (int64_t i = 0; i < window_size; ++i) axis.pixels.push_back({window + i, 1, 0});
    axis.weights = {1 << kWeightBits};
    return axis;
  }
  const double scale = static_cast<double>(end - begin) / static_cast<double>(resized);
  const double stretch = std::max(scale, 1.0);
  const double support = filter.support * stretch, shrink = 1 / stretch;
  std::vector<double> exact;
  for (int64_t i = window; i < window + window_size; ++i) {
    const double center = begin + (static_cast<double>(i) + 0.5) * scale;
    const int64_t first = std::max<int64_t>(0, static_cast<int64_t>(center - support + 0.5));
    const int64_t last = std::min(size, static_cast<int64_t>(center + support + 0.5));
    axis.pixels.push_back({first, last - first, static_cast<int64_t>(axis.weights.size())});
    exact.clear();
    double sum = 0;
    for (int64_t k = first; k < last; ++k) {
      exact.push_back(filter.weight((static_cast<double>(k) - center + 0.5) * shrink));
      sum += exact.back();
    }
    for (const double each : exact) {
      const double weight = each / sum * (1 << kWeightBits);
      axis.weights.push_back(static_cast<int32_t>(weight < 0 ? weight - 0.5 : weight + 0.5));
    }
  }
  return axis;
}

// out[i] = sum over t of weights[t] * in[t * stride + i], rounded and clipped. Loops over arrays:
// compilers turn them into better code than they make of vectors that change their width.
template <int kCount>
VP_INLINE void weigh(const uint8_t* in, int64_t stride, const Axis& axis, const Taps& taps,
                     uint8_t* out) {
  // without a sign, so that a sum is defined whatever it is
  uint32_t sums[kCount];
  for (int i = 0; i < kCount; ++i) sums[i] = 1u << (kWeightBits - 1);
  for (int64_t t = 0; t < taps.count; ++t, in += stride) {
    const auto weight = static_cast<uint32_t>(axis.weights[taps.weights + t]);
    for (int i = 0; i < kCount; ++i) sums[i] += in[i] * weight;
  }
  for (int i = 0; i < kCount; ++i) {
    const int32_t value = static_cast<int32_t>(sums[i]) >> kWeightBits;
    out[i] = static_cast<uint8_t>(std::min(std::max(value, 0), 255));
  }
}

// four bytes are one move, where three are two: what is too much is overwritten by the next pixel
template <int kChannels>
VP_INLINE void copy_pixel(uint8_t* to, const uint8_t* from, bool is_last) {
  if (kChannels == 3 && !is_last) {
    std::memcpy(to, from, 4);
  } else {
    std::memcpy(to, from, kChannels);
  }
}

// The rows of `source`, which begins at the first pixel that is read, resized to the window's
// width and put one after the other.
template <int kChannels>
struct ResizeRows {
  // `turned` has room for kRows rows, pixel by pixel: what a tap is multiplied with is adjacent
  template <int kBytes>
  static VP_INLINE void run(const uint8_t* source, int64_t stride, int64_t num_rows,
                            const Axis* axis, uint8_t* turned, uint8_t* target) {
    constexpr int64_t pixel = kRows * kChannels;
    const int64_t begin = axis->begin(), extent = axis->extent(), width = axis->size();
    for (int64_t y = 0; y < num_rows; y += kRows) {
      const int64_t count = std::min(kRows, num_rows - y);
      // the last row stands in for those that are not there
      const uint8_t* rows[kRows];
      for (int64_t r = 0; r < kRows; ++r) rows[r] = source + (y + std::min(r, count - 1)) * stride;
      for (int64_t x = 0; x < extent; ++x) {
        for (int64_t r = 0; r < kRows; ++r) {
          copy_pixel<kChannels>(turned + x * pixel + r * kChannels, rows[r] + x * kChannels,
                                x + 1 == extent);
        }
      }
      for (int64_t x = 0; x < width; ++x) {
        const Taps& taps = axis->pixels[x];
        uint8_t out[pixel + 1];
        weigh<pixel>(turned + (taps.first - begin) * pixel, pixel, *axis, taps, out);
        for (int64_t r = 0; r < count; ++r) {
          copy_pixel<kChannels>(target + ((y + r) * width + x) * kChannels, out + r * kChannels,
                                x + 1 == width);
        }
      }
    }
  }
};

// The columns of `source`, which begins at the first row that is read, resized to the window's
// height: rows of `width` bytes, put one after the other.
struct ResizeColumns {
  template <int kBytes>
  static VP_INLINE void run(const uint8_t* source, int64_t stride, const Axis* axis, int64_t width,
                            uint8_t* target) {
    for (const Taps& taps : axis->pixels) {
      const uint8_t* in = source + (taps.first - axis->begin()) * stride;
      if (width < kBytes) {
        for (int64_t x = 0; x < width; ++x) weigh<1>(in + x, stride, *axis, taps, target + x);
      } else {
        // the last bytes are computed twice where the count does not divide the width
        for (int64_t x = 0; x < width; x += kBytes) {
          const int64_t at = std::min(x, width - kBytes);
          weigh<kBytes>(in + at, stride, *axis, taps, target + at);
        }
      }
      target += width;
    }
  }
};

std::unique_ptr<uint8_t[]> room(int64_t bytes) {
  return std::unique_ptr<uint8_t[]>(new uint8_t[bytes]);
}

Tensor resize_window(Tensor pixels,                 // (H, W, C)
                     std::vector<double> box,       // left, top, right, bottom
                     std::vector<int64_t> resized,  // width, height
                     std::vector<int64_t> window,   // left, top, width, height
                     std::string resampling, bool columns_first) {
  VP_CHECK(pixels.dim() == 3 && pixels.scalar_type() == ScalarType::Byte && pixels.is_contiguous(),
           kOp, "pixels", "be a contiguous uint8 tensor of 3 dimensions", "another tensor");
  const int64_t sizes[] = {pixels.size(1), pixels.size(0)}, channels = pixels.size(2);
  VP_CHECK(channels == 1 || channels == 3, kOp, "pixels", "have 1 or 3 channels", channels);
  VP_CHECK(box.size() == 4, kOp, "box", "have 4 numbers", box.size());
  VP_CHECK(resized.size() == 2, kOp, "resized", "have 2 numbers", resized.size());
  VP_CHECK(window.size() == 4, kOp, "window", "have 4 numbers", window.size());
  const Filter filter = find_filter(resampling);
  Axis axes[2];
  for (int i = 0; i < 2; ++i) {
    const auto begin = static_cast<float>(box[i]), end = static_cast<float>(box[i + 2]);
    VP_CHECK(0 <= begin && begin < end && end <= static_cast<double>(sizes[i]), kOp, "box",
             "lie inside the image", std::to_string(begin) + " to " + std::to_string(end));
    VP_CHECK(resized[i] >= 1 && resized[i] <= INT32_MAX, kOp, "resized", "be from 1 to 2147483647",
             resized[i]);
    VP_CHECK(window[i] >= 0 && window[i + 2] >= 1 && window[i + 2] <= resized[i] &&
                 window[i] <= resized[i] - window[i + 2],
             kOp, "window", "lie inside what the box is resized to",
             std::to_string(window[i + 2]) + " pixels from " + std::to_string(window[i]));
    axes[i] = make_axis(filter, sizes[i], begin, end, resized[i], window[i], window[i + 2]);
  }
  const Axis &x = axes[0], &y = axes[1];
  const int64_t width = x.size() * channels, height = y.size(), stride = sizes[0] * channels;
  const auto resize_rows = [&](const uint8_t* source, int64_t stride, int64_t num_rows,
                               uint8_t* target) {
    const auto turned = room(x.extent() * kRows * channels);
    if (channels == 3) {
      run<ResizeRows<3>>(source, stride, num_rows, &x, turned.get(), target);
    } else {
      run<ResizeRows<1>>(source, stride, num_rows, &x, turned.get(), target);
    }
  };
  const auto resize_columns = [&](const uint8_t* source, int64_t stride, int64_t width,
                                  uint8_t* target) {
    run<ResizeColumns>(source, stride, &y, width, target);
  };
  Tensor result = torch::stable::new_empty(pixels, {height, x.size(), channels});
  auto* out = static_cast<uint8_t*>(result.data_ptr());
  const auto* source =
      static_cast<const uint8_t*>(pixels.data_ptr()) + y.begin() * stride + x.begin() * channels;
  if (y.copied) {
    resize_rows(source, stride, height, out);
  } else if (x.copied) {
    resize_columns(source, stride, width, out);
  } else if (columns_first) {
    const int64_t read = x.extent() * channels;
    const auto between = room(height * read);
    resize_columns(source, stride, read, between.get());
    resize_rows(between.get(), read, height, out);
  } else {
    const auto between = room(y.extent() * width);
    resize_rows(source, stride, y.extent(), between.get());
    resize_columns(between.get(), width, width, out);
  }
  return result;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(vitprune_fast, m) {
  m.def(
      "resize_window(Tensor pixels, float[] box, int[] resized, int[] window, str resampling, "
      "bool columns_first) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(vitprune_fast, CPU, m) {
  m.impl("resize_window", TORCH_BOX(&resize_window));
}
