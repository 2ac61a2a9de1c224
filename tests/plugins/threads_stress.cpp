// Phases of varying size, one after the other: every chunk is taken once, and none that does not exist.
#include <atomic>
#include <cstdio>
#include <cstdlib>

#include "threads.h"

int main(int, char** arguments) {
  constexpr int kMost = 64;
  const int counts[] = {2, 3, 40, 5, 17, 2, kMost, 7};
  twofour_cpu::set_threads(2);
  long wrong = 0;
  for (long phase = 0; phase < atol(arguments[1]); ++phase) {
    const int chunks = counts[phase % 8];
    std::atomic<int> taken[kMost] = {}, outside{0};
    twofour_cpu::parallel(chunks, [&](int64_t chunk) { (chunk < chunks ? taken[chunk] : outside)++; });
    bool right = outside == 0;
    for (int chunk = 0; chunk < kMost; ++chunk) right = right && taken[chunk] == (chunk < chunks);
    wrong += !right;
  }
  std::printf("%ld\n", wrong);
}
