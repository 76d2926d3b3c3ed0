// Attention on tensor cores in one pass over the keys (FlashAttention-2: Dao, 2023). A block of 4 warps computes 64 rows, a warp 16 of
// them. Scores, softmax and the running sums of a row stay in registers; keys and values pass through shared memory, KEYS at a time.
//
// Fragments are those of mma.m16n8k16 (PTX ISA): a lane holds of a 16 x 8 result the columns 2 (lane % 4) and the next, in the rows
// lane / 4 and 8 below. tests/backends/emulation/emulation.h defines the instructions for a CPU, where the tests run this very text.

namespace thresher {

typedef unsigned short Bits;  // a half or a bfloat16
typedef unsigned Pair;        // two of them, the first in the low bits

constexpr int ROWS = 64, WARPS = 4, LANES = 32;
constexpr float LOWEST = -3.0e38f, LOG2E = 1.44269504f;
enum Mask { NONE, BOOLEAN, ADDED };

#ifndef THRESHER_EMULATED
/// d += a b, a 16 x 16, b 16 x 8
template <bool BRAIN>
__device__ __forceinline__ void multiply(float (&d)[4], const Pair (&a)[4], Pair b0, Pair b1) {
  if constexpr (BRAIN)
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  else
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

/// Four 8 x 8 matrices; lane i gives the address of row i % 8 of matrix i / 8.
template <bool TRANSPOSED>
__device__ __forceinline__ void load_matrices(Pair (&to)[4], const Bits* row) {
  unsigned at = static_cast<unsigned>(__cvta_generic_to_shared(row));
  if constexpr (TRANSPOSED)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3]) : "r"(at));
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3]) : "r"(at));
}

template <bool BRAIN>
__device__ __forceinline__ Pair rounded(float first, float second) {
  Pair pair;
  if constexpr (BRAIN)
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
  else
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
  return pair;
}
#endif

/// Copies `have` rows of WIDTH values to `count` rows of PADDED in shared memory, zeros around them.
template <int WIDTH, int PADDED, int PITCH, bool WIDE>
__device__ __forceinline__ void copy_rows(Bits* to, const Bits* from, long long stride, int count, int have) {
  constexpr int PART = WIDE ? 8 : 1;
  for (int i = threadIdx.x; i < count * (PADDED / PART); i += WARPS * LANES) {
    int row = i / (PADDED / PART), column = i % (PADDED / PART) * PART;
    bool inside = row < have && column < WIDTH;
    if constexpr (WIDE) {
      uint4 value = {0, 0, 0, 0};
      if (inside) value = *reinterpret_cast<const uint4*>(from + row * stride + column);
      *reinterpret_cast<uint4*>(to + row * PITCH + column) = value;
    } else {
      to[row * PITCH + column] = inside ? from[row * stride + column] : Bits(0);
    }
  }
}

/// The largest (or the sum) over the four lanes that share a row.
__device__ __forceinline__ float row_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
  return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
}
__device__ __forceinline__ float row_sum(float x) {
  x += __shfl_xor_sync(0xffffffffu, x, 1);
  return x + __shfl_xor_sync(0xffffffffu, x, 2);
}

/// softmax(cap(scale q k^T) + mask) v for the block's rows; rows with nothing left by the mask are 0. The numbers after `softcap` are the
/// elements from one batch, head and row (and column of the mask) to the next.
/// WIDE: every row of q, k and v starts at a multiple of 16 bytes. CAPPED: cap(x) is softcap tanh(x / softcap), else x.
/// BLOCK_K: if not 0, only those blocks of BLOCK_K keys are read that are listed for the block of BLOCK_Q queries.
/// SKIPS: a tile is left out, before its values are read, if all its scores are more than `skip` under the top of their rows so far.
template <bool BRAIN, bool CAUSAL, int MASK, int E, int F, int KEYS, bool WIDE, bool CAPPED, int BLOCK_Q, int BLOCK_K, bool SKIPS,
          typename T, typename M, typename I>
