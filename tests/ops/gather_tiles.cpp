// Runs the tiles of csrc/cuda/gather_tile.h on the CPU, thread by thread, for test_gather_all.py.
//
// A thread runs until it waits for its block, then the next one does: a step that needs a wait and
// has none finds the other threads' work undone. What is copied on the side arrives as late as it
// may, when its thread waits for it.
#include <ucontext.h>

#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#include "cuda/gather_tile.h"

namespace {

class Block {
 public:
  explicit Block(int32_t threads) : threads_(threads) {
    for (Thread& thread : threads_) thread.stack.reset(new char[kStackBytes]);
  }

  // Runs work(number) of every thread; whether all met at the same waits and left no copy behind.
  bool run(std::function<void(int32_t)> work) {
    running_ = this;
    work_ = std::move(work);
    for (Thread& thread : threads_) {
      getcontext(&thread.context);
      thread.context.uc_stack.ss_sp = thread.stack.get();
      thread.context.uc_stack.ss_size = kStackBytes;
      thread.context.uc_link = &caller_;
      makecontext(&thread.context, [] { running_->begin(); }, 0);
    }
    int32_t ended = 0;
    while (!ended) {
      // backwards: a thread that counts on an earlier one would be found out
      for (now_ = count() - 1; now_ >= 0; --now_) {
        swapcontext(&caller_, &threads_[now_].context);
        ended += threads_[now_].ended;
      }
    }
    for (const Thread& thread : threads_) {
      if (!thread.ended || !thread.copies.empty()) return false;
    }
    return true;
  }

  static void wait() { swapcontext(&running_->thread().context, &running_->caller_); }

  static void copy(void* to, const void* from, size_t bytes) {
    running_->thread().copies.push_back([=] { std::memcpy(to, from, bytes); });
  }

  static void finish_copies() {
    for (const auto& copy : running_->thread().copies) copy();
    running_->thread().copies.clear();
  }

 private:
  static constexpr size_t kStackBytes = 64 * 1024;

  struct Thread {
    ucontext_t context;
    std::unique_ptr<char[]> stack;
    std::vector<std::function<void()>> copies;
    bool ended = false;
  };

  int32_t count() const { return static_cast<int32_t>(threads_.size()); }
  Thread& thread() { return threads_[now_]; }
  void begin() {
    work_(now_);
    thread().ended = true;
  }

  static Block* running_;
  std::vector<Thread> threads_;
  std::function<void(int32_t)> work_;
  ucontext_t caller_;
  int32_t now_ = 0;
};

Block* Block::running_ = nullptr;

}  // namespace

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

void wait_for_block() {
  Block::wait();
}

template <typename V>
void start_copy(V* shared, const V* source) {
  Block::copy(shared, source, sizeof(V));
}

void wait_for_copies() {
  Block::finish_copies();
}

}  // namespace vitprune

// Returns how the matrix was moved: bytes loaded at a time, plus 100 where rows were staged; -1 if
// the threads did not wait alike.
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
  std::memset(shared.data(), 0xa5, shared_bytes);
  // one block walks over all tiles
  const bool alike = Block(threads).run([&](int32_t thread) {
    for (int32_t tile = first_tile; tile < first_tile + tiles; ++tile) {
      vitprune::gather_tile({thread, threads}, move, words, tile,
                            reinterpret_cast<char*>(shared.data()), shared_bytes);
    }
  });
  return alike ? move.load + 100 * move.staged : -1;
}
