// What flash_attention.cuh needs of a GPU, for a CPU: a block is 128 threads, and what a warp does together is done by handing operands
// over between two barriers. The layouts of the fragments are written down from the PTX ISA, independently of the kernel.
#define THRESHER_EMULATED
#define __device__
#define __forceinline__ inline
#define __align__(n) alignas(n)
#define __shared__ static

#include <barrier>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <thread>
#include <vector>

struct Index {
  int x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
thread_local Index threadIdx, blockIdx;

struct Warp {
  std::barrier<> gate{32};
  unsigned words[32][6];
  const unsigned short* rows[32];
  float numbers[32];
};
Warp warps[4];
std::barrier<> block(128);

inline Warp& own() { return warps[threadIdx.x / 32]; }
inline int lane() { return threadIdx.x % 32; }
inline void __syncthreads() { block.arrive_and_wait(); }
inline float __shfl_xor_sync(unsigned, float value, int distance) {
  Warp& warp = own();
  warp.numbers[lane()] = value;
  warp.gate.arrive_and_wait();
  float found = warp.numbers[lane() ^ distance];
  warp.gate.arrive_and_wait();
  return found;
}

template <bool BRAIN>
float number(unsigned short bits) {
  if (BRAIN) {
    uint32_t word = uint32_t(bits) << 16;
    float value;
    std::memcpy(&value, &word, 4);
    return value;
  }
  _Float16 value;
  std::memcpy(&value, &bits, 2);
  return value;
}

template <bool BRAIN>
unsigned short bits_of(float value) {
  unsigned short bits;
  if (BRAIN) {
    uint32_t word;
    std::memcpy(&word, &value, 4);
    return (word + 0x7fff + (word >> 16 & 1)) >> 16;
  }
  _Float16 half = value;
  std::memcpy(&bits, &half, 2);
  return bits;
}

namespace thresher {

template <bool BRAIN>
unsigned rounded(float first, float second) {
  return bits_of<BRAIN>(first) | unsigned(bits_of<BRAIN>(second)) << 16;
}

// ldmatrix .x4: the result i of a lane is of matrix i the row lane / 4, columns 2 (lane % 4) and the next; transposed the other way round
template <bool TRANSPOSED>
void load_matrices(unsigned (&to)[4], const unsigned short* row) {
  Warp& warp = own();
  warp.rows[lane()] = row;
  warp.gate.arrive_and_wait();
  int line = lane() / 4, pair = lane() % 4 * 2;
  for (int i = 0; i < 4; ++i) {
    const unsigned short** rows = warp.rows + 8 * i;
    unsigned first = TRANSPOSED ? rows[pair][line] : rows[line][pair];
    unsigned second = TRANSPOSED ? rows[pair + 1][line] : rows[line][pair + 1];
    to[i] = first | second << 16;
  }
  warp.gate.arrive_and_wait();
}

// mma.m16n8k16: A[i][k] is in lane 4 (i % 8) + k % 8 / 2, register i / 8 + 2 (k / 8); B[k][j] in lane 4 j + k % 8 / 2, register k / 8;
// C[i][j] in lane 4 (i % 8) + j / 2, register 2 (i / 8) + j % 2
template <bool BRAIN>
void multiply(float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  Warp& warp = own();
  unsigned mine[6] = {a[0], a[1], a[2], a[3], b0, b1};
  std::memcpy(warp.words[lane()], mine, sizeof mine);
  warp.gate.arrive_and_wait();
  for (int r = 0; r < 4; ++r) {
    int i = lane() / 4 + r / 2 * 8, j = lane() % 4 * 2 + r % 2;
    for (int k = 0; k < 16; ++k) {
      unsigned left = warp.words[i % 8 * 4 + k % 8 / 2][i / 8 + k / 8 * 2], right = warp.words[j * 4 + k % 8 / 2][4 + k / 8];
      d[r] += number<BRAIN>(left >> k % 2 * 16) * number<BRAIN>(right >> k % 2 * 16);
    }
  }
  warp.gate.arrive_and_wait();
}

}  // namespace thresher

template <typename Kernel>
void launch(int across, int down, Kernel kernel) {
  for (int y = 0; y < down; ++y)
    for (int x = 0; x < across; ++x) {
      std::vector<std::thread> threads;
      for (int t = 0; t < 128; ++t)
        threads.emplace_back([=] {
          threadIdx = {t, 0}, blockIdx = {x, y};
          kernel();
        });
      for (std::thread& thread : threads) thread.join();
    }
}
