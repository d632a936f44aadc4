// Output rows of several tokens that share a path: y[t] = sum over k of weight[t][k] * rows[k].
#pragma once
#include "dots.h"

namespace CMM_ISA {

enum Store { kStore, kStream, kAdd };  // kStream goes past the caches, kAdd adds to what is there

template <Store kHow, class Y>
CMM_INLINE void put(typename Y::type* y, vf a) {
  if constexpr (kHow == kAdd) {
    Y::store(y, Y::load(y) + a);
  } else {
#if defined(__AVX512F__)
    if constexpr (kHow == kStream && sizeof(typename Y::type) == 4) {
      _mm512_stream_ps((float*)y, (__m512)a);
      return;
    }
#elif defined(__AVX2__)
    if constexpr (kHow == kStream && sizeof(typename Y::type) == 4) {
      _mm256_stream_ps((float*)y, (__m256)a);
      return;
    }
#endif
    Y::store(y, a);
  }
}

// Vectors of output held for each of T tokens. With 16 registers, eight sums hide the latency of a multiply-add, and a whole line of a
// token is written at once, which stores past the caches need.
#if defined(__AVX512F__)
template <int T>
constexpr int columns = 3;
#else
template <int T>
constexpr int columns = T > 2 ? 2 : 8 / T;
#endif

// weights [T, stride] float32, rows [levels].
template <int T, Store kHow, class Y, class W>
struct Combine {
  static CMM_INLINE void run(const float* const* weights, const typename W::type* const* rows, int levels, typename Y::type* const* y,
                             int64_t hidden, const char* const* ahead) {
    constexpr int kColumns = columns<T>, kLines = (kColumns * kLanes * sizeof(typename Y::type) + 63) / 64;
    int64_t i = 0;
    for (; i + kColumns * kLanes <= hidden; i += kColumns * kLanes) {
      vf total[T][kColumns];
      CMM_UNROLL for (int t = 0; t < T; ++t) CMM_UNROLL for (int j = 0; j < kColumns; ++j) total[t][j] = zero();
      for (int k = 0; k < levels; ++k) {
        if (k < kAheadRows * kLines) prefetch<Y, T>(ahead[k % kAheadRows] + i * sizeof(typename Y::type) + k / kAheadRows * 64);
        vf w[kColumns];
        CMM_UNROLL for (int j = 0; j < kColumns; ++j) {
          w[j] = W::load(rows[k] + i + j * kLanes);
          if (T > 2) hold_row(w[j]);
        }
        CMM_UNROLL for (int t = 0; t < T; ++t) {
          vf a = splat(weights[t][k]);
          hold(a);
          CMM_UNROLL for (int j = 0; j < kColumns; ++j) total[t][j] += a * w[j];
        }
      }
      CMM_UNROLL for (int t = 0; t < T; ++t) CMM_UNROLL for (int j = 0; j < kColumns; ++j) put<kHow, Y>(y[t] + i + j * kLanes, total[t][j]);
    }
    for (; i < hidden; i += kLanes) {
      const int left = (int)(hidden - i < kLanes ? hidden - i : kLanes);
      for (int t = 0; t < T; ++t) {
        if (left == kLanes) {
          vf total = zero();
          for (int k = 0; k < levels; ++k) total += weights[t][k] * W::load(rows[k] + i);
          put<kHow, Y>(y[t] + i, total);
          continue;
        }
        vf total = kHow == kAdd ? Y::load_part(y[t] + i, left) : zero();
        for (int k = 0; k < levels; ++k) total += weights[t][k] * W::load_part(rows[k] + i, left);
        Y::store_part(y[t] + i, total, left);
      }
    }
  }
};

#if defined(__AVX512BF16__)
// Two levels a multiply: rows k and k + 1 interleaved element by element, weights as pairs of bfloat16.
template <int T, Store kHow>
struct CombinePairs {
  static CMM_INLINE void run(const uint32_t* const* weights, const uint16_t* const* rows, int levels, uint16_t* const* y, int64_t hidden,
                             const char* const* ahead) {
    // unpacking works within 128 bits: the low sums hold columns 0-3, 8-11, ..., the high ones 4-7, 12-15, ...
    alignas(64) uint16_t order[32];
    for (int c = 0; c < 32; ++c) order[c] = (uint16_t)((c % 8 < 4 ? 0 : 16) + c / 8 * 4 + c % 4);
    const __m512i sorted = _mm512_load_si512(order);
    for (int64_t i = 0; i < hidden; i += 32) {
      const int left = (int)(hidden - i < 32 ? hidden - i : 32);
      const __mmask32 mask = (__mmask32)((uint64_t(1) << left) - 1);
      __m512 low[T], high[T];
      CMM_UNROLL for (int t = 0; t < T; ++t) low[t] = high[t] = _mm512_setzero_ps();
      for (int k = 0; k < levels; k += 2) {
        prefetch<BF16, T>(ahead[k / 2 % kAheadRows] + i * 2);
        __m512i first = _mm512_maskz_loadu_epi16(mask, rows[k] + i);
        __m512i second = k + 1 < levels ? _mm512_maskz_loadu_epi16(mask, rows[k + 1] + i) : _mm512_setzero_si512();
        __m512bh even = (__m512bh)_mm512_unpacklo_epi16(first, second), odd = (__m512bh)_mm512_unpackhi_epi16(first, second);
        CMM_UNROLL for (int t = 0; t < T; ++t) {
          __m512bh a = (__m512bh)_mm512_set1_epi32((int)weights[t][k / 2]);
          low[t] = _mm512_dpbf16_ps(low[t], a, even);
          high[t] = _mm512_dpbf16_ps(high[t], a, odd);
        }
      }
      CMM_UNROLL for (int t = 0; t < T; ++t) {
        __m512i out = _mm512_permutexvar_epi16(sorted, (__m512i)_mm512_cvtne2ps_pbh(high[t], low[t]));
        if (kHow == kStream)
          _mm512_stream_si512((__m512i*)(y[t] + i), out);
        else
          _mm512_mask_storeu_epi16(y[t] + i, mask, out);
      }
    }
  }
};
#endif

}  // namespace CMM_ISA
