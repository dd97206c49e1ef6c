// One tile of a gather on the GPU: some rows of one matrix, by the threads of one block.
//
// Written so that a compiler without CUDA takes it too: a test runs every thread of a tile in turn,
// which finds what a machine without a GPU can find. What needs all threads before the next step is
// in two functions, with a barrier between them.
//
//   direct   groups of neighbouring columns of whole vectors (rows, heads): vector in, vector out
//   staged   single columns (neurons): rows are read whole into shared memory, since half of the
//            columns touches nearly every sector of a row anyway, and vectors are picked from there
#pragma once
#include <cstdint>

#include "gather_table.h"

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define VP_DEVICE __device__ __forceinline__
#else
#define VP_DEVICE inline
#endif

namespace vitprune {

// conversions on the way
enum class Cast : int32_t { kNone, kFloatToBFloat16, kFloatToHalf, kBFloat16ToFloat, kHalfToFloat };

// One matrix of a call. All of them are a kernel parameter, where they fit.
struct GatherMove {
  const char* source;
  char* target;
  int64_t source_stride;  // bytes from row to row
  int32_t entry;          // word of the table where it lies
  int32_t rows_per_tile;
  int32_t first_tile;
  Cast cast;
  int8_t element, result;  // bytes
  int8_t load, store;      // bytes that are read and written at a time
  int8_t staged;           // whether rows go through shared memory
};

struct alignas(16) Bytes16 {
  uint32_t word[4];
};

// what one thread needs to know of its block
struct Lane {
  int32_t thread, threads;
};

#if defined(__CUDACC__)
// read and written once: neither stays in the caches
VP_DEVICE Bytes16 load_once(const Bytes16* p) {
  const int4 v = __ldcs(reinterpret_cast<const int4*>(p));
  return *reinterpret_cast<const Bytes16*>(&v);
}
VP_DEVICE void store_once(Bytes16* p, const Bytes16& v) {
  __stcs(reinterpret_cast<int4*>(p), *reinterpret_cast<const int4*>(&v));
}
template <typename T>
VP_DEVICE T load_once(const T* p) {
  return __ldcs(p);
}
template <typename T>
VP_DEVICE void store_once(T* p, T v) {
  __stcs(p, v);
}
VP_DEVICE uint16_t to_bfloat16(uint32_t bits) {
  return __bfloat16_as_ushort(__float2bfloat16_rn(__uint_as_float(bits)));
}
VP_DEVICE uint16_t to_half(uint32_t bits) {
  return __half_as_ushort(__float2half_rn(__uint_as_float(bits)));
}
VP_DEVICE uint32_t from_half(uint16_t bits) {
  return __float_as_uint(__half2float(__ushort_as_half(bits)));
}
#else
template <typename T>
VP_DEVICE T load_once(const T* p) {
  return *p;
}
template <typename T>
VP_DEVICE void store_once(T* p, const T& v) {
  *p = v;
}
// given by whoever runs the tiles without a GPU
uint16_t to_bfloat16(uint32_t bits);
uint16_t to_half(uint32_t bits);
uint32_t from_half(uint16_t bits);
#endif

template <Cast kCast, typename To, typename From>
VP_DEVICE To converted(From value) {
  if constexpr (kCast == Cast::kFloatToBFloat16) return to_bfloat16(value);
  if constexpr (kCast == Cast::kFloatToHalf) return to_half(value);
  if constexpr (kCast == Cast::kBFloat16ToFloat) return static_cast<uint32_t>(value) << 16;
  if constexpr (kCast == Cast::kHalfToFloat) return from_half(value);
  if constexpr (kCast == Cast::kNone) return value;
}

VP_DEVICE const int32_t* part(const int32_t* words, int32_t position) {
  return position ? words + position : nullptr;
}

// loads that are under way at a time, per thread
constexpr int kInFlight = 4;

// Rows first .. last - 1; V is a vector that holds whole columns of one group, or a part of one.
template <typename V>
VP_DEVICE void copy_rows(Lane lane, const GatherMove& move, const GatherEntry& entry,
                         const int32_t* words, int32_t first, int32_t last) {
  constexpr int32_t size = sizeof(V);
  const int32_t* rows = part(words, entry.row_index);
  const int32_t* columns = part(words, entry.column_index);
  const int32_t vectors_per_column = move.element > size ? move.element / size : 1;
  const int32_t columns_per_vector = move.element > size ? 1 : size / move.element;
  const int32_t vectors = entry.columns / columns_per_vector * vectors_per_column;
  const int32_t total = (last - first) * vectors;
  V* const target = reinterpret_cast<V*>(move.target) + int64_t{first} * vectors;
  for (int32_t begin = lane.thread; begin < total; begin += lane.threads * kInFlight) {
    V values[kInFlight];
#pragma unroll
    for (int u = 0; u < kInFlight; ++u) {
      const int32_t k = begin + u * lane.threads;
      values[u] = V{};
      if (k >= total) continue;
      const int32_t i = k / vectors;
      const int32_t v = k - i * vectors;
      const int32_t row = rows ? rows[first + i] : first + i;
      const int32_t column = v / vectors_per_column * columns_per_vector;
      const int32_t from = columns ? columns[column] : column;
      if (row < 0 || from < 0) continue;
      const char* source = move.source + row * move.source_stride + int64_t{from} * move.element;
      values[u] = load_once(reinterpret_cast<const V*>(source) + v % vectors_per_column);
    }
#pragma unroll
    for (int u = 0; u < kInFlight; ++u) {
      const int32_t k = begin + u * lane.threads;
      if (k < total) store_once(target + k, values[u]);
    }
  }
}

VP_DEVICE int32_t smaller(int32_t a, int32_t b) {
  return a < b ? a : b;
}

// bytes that a row takes in shared memory
VP_DEVICE int32_t pitch_of(const GatherMove& move, const GatherEntry& entry) {
  return (entry.source_columns * move.element + 15) / 16 * 16;
}

// Source rows of first .. last - 1 into shared memory, each at a multiple of 16 bytes.
template <typename V>
VP_DEVICE void stage_rows(Lane lane, const GatherMove& move, const GatherEntry& entry,
                          const int32_t* words, int32_t first, int32_t last, char* shared) {
  const int32_t* rows = part(words, entry.row_index);
  const int32_t pitch = pitch_of(move, entry);
  const int32_t vectors = entry.source_columns * move.element / static_cast<int32_t>(sizeof(V));
  const int32_t total = (last - first) * vectors;
  for (int32_t k = lane.thread; k < total; k += lane.threads) {
    const int32_t i = k / vectors;
    const int32_t v = k - i * vectors;
    const int32_t row = rows ? rows[first + i] : first + i;
    if (row < 0) continue;
    const char* source = move.source + row * move.source_stride;
    reinterpret_cast<V*>(shared + i * pitch)[v] = load_once(reinterpret_cast<const V*>(source) + v);
  }
}

// Columns of the staged rows, to the target; kGroup elements make one vector.
template <Cast kCast, typename From, typename To, int kGroup>
VP_DEVICE void pick_columns(Lane lane, const GatherMove& move, const GatherEntry& entry,
                            const int32_t* words, int32_t first, int32_t last, const char* shared) {
  struct alignas(sizeof(To) * kGroup) Group {
    To element[kGroup];
  };
  const int32_t* rows = part(words, entry.row_index);
  const int32_t* columns = part(words, entry.column_index);
  const int32_t pitch = pitch_of(move, entry);
  const int32_t groups = entry.columns / kGroup;
  const int32_t total = (last - first) * groups;
  Group* const target = reinterpret_cast<Group*>(move.target) + int64_t{first} * groups;
  for (int32_t k = lane.thread; k < total; k += lane.threads) {
    const int32_t i = k / groups;
    const int32_t g = k - i * groups;
    const bool live = (rows ? rows[first + i] : first + i) >= 0;
    const From* source = reinterpret_cast<const From*>(shared + i * pitch);
    Group group;
    for (int32_t e = 0; e < kGroup; ++e) {
      const int32_t from = columns ? columns[g * kGroup + e] : g * kGroup + e;
      group.element[e] = converted<kCast, To, From>(live && from >= 0 ? source[from] : From{0});
    }
    if constexpr (sizeof(Group) == 16) {
      store_once(reinterpret_cast<Bytes16*>(target + k), *reinterpret_cast<const Bytes16*>(&group));
    } else {
      target[k] = group;
    }
  }
}

// Picks one element after the other from the source: rows that shared memory does not hold.
template <Cast kCast, typename From, typename To>
VP_DEVICE void pick_from_source(Lane lane, const GatherMove& move, const GatherEntry& entry,
                                const int32_t* words, int32_t first, int32_t last) {
  const int32_t* rows = part(words, entry.row_index);
  const int32_t* columns = part(words, entry.column_index);
  const int32_t total = (last - first) * entry.columns;
  To* const target = reinterpret_cast<To*>(move.target) + int64_t{first} * entry.columns;
  for (int32_t k = lane.thread; k < total; k += lane.threads) {
    const int32_t i = k / entry.columns;
    const int32_t c = k - i * entry.columns;
    const int32_t row = rows ? rows[first + i] : first + i;
    const int32_t from = columns ? columns[c] : c;
    From value{};
    if (row >= 0 && from >= 0) {
      value = reinterpret_cast<const From*>(move.source + row * move.source_stride)[from];
    }
    target[k] = converted<kCast, To, From>(value);
  }
}

// `block.each(f)` is f(lane) of every thread, `block.barrier()` waits for all of them.
template <Cast kCast, typename From, typename To, typename Block>
VP_DEVICE void staged_tile(Block& block, const GatherMove& move, const GatherEntry& entry,
                           const int32_t* words, int32_t first, int32_t last, char* shared,
                           int32_t shared_bytes) {
  const int32_t at_once = shared_bytes / pitch_of(move, entry);
  for (int32_t begin = first; begin < last; begin += at_once) {
    const int32_t end = smaller(last, begin + at_once);
    block.barrier();  // nobody reads the rows before any more
    block.each([&](Lane lane) {
      if (move.load == 16) {
        stage_rows<Bytes16>(lane, move, entry, words, begin, end, shared);
      } else {
        stage_rows<From>(lane, move, entry, words, begin, end, shared);
      }
    });
    block.barrier();
    block.each([&](Lane lane) {
      if (move.store == 16) {
        constexpr int kGroup = 16 / static_cast<int>(sizeof(To));
        pick_columns<kCast, From, To, kGroup>(lane, move, entry, words, begin, end, shared);
      } else {
        pick_columns<kCast, From, To, 1>(lane, move, entry, words, begin, end, shared);
      }
    });
  }
}

template <Cast kCast, typename From, typename To, typename Block>
VP_DEVICE void picked_tile(Block& block, const GatherMove& move, const GatherEntry& entry,
                           const int32_t* words, int32_t first, int32_t last, char* shared,
                           int32_t shared_bytes) {
  if (move.staged) {
    staged_tile<kCast, From, To>(block, move, entry, words, first, last, shared, shared_bytes);
  } else {
    block.each([&](Lane lane) {
      pick_from_source<kCast, From, To>(lane, move, entry, words, first, last);
    });
  }
}

// Moves one tile. `shared` holds `shared_bytes` at a multiple of 16.
template <typename Block>
VP_DEVICE void gather_tile(Block& block, const GatherMove& move, const int32_t* words, int32_t tile,
                           char* shared, int32_t shared_bytes) {
  const GatherEntry& entry = *reinterpret_cast<const GatherEntry*>(words + move.entry);
  const int32_t first = (tile - move.first_tile) * move.rows_per_tile;
  const int32_t last = smaller(entry.rows, first + move.rows_per_tile);
  const auto picked = [&]<Cast kCast, typename From, typename To>() {
    picked_tile<kCast, From, To>(block, move, entry, words, first, last, shared, shared_bytes);
  };
  const auto copied = [&]<typename V>() {
    block.each([&](Lane lane) { copy_rows<V>(lane, move, entry, words, first, last); });
  };
  switch (move.cast) {
    case Cast::kFloatToBFloat16:
      return picked.template operator()<Cast::kFloatToBFloat16, uint32_t, uint16_t>();
    case Cast::kFloatToHalf:
      return picked.template operator()<Cast::kFloatToHalf, uint32_t, uint16_t>();
    case Cast::kBFloat16ToFloat:
      return picked.template operator()<Cast::kBFloat16ToFloat, uint16_t, uint32_t>();
    case Cast::kHalfToFloat:
      return picked.template operator()<Cast::kHalfToFloat, uint16_t, uint32_t>();
    case Cast::kNone:
      break;
  }
  if (move.staged) {
    if (move.element == 2) return picked.template operator()<Cast::kNone, uint16_t, uint16_t>();
    return picked.template operator()<Cast::kNone, uint32_t, uint32_t>();
  }
  switch (move.load) {
    case 16:
      return copied.template operator()<Bytes16>();
    case 8:
      return copied.template operator()<uint64_t>();
    case 4:
      return copied.template operator()<uint32_t>();
    case 2:
      return copied.template operator()<uint16_t>();
    default:
      return copied.template operator()<uint8_t>();
  }
}

// how rows are copied, for a machine whose blocks have so much shared memory
constexpr int32_t kTileBytes = 32 * 1024;

inline int8_t alignment(int64_t a, int64_t b, int64_t c, int64_t d) {
  int8_t bytes = 16;
  while (a % bytes || b % bytes || c % bytes || d % bytes) bytes /= 2;
  return bytes;
}

// Fills in how a matrix is moved; source, target, source_stride, entry, cast, element and result
// are given. Returns its tiles.
inline int32_t plan_tiles(GatherMove& move, const GatherEntry& entry, int32_t first_tile,
                          int32_t shared_bytes) {
  const auto source = reinterpret_cast<int64_t>(move.source);
  const auto target = reinterpret_cast<int64_t>(move.target);
  const int64_t row = int64_t{entry.source_columns} * move.element;
  const int64_t result = int64_t{entry.columns} * move.result;
  const int64_t group = entry.column_index ? int64_t{entry.span} * move.element : result;
  const int8_t together = alignment(source, target, move.source_stride, group);
  const bool cast = move.cast != Cast::kNone;
  const bool pick = entry.column_index && together < 16 && (move.element == 2 || move.element == 4);
  move.staged = (cast || pick) && row > 0 && (row + 15) / 16 * 16 <= shared_bytes;
  if (move.staged) {
    move.load = alignment(source, move.source_stride, row, 0) == 16 ? 16 : move.element;
    move.store = alignment(target, result, 0, 0) == 16 ? 16 : move.result;
  } else {
    move.load = move.store = together;
  }
  const int64_t widest = (result > row && result > 0) ? result : row;
  const int64_t rows = widest > 0 ? kTileBytes / widest : entry.rows;
  move.rows_per_tile = static_cast<int32_t>(rows < 1 ? 1 : rows);
  move.first_tile = first_tile;
  if (!entry.rows || !entry.columns) return 0;
  return (entry.rows + move.rows_per_tile - 1) / move.rows_per_tile;
}

}  // namespace vitprune
