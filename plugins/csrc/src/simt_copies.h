// The simulated GPU's asynchronous copies: cp.async, and bulk copies with their barriers.
#pragma once

#include "simt_block.h"

namespace twofour {
namespace gpu {

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
// As mbarrier.try_wait.parity: true at once where the current phase has the other parity. Copies the bytes at the latest here.
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

}  // namespace gpu
}  // namespace twofour
