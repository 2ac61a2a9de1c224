#include "threads.h"

#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <mutex>
#include <thread>

namespace twofour_cpu {
namespace {

using Clock = std::chrono::steady_clock;
using std::chrono::microseconds;

constexpr microseconds kAwake{100};             // that a worker spins before it sleeps
constexpr microseconds kBeforeYield{20};        // of a caller that waits for a chunk
constexpr int kLooks = 256;                     // between two pauses
constexpr microseconds kPatience{300};          // a wait longer than this and than two chunks: a worker is stopped
constexpr microseconds kFirstPause{10'000}, kLongestPause{320'000};  // how long the caller then works alone

inline void pause_cpu() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

// Looks until `done`, at most so long, and returns whether it is. Mostly loads: a hypervisor takes the processor from a
// virtual machine that pauses many times in a row.
template <class Done>
bool spin(microseconds longest, const Done& done) {
  const auto until = Clock::now() + longest;
  do {
    for (int look = 0; look < kLooks; ++look)
      if (done()) return true;
    pause_cpu();
  } while (Clock::now() < until);
  return false;
}

int allowed_processors() {
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof(set), &set) == 0) return std::max(1, CPU_COUNT(&set));
  return std::max(1u, std::thread::hardware_concurrency());
}

class Pool {
 public:
  int resize(int count) {
    const std::lock_guard<std::mutex> hold(in_use_);
    wanted_ = std::clamp(count, 1, allowed_processors());
    for (; started_ < wanted_ - 1; ++started_) std::thread([this, index = started_] { serve(index); }).detach();
    return wanted_;
  }

  int size() const { return wanted_; }

  void run(int64_t chunks, void (*body)(void*, int64_t), void* context) {
    std::unique_lock<std::mutex> hold(in_use_, std::try_to_lock);
    if (wanted_ == 1 || chunks == 1 || !hold || (pause_.count() && Clock::now() < alone_until_)) {
      for (int64_t chunk = 0; chunk < chunks; ++chunk) body(context, chunk);
      return;
    }
    const auto begin = Clock::now();
    body_.store(body, std::memory_order_relaxed);
    context_.store(context, std::memory_order_relaxed);
    chunks_.store(static_cast<uint32_t>(chunks), std::memory_order_relaxed);
    done_.store(0, std::memory_order_relaxed);
    const uint32_t phase = phase_.load(std::memory_order_relaxed) + 1;
    ticket_.store(uint64_t{phase} << 32 | static_cast<uint32_t>(chunks), std::memory_order_release);
    phase_.store(phase);
    if (sleepers_.load() > 0) syscall(SYS_futex, &phase_, FUTEX_WAKE_PRIVATE, wanted_ - 1, nullptr, nullptr, 0);
    const uint32_t own = take_chunks(phase);
    if (done_.load(std::memory_order_acquire) != chunks) wait_for(static_cast<uint32_t>(chunks), own, begin);
  }

 private:
  // Takes chunks of `phase` until none is left. A ticket is the phase and the number of chunks left in one word: taking
  // one proves that the phase is not over, so what was read of its job is whole. (The number is part of the word
  // because a worker that comes late may read the next phase's.)
  uint32_t take_chunks(uint32_t phase) {
    uint32_t own = 0;
    for (;;) {
      uint64_t ticket = ticket_.load(std::memory_order_acquire);
      const auto body = body_.load(std::memory_order_relaxed);
      const auto context = context_.load(std::memory_order_relaxed);
      const uint32_t chunks = chunks_.load(std::memory_order_relaxed), left = static_cast<uint32_t>(ticket);
      if (ticket >> 32 != phase || left == 0) return own;
      if (!ticket_.compare_exchange_weak(ticket, ticket - 1, std::memory_order_acq_rel)) continue;
      body(context, chunks - left);
      done_.fetch_add(1, std::memory_order_release);
      ++own;
    }
  }

  void wait_for(uint32_t chunks, uint32_t own, Clock::time_point begin) {
    const auto from = Clock::now();
    const auto ended = [&] { return done_.load(std::memory_order_acquire) == chunks; };
    if (!spin(kBeforeYield, ended))
      while (!ended()) sched_yield();
    const auto waited = Clock::now() - from, chunk_time = (from - begin) / std::max(1u, own);
    if (waited > kPatience && waited > 2 * chunk_time) {
      pause_ = std::min(std::max(kFirstPause, 2 * pause_), kLongestPause);
      alone_until_ = Clock::now() + pause_;
      good_phases_ = 0;
    } else if (pause_.count() && ++good_phases_ > 200) {
      pause_ = microseconds{0};
    }
  }

  void serve(int index) {
    uint32_t seen = 0;
    for (;;) {
      spin(kAwake, [&] { return phase_.load(std::memory_order_acquire) != seen; });
      while (phase_.load() == seen) {
        sleepers_.fetch_add(1);
        if (phase_.load() == seen) syscall(SYS_futex, &phase_, FUTEX_WAIT_PRIVATE, seen, nullptr, nullptr, 0);
        sleepers_.fetch_sub(1);
      }
      seen = phase_.load(std::memory_order_acquire);
      if (index < wanted_ - 1) take_chunks(seen);
    }
  }

  std::mutex in_use_;
  std::atomic<int> wanted_{1};
  int started_ = 0;  // workers
  std::atomic<uint32_t> phase_{0}, chunks_{0};
  std::atomic<int> sleepers_{0};
  std::atomic<void (*)(void*, int64_t)> body_{nullptr};
  std::atomic<void*> context_{nullptr};
  alignas(64) std::atomic<uint64_t> ticket_{0};
  alignas(64) std::atomic<uint32_t> done_{0};
  microseconds pause_{0};
  Clock::time_point alone_until_{};
  int good_phases_ = 0;
};

// Never destroyed: workers may outlive the end of main. A child of fork() has no workers and makes its own.
Pool*& pool() {
  static Pool* instance = [] {
    pthread_atfork(nullptr, nullptr, [] { pool() = new Pool; });
    return new Pool;
  }();
  return instance;
}

}  // namespace

int set_threads(int threads) { return pool()->resize(threads); }
int threads() { return pool()->size(); }
void parallel(int64_t chunks, void (*body)(void*, int64_t), void* context) { pool()->run(chunks, body, context); }

}  // namespace twofour_cpu
