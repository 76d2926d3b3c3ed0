// WMMA: every lane keeps the whole fragment, and the warp waits for itself around every operation.
#pragma once
#include "cuda_fp16.h"

namespace nvcuda {
namespace wmma {

struct matrix_a {};
struct matrix_b {};
struct accumulator {};
struct row_major {};
struct col_major {};
enum layout_t { mem_row_major, mem_col_major };

template <typename Use, int M, int N, int K, typename T, typename Layout = void>
struct fragment {
  static constexpr int ROWS = std::is_same<Use, matrix_b>::value ? K : M, COLUMNS = std::is_same<Use, matrix_a>::value ? K : N;
  T x[ROWS][COLUMNS];
};

template <typename U, int M, int N, int K, typename T, typename L>
void load_matrix_sync(fragment<U, M, N, K, T, L>& to, const T* from, unsigned pitch) {
  __syncwarp();
  for (int i = 0; i < to.ROWS; ++i)
    for (int j = 0; j < to.COLUMNS; ++j) to.x[i][j] = std::is_same<L, col_major>::value ? from[j * pitch + i] : from[i * pitch + j];
  __syncwarp();
}

template <int M, int N, int K, typename T>
void store_matrix_sync(T* to, const fragment<accumulator, M, N, K, T>& from, unsigned pitch, layout_t layout) {
  __syncwarp();
  for (int i = 0; i < M; ++i)
    for (int j = 0; j < N; ++j) (layout == mem_col_major ? to[j * pitch + i] : to[i * pitch + j]) = from.x[i][j];
  __syncwarp();
}

template <typename F, typename T>
void fill_fragment(F& fragment, T value) {
  for (auto& row : fragment.x)
    for (auto& cell : row) cell = value;
}

template <int M, int N, int K, typename A, typename B, typename C, typename LA, typename LB>
void mma_sync(fragment<accumulator, M, N, K, C>& d, const fragment<matrix_a, M, N, K, A, LA>& a,
              const fragment<matrix_b, M, N, K, B, LB>& b, const fragment<accumulator, M, N, K, C>& c) {
  __syncwarp();
  for (int i = 0; i < M; ++i)
    for (int j = 0; j < N; ++j) {
      float sum = c.x[i][j];
      for (int k = 0; k < K; ++k) sum += float(a.x[i][k]) * float(b.x[k][j]);
      d.x[i][j] = C(sum);
    }
  __syncwarp();
}

}  // namespace wmma
}  // namespace nvcuda
