// A GPU's block of threads on a CPU: enough of CUDA C++ to run generated kernels. Every thread is a fiber; it runs until it waits for its
// block or its warp. What a warp does together (shuffles, matrix instructions) is done by handing operands over between two such waits.
#pragma once
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#define THRESHER_EMULATED
#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __host__
#define __align__(n) __attribute__((aligned(n)))
#define __shared__ static  // blocks run one after the other

typedef unsigned char uchar;
typedef unsigned int uint;

struct Index {
  int x, y, z;
};
inline Index threadIdx, blockIdx;

namespace emulated {

struct Gate {  // a barrier for `count` fibers
  int count, arrived = 0;
  long passed = 0;
};

struct Warp {
  Gate gate{32};
  unsigned words[32][6];
  const unsigned short* rows[32];
  double numbers[32];
};

constexpr size_t STACK = 1 << 18;

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[STACK]};
  Index index;
  int number;
  bool done;
};

inline std::vector<std::unique_ptr<Fiber>> fibers;
inline std::vector<std::unique_ptr<Warp>> warps;
inline Gate block;
inline ucontext_t scheduler;
inline Fiber* running;
inline std::function<void()> kernel;

inline void wait(Gate& gate) {
  long passed = gate.passed;
  if (++gate.arrived == gate.count) {
    gate.arrived = 0;
    ++gate.passed;
    return;
  }
  while (gate.passed == passed) swapcontext(&running->context, &scheduler);
}

inline int lane() { return running->number % 32; }
inline Warp& warp() { return *warps[running->number / 32]; }

inline void enter() {
  kernel();
  running->done = true;
  swapcontext(&running->context, &scheduler);
}

/// Every block of the grid with every one of its threads. False: threads waited for each other for ever.
inline bool launch(Index grid, Index threads, std::function<void()> body) {
  kernel = body;
  int count = threads.x * threads.y * threads.z;
  for (int z = 0; z < grid.z; ++z)
    for (int y = 0; y < grid.y; ++y)
      for (int x = 0; x < grid.x; ++x) {
        warps.clear();
        block = Gate{count};
        while (int(fibers.size()) < count) fibers.push_back(std::make_unique<Fiber>());
        for (int i = 0; i < count; ++i) {
          if (i % 32 == 0) warps.push_back(std::make_unique<Warp>());
          Fiber& fiber = *fibers[i];
          fiber.number = i, fiber.done = false;
          fiber.index = {i % threads.x, i / threads.x % threads.y, i / threads.x / threads.y};
          getcontext(&fiber.context);
          fiber.context.uc_stack.ss_sp = fiber.stack.get();
          fiber.context.uc_stack.ss_size = STACK;
          makecontext(&fiber.context, enter, 0);
        }
        warps.back()->gate.count = (count - 1) % 32 + 1;
        int left = count;
        for (long idle = 0; left; ++idle) {
          if (idle > 1000000) return false;
          for (int i = 0; i < count; ++i)
            if (!fibers[i]->done) {
              running = fibers[i].get();
              threadIdx = running->index, blockIdx = {x, y, z};
              swapcontext(&scheduler, &running->context);
              if (fibers[i]->done) --left;
            }
        }
      }
  return true;
}

template <typename T>
T exchanged(T value, int from) {
  Warp& own = warp();
  std::memcpy(&own.numbers[lane()], &value, sizeof value);
  wait(own.gate);
  T found;
  std::memcpy(&found, &own.numbers[from >= 0 && from < 32 ? from : lane()], sizeof found);
  wait(own.gate);
  return found;
}

}  // namespace emulated

inline void __syncthreads() { emulated::wait(emulated::block); }
/// Whether it holds for all threads of a block: everyone has told before the second gate, and read before the third.
inline int __syncthreads_and(int holds) {
  static bool all;
  __syncthreads();
  all = true;
  __syncthreads();
  if (!holds) all = false;
  __syncthreads();
  return all;
}
inline void __syncwarp(unsigned = 0) { emulated::wait(emulated::warp().gate); }
inline unsigned __activemask() { return 0xffffffffu; }
inline unsigned __ballot_sync(unsigned, bool vote) {
  emulated::warp().words[emulated::lane()][0] = vote;
  emulated::wait(emulated::warp().gate);
  unsigned votes = 0;
  for (int i = 0; i < 32; ++i) votes |= emulated::warp().words[i][0] << i;
  emulated::wait(emulated::warp().gate);
  return votes;
}
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
template <typename T>
T __shfl_xor_sync(unsigned, T value, int distance, int = 32) {
  return emulated::exchanged(value, emulated::lane() ^ distance);
}
template <typename T>
T __shfl_down_sync(unsigned, T value, int distance, int = 32) {
  return emulated::exchanged(value, emulated::lane() + distance);
}
template <typename T>
T __shfl_sync(unsigned, T value, int from, int = 32) {
  return emulated::exchanged(value, from);
}

