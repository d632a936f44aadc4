// Weights of 8 bits: w = scale[node] * int8, tokens rounded to 16 bits of their own largest element. Products and sums are exact in
// 32-bit integers, so the only losses are those two roundings; the combination runs in float32.
#pragma once
#include "cmm.h"
#include "dots.h"

namespace CMM_ISA {

// Elements of a row of weights; `Tree` holds the scales.
struct I8 {
  typedef int8_t type;
  typedef F32 Bias;
  static constexpr bool kScaled = true;
  static CMM_INLINE vf load(const int8_t* p) {
#if defined(__AVX512F__)
    return (vf)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)));
#elif defined(__AVX2__)
    return (vf)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)));
#else
    vf a;
    for (int i = 0; i < kLanes; ++i) a[i] = p[i];
    return a;
#endif
  }
  static CMM_INLINE vf load_part(const int8_t* p, int n) {
    int8_t whole[kLanes] = {};
    memcpy(whole, p, n);
    return load(whole);
  }
};

// Elements of a token.
struct I16 {
  typedef int16_t type;
  static CMM_INLINE vf load(const int16_t* p) {
#if defined(__AVX512F__)
    return (vf)_mm512_cvtepi32_ps(_mm512_cvtepi16_epi32(_mm256_loadu_si256((const __m256i*)p)));
#elif defined(__AVX2__)
    return (vf)_mm256_cvtepi32_ps(_mm256_cvtepi16_epi32(_mm_loadu_si128((const __m128i*)p)));
#else
    vf a;
    for (int i = 0; i < kLanes; ++i) a[i] = p[i];
    return a;
#endif
  }
  static CMM_INLINE vf load_part(const int16_t* p, int n) {
    int16_t whole[kLanes] = {};
    memcpy(whole, p, n * sizeof *p);
    return load(whole);
  }
};

// Two products an instruction and lane: rows widen to 16 bits once for all tokens of a block. Elsewhere the float32 step serves.
#if defined(__AVX512BW__)
template <>
struct Step<I16, I8> {
  static constexpr int kStep = 32;
  static constexpr bool kHold = false;
  typedef __m512i in;
  typedef __m512i total;
  static CMM_INLINE total none() { return _mm512_setzero_si512(); }
  static CMM_INLINE vf to_float(total a) { return (vf)_mm512_cvtepi32_ps(a); }
  static CMM_INLINE in load_x(const int16_t* p) { return _mm512_loadu_si512(p); }
  static CMM_INLINE in load_w(const int8_t* p) { return _mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i*)p)); }
  static CMM_INLINE in part_x(const int16_t* p, int n) { return _mm512_maskz_loadu_epi16((__mmask32)((1u << n) - 1), p); }
  static CMM_INLINE in part_w(const int8_t* p, int n) { return _mm512_cvtepi8_epi16(_mm256_maskz_loadu_epi8((__mmask32)((1u << n) - 1), p)); }
  static CMM_INLINE total add(total sum, in x, in w) {
#if defined(__AVX512VNNI__)
    return _mm512_dpwssd_epi32(sum, x, w);
#else
    return _mm512_add_epi32(sum, _mm512_madd_epi16(x, w));
#endif
  }
};
#elif defined(__AVX2__)
template <>
struct Step<I16, I8> {
  static constexpr int kStep = 16;
  static constexpr bool kHold = false;  // a sixteenth register holds the product
  typedef __m256i in;
  typedef __m256i total;
  static CMM_INLINE total none() { return _mm256_setzero_si256(); }
  static CMM_INLINE vf to_float(total a) { return (vf)_mm256_cvtepi32_ps(a); }
  static CMM_INLINE in load_x(const int16_t* p) { return _mm256_loadu_si256((const __m256i*)p); }
  static CMM_INLINE in load_w(const int8_t* p) { return _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)p)); }
  static CMM_INLINE in part_x(const int16_t* p, int n) {
    int16_t whole[kStep] = {};
    memcpy(whole, p, n * sizeof *p);
    return load_x(whole);
  }
  static CMM_INLINE in part_w(const int8_t* p, int n) {
    int8_t whole[kStep] = {};
    memcpy(whole, p, n);
    return load_w(whole);
  }
  static CMM_INLINE total add(total sum, in x, in w) { return _mm256_add_epi32(sum, _mm256_madd_epi16(x, w)); }
};
#endif

CMM_INLINE float integer_dot(const int16_t* x, const int8_t* w, int64_t hidden) {
  typedef Step<I16, I8> S;
  S::total even = S::none(), odd = S::none();
  int64_t i = 0;
  for (; i + 2 * S::kStep <= hidden; i += 2 * S::kStep) {
    even = S::add(even, S::load_x(x + i), S::load_w(w + i));
    odd = S::add(odd, S::load_x(x + i + S::kStep), S::load_w(w + i + S::kStep));
  }
  for (; i < hidden; i += S::kStep) {
    const int left = (int)(hidden - i < S::kStep ? hidden - i : S::kStep);
    even = left < S::kStep ? S::add(even, S::part_x(x + i, left), S::part_w(w + i, left)) : S::add(even, S::load_x(x + i), S::load_w(w + i));
  }
  return sum(S::to_float(even) + S::to_float(odd));
}

