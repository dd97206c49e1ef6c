// gather_all on the CPU: out[i, j] = source[rows[i], columns[j]], an index of -1 gives zeros. Any
// number of matrices in one call, by a table that is made once (gather_table.h).
//
// Elements are moved as bytes of their size, so every dtype has the same code; where the target is
// of another dtype, a row is converted after it was picked. How rows are copied follows from the
// columns:
//   all        every column: one memcpy
//   runs       long runs of neighbours (heads): one memcpy per run
//   compress   ascending columns (neurons): AVX-512 reads the whole row and packs what is kept
//   expand     the way back of compress: zeros between
//   indexed    anything else, element by element
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "cpu/isa.h"
#include "cpu/lanes.h"
#include "gather_checks.h"
#include "gather_table.h"

#if VP_X86
#include <immintrin.h>
#endif

namespace {

using namespace vitprune;

constexpr int64_t kRunBytes = 128;             // shorter runs are cheaper one element at a time
constexpr int64_t kBytesPerTask = 128 * 1024;  // below this a second thread costs more than it does

// the columns of a matrix, and of what comes out of it
struct Columns {
  int64_t source_count, count;
  const int32_t* index;
  const GatherRun* runs;
  int64_t num_runs;
  const uint8_t* kept;    // one bit per source column
  const uint8_t* filled;  // one bit per column
};

using CopyRow = void (*)(const char* source, char* target, const Columns& columns);

struct Bytes16 {
  uint64_t low, high;
};

template <typename T>
void copy_all(const char* source, char* target, const Columns& columns) {
  std::memcpy(target, source, columns.count * sizeof(T));
}

template <typename T>
void copy_runs(const char* source, char* target, const Columns& columns) {
  for (int64_t r = 0; r < columns.num_runs; ++r) {
    const GatherRun& run = columns.runs[r];
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
void copy_indexed(const char* source, char* target, const Columns& columns) {
  const T* from = reinterpret_cast<const T*>(source);
  T* to = reinterpret_cast<T*>(target);
  for (int64_t j = 0; j < columns.count; ++j) {
    to[j] = columns.index[j] < 0 ? T{} : from[columns.index[j]];
  }
}

#if VP_X86
template <typename Mask>
VP_INLINE Mask first_lanes(int64_t count) {
  return static_cast<Mask>(count >= 64 ? ~uint64_t{0} : (uint64_t{1} << count) - 1);
}

// load and store touch only the lanes of `mask`; pack moves them to the front, unpack back
#define VP_LANES(T, FEATURES, MASK, SUFFIX)                                      \
  VP_TARGET(FEATURES) VP_INLINE __m512i load(const T* p, MASK mask) {            \
    return _mm512_maskz_loadu_##SUFFIX(mask, p);                                 \
  }                                                                              \
  VP_TARGET(FEATURES) VP_INLINE void store(T* p, MASK mask, __m512i v) {         \
    _mm512_mask_storeu_##SUFFIX(p, mask, v);                                     \
  }                                                                              \
  VP_TARGET(FEATURES) VP_INLINE __m512i pack(const T*, MASK mask, __m512i v) {   \
    return _mm512_maskz_compress_##SUFFIX(mask, v);                              \
  }                                                                              \
  VP_TARGET(FEATURES) VP_INLINE __m512i unpack(const T*, MASK mask, __m512i v) { \
    return _mm512_maskz_expand_##SUFFIX(mask, v);                                \
  }
VP_LANES(uint8_t, VP_AVX512_VBMI2, __mmask64, epi8)
VP_LANES(uint16_t, VP_AVX512_VBMI2, __mmask32, epi16)
VP_LANES(uint32_t, VP_AVX512, __mmask16, epi32)
VP_LANES(uint64_t, VP_AVX512, __mmask8, epi64)
#undef VP_LANES

#define VP_COPY_COMPRESS(SIZE, T, FEATURES, MASK)                                           \
  VP_TARGET(FEATURES)                                                                       \
  void copy_compress##SIZE(const char* source, char* target, const Columns& columns) {      \
    constexpr int64_t lanes = 64 / sizeof(T);                                               \
    const uint8_t* bits = columns.kept;                                                     \
    const T* from = reinterpret_cast<const T*>(source);                                     \
    const T* const from_end = from + columns.source_count;                                  \
    T* to = reinterpret_cast<T*>(target);                                                   \
    T* const end = to + columns.count;                                                      \
    MASK mask;                                                                              \
    /* whole vectors in and out; what a store writes too much is overwritten by the next */ \
    for (; from_end - from >= lanes && end - to >= lanes; from += lanes) {                  \
      std::memcpy(&mask, bits, sizeof mask);                                                \
      bits += sizeof mask;                                                                  \
      _mm512_storeu_si512(to, pack(from, mask, _mm512_loadu_si512(from)));                  \
      to += __builtin_popcountll(mask);                                                     \
    }                                                                                       \
    for (; from < from_end; from += lanes) {                                                \
      std::memcpy(&mask, bits, sizeof mask);                                                \
      bits += sizeof mask;                                                                  \
      const int64_t n = __builtin_popcountll(mask);                                         \
      store(to, first_lanes<MASK>(n), pack(from, mask, load(from, mask)));                  \
      to += n;                                                                              \
    }                                                                                       \
    std::memset(to, 0, reinterpret_cast<char*>(end) - reinterpret_cast<char*>(to));         \
  }                                                                                         \
  VP_TARGET(FEATURES)                                                                       \
  void copy_expand##SIZE(const char* source, char* target, const Columns& columns) {        \
    constexpr int64_t lanes = 64 / sizeof(T);                                               \
    const uint8_t* bits = columns.filled;                                                   \
    const T* from = reinterpret_cast<const T*>(source);                                     \
    T* to = reinterpret_cast<T*>(target);                                                   \
    T* const end = to + columns.count;                                                      \
    MASK mask;                                                                              \
    for (; to < end; to += lanes) {                                                         \
      std::memcpy(&mask, bits, sizeof mask);                                                \
      bits += sizeof mask;                                                                  \
      const int64_t n = __builtin_popcountll(mask);                                         \
      store(to, first_lanes<MASK>(end - to),                                                \
            unpack(from, mask, load(from, first_lanes<MASK>(n))));                          \
      from += n;                                                                            \
    }                                                                                       \
  }
VP_COPY_COMPRESS(8, uint8_t, VP_AVX512_VBMI2, __mmask64)
VP_COPY_COMPRESS(16, uint16_t, VP_AVX512_VBMI2, __mmask32)
VP_COPY_COMPRESS(32, uint32_t, VP_AVX512, __mmask16)
VP_COPY_COMPRESS(64, uint64_t, VP_AVX512, __mmask8)
#undef VP_COPY_COMPRESS
#endif

// whether this processor packs elements of this size
template <typename T>
bool can_pack() {
#if VP_X86
  if constexpr (sizeof(T) <= 8) {
    return isa() >= (sizeof(T) <= 2 ? Isa::kAvx512Vbmi2 : Isa::kAvx512);
  }
#endif
  return false;
}

template <typename T>
CopyRow choose_copy(const Columns& columns) {
  if (!columns.index) return copy_all<T>;
  if (columns.count * static_cast<int64_t>(sizeof(T)) >= kRunBytes * columns.num_runs) {
    return copy_runs<T>;
  }
#if VP_X86
  if (can_pack<T>() && columns.kept) {
    if constexpr (sizeof(T) == 1) return copy_compress8;
    if constexpr (sizeof(T) == 2) return copy_compress16;
    if constexpr (sizeof(T) == 4) return copy_compress32;
    if constexpr (sizeof(T) == 8) return copy_compress64;
  }
  if (can_pack<T>() && columns.filled) {
    if constexpr (sizeof(T) == 1) return copy_expand8;
    if constexpr (sizeof(T) == 2) return copy_expand16;
    if constexpr (sizeof(T) == 4) return copy_expand32;
    if constexpr (sizeof(T) == 8) return copy_expand64;
  }
#endif
  return copy_indexed<T>;
}

CopyRow choose_copy(const Columns& columns, int64_t element_size) {
  switch (element_size) {
    case 1:
      return choose_copy<uint8_t>(columns);
    case 2:
      return choose_copy<uint16_t>(columns);
    case 4:
      return choose_copy<uint32_t>(columns);
    case 8:
      return choose_copy<uint64_t>(columns);
    default:
      return choose_copy<Bytes16>(columns);
  }
}

using Convert = void (*)(const char* source, char* target, int64_t count);

template <typename From, typename To>
struct ConvertRow {
  template <int kBytes>
  static VP_INLINE void run(const char* source, char* target, int64_t count) {
    const From* from = reinterpret_cast<const From*>(source);
    To* to = reinterpret_cast<To*>(target);
    constexpr int64_t lanes = kLanes<float>;
    int64_t j = 0;
    for (; j + lanes <= count; j += lanes) store_lanes(to + j, load_lanes(from + j));
    if (j < count) store_first(to + j, load_first(from + j, count - j), count - j);
  }
};

Convert choose_convert(Cast cast) {
  switch (cast) {
    case Cast::kFloatToBFloat16:
      return run<ConvertRow<float, BFloat16>>;
    case Cast::kFloatToHalf:
      return run<ConvertRow<float, Half>>;
    case Cast::kBFloat16ToFloat:
      return run<ConvertRow<BFloat16, float>>;
    case Cast::kHalfToFloat:
      return run<ConvertRow<Half, float>>;
    default:
      return nullptr;
  }
}

// one matrix and what becomes of it
struct Move {
  const char* source;
  char* target;
  int64_t source_stride, target_stride;  // bytes from row to row
  int64_t num_rows;
  const int32_t* rows;  // nullptr for all
  Columns columns;
  CopyRow copy_row;
  Convert convert;     // nullptr where the dtype stays
  int64_t picked;      // bytes of a row before it is converted
  int64_t first_task;  // of the whole call
  int64_t rows_per_task;
};

Move make_move(const GatherTableView& table, const GatherEntry& entry, const Tensor& source,
               Tensor& target) {
  const auto size = static_cast<int64_t>(source.element_size());
  Move move{};
  move.source = static_cast<const char*>(source.data_ptr());
  move.target = static_cast<char*>(target.data_ptr());
  move.source_stride = source.stride(0) * size;
  move.target_stride = entry.columns * static_cast<int64_t>(target.element_size());
  move.num_rows = entry.columns ? entry.rows : 0;
  move.rows = table.at(entry.row_index);
  move.columns = {entry.source_columns,
                  entry.columns,
                  table.at(entry.column_index),
                  reinterpret_cast<const GatherRun*>(table.at(entry.runs)),
                  entry.num_runs,
                  reinterpret_cast<const uint8_t*>(table.at(entry.kept_bits)),
                  reinterpret_cast<const uint8_t*>(table.at(entry.filled_bits))};
  move.copy_row = choose_copy(move.columns, size);
  move.convert = choose_convert(cast_between(source.scalar_type(), target.scalar_type()));
  move.picked = entry.columns * size;
  move.rows_per_task =
      std::max<int64_t>(1, kBytesPerTask / std::max<int64_t>(1, move.target_stride));
  return move;
}

// rows begin .. end - 1 of one matrix
void move_rows(const Move& move, int64_t begin, int64_t end, std::vector<char>& buffer) {
  const int64_t stride = move.target_stride;
  // rows that lie next to each other on both sides are one long copy
  const bool adjacent = !move.columns.index && !move.convert && move.source_stride == stride;
  for (int64_t i = begin; i < end;) {
    const int64_t row = move.rows ? move.rows[i] : i;
    char* const target = move.target + i * stride;
    int64_t next = i + 1;
    if (row < 0) {
      std::memset(target, 0, stride);
    } else if (adjacent) {
      while (next < end && (move.rows ? move.rows[next] : next) == row + next - i) ++next;
      std::memcpy(target, move.source + row * move.source_stride, (next - i) * stride);
    } else if (!move.convert) {
      move.copy_row(move.source + row * move.source_stride, target, move.columns);
    } else {
      const char* picked = move.source + row * move.source_stride;
      if (move.columns.index) {
        buffer.resize(move.picked);
        move.copy_row(picked, buffer.data(), move.columns);
        picked = buffer.data();
      }
      move.convert(picked, target, move.columns.count);
    }
    i = next;
  }
}

void move_all(std::vector<Move>& moves) {
  int64_t num_tasks = 0;
  for (Move& move : moves) {
    move.first_task = num_tasks;
    num_tasks += (move.num_rows + move.rows_per_task - 1) / move.rows_per_task;
  }
  torch::stable::parallel_for(0, num_tasks, 1, [&](int64_t begin, int64_t end) {
    std::vector<char> buffer;
    const auto after = [](int64_t task, const Move& move) { return task < move.first_task; };
    auto move = std::upper_bound(moves.begin(), moves.end(), begin, after) - 1;
    for (int64_t task = begin; task < end; ++task) {
      while (move + 1 != moves.end() && (move + 1)->first_task <= task) ++move;
      const int64_t row = (task - move->first_task) * move->rows_per_task;
      move_rows(*move, row, std::min(move->num_rows, row + move->rows_per_task), buffer);
    }
  });
}

void gather_all(std::vector<Tensor> sources, std::vector<Tensor> targets,
                std::vector<int64_t> entries, Tensor table, Tensor) {
  check_table(table);
  const GatherTableView view(static_cast<const int32_t*>(table.data_ptr()));
  check_matrices(view, sources, targets, entries, false);
  std::vector<Move> moves;
  moves.reserve(sources.size());
  for (size_t i = 0; i < sources.size(); ++i) {
    moves.push_back(make_move(view, view.entry(entries[i]), sources[i], targets[i]));
  }
  if (!moves.empty()) move_all(moves);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(vitprune_fast, CPU, m) {
  m.impl("gather_all", TORCH_BOX(&gather_all));
}
