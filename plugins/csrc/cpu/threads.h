// Threads that share a product's rows.
//
// Work is handed out in chunks from one counter, and a phase ends when all chunks are done, not when all threads have
// come: a worker that the system does not run takes no chunk and holds nobody up. One that is stopped inside a chunk
// does, so after a wait that is too long the caller works alone for a while. Idle workers spin for some microseconds,
// the time between two phases of a decode step, and then sleep.
#pragma once

#include <stdint.h>

namespace twofour_cpu {

// Threads in use, the caller's included. `threads` above the processors allowed to this process is cut to them.
int set_threads(int threads);
int threads();

// body(context, chunk) for each chunk in 0 to chunks - 1; returns when all are done.
void parallel(int64_t chunks, void (*body)(void*, int64_t), void* context);

template <class Body>
void parallel(int64_t chunks, const Body& body) {
  const auto call = [](void* context, int64_t chunk) { (*static_cast<const Body*>(context))(chunk); };
  parallel(chunks, call, const_cast<Body*>(&body));
}

}  // namespace twofour_cpu
