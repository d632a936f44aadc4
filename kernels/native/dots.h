// Dot products of several tokens with one node, or with a node and both its children, and sums of weighted rows.
// Tokens are blocked so that a row is loaded once for all of them; prefetches of later rows are spread, a line a step.
#pragma once
#include "simd.h"

namespace CMM_ISA {

// Tokens a block: 3 nodes x 8 tokens fill 24 of 32 vector registers, 3 x 4 fill 12 of 16.
#if defined(__AVX512F__)
constexpr int kBlock = 8;
#else
constexpr int kBlock = 4;
#endif
constexpr int kAheadRows = 4;  // rows that are prefetched meanwhile

// Rows of the next calls come into the first-level cache where they fit beside the tokens of this one and its rows: those of 16-bit
// elements, or of few tokens. Others come into the second.
template <class E, int T>
CMM_INLINE void prefetch(const void* p) {
  __builtin_prefetch(p, 0, sizeof(typename E::type) == 2 || 2 * T <= kBlock ? 3 : 2);
}

// One multiply-accumulate step on `kStep` elements of rows of types X and W.
template <class X, class W>
struct Step {
  static constexpr int kStep = kLanes;
  static constexpr bool kHold = true;
  typedef vf in;
  typedef vf total;
  static CMM_INLINE total none() { return zero(); }
  static CMM_INLINE vf to_float(total a) { return a; }
  static CMM_INLINE in load_x(const typename X::type* p) { return X::load(p); }
  static CMM_INLINE in load_w(const typename W::type* p) { return W::load(p); }
  static CMM_INLINE in part_x(const typename X::type* p, int n) { return X::load_part(p, n); }
  static CMM_INLINE in part_w(const typename W::type* p, int n) { return W::load_part(p, n); }
  static CMM_INLINE vf add(vf sum, in x, in w) { return sum + x * w; }
};

#if defined(__AVX512BF16__)
// Pairs of bfloat16 are multiplied and added in float32 by one instruction.
template <>
struct Step<BF16, BF16> {
  static constexpr int kStep = 32;
  static constexpr bool kHold = true;
  typedef __m512i in;
  typedef vf total;
  static CMM_INLINE total none() { return zero(); }
  static CMM_INLINE vf to_float(total a) { return a; }
  static CMM_INLINE in load_x(const uint16_t* p) { return _mm512_loadu_si512(p); }
  static CMM_INLINE in load_w(const uint16_t* p) { return _mm512_loadu_si512(p); }
  static CMM_INLINE in part_x(const uint16_t* p, int n) { return _mm512_maskz_loadu_epi16((1u << n) - 1, p); }
  static CMM_INLINE in part_w(const uint16_t* p, int n) { return part_x(p, n); }
  static CMM_INLINE vf add(vf sum, in x, in w) { return (vf)_mm512_dpbf16_ps((__m512)sum, (__m512bh)x, (__m512bh)w); }
};
#endif

// out[i] = sum of the lanes of sums[i], by a transposing tree: three operations halve two vectors into one.
template <int N>
CMM_INLINE void reduce(const vf (&sums)[N], float (&out)[N]) {
#if defined(__AVX512F__)
  constexpr int kGroup = 8;
  CMM_UNROLL for (int first = 0; first < N; first += kGroup) {
    __m512 quads[2];
    CMM_UNROLL for (int half = 0; half < 2; ++half) {
      __m512 a[4], pairs[2];
      CMM_UNROLL for (int i = 0; i < 4; ++i) a[i] = first + 4 * half + i < N ? (__m512)sums[first + 4 * half + i] : _mm512_setzero_ps();
      CMM_UNROLL for (int i = 0; i < 2; ++i)
        pairs[i] = _mm512_add_ps(_mm512_unpacklo_ps(a[2 * i], a[2 * i + 1]), _mm512_unpackhi_ps(a[2 * i], a[2 * i + 1]));
      __m512d low = _mm512_unpacklo_pd(_mm512_castps_pd(pairs[0]), _mm512_castps_pd(pairs[1]));
      __m512d high = _mm512_unpackhi_pd(_mm512_castps_pd(pairs[0]), _mm512_castps_pd(pairs[1]));
      quads[half] = _mm512_add_ps(_mm512_castpd_ps(low), _mm512_castpd_ps(high));
    }
    __m512 both = _mm512_add_ps(_mm512_shuffle_f32x4(quads[0], quads[1], 0x88), _mm512_shuffle_f32x4(quads[0], quads[1], 0xdd));
    both = _mm512_add_ps(_mm512_shuffle_f32x4(both, both, 0x88), _mm512_shuffle_f32x4(both, both, 0xdd));
    // a masked store cannot be forwarded to the loads that wait for it
    if (first + kGroup <= N)
      _mm256_storeu_ps(out + first, _mm512_castps512_ps256(both));
    else
      _mm512_mask_storeu_ps(out + first, (__mmask16)((1u << (N - first)) - 1), both);
  }
#elif defined(__AVX2__)
  constexpr int kGroup = 4;
  CMM_UNROLL for (int first = 0; first < N; first += kGroup) {
    __m256 a[kGroup], pairs[2];
    CMM_UNROLL for (int i = 0; i < kGroup; ++i) a[i] = first + i < N ? (__m256)sums[first + i] : _mm256_setzero_ps();
    CMM_UNROLL for (int i = 0; i < 2; ++i)
      pairs[i] = _mm256_add_ps(_mm256_unpacklo_ps(a[2 * i], a[2 * i + 1]), _mm256_unpackhi_ps(a[2 * i], a[2 * i + 1]));
    __m256d low = _mm256_unpacklo_pd(_mm256_castps_pd(pairs[0]), _mm256_castps_pd(pairs[1]));
    __m256d high = _mm256_unpackhi_pd(_mm256_castps_pd(pairs[0]), _mm256_castps_pd(pairs[1]));
    const __m256 quads = _mm256_add_ps(_mm256_castpd_ps(low), _mm256_castpd_ps(high));
    const __m128 both = _mm_add_ps(_mm256_castps256_ps128(quads), _mm256_extractf128_ps(quads, 1));
    if (first + kGroup <= N) {
      _mm_storeu_ps(out + first, both);
    } else {
      float parts[kGroup];
      _mm_storeu_ps(parts, both);
      CMM_UNROLL for (int i = 0; i < kGroup; ++i)
        if (first + i < N) out[first + i] = parts[i];
    }
  }
#else
  CMM_UNROLL for (int i = 0; i < N; ++i) out[i] = sum(sums[i]);
#endif
}

// logits[n * T + t] = x[t] . nodes[n]; `ahead` are rows to prefetch meanwhile.
template <int kNodes, int T, class X, class W>
CMM_INLINE void dots(const typename X::type* const* x, const typename W::type* const* nodes, int64_t hidden, const char* const* ahead,
                     float (&logits)[kNodes * T]) {
  typedef Step<X, W> S;
  const typename X::type* rows[T];
  CMM_UNROLL for (int t = 0; t < T; ++t) rows[t] = x[t];
  const typename W::type* w[kNodes];
  CMM_UNROLL for (int n = 0; n < kNodes; ++n) w[n] = nodes[n];
  const char* later[kAheadRows];
  CMM_UNROLL for (int r = 0; r < kAheadRows; ++r) later[r] = ahead[r];
  constexpr int kLineStep = S::kStep * sizeof(typename X::type) < 64 ? 64 / (S::kStep * sizeof(typename X::type)) : 1;
  typename S::total sums[kNodes * T];
  CMM_UNROLL for (int i = 0; i < kNodes * T; ++i) sums[i] = S::none();
  int64_t i = 0;
  for (; i + S::kStep * kLineStep <= hidden; i += S::kStep * kLineStep) {
    // one index for all rows: compilers else advance a pointer for each, and read those that find no register from the stack in each step
    if (kNodes + T > 8) asm("" : "+r"(i));
    CMM_UNROLL for (int r = 0; r < kAheadRows; ++r) prefetch<X, T>(later[r] + i * sizeof(typename X::type));
    CMM_UNROLL for (int u = 0; u < kLineStep; ++u) {
      const int64_t at = i + u * S::kStep;
      typename S::in row[kNodes];
      CMM_UNROLL for (int n = 0; n < kNodes; ++n) {
        row[n] = S::load_w(w[n] + at);
        if (T > 2 && S::kHold) hold_row(row[n]);
      }
      CMM_UNROLL for (int t = 0; t < T; ++t) {
        typename S::in token = S::load_x(rows[t] + at);
        if (kNodes > 1 && S::kHold) hold(token);
        CMM_UNROLL for (int n = 0; n < kNodes; ++n) sums[n * T + t] = S::add(sums[n * T + t], token, row[n]);
      }
    }
  }
  for (; i < hidden; i += S::kStep) {
    const int left = (int)(hidden - i < S::kStep ? hidden - i : S::kStep);
    CMM_UNROLL for (int t = 0; t < T; ++t) {
      typename S::in token = S::part_x(rows[t] + i, left);
      CMM_UNROLL for (int n = 0; n < kNodes; ++n) sums[n * T + t] = S::add(sums[n * T + t], token, S::part_w(w[n] + i, left));
    }
  }
  vf found[kNodes * T];
  CMM_UNROLL for (int i = 0; i < kNodes * T; ++i) found[i] = S::to_float(sums[i]);
  reduce(found, logits);
}

}  // namespace CMM_ISA
