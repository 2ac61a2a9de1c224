// The simulated GPU's loads of fragments and its sparse matrix product.
#pragma once

#include "simt_block.h"

namespace twofour {
namespace gpu {

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

inline uint32_t permute_bytes(uint32_t low, uint32_t high, uint32_t selector) {
  if (selector & 0x8888u) report("a selector that replicates a sign");
  uint32_t out = 0;
  for (int i = 0; i < 4; ++i) {
    const unsigned index = selector >> (4 * i) & 7u;
    out |= ((index < 4 ? low : high) >> (8 * (index % 4)) & 0xFFu) << (8 * i);
  }
  return out;
}

template <int kType>
inline double operand(uint32_t word, int index) {  // element `index` of a 32-bit register
  if (kType == TWOFOUR_INT8) return static_cast<int8_t>(word >> (8 * index) & 0xFFu);
  const unsigned bits = word >> (16 * index) & 0xFFFFu;
  return kType == TWOFOUR_BF16 ? bfloat_bits(bits) : half_bits(bits);
}

// The warp's A[16, K] B[K, 8] from its lanes' registers, K = 32 for 16-bit operands and 64 for int8.
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

// The same of dense operands, of which B has two registers: K = 16 for 16-bit operands and 32 for int8.
template <int kType>
inline void multiply_warp_dense(Warp& w) {
  constexpr int per_register = kType == TWOFOUR_INT8 ? 4 : 2, k = 8 * per_register;
  double a[16][k], b[k][8];
  for (int lane = 0; lane < 32; ++lane)
    for (int i = 0; i < per_register; ++i)
      for (int half = 0; half < 2; ++half) {  // of K
        const int at = lane % 4 * per_register + i + half * k / 2;
        b[at][lane / 4] = operand<kType>(w.b[lane].r[half], i);
        for (int high = 0; high < 2; ++high) a[lane / 4 + 8 * high][at] = operand<kType>(w.a[lane].r[2 * half + high], i);
      }
  for (int row = 0; row < 16; ++row)
    for (int column = 0; column < 8; ++column) {
      w.d[row][column] = 0;
      for (int i = 0; i < k; ++i) w.d[row][column] += a[row][i] * b[i][column];
    }
}

// Lets every lane of the warp arrive with its operands, multiplies, and adds each lane's four elements to d.
template <class T, class F>
inline void together(T (&d)[4], const Fragment& a, const Fragment& b, uint32_t metadata, F&& multiply) {
  const int lane = thread() % 32;
  Warp& w = warp();
  w.a[lane] = a;
  w.b[lane] = b;
  w.metadata[lane] = metadata;
  warp_sync();
  if (lane == 0) multiply(w);
  warp_sync();
  for (int i = 0; i < 4; ++i) d[i] += static_cast<T>(w.d[lane / 4 + 8 * (i / 2)][2 * (lane % 4) + i % 2]);
  warp_sync();
}

template <int kType, class T>
inline void mma_sp(T (&d)[4], const Fragment& a, const Fragment& b, uint32_t metadata, int selector) {
  together(d, a, b, metadata, [&](Warp& w) { multiply_warp<kType>(w, selector); });
}

template <int kType, class T>
inline void mma(T (&d)[4], const Fragment& a, const Pair& b) {
  together(d, a, {{b.r[0], b.r[1]}}, 0, [](Warp& w) { multiply_warp_dense<kType>(w); });
}

}  // namespace gpu
}  // namespace twofour
