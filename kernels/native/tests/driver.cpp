// Runs every kernel of every instruction set of this processor on awkward sizes, rows flush against the end of their memory, and
// compares them with a plain loop; built with sanitizers by tests/integration/test_sanitizers.py. Prints the number of cases.
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <functional>
#include <random>
#include <thread>
#include <vector>

#include "cmm.h"

namespace {

void serial(int64_t tasks, cmm_task task, void* context) {
  for (int64_t i = 0; i < tasks; ++i) task(context, i);
}

void threaded(int64_t tasks, cmm_task task, void* context) {
  std::vector<std::thread> threads;
  for (int64_t i = 0; i < tasks; ++i) threads.emplace_back(task, context, i);
  for (auto& each : threads) each.join();
}

float from_bf16(uint16_t a) {
  uint32_t wide = (uint32_t)a << 16;
  float out;
  memcpy(&out, &wide, sizeof out);
  return out;
}

// Memory from a whole line on, as tensors have it: stores past the caches need that.
template <class T>
struct Lines {
  typedef T value_type;
  T* allocate(size_t n) {
    void* memory = nullptr;
    if (posix_memalign(&memory, 64, n * sizeof(T))) abort();
    return (T*)memory;
  }
  void deallocate(T* memory, size_t) { free(memory); }
  bool operator==(const Lines&) const { return true; }
};

// Exact size on the heap, so that a sanitizer sees the first element too many.
struct Array {
  int32_t dtype;
  std::vector<float, Lines<float>> wide;
  std::vector<uint16_t, Lines<uint16_t>> narrow;
  Array(int32_t dtype, size_t n, std::mt19937& random, float scale) : dtype(dtype) {
    std::normal_distribution<float> normal;
    if (dtype == CMM_F32) {
      wide.resize(n);
      for (float& each : wide) each = scale * normal(random);
    } else {
      narrow.resize(n);
      for (uint16_t& each : narrow) {
        float value = scale * normal(random);
        uint32_t bits;
        memcpy(&bits, &value, sizeof bits);
        each = (uint16_t)(bits >> 16);
      }
    }
  }
  void* data() { return dtype == CMM_F32 ? (void*)wide.data() : (void*)narrow.data(); }
  float at(size_t i) const { return dtype == CMM_F32 ? wide[i] : from_bf16(narrow[i]); }
};

struct Scratch {
  std::vector<char> memory;
  explicit Scratch(size_t bytes) : memory(bytes + 64) {}
  void* data() { return (void*)(((uintptr_t)memory.data() + 63) / 64 * 64); }
};

void fail(const char* what, double got, double expected) {
  fprintf(stderr, "%s: got %g, expected %g\n", what, got, expected);
  exit(1);
}

void run(const cmm_kernels* kernels, int32_t x_dtype, int32_t w_dtype, int trees, int levels, int64_t hidden, int64_t tokens, bool bias,
         int threads) {
  std::mt19937 random(1);
  const int64_t nodes = (int64_t(1) << levels) - 1, width = trees * nodes, active = trees * levels;
  Array x(x_dtype, tokens * hidden, random, 1), y(x_dtype, tokens * hidden, random, 0), grad_y(x_dtype, tokens * hidden, random, 1);
  Array grad_x(x_dtype, tokens * hidden, random, 0), w_in(w_dtype, width * hidden, random, 0.3f), b_in(w_dtype, width, random, 0.1f);
  Array w_out(w_dtype, width * hidden, random, 0.3f);
  std::vector<float> logits(tokens * active), grad_in(width * hidden, NAN), grad_out(width * hidden, NAN), grad_bias(width, NAN);
  std::vector<int32_t> leaves(tokens * trees);
  const int32_t relu = 1;
  cmm_layer layer{w_in.data(), bias ? b_in.data() : nullptr, w_out.data(), hidden, nodes, trees, levels, relu, w_dtype, x_dtype, nullptr, nullptr};
  cmm_forward_call forward{layer, x.data(), y.data(), tokens, logits.data(), leaves.data(), nullptr, threads, threads > 1 ? threaded : serial, nullptr};
  Scratch scratch(kernels->forward_scratch(&forward));
  forward.scratch = scratch.data();
  kernels->forward(&forward);

  const double slack = x_dtype == CMM_BF16 ? 0.05 : 1e-4;
  for (int64_t t = 0; t < tokens; ++t) {
    std::vector<double> expected(hidden);
    for (int tree = 0; tree < trees; ++tree) {
      // along the kernel's own path: rounding may turn a token whose logit is nearly zero
      int64_t node = leaves[t * trees + tree];
      for (int level = levels - 1; level >= 0; --level, node = (node - 1) / 2) {
        const int64_t row = tree * nodes + node;
        double logit = bias ? b_in.at(row) : 0;
        for (int64_t i = 0; i < hidden; ++i) logit += (double)x.at(t * hidden + i) * w_in.at(row * hidden + i);
        const double kept = logits[t * active + tree * levels + level];
        if (fabs(kept - logit) > 1e-4 * (1 + hidden / 16.0)) fail("logit", kept, logit);
        for (int64_t i = 0; i < hidden; ++i) expected[i] += (kept > 0 ? kept : 0) * w_out.at(row * hidden + i);
      }
    }
    for (int64_t i = 0; i < hidden; ++i)
      if (fabs(y.at(t * hidden + i) - expected[i]) > slack * (1 + active + fabs(expected[i]))) fail("output", y.at(t * hidden + i), expected[i]);
  }

  cmm_backward_call backward{layer, x.data(), grad_y.data(), logits.data(), leaves.data(), tokens, grad_x.data(), grad_in.data(),
                             bias ? grad_bias.data() : nullptr, grad_out.data(), nullptr, threads, threads > 1 ? threaded : serial};
  Scratch backward_scratch(kernels->backward_scratch(&backward));
  backward.scratch = backward_scratch.data();
  kernels->backward(&backward);
  double total = 0, expected = 0;
  for (int64_t i = 0; i < width * hidden; ++i) {
    if (grad_in[i] != grad_in[i]) fail("gradient of w_in", grad_in[i], 0);
    total += grad_out[i];
  }
  for (int64_t t = 0; t < tokens; ++t) {
    double hidden_sum = 0, grad_sum = 0;
    for (int64_t k = 0; k < active; ++k) hidden_sum += logits[t * active + k] > 0 ? logits[t * active + k] : 0;
    for (int64_t i = 0; i < hidden; ++i) grad_sum += grad_y.at(t * hidden + i);
    expected += hidden_sum * grad_sum;
  }
  if (fabs(total - expected) > 1e-3 * (1 + tokens * active * sqrt((double)hidden))) fail("sum of the gradient of w_out", total, expected);

  Array alone(x_dtype, tokens * hidden, random, 0);
  backward.grad_x = alone.data(), backward.grad_w_in = backward.grad_b_in = backward.grad_w_out = nullptr;
  kernels->backward(&backward);
  for (int64_t i = 0; i < tokens * hidden; ++i)
    if (alone.at(i) != grad_x.at(i)) fail("gradient of x without those of the weights", alone.at(i), grad_x.at(i));
}

// The same forward pass with weights of 8 bits, against a loop over the integers times their scales.
void run_int8(const cmm_kernels* kernels, int32_t x_dtype, int trees, int levels, int64_t hidden, int64_t tokens, bool bias, int threads) {
  std::mt19937 random(2);
  const int64_t nodes = (int64_t(1) << levels) - 1, width = trees * nodes, active = trees * levels;
  Array x(x_dtype, tokens * hidden, random, 1), y(x_dtype, tokens * hidden, random, 0), b_in(CMM_F32, width, random, 0.1f);
  std::vector<int8_t> w_in(width * hidden), w_out(width * hidden);
  for (auto* each : {&w_in, &w_out})
    for (int8_t& w : *each) w = (int8_t)((int)(random() % 255) - 127);
  std::vector<float> scale_in(width), scale_out(width), logits(tokens * active);
  for (auto* each : {&scale_in, &scale_out})
    for (float& scale : *each) scale = 0.002f + 0.00001f * (float)(random() % 100);
  std::vector<int32_t> leaves(tokens * trees);
  const int32_t relu = 1;
  cmm_layer layer{w_in.data(), bias ? b_in.data() : nullptr, w_out.data(), hidden, nodes, trees, levels, relu, CMM_I8, x_dtype,
                  scale_in.data(), scale_out.data()};
  cmm_forward_call forward{layer, x.data(), y.data(), tokens, logits.data(), leaves.data(), nullptr, threads,
                           threads > 1 ? threaded : serial, nullptr};
  Scratch scratch(kernels->forward_scratch(&forward));
  forward.scratch = scratch.data();
  kernels->forward(&forward);

  const double slack = x_dtype == CMM_BF16 ? 0.02 : 1e-4;
  for (int64_t t = 0; t < tokens; ++t) {
    std::vector<double> expected(hidden);
    for (int tree = 0; tree < trees; ++tree) {
      int64_t node = leaves[t * trees + tree];
      for (int level = levels - 1; level >= 0; --level, node = (node - 1) / 2) {
        const int64_t row = tree * nodes + node;
        double logit = 0;
        for (int64_t i = 0; i < hidden; ++i) logit += (double)x.at(t * hidden + i) * w_in[row * hidden + i];
        logit = logit * scale_in[row] + (bias ? b_in.at(row) : 0);
        const double kept = logits[t * active + tree * levels + level];
        // a token's element is off by half of its 32767th part at most, and a weight here is below 0.4
        if (fabs(kept - logit) > 1e-4 * (1 + hidden / 4.0)) fail("8-bit logit", kept, logit);
        for (int64_t i = 0; i < hidden; ++i) expected[i] += (kept > 0 ? kept : 0) * w_out[row * hidden + i] * scale_out[row];
      }
    }
    for (int64_t i = 0; i < hidden; ++i)
      if (fabs(y.at(t * hidden + i) - expected[i]) > slack * (1 + active + fabs(expected[i]))) fail("8-bit output", y.at(t * hidden + i), expected[i]);
  }
}

// 65,537 tokens leave one for a pass of its own, whose rows are noted tree by tree: with many trees of short rows more than a chunk takes.
void check_scratch_of_last_token(const cmm_kernels* kernels) {
  const int64_t pass = 65536, rounded = pass * 2 + pass * 4;  // two bytes a token of one element, and its scale
  cmm_layer layer{nullptr, nullptr, nullptr, 1, 1, 8000, 1, 0, CMM_I8, CMM_F32, nullptr, nullptr};
  cmm_forward_call call{layer, nullptr, nullptr, pass + 1, nullptr, nullptr, nullptr, 1, serial, nullptr};
  const double all = (double)kernels->forward_scratch(&call);
  call.tokens = 1;
  const double one = (double)kernels->forward_scratch(&call) - 2 * 64;  // less its own element and scale
  if (all < rounded + one) fail("scratch of 65,537 tokens", all, rounded + one);
}

}  // namespace