#define VECTOR(type, name)                                                                          \
  struct alignas(2 * sizeof(type)) name##2 { type x, y; };                                          \
  struct alignas(sizeof(type)) name##3 { type x, y, z; };                                           \
  struct alignas(sizeof(type) == 8 ? 16 : 4 * sizeof(type)) name##4 { type x, y, z, w; };           \
  inline name##2 make_##name##2(type x, type y) { return {x, y}; }                                  \
  inline name##4 make_##name##4(type x, type y, type z, type w) { return {x, y, z, w}; }
VECTOR(float, float)
VECTOR(int, int)
VECTOR(unsigned, uint)
VECTOR(short, short)
VECTOR(unsigned short, ushort)
VECTOR(signed char, char)
VECTOR(unsigned char, uchar)
VECTOR(long long, longlong)
VECTOR(double, double)
#undef VECTOR

using std::max;
using std::min;
inline float __expf(float x) { return std::exp(x); }
inline float __logf(float x) { return std::log(x); }
inline float __fdividef(float x, float y) { return x / y; }
inline float __frcp_rn(float x) { return 1 / x; }
inline float rsqrtf(float x) { return 1 / std::sqrt(x); }
template <typename T>
T __ldg(const T* at) {
  return *at;
}
inline float __int_as_float(int bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
inline int __float_as_int(float value) {
  int bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

template <bool BRAIN>
float number(unsigned short bits) {
  if (BRAIN) return __int_as_float(int(uint32_t(bits) << 16));
  _Float16 value;
  std::memcpy(&value, &bits, 2);
  return value;
}

template <bool BRAIN>
unsigned short bits_of(float value) {
  if (BRAIN) {
    uint32_t word = __float_as_int(value);
    return (word + 0x7fff + (word >> 16 & 1)) >> 16;
  }
  _Float16 half = value;
  unsigned short bits;
  std::memcpy(&bits, &half, 2);
  return bits;
}

// The instructions of flash_attention.cuh, by the layouts of the PTX ISA, which are written down here independently of the kernel.
namespace thresher {

template <bool BRAIN>
unsigned rounded(float first, float second) {
  return bits_of<BRAIN>(first) | unsigned(bits_of<BRAIN>(second)) << 16;
}

// ldmatrix .x4: the result i of a lane is of matrix i the row lane / 4, columns 2 (lane % 4) and the next; transposed the other way round
template <bool TRANSPOSED>
void load_matrices(unsigned (&to)[4], const unsigned short* row) {
  emulated::Warp& warp = emulated::warp();
  int lane = emulated::lane(), line = lane / 4, pair = lane % 4 * 2;
  warp.rows[lane] = row;
  emulated::wait(warp.gate);
  for (int i = 0; i < 4; ++i) {
    const unsigned short** rows = warp.rows + 8 * i;
    unsigned first = TRANSPOSED ? rows[pair][line] : rows[line][pair];
    unsigned second = TRANSPOSED ? rows[pair + 1][line] : rows[line][pair + 1];
    to[i] = first | second << 16;
  }
  emulated::wait(warp.gate);
}

// mma.m16n8k16: A[i][k] is in lane 4 (i % 8) + k % 8 / 2, register i / 8 + 2 (k / 8); B[k][j] in lane 4 j + k % 8 / 2, register k / 8;
// C[i][j] in lane 4 (i % 8) + j / 2, register 2 (i / 8) + j % 2
template <bool BRAIN>
void multiply(float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  emulated::Warp& warp = emulated::warp();
  int lane = emulated::lane();
  unsigned mine[6] = {a[0], a[1], a[2], a[3], b0, b1};
  std::memcpy(warp.words[lane], mine, sizeof mine);
  emulated::wait(warp.gate);
  for (int r = 0; r < 4; ++r) {
    int i = lane / 4 + r / 2 * 8, j = lane % 4 * 2 + r % 2;
    for (int k = 0; k < 16; ++k) {
      unsigned left = warp.words[i % 8 * 4 + k % 8 / 2][i / 8 + k / 8 * 2], right = warp.words[j * 4 + k % 8 / 2][4 + k / 8];
      d[r] += number<BRAIN>(left >> k % 2 * 16) * number<BRAIN>(right >> k % 2 * 16);
    }
  }
  emulated::wait(warp.gate);
}

}  // namespace thresher
