// One simulated thread block: its threads are fibers, which switch at barriers.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>
#include <stdint.h>
#include <ucontext.h>

#include <cstring>
#include <functional>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "registers.h"
#include "status.h"

#define TWOFOUR_DEVICE inline
#define TWOFOUR_UNROLL

namespace twofour {
namespace gpu {

struct Copy {
  uint8_t* target;
  const uint8_t* source;
  bool copy;
};
struct Barrier {
  int arrived = 0;
  unsigned generation = 0;
};
struct Warp {
  Barrier barrier;
  const uint8_t* address[32];
  Fragment a[32], b[32];
  uint32_t metadata[32];
  double d[16][8];
};
struct Range {
  const uint8_t* begin;
  const uint8_t* end;
  bool holds(const uint8_t* first, size_t bytes) const { return first >= begin && first + bytes <= end; }
};
struct BulkCopy {
  uint8_t* target;
  const uint8_t* source;
  size_t bytes;
};
struct CopyBarrier {  // mbarrier
  int arrivals = 0;     // that end a phase
  bool published = false;
  unsigned parity = 0;
  int arrived = 0;
  size_t expected = 0, issued = 0;
  std::vector<BulkCopy> bulk;
  std::vector<Copy> copies;
};

// One running thread block.
struct Block {
  int x, y, z, grid_x;
  std::vector<Range> readable;
  Range x_range{};  // the part of it that the kernel before this one may still be writing
  bool early = false;  // started before that kernel ended: no x and no global write until each thread has waited for it
  std::vector<bool> waited;
  std::map<const void*, CopyBarrier> copy_barriers;
  std::vector<Warp> warps;
  std::vector<std::vector<std::vector<Copy>>> copies;  // a thread's open groups; the last is not yet committed
  std::vector<ucontext_t> fibers;
  std::vector<bool> done;
  ucontext_t scheduler;
  Barrier barrier;
  int threads, current = 0;
  unsigned progress = 0;
  std::string error;
  std::function<void()> body;
};

inline Block*& running() {
  thread_local Block* block = nullptr;
  return block;
}

inline int thread() { return running()->current; }
inline int block_x() { return running()->x; }
inline int block_y() { return running()->y; }
inline int block_z() { return running()->z; }
inline int grid_x() { return running()->grid_x; }

inline void report(const char* what) {
  if (running()->error.empty()) running()->error = what;
}
inline void yield() { swapcontext(&running()->fibers[static_cast<size_t>(thread())], &running()->scheduler); }
inline void arrive(Barrier& barrier, int count) {
  const unsigned generation = barrier.generation;
  ++running()->progress;
  if (++barrier.arrived == count) {
    barrier.arrived = 0;
    ++barrier.generation;
  } else {
    while (barrier.generation == generation) yield();
  }
}
inline void block_sync() { arrive(running()->barrier, running()->threads); }
inline void fence() {}
inline void wait_for_previous_kernel() { running()->waited[static_cast<size_t>(thread())] = true; }
inline void let_next_kernel_start() {}
inline void require_waited(const char* what) {
  if (running() != nullptr && running()->early && !running()->waited[static_cast<size_t>(thread())]) report(what);
}
inline void require_write() { require_waited("a global write before the kernel before has ended"); }
inline unsigned fetch_add(unsigned* counter) {
  require_write();
  return (*counter)++;
}
inline Warp& warp() { return running()->warps[static_cast<size_t>(thread() / 32)]; }
inline void warp_sync() { arrive(warp().barrier, 32); }

inline void fiber_main() {
  Block* block = running();
  block->body();
  block->done[static_cast<size_t>(block->current)] = true;
  ++block->progress;
  yield();
}

// Runs `body` as every thread of one block, switching only at barriers, in an order that `seed` picks.
inline void run_block(Block& block, unsigned seed) {
  const size_t n = static_cast<size_t>(block.threads), stack_bytes = 128 * 1024;
  static thread_local std::vector<uint8_t> stacks;  // reused: each is large and there are many blocks
  if (stacks.size() < n * stack_bytes) stacks.resize(n * stack_bytes);
  block.warps.resize(n / 32);
  block.copies.assign(n, {{}});
  block.fibers.resize(n);
  block.done.assign(n, false);
  block.waited.assign(n, false);
  running() = &block;
  for (size_t i = 0; i < n; ++i) {
    getcontext(&block.fibers[i]);
    block.fibers[i].uc_stack.ss_sp = stacks.data() + i * stack_bytes;
    block.fibers[i].uc_stack.ss_size = stack_bytes;
    block.fibers[i].uc_link = nullptr;
    makecontext(&block.fibers[i], fiber_main, 0);
  }
  for (bool left = true; left;) {
    const unsigned before = block.progress;
    left = false;
    for (size_t i = 0; i < n; ++i) {
      const size_t t = (i * 37 + seed) % n;  // 37 is odd, n a power of two: a permutation
      if (block.done[t]) continue;
      block.current = static_cast<int>(t);
      swapcontext(&block.scheduler, &block.fibers[t]);
      left = true;
    }
    if (left && block.progress == before) {
      if (block.error.empty()) block.error = "a barrier that not all threads reach";
      break;
    }
  }
  running() = nullptr;
  if (!block.error.empty()) fail(TWOFOUR_INVALID_ARGUMENT, "simulated kernel: %s", block.error.c_str());
}

}  // namespace gpu
}  // namespace twofour
