// gather_all on the GPU: every matrix of a call in one launch. How a tile is moved is in
// gather_tile.h; here are the grid, the table and the stream.
//
// The grid stays as wide as the GPU and walks over the tiles of all matrices. A tile finds its
// matrix by bisection of the first tiles, in the constant bank: all threads of a block read the
// same.
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/shim_utils.h>

#include <algorithm>
#include <cstdint>
#include <vector>

#include "cuda/gather_tile.h"
#include "gather_checks.h"
#include "gather_table.h"
#include "tensors.h"

namespace {

using namespace vitprune;

constexpr int kThreads = 256;
constexpr int kBlocksPerProcessor = 4;
constexpr int32_t kSharedBytes = 48 * 1024;  // what a block gets without asking
// kernel parameters may take 32,764 bytes; ViT-L with two moments has 432 matrices
constexpr int kMostMoves = 640;

struct Moves {
  int32_t count, num_tiles;
  GatherMove move[kMostMoves];
};
static_assert(sizeof(Moves) <= 32764 - sizeof(void*));

__device__ __forceinline__ void walk(const GatherMove* moves, int32_t count, int32_t num_tiles,
                                     const int32_t* words) {
  extern __shared__ __align__(16) char shared[];
  const Lane lane{static_cast<int32_t>(threadIdx.x), kThreads};
  for (int32_t tile = blockIdx.x; tile < num_tiles; tile += gridDim.x) {
    int32_t low = 0, high = count - 1;
    while (low < high) {
      const int32_t middle = (low + high + 1) / 2;
      if (moves[middle].first_tile <= tile) {
        low = middle;
      } else {
        high = middle - 1;
      }
    }
    gather_tile(lane, moves[low], words, tile, shared, kSharedBytes);
  }
}

__global__ void __launch_bounds__(kThreads, kBlocksPerProcessor)
    gather_from_parameter(const __grid_constant__ Moves moves, const int32_t* words) {
  walk(moves.move, moves.count, moves.num_tiles, words);
}

__global__ void __launch_bounds__(kThreads, kBlocksPerProcessor)
    gather_from_memory(const GatherMove* moves, int32_t count, int32_t num_tiles,
                       const int32_t* words) {
  walk(moves, count, num_tiles, words);
}

void check_cuda(cudaError_t status) {
  STD_TORCH_CHECK(status == cudaSuccess, "gather_all: ", cudaGetErrorString(status));
}

void gather_all(std::vector<Tensor> sources, std::vector<Tensor> targets,
                std::vector<int64_t> entries, Tensor table, Tensor table_on_device) {
  check_table(table);
  const GatherTableView view(static_cast<const int32_t*>(table.data_ptr()));
  check_matrices(view, sources, targets, entries, true);
  if (sources.empty()) return;
  const int32_t device = sources[0].get_device_index();
  VP_CHECK(table_on_device.is_cuda() && table_on_device.get_device_index() == device &&
               table_on_device.scalar_type() == ScalarType::Int &&
               table_on_device.is_contiguous() && table_on_device.numel() == table.numel(),
           "gather_all", "table_on_device", "be the table on the device of the sources",
           "another tensor");
  std::vector<GatherMove> moves;
  int32_t num_tiles = 0;
  for (size_t i = 0; i < sources.size(); ++i) {
    const Tensor &source = sources[i], &target = targets[i];
    const GatherEntry& entry = view.entry(entries[i]);
    GatherMove move{};
    move.source = static_cast<const char*>(source.data_ptr());
    move.target = static_cast<char*>(target.data_ptr());
    move.element = static_cast<int8_t>(source.element_size());
    move.result = static_cast<int8_t>(target.element_size());
    move.source_stride = source.stride(0) * move.element;
    move.entry = view.position(entries[i]);
    move.cast = cast_between(source.scalar_type(), target.scalar_type());
    const int32_t tiles = plan_tiles(move, entry, num_tiles, kSharedBytes);
    if (tiles) moves.push_back(move);
    num_tiles += tiles;
  }
  if (!num_tiles) return;

  const torch::stable::accelerator::DeviceGuard guard(device);
  void* current = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &current));
  const auto stream = static_cast<cudaStream_t>(current);
  int processors = 0;
  check_cuda(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device));
  const int blocks = std::min(num_tiles, processors * kBlocksPerProcessor);
  const auto* words = static_cast<const int32_t*>(table_on_device.data_ptr());
  const auto count = static_cast<int32_t>(moves.size());
  if (count <= kMostMoves) {
    Moves all{};
    all.count = count;
    all.num_tiles = num_tiles;
    std::copy(moves.begin(), moves.end(), all.move);
    gather_from_parameter<<<blocks, kThreads, kSharedBytes, stream>>>(all, words);
  } else {
    const auto bytes = static_cast<int64_t>(moves.size() * sizeof(GatherMove));
    // from memory that isn't pinned the driver takes a copy before this returns, so `moves` may go
    Tensor memory = torch::stable::new_empty(table_on_device, {(bytes + 3) / 4});
    check_cuda(
        cudaMemcpyAsync(memory.data_ptr(), moves.data(), bytes, cudaMemcpyHostToDevice, stream));
    gather_from_memory<<<blocks, kThreads, kSharedBytes, stream>>>(
        static_cast<const GatherMove*>(memory.data_ptr()), count, num_tiles, words);
  }
  check_cuda(cudaGetLastError());
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(vitprune_fast, CUDA, m) {
  m.impl("gather_all", TORCH_BOX(&gather_all));
}
