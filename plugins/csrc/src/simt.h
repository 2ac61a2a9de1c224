// Namespace gpu for the host compiler: one thread block at a time, each CUDA thread a fiber, so that the skinny kernel's
// own source runs on a CPU. It is strict where the GPU is silent: shared memory starts as rubbish; an asynchronous copy
// turns its target into rubbish until the wait that completes it; copies must be aligned and inside their tensor;
// metadata must be one of the six codes that mma.sp::ordered_metadata defines; a barrier that not all threads reach is
// reported; a kernel that starts before the one before it has ended must wait before it reads x or writes. The semantics
// of mma.sp and ldmatrix are written from the PTX ISA and share nothing with layout.h.
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

// One thread block under way.
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

inline std::vector<std::vector<Copy>>& open_copies() { return running()->copies[static_cast<size_t>(thread())]; }

inline void require_source(const uint8_t* source, size_t bytes) {
  bool inside = false;
  for (const Range& range : running()->readable) inside = inside || range.holds(source, bytes);
  if (!inside) report("a copy reads outside of its tensor");
  if (running()->x_range.holds(source, bytes)) require_waited("x is read before the kernel before has ended");
}
inline void copy_or_zero(void* shared, const void* global, bool copy) {
  const uint8_t* source = static_cast<const uint8_t*>(global);
  if (reinterpret_cast<uintptr_t>(shared) % 16 || reinterpret_cast<uintptr_t>(global) % 16) report("misaligned copy");
  if (copy) require_source(source, 16);
  if (!running()->error.empty()) return;
  std::memset(shared, 0xCD, 16);
  open_copies().back().push_back({static_cast<uint8_t*>(shared), source, copy});
}
inline void copy_weight(void* shared, const void* global) { copy_or_zero(shared, global, true); }
inline void land(const std::vector<Copy>& copies) {
  for (const Copy& c : copies) {
    if (c.copy) std::memcpy(c.target, c.source, 16);
    else std::memset(c.target, 0, 16);
  }
}
inline void commit() { open_copies().emplace_back(); }
template <int kPending>
inline void wait() {
  while (open_copies().size() > kPending + 1) {  // + 1: the group still being filled
    land(open_copies().front());
    open_copies().erase(open_copies().begin());
  }
}

inline CopyBarrier& copy_barrier(const void* barrier) {
  if (running()->copy_barriers.count(barrier) == 0) report("a barrier without init");
  return running()->copy_barriers[barrier];
}
inline void init_barrier(uint64_t* barrier, int arrivals) {
  if (reinterpret_cast<uintptr_t>(barrier) % 8) report("misaligned barrier");
  running()->copy_barriers[barrier] = {};
  running()->copy_barriers[barrier].arrivals = arrivals;
}
inline void publish_barriers() {
  for (auto& [address, barrier] : running()->copy_barriers) barrier.published = true;
}
inline CopyBarrier& arrive(uint64_t* barrier) {
  CopyBarrier& b = copy_barrier(barrier);
  if (++b.arrived > b.arrivals) report("more arrivals at a barrier than end its phase");
  return b;
}
inline void expect_bytes(uint64_t* barrier, int bytes) { arrive(barrier).expected += static_cast<size_t>(bytes); }
inline void arrive_when_copied(uint64_t* barrier) {
  CopyBarrier& b = arrive(barrier);
  std::vector<Copy>& own = open_copies().back();
  b.copies.insert(b.copies.end(), own.begin(), own.end());
  own.clear();
}
inline void bulk_copy(void* shared, const void* global, int bytes, uint64_t* barrier) {
  CopyBarrier& b = copy_barrier(barrier);
  const uint8_t* source = static_cast<const uint8_t*>(global);
  if (reinterpret_cast<uintptr_t>(shared) % 16 || reinterpret_cast<uintptr_t>(global) % 16 || bytes % 16)
    report("misaligned copy");
  if (!b.published) report("a barrier that the copy engine does not see");
  require_source(source, static_cast<size_t>(bytes));
  if (!running()->error.empty()) return;
  std::memset(shared, 0xCD, static_cast<size_t>(bytes));
  b.bulk.push_back({static_cast<uint8_t*>(shared), source, static_cast<size_t>(bytes)});
  b.issued += static_cast<size_t>(bytes);
}
inline void prefetch_to_l2(const void* global, int bytes) {
  require_source(static_cast<const uint8_t*>(global), static_cast<size_t>(bytes));
}
// As mbarrier.try_wait.parity: true at once where the current phase has the other parity. The bytes land here at last.
inline void wait_phase(uint64_t* barrier, unsigned parity) {
  CopyBarrier& b = copy_barrier(barrier);
  while (b.parity == parity) {
    if (b.arrived == b.arrivals && b.issued == b.expected) {
      for (const BulkCopy& c : b.bulk) std::memcpy(c.target, c.source, c.bytes);
      land(b.copies);
      b = {b.arrivals, true, parity ^ 1u, 0, 0, 0, {}, {}};
      ++running()->progress;
    } else {
      yield();
    }
  }
}

