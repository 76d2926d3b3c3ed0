#pragma once
#include "emulation.h"

typedef _Float16 half;
typedef _Float16 __half;
struct alignas(4) half2 {
  half x, y;
};
typedef half2 __half2;
inline half2 make_half2(half x, half y) { return {x, y}; }
inline half __float2half_rn(float x) { return half(x); }
inline half __float2half(float x) { return half(x); }
inline float __half2float(half x) { return float(x); }
inline unsigned short __half_as_ushort(half x) {
  unsigned short bits;
  std::memcpy(&bits, &x, 2);
  return bits;
}
inline half __ushort_as_half(unsigned short bits) {
  half x;
  std::memcpy(&x, &bits, 2);
  return x;
}
inline bool __hgt(half a, half b) { return a > b; }
inline bool __hlt(half a, half b) { return a < b; }
inline half __hmax(half a, half b) { return a > b ? a : b; }
inline half __hmin(half a, half b) { return a < b ? a : b; }
inline half hexp(half x) { return half(std::exp(float(x))); }
inline half hlog(half x) { return half(std::log(float(x))); }
inline half hsqrt(half x) { return half(std::sqrt(float(x))); }
