// Runs the tiles of csrc/cuda/gather_tile.h on the CPU, thread by thread, for test_gather_all.py.
#include <cstring>
#include <vector>

#include "cuda/gather_tile.h"

namespace vitprune {

template <typename To, typename From>
To bits_as(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

uint16_t to_bfloat16(uint32_t bits) {
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fffu;  // the NaN of the GPU
  return static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

uint16_t to_half(uint32_t bits) {
  return bits_as<uint16_t>(static_cast<_Float16>(bits_as<float>(bits)));
}

uint32_t from_half(uint16_t bits) {
  return bits_as<uint32_t>(static_cast<float>(bits_as<_Float16>(bits)));
}

}  // namespace vitprune

namespace {

struct HostBlock {
  int32_t threads;
  template <typename F>
  void each(F f) {
    // backwards: a thread that counts on an earlier one would be found out
    for (int32_t t = threads - 1; t >= 0; --t) f(vitprune::Lane{t, threads});
  }
  void barrier() {}
};

}  // namespace

// Returns how the matrix was moved: bytes loaded at a time, plus 100 where rows were staged.
extern "C" int move_matrix(const void* source, void* target, int64_t source_stride, int element,
                           int result, int cast, const int32_t* words, int entry_number,
                           int32_t shared_bytes, int threads) {
  const vitprune::GatherTableView table(words);
  const vitprune::GatherEntry& entry = table.entry(entry_number);
  vitprune::GatherMove move{};
  move.source = static_cast<const char*>(source);
  move.target = static_cast<char*>(target);
  move.source_stride = source_stride;
  move.element = static_cast<int8_t>(element);
  move.result = static_cast<int8_t>(result);
  move.entry = vitprune::GatherTableView::position(entry_number);
  move.cast = static_cast<vitprune::Cast>(cast);
  constexpr int32_t first_tile = 7;
  const int32_t tiles = vitprune::plan_tiles(move, entry, first_tile, shared_bytes);
  std::vector<vitprune::Bytes16> shared(shared_bytes / 16);
  HostBlock block{threads};
  for (int32_t tile = first_tile; tile < first_tile + tiles; ++tile) {
    std::memset(shared.data(), 0xa5, shared_bytes);
    vitprune::gather_tile(block, move, words, tile, reinterpret_cast<char*>(shared.data()),
                          shared_bytes);
  }
  return move.load + 100 * move.staged;
}
