// The activations of fffsweep.kernels.activations and their slopes, on whole vectors.
#pragma once
#include "cmm.h"
#include "simd.h"

namespace CMM_ISA {

enum Activation { kIdentity = 0, kRelu = 1, kLeakyRelu = 2, kSilu = 3, kGelu = 4, kGeluTanh = 5 };
static_assert(kGeluTanh + 1 == CMM_NUM_ACTIVATIONS);
constexpr float kLeakySlope = 0.01f;

// exp(a): 2**n times the Taylor series on |r| <= ln(2)/2, whose eighth term is below half a unit in the last place. NaN stays NaN.
CMM_INLINE vf exp_of(vf a) {
  a = a > 88.0f ? splat(88.0f) : a;
  a = a < -87.0f ? splat(-87.0f) : a;
  const float magic = 12582912.0f;  // 1.5 * 2**23: adding it leaves the rounded integer in the low bits
  vf shifted = a * 1.44269504f + magic;
  vf n = shifted - magic;
  vf r = a - n * 0.693359375f;
  r = r - n * -2.12194440e-4f;
  vf p = splat(1.0f / 5040);
  p = p * r + 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  return (vf)((bits(p)) + (bits(shifted) << 23));
}

// 0 where float32 would round exp(a) to 0 or nearly so: a product with it is then 0, and NaN at minus infinity, as torch's.
CMM_INLINE vf sigmoid(vf a) {
  vf s = 1.0f / (1.0f + exp_of(-a));
  return a < -87.0f ? zero() : s;
}

// Normal distribution function and density. Abramowitz & Stegun 7.1.26: absolute error below 1.5e-7 in erf.
CMM_INLINE vf normal_cdf(vf a, vf* density) {
  vf z = (a < 0.0f ? -a : a) * 0.70710678f;
  vf t = 1.0f / (1.0f + 0.3275911f * z);
  vf e = exp_of(-z * z);
  vf p = t * (0.254829592f + t * (-0.284496736f + t * (1.421413741f + t * (-1.453152027f + t * 1.061405429f))));
  vf tail = 0.5f * p * e;
  *density = 0.39894228f * e;
  return a > 0.0f ? 1.0f - tail : tail;
}

// Writes act(z) to out and, where slope is not null, act'(z). Each array holds count floats rounded up to whole vectors.
inline void activate(int activation, const float* z, float* out, float* slope, int64_t count) {
  for (int64_t i = 0; i < count; i += kLanes) {
    vf a = F32::load(z + i), y = a, dy = splat(1.0f), density;
    switch (activation) {
      case kRelu:
        y = a < 0.0f ? zero() : a;  // keeps NaN
        dy = a > 0.0f ? splat(1.0f) : zero();
        break;
      case kLeakyRelu:
        y = a > 0.0f ? a : a * kLeakySlope;
        dy = a > 0.0f ? splat(1.0f) : splat(kLeakySlope);
        break;
      case kSilu: {
        vf s = sigmoid(a);
        y = a * s;
        dy = s * (1.0f + a * (1.0f - s));
        break;
      }
      case kGelu: {
        vf cdf = normal_cdf(a, &density);
        y = a * cdf;
        dy = cdf + a * density;
        break;
      }
      case kGeluTanh: {
        // 0.5 (1 + tanh(u)) is sigmoid(2u)
        const float scale = 0.79788456f * 2;
        vf s = sigmoid(scale * (a + 0.044715f * a * a * a));
        y = a * s;
        dy = s + a * s * (1.0f - s) * scale * (1.0f + 3 * 0.044715f * a * a);
        break;
      }
      default:
        break;
    }
    F32::store(out + i, y);
    if (slope) F32::store(slope + i, dy);
  }
}

}  // namespace CMM_ISA