// Largest 16-bit element of a token for which no 32-bit sum over `hidden` products with 8-bit weights can overflow.
inline float token_limit(int64_t hidden) {
  const int64_t products = 2 * (hidden / Step<I16, I8>::kStep + 1), most = INT32_MAX / (128 * products);
  return (float)(most < INT16_MAX ? most : INT16_MAX);
}

// Rounds a token to 16 bits; returns its scale, NaN where an element is NaN or infinite: then every logit is NaN.
template <class E>
float round_token(const typename E::type* x, int64_t hidden, float limit, int16_t* out) {
  vf most = zero(), unsound = zero();
  for (int64_t i = 0; i < hidden; i += kLanes) {
    const vf a = hidden - i < kLanes ? E::load_part(x + i, (int)(hidden - i)) : E::load(x + i);
    const vf size = a < 0.0f ? -a : a;
    most = size > most ? size : most;
    unsound += a * 0.0f;
  }
  float largest = 0;
  for (int i = 0; i < kLanes; ++i) largest = most[i] > largest ? most[i] : largest;
  const float inverse = largest > 1e-33f ? limit / largest : 0.0f, magic = 12582912.0f;  // as in `exp_of`: rounds to an integer
  for (int64_t i = 0; i < hidden; i += kLanes) {
    const int left = (int)(hidden - i < kLanes ? hidden - i : kLanes);
    const vf a = left < kLanes ? E::load_part(x + i, left) : E::load(x + i);
    const vh rounded = __builtin_convertvector(bits(a * inverse + magic), vh);
    memcpy(out + i, &rounded, left * sizeof *out);
  }
  return largest / limit + sum(unsound);
}

// Kernels for tokens and outputs of type E: rounds some tokens, then runs `Rounded`, the kernels for 16-bit tokens, on them.
template <class E, class Rounded, int64_t kTokens>
struct Int8Kernels {
  static int64_t tokens_at_once(const cmm_forward_call* call) { return call->tokens < kTokens ? call->tokens : kTokens; }
  static int64_t row_bytes(const cmm_forward_call* call) { return (tokens_at_once(call) * call->layer.hidden * 2 + 63) / 64 * 64; }
  static int64_t scale_bytes(const cmm_forward_call* call) { return (tokens_at_once(call) * 4 + 63) / 64 * 64; }
  static size_t forward_scratch(const cmm_forward_call* call) {
    // the last tokens may be one, whose walk needs more where trees are many and rows short
    cmm_forward_call last = *call;
    last.tokens = call->tokens % kTokens;
    const size_t most = Rounded::forward_scratch(call), least = Rounded::forward_scratch(&last);
    return (size_t)(row_bytes(call) + scale_bytes(call)) + (most > least ? most : least);
  }

  struct Rounding {
    const typename E::type* x;
    int64_t tokens, hidden, lots;
    int16_t* rows;
    float* scales;
  };
  static void round_lot(void* raw, int64_t lot) {
    const Rounding& all = *(const Rounding*)raw;
    const float limit = token_limit(all.hidden);
    for (int64_t t = all.tokens * lot / all.lots; t < all.tokens * (lot + 1) / all.lots; ++t)
      all.scales[t] = round_token<E>(all.x + t * all.hidden, all.hidden, limit, all.rows + t * all.hidden);
  }

  static void forward(const cmm_forward_call* call) {
    const int64_t hidden = call->layer.hidden, active = (int64_t)call->layer.trees * call->layer.levels;
    for (int64_t first = 0; first < call->tokens; first += kTokens) {
      cmm_forward_call part = *call;
      part.tokens = call->tokens - first < kTokens ? call->tokens - first : kTokens;
      int16_t* rows = (int16_t*)call->scratch;
      float* scales = (float*)((char*)call->scratch + row_bytes(call));
      Rounding rounding{(const typename E::type*)call->x + first * hidden, part.tokens, hidden, 1, rows, scales};
      rounding.lots = part.tokens < call->threads ? part.tokens : call->threads;
      call->parallel(rounding.lots, round_lot, &rounding);
      part.x = rows;
      part.x_scale = scales;
      part.y = (typename E::type*)call->y + first * hidden;
      if (call->logits) part.logits = call->logits + first * active;
      if (call->leaves) part.leaves = call->leaves + first * call->layer.trees;
      part.scratch = (char*)scales + scale_bytes(call);
      Rounded::forward(&part);
    }
  }
};

}  // namespace CMM_ISA
