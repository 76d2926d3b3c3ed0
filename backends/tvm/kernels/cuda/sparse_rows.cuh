// A few rows times a weight that is stored with its inputs first, [K, N]: an input that is 0 in all rows saves a row of memory.
// A block takes a slice of the inputs and THREADS * COLUMNS columns; what the slices find is added by another kernel.
// tests/backends/emulation/emulation.h runs this very text on a CPU.

namespace thresher {

constexpr int THREADS = 128;

/// part[slice][m][n] = sum over the inputs k of the slice that are not 0 in some row of x[m][k] w[k][n]
template <int M, int K, int N, int SLICE, int COLUMNS, typename T>
__device__ __forceinline__ void sparse_rows(const T* x, const T* w, float* part) {
  struct __align__(16) Wide { T column[COLUMNS]; };
  __shared__ int listed[SLICE], counts[THREADS / 32];
  __shared__ float values[SLICE * M];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int first = blockIdx.y * SLICE, last = first + SLICE < K ? first + SLICE : K;

  int total = 0;  // the same for all threads
  for (int start = first; start < last; start += THREADS) {
    const int k = start + threadIdx.x;
    float own[M];
    bool some = false;  // NaN counts
#pragma unroll
    for (int m = 0; m < M; ++m) {
      own[m] = k < last ? static_cast<float>(x[m * K + k]) : 0.0f;
      some = some || !(own[m] == 0.0f);
    }
    const unsigned votes = __ballot_sync(0xffffffffu, some);
    if (lane == 0) counts[warp] = __popc(votes);
    __syncthreads();
    int at = total + __popc(votes & ((1u << lane) - 1));
    for (int i = 0; i < THREADS / 32; ++i) {
      if (i < warp) at += counts[i];
      total += counts[i];
    }
    if (some) {
      listed[at] = k;
#pragma unroll
      for (int m = 0; m < M; ++m) values[at * M + m] = own[m];
    }
    __syncthreads();
  }

  const int column = (blockIdx.x * THREADS + threadIdx.x) * COLUMNS;
  if (column >= N) return;
  float sum[M][COLUMNS] = {};
#pragma unroll 4
  for (int i = 0; i < total; ++i) {
    const Wide row = *reinterpret_cast<const Wide*>(w + static_cast<long long>(listed[i]) * N + column);
#pragma unroll
    for (int m = 0; m < M; ++m)
#pragma unroll
      for (int c = 0; c < COLUMNS; ++c) sum[m][c] += values[i * M + m] * static_cast<float>(row.column[c]);
  }
#pragma unroll
  for (int m = 0; m < M; ++m)
#pragma unroll
    for (int c = 0; c < COLUMNS; ++c) part[(static_cast<long long>(blockIdx.y) * M + m) * N + column + c] = sum[m][c];
}

}  // namespace thresher
