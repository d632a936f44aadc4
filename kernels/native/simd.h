// Vectors of one instruction set, written with the compiler's vector extensions; CMM_LANES floats each.
// Included by one isa_*.cpp after it has defined CMM_ISA (a namespace of its own) and CMM_LANES.
#pragma once
#include <stdint.h>
#include <string.h>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace CMM_ISA {

constexpr int kLanes = CMM_LANES;
typedef float vf __attribute__((vector_size(CMM_LANES * 4)));
typedef float vf_any __attribute__((vector_size(CMM_LANES * 4), aligned(4), may_alias));
typedef uint32_t vu __attribute__((vector_size(CMM_LANES * 4)));
typedef uint16_t vh __attribute__((vector_size(CMM_LANES * 2)));
typedef uint16_t vh_any __attribute__((vector_size(CMM_LANES * 2), aligned(2), may_alias));

#define CMM_INLINE inline __attribute__((always_inline))
#define CMM_UNROLL _Pragma("GCC unroll 32")

CMM_INLINE vf splat(float a) { return a - vf{}; }
CMM_INLINE vf zero() { return vf{}; }
CMM_INLINE vu bits(vf a) { return (vu)a; }

// Holds a value in a register: compilers else fold the load into each of its uses, and one 512-bit load a cycle is the limit.
template <class V>
CMM_INLINE void hold(V& a) {
#if defined(__AVX512F__)
  asm("" : "+v"(a));
#elif defined(__SSE__)
  asm("" : "+x"(a));
#endif
}

// The same for a row that all tokens of a block meet, where registers are few: without it a row is loaded anew for every token.
template <class V>
CMM_INLINE void hold_row(V& a) {
#if defined(__AVX2__) && !defined(__AVX512F__)
  hold(a);
#endif
}

CMM_INLINE float sum(vf a) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps((__m512)a);
#else
  float parts[kLanes];
  memcpy(parts, &a, sizeof a);
  for (int width = kLanes / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) parts[i] += parts[i + width];
  return parts[0];
#endif
}

// Element types: how rows in memory become vectors of floats and back. `part` handles the n < kLanes elements at a row's end.
struct F32 {
  typedef float type;
  typedef F32 Bias;                       // element type of the biases beside such rows
  static constexpr bool kScaled = false;  // whether a row has a scale of its own
  static CMM_INLINE float scalar(float a) { return a; }
  static CMM_INLINE vf load(const float* p) { return *(const vf_any*)p; }
  static CMM_INLINE void store(float* p, vf a) { *(vf_any*)p = a; }
#if defined(__AVX512F__)
  static CMM_INLINE vf load_part(const float* p, int n) { return (vf)_mm512_maskz_loadu_ps((__mmask16)((1u << n) - 1), p); }
  static CMM_INLINE void store_part(float* p, vf a, int n) { _mm512_mask_storeu_ps(p, (__mmask16)((1u << n) - 1), (__m512)a); }
#else
  static CMM_INLINE vf load_part(const float* p, int n) {
    vf a = {};
    memcpy(&a, p, n * sizeof *p);
    return a;
  }
  static CMM_INLINE void store_part(float* p, vf a, int n) { memcpy(p, &a, n * sizeof *p); }
#endif
};

struct BF16 {
  typedef uint16_t type;
  typedef BF16 Bias;
  static constexpr bool kScaled = false;
  static CMM_INLINE float scalar(uint16_t a) {
    uint32_t wide = (uint32_t)a << 16;
    float out;
    memcpy(&out, &wide, sizeof out);
    return out;
  }
  static CMM_INLINE vf widen(vh a) { return (vf)(__builtin_convertvector(a, vu) << 16); }
  static CMM_INLINE vh narrow(vf a) {
    // round to nearest even; a NaN becomes the quiet NaN, since rounding could carry it into an infinity
    vu b = bits(a), rounded = (b + 0x7fffu + ((b >> 16) & 1u)) >> 16;
    vu is_nan = (vu)(a != a);
    return __builtin_convertvector((rounded & ~is_nan) | (0x7fc0u & is_nan), vh);
  }
  static CMM_INLINE vf load(const uint16_t* p) { return widen(*(const vh_any*)p); }
  static CMM_INLINE void store(uint16_t* p, vf a) { *(vh_any*)p = narrow(a); }
  static CMM_INLINE vf load_part(const uint16_t* p, int n) {
    vh a = {};
    memcpy(&a, p, n * sizeof *p);
    return widen(a);
  }
  static CMM_INLINE void store_part(uint16_t* p, vf a, int n) {
    vh h = narrow(a);
    memcpy(p, &h, n * sizeof *p);
  }
};

}  // namespace CMM_ISA