inline Fragment load_16(const void* shared) {
  if (reinterpret_cast<uintptr_t>(shared) % 16) report("misaligned load");
  Fragment f;
  std::memcpy(&f, shared, sizeof f);
  return f;
}
inline Pair load_8(const void* shared) {
  if (reinterpret_cast<uintptr_t>(shared) % 8) report("misaligned load");
  Pair p;
  std::memcpy(&p, shared, sizeof p);
  return p;
}
inline Fragment load_matrices(const void* shared) {
  const int lane = thread() % 32;
  if (reinterpret_cast<uintptr_t>(shared) % 16) report("misaligned ldmatrix row");
  warp().address[lane] = static_cast<const uint8_t*>(shared);
  warp_sync();
  Fragment f;
  for (int matrix = 0; matrix < 4; ++matrix)
    std::memcpy(&f.r[matrix], warp().address[8 * matrix + lane / 4] + 4 * (lane % 4), 4);
  warp_sync();
  return f;
}

inline float half_bits(unsigned bits) {
  __half_raw raw;
  raw.x = static_cast<unsigned short>(bits);
  return __half2float(__half(raw));
}
inline float bfloat_bits(unsigned bits) {
  __nv_bfloat16_raw raw;
  raw.x = static_cast<unsigned short>(bits);
  return __bfloat162float(__nv_bfloat16(raw));
}
inline uint32_t widen_fp8(uint32_t v) {
  const auto half = [](unsigned byte) {
    return static_cast<uint32_t>(__nv_cvt_fp8_to_halfraw(static_cast<__nv_fp8_storage_t>(byte), __NV_E4M3).x);
  };
  return half(v & 0xFFu) | half(v >> 8 & 0xFFu) << 16;
}

template <int kType>
inline double operand(uint32_t word, int index) {  // element `index` of a 32-bit register
  if (kType == TWOFOUR_INT8) return static_cast<int8_t>(word >> (8 * index) & 0xFFu);
  const unsigned bits = word >> (16 * index) & 0xFFFFu;
  return kType == TWOFOUR_BF16 ? bfloat_bits(bits) : half_bits(bits);
}

// The warp's A[16, K] B[K, 8] from what its lanes hold, K = 32 for 16-bit operands and 64 for int8.
template <int kType>
inline void multiply_warp(Warp& w, int selector) {
  constexpr int k8 = kType == TWOFOUR_INT8 ? 2 : 1, k = 32 * k8, per_register = 2 * k8;
  double a[16][k] = {}, b[k][8];
  for (int lane = 0; lane < 32; ++lane) {
    const int group_id = lane / 4, in_group = lane % 4;
    for (int i = 0; i < 4 * per_register; ++i) {
      // B: registers hold rows (in_group * per_register) + ..., 8 (16 for int8) rows further each.
      const int row = in_group * per_register + i % per_register + i / per_register * 4 * per_register;
      b[row][group_id] = operand<kType>(w.b[lane].r[i / per_register], i % per_register);
    }
    for (int j = 0; j < 4; ++j) {
      const int row = group_id + (j % 2 == 1 ? 8 : 0);
      const int first = in_group * 2 * per_register + (j >= 2 ? k / 2 : 0);  // dense column of the register's first chunk
      for (int i = 0; i < per_register; ++i) {
        const int chunk = (first + 4 * (i / 2)) / 4;  // of the row, 4 dense columns each
        uint32_t codes;
        if (kType == TWOFOUR_INT8) codes = w.metadata[4 * group_id + row / 8 + 2 * (chunk / 8)] >> (4 * (chunk % 8));
        else codes = w.metadata[4 * group_id + 2 * selector + chunk / 4] >> (16 * (row / 8) + 4 * (chunk % 4));
        codes &= 0xFu;
        if (codes != 0x4 && codes != 0x8 && codes != 0x9 && codes != 0xC && codes != 0xD && codes != 0xE)
          report("metadata that mma.sp does not define");
        a[row][4 * chunk + (codes >> (2 * (i % 2)) & 3u)] = operand<kType>(w.a[lane].r[j], i);
      }
    }
  }
  for (int row = 0; row < 16; ++row)
    for (int column = 0; column < 8; ++column) {
      w.d[row][column] = 0;
      for (int i = 0; i < k; ++i) w.d[row][column] += a[row][i] * b[i][column];
    }
}

template <int kType, class T>
inline void mma_sp(T (&d)[4], const Fragment& a, const Fragment& b, uint32_t metadata, int selector) {
  const int lane = thread() % 32;
  Warp& w = warp();
  w.a[lane] = a;
  w.b[lane] = b;
  w.metadata[lane] = metadata;
  warp_sync();
  if (lane == 0) multiply_warp<kType>(w, selector);
  warp_sync();
  for (int i = 0; i < 4; ++i) d[i] += static_cast<T>(w.d[lane / 4 + 8 * (i / 2)][2 * (lane % 4) + i % 2]);
  warp_sync();
}

inline float multiply(float a, float b) { return a * b; }
inline float add(float a, float b) { return a + b; }
inline float load_float(int type, const void* values, int64_t index) {
  const unsigned bits = static_cast<const uint16_t*>(values)[index];
  return type == TWOFOUR_FP16 ? half_bits(bits) : bfloat_bits(bits);
}
inline void store_float(int type, void* values, int64_t index, float value) {
  require_write();
  if (type == TWOFOUR_FP16) static_cast<__half*>(values)[index] = __float2half_rn(value);
  else static_cast<__nv_bfloat16*>(values)[index] = __float2bfloat16_rn(value);
}
template <class T>
inline void store_partial(uint32_t* p, T value) {
  require_write();
  std::memcpy(p, &value, 4);
}
template <class T>
inline T load_partial(const uint32_t* p) {
  T value;
  std::memcpy(&value, p, 4);
  return value;
}

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
  static thread_local std::vector<uint8_t> stacks;  // kept: they are large, and blocks many
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
