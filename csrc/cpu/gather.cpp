// gather on the CPU: out[i, j] = source[rows[i], columns[j]], an index of -1 gives zeros.
//
// R source rows, C source columns. Elements are moved as bytes of their size, so every dtype has
// the same code. How a row is copied is decided once per call from the column indices:
//   all        every column: one memcpy
//   runs       long runs of neighbours (heads): one memcpy per run
//   compress   ascending indices (neurons): AVX-512 reads the whole row and packs what is kept
//   indexed    anything else, element by element
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <optional>
#include <string>
#include <vector>

#include "checks.h"
#include "cpu/isa.h"

#if VP_X86
#include <immintrin.h>
#endif

namespace {

using torch::stable::Tensor;
using vitprune::Isa;

constexpr int64_t kRunBytes = 128;             // shorter runs are cheaper one element at a time
constexpr int64_t kBytesPerTask = 128 * 1024;  // below this a second thread costs more than it does

struct Run {
  int64_t source;  // first source column, -1 for zeros
  int64_t length;
};

// what copies one row; the same for every row of a call
struct ColumnPlan {
  int64_t source_count = 0;
  int64_t count = 0;
  const int64_t* index = nullptr;  // (count)
  std::vector<Run> runs;
  std::vector<uint8_t> kept;  // one bit per source column, padded to whole vectors
  int64_t kept_count = 0;     // the zeros that follow are count - kept_count
};

using CopyRow = void (*)(const char* source, char* target, const ColumnPlan& plan);

std::vector<Run> find_runs(const int64_t* index, int64_t count) {
  std::vector<Run> runs;
  for (int64_t j = 0; j < count; ++j) {
    const bool zero = index[j] < 0;
    if (!runs.empty()) {
      Run& last = runs.back();
      if (zero ? last.source < 0 : last.source >= 0 && index[j] == last.source + last.length) {
        ++last.length;
        continue;
      }
    }
    runs.push_back({zero ? -1 : index[j], 1});
  }
  return runs;
}

// strictly ascending, with zeros only at the end
bool is_ascending(const int64_t* index, int64_t count, int64_t* kept_count) {
  int64_t kept = 0;
  while (kept < count && index[kept] >= 0 && (kept == 0 || index[kept] > index[kept - 1])) ++kept;
  *kept_count = kept;
  return std::all_of(index + kept, index + count, [](int64_t i) { return i < 0; });
}

struct Bytes16 {
  uint64_t low, high;
};

template <typename T>
void copy_all(const char* source, char* target, const ColumnPlan& plan) {
  std::memcpy(target, source, plan.count * sizeof(T));
}

template <typename T>
void copy_runs(const char* source, char* target, const ColumnPlan& plan) {
  for (const Run& run : plan.runs) {
    const size_t bytes = run.length * sizeof(T);
    if (run.source < 0) {
      std::memset(target, 0, bytes);
    } else {
      std::memcpy(target, source + run.source * sizeof(T), bytes);
    }
    target += bytes;
  }
}

template <typename T>
void copy_indexed(const char* source, char* target, const ColumnPlan& plan) {
  const T* from = reinterpret_cast<const T*>(source);
  T* to = reinterpret_cast<T*>(target);
  for (int64_t j = 0; j < plan.count; ++j) to[j] = plan.index[j] < 0 ? T{} : from[plan.index[j]];
}

#if VP_X86
template <typename Mask>
VP_INLINE Mask first_lanes(int64_t count) {
  return static_cast<Mask>(count >= 64 ? ~uint64_t{0} : (uint64_t{1} << count) - 1);
}

// pack keeps the lanes of `mask`, load and store touch only theirs
#define VP_LANES(T, FEATURES, MASK, SUFFIX)                                    \
  VP_TARGET(FEATURES) VP_INLINE __m512i load(const T* p, MASK mask) {          \
    return _mm512_maskz_loadu_##SUFFIX(mask, p);                               \
  }                                                                            \
  VP_TARGET(FEATURES) VP_INLINE void store(T* p, MASK mask, __m512i v) {       \
    _mm512_mask_storeu_##SUFFIX(p, mask, v);                                   \
  }                                                                            \
  VP_TARGET(FEATURES) VP_INLINE __m512i pack(const T*, MASK mask, __m512i v) { \
    return _mm512_maskz_compress_##SUFFIX(mask, v);                            \
  }
VP_LANES(uint8_t, VP_AVX512_VBMI2, __mmask64, epi8)
VP_LANES(uint16_t, VP_AVX512_VBMI2, __mmask32, epi16)
VP_LANES(uint32_t, VP_AVX512, __mmask16, epi32)
VP_LANES(uint64_t, VP_AVX512, __mmask8, epi64)
#undef VP_LANES

#define VP_COPY_COMPRESS(NAME, T, FEATURES, MASK)                                           \
  VP_TARGET(FEATURES) void NAME(const char* source, char* target, const ColumnPlan& plan) { \
    constexpr int64_t lanes = 64 / sizeof(T);                                               \
    const uint8_t* kept_bits = plan.kept.data();                                            \
    const T* from = reinterpret_cast<const T*>(source);                                     \
    const T* const from_end = from + plan.source_count;                                     \
    T* to = reinterpret_cast<T*>(target);                                                   \
    T* const end = to + plan.count;                                                         \
    /* whole vectors in and out; what a store writes too much is overwritten by the next */ \
    for (; from_end - from >= lanes && end - to >= lanes; from += lanes) {                  \
      MASK kept;                                                                            \
      std::memcpy(&kept, kept_bits, sizeof kept);                                           \
      kept_bits += sizeof kept;                                                             \
      _mm512_storeu_si512(to, pack(from, kept, _mm512_loadu_si512(from)));                  \
      to += __builtin_popcountll(kept);                                                     \
    }                                                                                       \
    for (; from < from_end; from += lanes) {                                                \
      MASK kept;                                                                            \
      std::memcpy(&kept, kept_bits, sizeof kept);                                           \
      kept_bits += sizeof kept;                                                             \
      const int64_t n = __builtin_popcountll(kept);                                         \
      store(to, first_lanes<MASK>(n), pack(from, kept, load(from, kept)));                  \
      to += n;                                                                              \
    }                                                                                       \
    std::memset(to, 0, reinterpret_cast<char*>(end) - reinterpret_cast<char*>(to));         \
  }
VP_COPY_COMPRESS(copy_compress8, uint8_t, VP_AVX512_VBMI2, __mmask64)
VP_COPY_COMPRESS(copy_compress16, uint16_t, VP_AVX512_VBMI2, __mmask32)
VP_COPY_COMPRESS(copy_compress32, uint32_t, VP_AVX512, __mmask16)
VP_COPY_COMPRESS(copy_compress64, uint64_t, VP_AVX512, __mmask8)
#undef VP_COPY_COMPRESS
#endif

// nullptr where this processor has no such instruction for elements of this size
template <typename T>
CopyRow choose_compress() {
#if VP_X86
  if constexpr (sizeof(T) <= 2) {
    if (vitprune::isa() >= Isa::kAvx512Vbmi2) {
      return sizeof(T) == 1 ? copy_compress8 : copy_compress16;
    }
  } else if constexpr (sizeof(T) <= 8) {
    if (vitprune::isa() >= Isa::kAvx512) {
      return sizeof(T) == 4 ? copy_compress32 : copy_compress64;
    }
  }
#endif
  return nullptr;
}

template <typename T>
CopyRow plan_columns(ColumnPlan& plan) {
  if (!plan.index) return copy_all<T>;
  plan.runs = find_runs(plan.index, plan.count);
  const int64_t run_count = static_cast<int64_t>(plan.runs.size());
  if (plan.count * static_cast<int64_t>(sizeof(T)) >= kRunBytes * run_count) return copy_runs<T>;
  const CopyRow compress = choose_compress<T>();
  if (!compress || !is_ascending(plan.index, plan.count, &plan.kept_count)) return copy_indexed<T>;
  plan.kept.assign((plan.source_count + 63) / 64 * 8, 0);
  for (int64_t j = 0; j < plan.kept_count; ++j) {
    plan.kept[plan.index[j] / 8] |= static_cast<uint8_t>(1u << plan.index[j] % 8);
  }
  return compress;
}

template <typename T>
void gather_rows(const Tensor& source,  // (R, C), columns adjacent
                 const int64_t* rows,   // (out rows) or nullptr for all
                 ColumnPlan& plan,
                 Tensor& out) {  // (out rows, plan.count)
  const int64_t num_rows = out.size(0);
  if (num_rows == 0 || plan.count == 0) return;
  const CopyRow copy_row = plan_columns<T>(plan);
  const char* from = static_cast<const char*>(source.data_ptr());
  char* to = static_cast<char*>(out.data_ptr());
  const int64_t from_stride = source.stride(0) * static_cast<int64_t>(sizeof(T));
  const int64_t to_stride = plan.count * static_cast<int64_t>(sizeof(T));
  // rows that lie next to each other on both sides are one long copy
  const bool adjacent = !plan.index && from_stride == to_stride;
  const int64_t grain = std::max<int64_t>(1, kBytesPerTask / to_stride);
  torch::stable::parallel_for(0, num_rows, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end;) {
      const int64_t row = rows ? rows[i] : i;
      int64_t next = i + 1;
      if (row < 0) {
        std::memset(to + i * to_stride, 0, to_stride);
      } else if (adjacent) {
        // up to a limit: memcpy bypasses the caches when it is given many megabytes
        while (next < end && (rows ? rows[next] : next) == row + next - i &&
               (next - i) * to_stride < kBytesPerTask) {
          ++next;
        }
        std::memcpy(to + i * to_stride, from + row * from_stride, (next - i) * to_stride);
      } else {
        copy_row(from + row * from_stride, to + i * to_stride, plan);
      }
      i = next;
    }
  });
}

