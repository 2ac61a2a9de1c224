// A warp's ring of slots in shared memory, which its stream of packed blocks fills in turn: one bulk copy a block, counted
// by the slot's barrier. No other warp reads or waits for them.
#pragma once

#include "fragments.cuh"

namespace twofour {

// Stream: `ended`, `source` and `bytes` of the next packed block, and `advance`.
template <class Stream, int kSlotBytes>
class Ring {
 public:
  // Of barriers that are ready.
  TWOFOUR_DEVICE Ring(const Stream& stream, uint8_t* slots, uint64_t* barriers, int depth, int lane)
      : ahead_(stream), slots_(slots), barriers_(barriers), depth_(depth), lane_(lane) {}

  // Starts the copies of the first blocks, and prefetches `prefetch` blocks after them into the L2.
  TWOFOUR_DEVICE void start(int prefetch) {
    for (int slot = 0; slot < depth_; ++slot) fill(slot);
    Stream further = ahead_;
    for (int i = 0; i < prefetch && !further.ended(); ++i, further.advance())
      if (lane_ == 0) gpu::prefetch_to_l2(further.source(), further.bytes());
  }
  // The next block, once its copy is there.
  TWOFOUR_DEVICE const uint8_t* wait() {
    gpu::wait_phase(barriers_ + slot_, parity_);
    return slots_ + slot_ * kSlotBytes;
  }
  // Gives the slot of that block to one further on.
  TWOFOUR_DEVICE void release() {
    gpu::warp_sync();  // all lanes have read it
    fill(slot_);
    if (++slot_ == depth_) slot_ = 0, parity_ ^= 1u;
  }

 private:
  TWOFOUR_DEVICE void fill(int slot) {
    if (ahead_.ended()) return;
    if (lane_ == 0) {
      gpu::expect_bytes(barriers_ + slot, ahead_.bytes());
      gpu::bulk_copy(slots_ + slot * kSlotBytes, ahead_.source(), ahead_.bytes(), barriers_ + slot);
    }
    ahead_.advance();
  }

  Stream ahead_;  // the next block to copy
  uint8_t* slots_;
  uint64_t* barriers_;
  int depth_, lane_, slot_ = 0;
  unsigned parity_ = 0;  // of the phase of the slot's barrier; flips with each turn of the ring
};

}  // namespace twofour
