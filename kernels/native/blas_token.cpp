// The published CPU forms of CMM, token by token over a BLAS whose functions the caller hands in: level 1 is a dot product a node and
// a scaled row added a node; level 2 gathers the visited output rows and multiplies them at once. Called through ctypes.
#include <stdint.h>
#include <string.h>

extern "C" {

typedef float (*blas_sdot)(int64_t n, const float* x, int64_t step_x, const float* y, int64_t step_y);
typedef void (*blas_saxpy)(int64_t n, float a, const float* x, int64_t step_x, float* y, int64_t step_y);
typedef void (*blas_sgemv)(int order, int transpose, int64_t rows, int64_t columns, float a, const float* matrix, int64_t leading,
                           const float* x, int64_t step_x, float b, float* y, int64_t step_y);

#define CMM_EXPORT __attribute__((visibility("default")))

// Logits and numbers of the visited rows, [tokens, trees, levels], of x [tokens, hidden].
CMM_EXPORT void cmm_blas_walk(blas_sdot sdot, const float* x, int64_t tokens, const float* w_in, const float* b_in, int64_t hidden,
                              int64_t trees, int64_t levels, float* logits, int64_t* rows) {
  const int64_t nodes = (int64_t(1) << levels) - 1;
  for (int64_t token = 0, at = 0; token < tokens; ++token, x += hidden)
    for (int64_t tree = 0; tree < trees; ++tree)
      for (int64_t level = 0, node = 0; level < levels; ++level, ++at) {
        rows[at] = tree * nodes + node;
        logits[at] = sdot(hidden, x, 1, w_in + rows[at] * hidden, 1) + (b_in ? b_in[rows[at]] : 0.0f);
        node = 2 * node + 1 + (logits[at] > 0.0f);
      }
}

// y [tokens, hidden] = sums of activations [tokens, active] times the rows of w_out.
CMM_EXPORT void cmm_blas_level1(blas_saxpy saxpy, const float* activations, const int64_t* rows, int64_t tokens, int64_t active,
                                const float* w_out, int64_t hidden, float* y) {
  memset(y, 0, tokens * hidden * sizeof(float));
  for (int64_t token = 0; token < tokens; ++token, activations += active, rows += active, y += hidden)
    for (int64_t k = 0; k < active; ++k) saxpy(hidden, activations[k], w_out + rows[k] * hidden, 1, y, 1);
}

// The same; `gathered` holds the rows of one token, [active, hidden].
CMM_EXPORT void cmm_blas_level2(blas_sgemv sgemv, const float* activations, const int64_t* rows, int64_t tokens, int64_t active,
                                const float* w_out, int64_t hidden, float* gathered, float* y) {
  const int row_major = 101, transposed = 112;
  for (int64_t token = 0; token < tokens; ++token, activations += active, rows += active, y += hidden) {
    for (int64_t k = 0; k < active; ++k) memcpy(gathered + k * hidden, w_out + rows[k] * hidden, hidden * sizeof(float));
    sgemv(row_major, transposed, active, hidden, 1.0f, gathered, hidden, activations, 1, 0.0f, y, 1);
  }
}
}
