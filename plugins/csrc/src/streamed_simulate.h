// Every thread block of a streamed kernel on the simulated GPU.
#pragma once

#include "simt.h"
#include "streamed.h"

namespace twofour {

// `block`: what all thread blocks have in common; body(shared memory, 128-byte aligned) is one thread.
template <class F>
void simulate_streamed(const StreamedPlan& plan, const gpu::Block& block, F&& body) {
  std::vector<uint8_t> memory(plan.shared_bytes + 128);
  uint8_t* shared = memory.data() + (128 - reinterpret_cast<uintptr_t>(memory.data()) % 128) % 128;
  // In descending order: the block that adds the splits is not the one with the last range of inputs.
  for (int x = plan.blocks - 1; x >= 0; --x)
    for (int y = 0; y < plan.token_blocks; ++y) {
      std::fill(memory.begin(), memory.end(), uint8_t{0xCD});
      gpu::Block own = block;
      own.x = x, own.y = y;
      own.body = [&] { body(shared); };
      gpu::run_block(own, static_cast<unsigned>(x + 3 * y));
    }
}

}  // namespace twofour
