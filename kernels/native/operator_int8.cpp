// The operator fffsweep::cmm_int8 over the C ABI: inference with weights of 8 bits, and with a scale a row. Returns the outputs and,
// where `leaves` asks for them, the last node of each path (else an empty tensor).
#include "operator.h"

namespace {

using namespace cmm_operator;

void check(const Tensor& x, const Tensor& w_in, const Tensor& scale_in, const OptionalTensor& b_in, const Tensor& w_out,
           const Tensor& scale_out, int64_t levels) {
  TORCH_CHECK_VALUE(x.dim() >= 1 && w_in.dim() == 3, "cmm_int8: expected x [..., hidden] and w_in [trees, nodes, hidden]");
  TORCH_CHECK_VALUE(levels >= 1 && levels <= 31 && w_in.size(1) == (int64_t(1) << levels) - 1, "cmm_int8: w_in has ", w_in.size(1),
                    " nodes a tree, expected 2**levels - 1 for ", levels, " levels");
  TORCH_CHECK_VALUE(x.size(-1) == w_in.size(2), "cmm_int8: x has hidden size ", x.size(-1), ", expected ", w_in.size(2), " as w_in");
  TORCH_CHECK_VALUE(w_out.sizes() == w_in.sizes(), "cmm_int8: w_out has shape ", w_out.sizes(), ", expected ", w_in.sizes());
  TORCH_CHECK_VALUE(w_in.scalar_type() == at::kChar && w_out.scalar_type() == at::kChar, "cmm_int8: expected int8 weights");
  TORCH_CHECK_VALUE(x.scalar_type() == at::kFloat || x.scalar_type() == at::kBFloat16, "cmm_int8: x is ", x.scalar_type(),
                    ", expected float32 or bfloat16");
  for (const Tensor* each : {&scale_in, &scale_out, b_in ? &*b_in : &scale_in})
    TORCH_CHECK_VALUE(each->dim() == 2 && each->size(0) == w_in.size(0) && each->size(1) == w_in.size(1) &&
                          each->scalar_type() == at::kFloat && each->is_cpu(),
                      "cmm_int8: expected float32 scales and biases [trees, nodes] on the CPU");
  TORCH_CHECK_VALUE(x.is_cpu() && w_in.is_cpu() && w_out.is_cpu(), "cmm_int8: expected tensors on the CPU");
}

std::tuple<Tensor, Tensor> cmm_int8(const Tensor& x, const Tensor& w_in, const Tensor& scale_in, const OptionalTensor& b_in,
                                    const Tensor& w_out, const Tensor& scale_out, int64_t levels, int64_t activation, bool leaves,
                                    int64_t isa) {
  check(x, w_in, scale_in, b_in, w_out, scale_out, levels);
  const int64_t tokens = x.size(-1) ? x.numel() / x.size(-1) : 0;
  Tensor y = cmm_pool::empty(x.sizes(), x.options());
  Tensor last = at::empty({leaves ? tokens : 0, w_in.size(0)}, x.options().dtype(at::kInt));
  if (x.numel() == 0) return {y, last};
  auto in = w_in.expect_contiguous(), out = w_out.expect_contiguous(), rows = x.expect_contiguous();
  auto of_in = scale_in.expect_contiguous(), of_out = scale_out.expect_contiguous();
  OptionalTensor bias = b_in ? OptionalTensor(b_in->contiguous()) : b_in;
  // logits are kept wherever leaves are
  Tensor logits = leaves ? at::empty({tokens, w_in.size(0), levels}, x.options().dtype(at::kFloat)) : Tensor();
  cmm_layer layer = layer_of(*rows, *in, bias, *out, levels, activation);
  layer.scale_in = of_in->const_data_ptr<float>(), layer.scale_out = of_out->const_data_ptr<float>();
  run_forward({layer, rows->const_data_ptr(), y.mutable_data_ptr(), tokens, leaves ? logits.mutable_data_ptr<float>() : nullptr,
               leaves ? last.mutable_data_ptr<int32_t>() : nullptr, nullptr, threads_now(), run_parallel, nullptr},
              isa);
  return {y, last};
}

std::tuple<Tensor, Tensor> cmm_int8_shape(const Tensor& x, const Tensor& w_in, const Tensor&, const OptionalTensor&, const Tensor&,
                                          const Tensor&, int64_t, int64_t, bool leaves, int64_t) {
  auto tokens = leaves ? tokens_of(x) : c10::SymInt(0);
  return {at::empty_symint(x.sym_sizes(), x.options()), at::empty_symint({tokens, w_in.sym_size(0)}, x.options().dtype(at::kInt))};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(fffsweep, m) {
  m.def(
      "cmm_int8(Tensor x, Tensor w_in, Tensor scale_in, Tensor? b_in, Tensor w_out, Tensor scale_out, int levels, int activation, "
      "bool leaves=False, int isa=-1) -> (Tensor, Tensor)");
}
TORCH_LIBRARY_IMPL(fffsweep, CPU, m) { m.impl("cmm_int8", cmm_int8); }
TORCH_LIBRARY_IMPL(fffsweep, Meta, m) { m.impl("cmm_int8", cmm_int8_shape); }