// a contiguous 1-D int64 index whose values lie in [-1, size)
Tensor checked_index(const Tensor& index, const char* name, int64_t size) {
  VP_CHECK(index.dim() == 1 && index.scalar_type() == torch::headeronly::ScalarType::Long &&
               index.is_cpu(),
           "gather", name, "be a 1-D int64 tensor on the device of source_RC", "another tensor");
  Tensor adjacent = torch::stable::contiguous(index);
  const int64_t* values = static_cast<const int64_t*>(adjacent.data_ptr());
  const int64_t count = adjacent.numel();
  for (int64_t i = 0; i < count; ++i) {
    VP_CHECK(values[i] >= -1 && values[i] < size, "gather", name,
             "hold numbers from -1 to " + std::to_string(size - 1), values[i]);
  }
  return adjacent;
}

Tensor gather(Tensor source, std::optional<Tensor> rows, std::optional<Tensor> columns) {
  VP_CHECK(source.dim() == 2, "gather", "source_RC", "have 2 dimensions", source.dim());
  ColumnPlan plan;
  plan.source_count = plan.count = source.size(1);
  int64_t num_rows = source.size(0);
  const int64_t* row_index = nullptr;
  if (rows) {
    rows = checked_index(*rows, "rows", source.size(0));
    row_index = static_cast<const int64_t*>(rows->data_ptr());
    num_rows = rows->numel();
  }
  if (columns) {
    columns = checked_index(*columns, "columns", source.size(1));
    plan.index = static_cast<const int64_t*>(columns->data_ptr());
    plan.count = columns->numel();
  }
  if (source.size(1) > 1 && source.stride(1) != 1) source = torch::stable::contiguous(source);
  Tensor out = torch::stable::new_empty(source, {num_rows, plan.count});
  switch (source.element_size()) {
    case 1:
      gather_rows<uint8_t>(source, row_index, plan, out);
      break;
    case 2:
      gather_rows<uint16_t>(source, row_index, plan, out);
      break;
    case 4:
      gather_rows<uint32_t>(source, row_index, plan, out);
      break;
    case 8:
      gather_rows<uint64_t>(source, row_index, plan, out);
      break;
    case 16:
      gather_rows<Bytes16>(source, row_index, plan, out);
      break;
    default:
      VP_CHECK(false, "gather", "source_RC", "have elements of 1, 2, 4, 8 or 16 bytes",
               source.element_size());
  }
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(vitprune_fast, CPU, m) {
  m.impl("gather", TORCH_BOX(&gather));
}