__device__ __forceinline__ void flash_attention(const T* q_data, const T* k_data, const T* v_data, const M* mask, const I* blocks,
                                                const I* counts, T* out_data, int heads, int group, int rows, int keys, float scale,
                                                float softcap, float skip, long long list_batch, long long list_head, int most,
                                                long long q_batch, long long q_head, long long q_row,
                                                long long k_batch, long long k_head, long long k_row,
                                                long long v_batch, long long v_head, long long v_row,
                                                long long mask_batch, long long mask_head, long long mask_row,
                                                long long mask_column) {
  constexpr int EP = (E + 15) / 16 * 16, FP = (F + 15) / 16 * 16;  // whole fragments
  constexpr int Q_PITCH = EP + 8, V_PITCH = FP + 8;                // 8 more: the rows of a matrix lie in different banks
  __align__(16) __shared__ Bits q_tile[ROWS * Q_PITCH], k_tile[KEYS * Q_PITCH], v_tile[KEYS * V_PITCH];
  const int warp = threadIdx.x / LANES, lane = threadIdx.x % LANES;
  const int head = blockIdx.x % heads, batch = blockIdx.x / heads, first = blockIdx.y * ROWS;
  const Bits* q = reinterpret_cast<const Bits*>(q_data) + batch * q_batch + head * q_head + first * q_row;
  const Bits* k = reinterpret_cast<const Bits*>(k_data) + batch * k_batch + head / group * k_head;
  const Bits* v = reinterpret_cast<const Bits*>(v_data) + batch * v_batch + head / group * v_head;

  copy_rows<E, EP, Q_PITCH, WIDE>(q_tile, q, q_row, ROWS, rows - first);
  __syncthreads();
  Pair q_part[EP / 16][4];
#pragma unroll
  for (int e = 0; e < EP / 16; ++e)
    load_matrices<false>(q_part[e], q_tile + (warp * 16 + lane % 16) * Q_PITCH + e * 16 + lane / 16 * 8);

  float mixed[FP / 8][4] = {}, top[2] = {LOWEST, LOWEST}, sum[2] = {0.0f, 0.0f};
  const int row = first + warp * 16 + lane / 4;  // and row + 8
  const int end = CAUSAL && first + ROWS < keys ? first + ROWS : keys;
  constexpr int PARTS = BLOCK_K ? BLOCK_K / KEYS : 1;  // tiles of a listed block
  int steps = (end + KEYS - 1) / KEYS;
  if constexpr (BLOCK_K > 0) {
    const long long list = batch * list_batch + head * list_head + first / BLOCK_Q;
    steps = counts[list] * PARTS;
    blocks += list * most;
  }
  for (int step = 0; step < steps; ++step) {
    int start = step * KEYS;
    if constexpr (BLOCK_K > 0) start = blocks[step / PARTS] * BLOCK_K + step % PARTS * KEYS;
    if (start >= end) continue;  // the same for all threads
    __syncthreads();
    copy_rows<E, EP, Q_PITCH, WIDE>(k_tile, k + start * k_row, k_row, KEYS, keys - start);
    if constexpr (!SKIPS) copy_rows<F, FP, V_PITCH, WIDE>(v_tile, v + start * v_row, v_row, KEYS, keys - start);
    __syncthreads();

    float score[KEYS / 8][4] = {};
#pragma unroll
    for (int e = 0; e < EP / 16; ++e)
#pragma unroll
      for (int n = 0; n < KEYS / 16; ++n) {
        Pair part[4];
        load_matrices<false>(part, k_tile + (n * 16 + lane % 8 + lane / 16 * 8) * Q_PITCH + e * 16 + lane / 8 % 2 * 8);
        multiply<BRAIN>(score[2 * n], q_part[e], part[0], part[1]);
        multiply<BRAIN>(score[2 * n + 1], q_part[e], part[2], part[3]);
      }

    float peak[2] = {LOWEST, LOWEST};
#pragma unroll
    for (int n = 0; n < KEYS / 8; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        int at = row + i / 2 * 8, key = start + n * 8 + lane % 4 * 2 + i % 2;
        float value = score[n][i] * (scale * LOG2E);
        if constexpr (CAPPED) value = softcap * LOG2E * tanhf(score[n][i] * scale / softcap);
        bool seen = key < keys && (!CAUSAL || key <= at);
        if constexpr (MASK != NONE)
          if (seen && at < rows) {
            M cell = mask[batch * mask_batch + head * mask_head + at * mask_row + key * mask_column];
            if constexpr (MASK == BOOLEAN) seen = cell != M(0);
            else value = fmaxf(value + float(cell) * LOG2E, LOWEST);
          }
        score[n][i] = seen ? value : LOWEST;
        peak[i / 2] = fmaxf(peak[i / 2], score[n][i]);
      }
#pragma unroll
    for (int half = 0; half < 2; ++half) peak[half] = row_max(peak[half]);
    if constexpr (SKIPS) {
      bool small = true;
#pragma unroll
      for (int half = 0; half < 2; ++half)
        if (row + half * 8 < rows && peak[half] > LOWEST) small = small && peak[half] - top[half] < -skip * LOG2E;
      if (__syncthreads_and(small)) continue;
      copy_rows<F, FP, V_PITCH, WIDE>(v_tile, v + start * v_row, v_row, KEYS, keys - start);
      __syncthreads();
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float above = fmaxf(top[half], peak[half]), shrink = exp2f(top[half] - above);
      top[half] = above;
      sum[half] *= shrink;
#pragma unroll
      for (int n = 0; n < FP / 8; ++n) {
        mixed[n][2 * half] *= shrink;
        mixed[n][2 * half + 1] *= shrink;
      }
    }
#pragma unroll
    for (int n = 0; n < KEYS / 8; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        score[n][i] = score[n][i] > LOWEST ? exp2f(score[n][i] - top[i / 2]) : 0.0f;
        sum[i / 2] += score[n][i];
      }

#pragma unroll
    for (int s = 0; s < KEYS / 16; ++s) {
      Pair weight[4] = {rounded<BRAIN>(score[2 * s][0], score[2 * s][1]), rounded<BRAIN>(score[2 * s][2], score[2 * s][3]),
                        rounded<BRAIN>(score[2 * s + 1][0], score[2 * s + 1][1]),
                        rounded<BRAIN>(score[2 * s + 1][2], score[2 * s + 1][3])};
#pragma unroll
      for (int n = 0; n < FP / 16; ++n) {
        Pair part[4];
        load_matrices<true>(part, v_tile + (s * 16 + lane % 16) * V_PITCH + n * 16 + lane / 16 * 8);
        multiply<BRAIN>(mixed[2 * n], weight, part[0], part[1]);
        multiply<BRAIN>(mixed[2 * n + 1], weight, part[2], part[3]);
      }
    }
  }

  Bits* out = reinterpret_cast<Bits*>(out_data) + (static_cast<long long>(blockIdx.x) * rows + row) * F;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float whole = row_sum(sum[half]), inverse = whole > 0.0f ? 1.0f / whole : 0.0f;
    if (row + half * 8 < rows)
#pragma unroll
      for (int n = 0; n < FP / 8; ++n) {
        int column = n * 8 + lane % 4 * 2;
        Pair pair = rounded<BRAIN>(mixed[n][2 * half] * inverse, mixed[n][2 * half + 1] * inverse);
        Bits* to = out + half * 8 * F + column;
        if constexpr (F % 2 == 0) {
          if (column < F) *reinterpret_cast<Pair*>(to) = pair;
        } else {
          if (column < F) to[0] = Bits(pair & 0xffff);
          if (column + 1 < F) to[1] = Bits(pair >> 16);
        }
      }
  }
}

}  // namespace thresher
