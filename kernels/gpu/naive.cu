// The first thing one writes for a GPU, and what published speed-ups are relative to: a thread a token, walking and adding by itself.
// Neighbouring threads read rows far apart, so that no access is coalesced and no row is shared but by luck of the cache.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

namespace {

__device__ float activate(float z, int activation) {
  switch (activation) {
    case 1: return z <= 0.0f ? 0.0f : z;
    case 2: return z > 0.0f ? z : 0.01f * z;
    case 3: return z / (1.0f + expf(-z));
    case 4: return 0.5f * z * (1.0f + erff(z * 0.70710678f));
    case 5: return 0.5f * z * (1.0f + tanhf(0.79788456f * (z + 0.044715f * z * z * z)));
    default: return z;
  }
}

// scratch [tokens, trees * levels]: activations, and after them the nodes, so that outputs are written once and in one order.
template <typename T>
__global__ void naive(const T* x, const T* w_in, const T* b_in, const T* w_out, T* y, float* values, int* rows, long tokens, int hidden,
                      int trees, int levels, int activation) {
  long token = (long)blockIdx.x * blockDim.x + threadIdx.x;
  if (token >= tokens) return;
  long nodes = (1L << levels) - 1;
  int active = trees * levels;
  x += token * hidden, y += token * hidden, values += token * active, rows += token * active;
  for (int tree = 0; tree < trees; ++tree) {
    long node = 0;
    for (int level = 0; level < levels; ++level) {
      long row = tree * nodes + node;
      float logit = b_in ? (float)b_in[row] : 0.0f;
      for (int h = 0; h < hidden; ++h) logit += (float)x[h] * (float)w_in[row * hidden + h];
      values[tree * levels + level] = activate(logit, activation);
      rows[tree * levels + level] = (int)row;
      node = 2 * node + 1 + (logit > 0.0f);
    }
  }
  for (int h = 0; h < hidden; ++h) {
    float sum = 0.0f;
    for (int i = 0; i < active; ++i) sum += values[i] * (float)w_out[(long)rows[i] * hidden + h];
    y[h] = (T)sum;
  }
}

template <typename T>
int launch(const void* x, const void* w_in, const void* b_in, const void* w_out, void* y, float* values, int* rows, long tokens, int hidden,
           int trees, int levels, int activation, void* stream) {
  int threads = 128;
  naive<T><<<(tokens + threads - 1) / threads, threads, 0, (cudaStream_t)stream>>>((const T*)x, (const T*)w_in, (const T*)b_in,
                                                                                   (const T*)w_out, (T*)y, values, rows, tokens, hidden,
                                                                                   trees, levels, activation);
  return (int)cudaGetLastError();
}

}  // namespace

// dtype: 0 float32, 1 bfloat16, 2 float16. Returns CUDA's error code, 0 if the launch went well.
extern "C" int cmm_naive(int dtype, const void* x, const void* w_in, const void* b_in, const void* w_out, void* y, float* values, int* rows,
                         long tokens, int hidden, int trees, int levels, int activation, void* stream) {
  auto run = dtype == 0 ? launch<float> : dtype == 1 ? launch<__nv_bfloat16> : launch<__half>;
  return run(x, w_in, b_in, w_out, y, values, rows, tokens, hidden, trees, levels, activation, stream);
}