int main() {
  int cases = 0;
  const struct {
    int trees, levels;
    int64_t tokens;
  } sizes[] = {{1, 1, 1}, {1, 1, 70}, {1, 4, 2}, {3, 3, 9}, {1, 6, 130}, {1, 9, 700}, {2, 5, 1100}, {1, 11, 2100}};
  for (int32_t isa = 0; isa < CMM_NUM_ISA; ++isa) {
    const cmm_kernels* kernels = cmm_kernels_of(isa);
    if (!kernels) continue;
    check_scratch_of_last_token(kernels);
    for (const auto& size : sizes)
      for (int64_t hidden : {1, 7, 16, 33, 48, 95})
        for (int types = 0; types < 3; ++types)
          for (int threads = 1; threads <= 2; ++threads, ++cases)
            run(kernels, types == 2 ? CMM_BF16 : CMM_F32, types ? CMM_BF16 : CMM_F32, size.trees, size.levels, hidden, size.tokens,
                hidden % 2 == 1, threads);
    for (const auto& size : sizes)
      for (int64_t hidden : {1, 7, 16, 33, 48, 95})
        for (int threads = 1; threads <= 2; ++threads)
          for (int32_t x_dtype : {CMM_F32, CMM_BF16}) {
            run_int8(kernels, x_dtype, size.trees, size.levels, hidden, size.tokens, hidden % 2 == 1, threads);
            ++cases;
          }
    // outputs of more than 2 MiB, which go past the caches, and more tokens than one pass takes
    for (int types = 0; types < 3; ++types)
      for (int threads = 1; threads <= 2; ++threads, cases += 2) {
        const int32_t x_dtype = types == 2 ? CMM_BF16 : CMM_F32, w_dtype = types ? CMM_BF16 : CMM_F32;
        run(kernels, x_dtype, w_dtype, 1, 6, 128, 8500, true, threads);
        run(kernels, x_dtype, w_dtype, 1, 3, 16, 66000, true, threads);
      }
    for (int32_t x_dtype : {CMM_F32, CMM_BF16}) {
      run_int8(kernels, x_dtype, 1, 6, 128, 8500, true, 2);
      run_int8(kernels, x_dtype, 1, 3, 16, 66000, true, 2);
      cases += 2;
    }
  }
  printf("%d cases\n", cases);
  return cases > 0 ? 0 : 1;
}
