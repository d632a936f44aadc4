// Operators over the C ABI: fffsweep::cmm (inference), cmm_train (keeps logits and leaves) and cmm_backward, with shapes for
// tracing and with autograd. Arguments are checked here for memory safety; fffsweep.kernels.cmm gives the friendly messages.
#include <torch/csrc/autograd/custom_function.h>

#include "operator.h"

namespace {

using namespace cmm_operator;

// What tensors without memory, those of tracing, must keep too.
void check_shapes(const Tensor& x, const Tensor& w_in, const OptionalTensor& b_in, const Tensor& w_out, int64_t levels) {
  TORCH_CHECK_VALUE(x.dim() >= 1 && w_in.dim() == 3, "cmm: expected x [..., hidden] and w_in [trees, nodes, hidden]");
  TORCH_CHECK_VALUE(levels >= 1 && levels <= 31 && w_in.sym_size(1) == (int64_t(1) << levels) - 1, "cmm: w_in has ", w_in.sym_size(1),
                    " nodes a tree, expected 2**levels - 1 for ", levels, " levels");
  TORCH_CHECK_VALUE(x.sym_size(-1) == w_in.sym_size(2), "cmm: x has hidden size ", x.sym_size(-1), ", expected ", w_in.sym_size(2),
                    " as w_in");
  TORCH_CHECK_VALUE(w_out.sym_sizes() == w_in.sym_sizes(), "cmm: w_out has shape ", w_out.sym_sizes(), ", expected ", w_in.sym_sizes());
  auto w = w_in.scalar_type();
  TORCH_CHECK_VALUE((w == at::kFloat || w == at::kBFloat16) && w_out.scalar_type() == w, "cmm: expected float32 or bfloat16 weights");
  TORCH_CHECK_VALUE(x.scalar_type() == w || x.scalar_type() == at::kFloat, "cmm: x is ", x.scalar_type(), ", expected ", w);
  if (b_in)
    TORCH_CHECK_VALUE(b_in->dim() == 2 && b_in->sym_size(0) == w_in.sym_size(0) && b_in->sym_size(1) == w_in.sym_size(1) &&
                          b_in->scalar_type() == w,
                      "cmm: expected b_in [trees, nodes] of the dtype of w_in");
}

void check(const Tensor& x, const Tensor& w_in, const OptionalTensor& b_in, const Tensor& w_out, int64_t levels) {
  check_shapes(x, w_in, b_in, w_out, levels);
  TORCH_CHECK_VALUE(x.size(-1) == 0 || x.numel() / x.size(-1) <= INT32_MAX, "cmm: x has ", x.numel() / x.size(-1),
                    " tokens, expected at most 2**31 - 1 in one call");
  TORCH_CHECK_VALUE(x.is_cpu() && w_in.is_cpu() && w_out.is_cpu() && (!b_in || b_in->is_cpu()), "cmm: expected tensors on the CPU");
}

// Hidden size 0 and no tokens leave nothing to do.
void forward_into(const Tensor& x, const Tensor& w_in, const OptionalTensor& b_in, const Tensor& w_out, int64_t levels,
                  int64_t activation, int64_t isa, const Tensor& y, float* logits, int32_t* leaves) {
  if (x.numel() == 0) return;
  auto in = w_in.expect_contiguous(), out = w_out.expect_contiguous(), rows = x.expect_contiguous();
  OptionalTensor bias = b_in ? OptionalTensor(b_in->contiguous()) : b_in;
  run_forward({layer_of(*rows, *in, bias, *out, levels, activation), rows->const_data_ptr(), y.mutable_data_ptr(),
               x.numel() / x.size(-1), logits, leaves, nullptr, threads_now(), run_parallel, nullptr},
              isa);
}

Tensor cmm(const Tensor& x, const Tensor& w_in, const OptionalTensor& b_in, const Tensor& w_out, int64_t levels, int64_t activation,
           int64_t isa) {
  check(x, w_in, b_in, w_out, levels);
  Tensor y = cmm_pool::empty(x.sizes(), x.options());
  forward_into(x, w_in, b_in, w_out, levels, activation, isa, y, nullptr, nullptr);
  return y;
}

std::tuple<Tensor, Tensor, Tensor> cmm_train(const Tensor& x, const Tensor& w_in, const OptionalTensor& b_in, const Tensor& w_out,
                                             int64_t levels, int64_t activation, int64_t isa) {
  check(x, w_in, b_in, w_out, levels);
  const int64_t tokens = x.size(-1) ? x.numel() / x.size(-1) : 0, trees = w_in.size(0);
  Tensor y = cmm_pool::empty(x.sizes(), x.options());
  Tensor logits = at::empty({tokens, trees, levels}, x.options().dtype(at::kFloat));
  Tensor leaves = at::empty({tokens, trees}, x.options().dtype(at::kInt));
  forward_into(x, w_in, b_in, w_out, levels, activation, isa, y, logits.mutable_data_ptr<float>(), leaves.mutable_data_ptr<int32_t>());
  return {y, logits, leaves};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> cmm_backward(const Tensor& grad_y, const Tensor& x, const Tensor& w_in,
                                                        const OptionalTensor& b_in, const Tensor& w_out, const Tensor& logits,
                                                        const Tensor& leaves, int64_t levels, int64_t activation, int64_t isa,
                                                        bool of_weights) {
  check(x, w_in, b_in, w_out, levels);
  const int64_t tokens = x.size(-1) ? x.numel() / x.size(-1) : 0, trees = w_in.size(0);
  TORCH_CHECK_VALUE(grad_y.sizes() == x.sizes() && grad_y.scalar_type() == x.scalar_type() && grad_y.is_cpu(),
                    "cmm_backward: expected grad_y like x");
  TORCH_CHECK_VALUE(logits.sizes() == at::IntArrayRef({tokens, trees, levels}) && logits.scalar_type() == at::kFloat &&
                        leaves.sizes() == at::IntArrayRef({tokens, trees}) && leaves.scalar_type() == at::kInt,
                    "cmm_backward: expected logits and leaves of cmm_train");
  auto in = w_in.expect_contiguous(), out = w_out.expect_contiguous(), rows = x.expect_contiguous(), grad = grad_y.expect_contiguous();
  OptionalTensor bias = b_in ? OptionalTensor(b_in->contiguous()) : b_in;
  auto kept = logits.expect_contiguous(), last = leaves.expect_contiguous();
  const int32_t first = (1 << (levels - 1)) - 1;
  for (int64_t i = 0; i < last->numel(); ++i) {
    const int32_t leaf = last->const_data_ptr<int32_t>()[i];
    TORCH_CHECK_VALUE(leaf >= first && leaf - first <= first, "cmm_backward: leaf ", leaf, " is not one of a tree of ", levels, " levels");
  }
  auto wide = w_in.options().dtype(at::kFloat);
  Tensor grad_x = cmm_pool::empty(x.sizes(), x.options());
  auto rows_like = [&] { return of_weights ? cmm_pool::empty(w_in.sizes(), wide) : at::empty({0}, wide); };
  Tensor grad_in = rows_like(), grad_out = rows_like();
  const bool of_bias = of_weights && b_in;
  Tensor grad_bias = of_bias ? at::empty(b_in->sizes(), wide) : at::empty({0}, wide);
  if (x.numel() == 0) {
    for (Tensor* each : {&grad_in, &grad_out, &grad_bias}) each->zero_();
  } else {
    cmm_backward_call call{layer_of(*rows, *in, bias, *out, levels, activation), rows->const_data_ptr(), grad->const_data_ptr(),
                           kept->const_data_ptr<float>(), last->const_data_ptr<int32_t>(), tokens, grad_x.mutable_data_ptr(),
                           of_weights ? grad_in.mutable_data_ptr<float>() : nullptr,
                           of_bias ? grad_bias.mutable_data_ptr<float>() : nullptr,
                           of_weights ? grad_out.mutable_data_ptr<float>() : nullptr, nullptr, threads_now(), run_parallel};
    const cmm_kernels* kernels = kernels_of(isa);
    call.scratch = scratch_of(kernels->backward_scratch(&call));
    kernels->backward(&call);
  }
  auto w = w_in.scalar_type();
  return {grad_x, grad_in.to(w), grad_bias.to(w), grad_out.to(w)};
}

Tensor cmm_shape(const Tensor& x, const Tensor& w_in, const OptionalTensor& b_in, const Tensor& w_out, int64_t levels, int64_t, int64_t) {
  check_shapes(x, w_in, b_in, w_out, levels);
  return at::empty_symint(x.sym_sizes(), x.options());
}

std::tuple<Tensor, Tensor, Tensor> cmm_train_shape(const Tensor& x, const Tensor& w_in, const OptionalTensor& b_in, const Tensor& w_out,
                                                   int64_t levels, int64_t, int64_t) {
  check_shapes(x, w_in, b_in, w_out, levels);
  auto tokens = tokens_of(x);
  auto trees = w_in.sym_size(0);
  return {at::empty_symint(x.sym_sizes(), x.options()), at::empty_symint({tokens, trees, levels}, x.options().dtype(at::kFloat)),
          at::empty_symint({tokens, trees}, x.options().dtype(at::kInt))};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> cmm_backward_shape(const Tensor&, const Tensor& x, const Tensor& w_in,
                                                              const OptionalTensor& b_in, const Tensor& w_out, const Tensor&,
                                                              const Tensor&, int64_t levels, int64_t, int64_t, bool of_weights) {
  check_shapes(x, w_in, b_in, w_out, levels);
  auto like = [&](const Tensor& weights) { return at::empty_symint(weights.sym_sizes(), w_in.options()); };
  auto none = [&] { return at::empty({0}, w_in.options()); };
  return {at::empty_symint(x.sym_sizes(), x.options()), of_weights ? like(w_in) : none(), of_weights && b_in ? like(*b_in) : none(),
          of_weights ? like(w_in) : none()};
}

c10::OperatorHandle operator_named(const char* name) { return c10::Dispatcher::singleton().findSchemaOrThrow(name, ""); }

template <class... Tensors>
bool has_tangent(const Tensors&... tensors) {
  return (tensors._fw_grad(/*level=*/0).defined() || ...);
}

// The backward pass where its gradients may be differentiated once more: what asks for that gets an error and not zeros.
class CmmBackwardFunction : public torch::autograd::Function<CmmBackwardFunction> {
 public:
  static torch::autograd::variable_list forward(torch::autograd::AutogradContext*, const Tensor& grad_y, const Tensor& x,
                                                const Tensor& w_in, const OptionalTensor& b_in, const Tensor& w_out,
                                                const Tensor& logits, const Tensor& leaves, int64_t levels, int64_t activation,
                                                int64_t isa, bool of_weights) {
    at::AutoDispatchBelowADInplaceOrView guard;
    static auto op = operator_named("fffsweep::cmm_backward").typed<decltype(cmm_backward)>();
    auto [of_x, of_in, of_bias, of_out] = op.call(grad_y, x, w_in, b_in, w_out, logits, leaves, levels, activation, isa, of_weights);
    return {of_x, of_in, of_bias, of_out};
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext*, torch::autograd::variable_list) {
    TORCH_CHECK_NOT_IMPLEMENTED(false, "cmm: its gradients were differentiated, and native kernels have no second derivative: ",
                                "expected one backward pass alone, or implementation='masked', which has them all");
  }
};

std::tuple<Tensor, Tensor, Tensor, Tensor> cmm_backward_autograd(const Tensor& grad_y, const Tensor& x, const Tensor& w_in,
                                                                 const OptionalTensor& b_in, const Tensor& w_out, const Tensor& logits,
                                                                 const Tensor& leaves, int64_t levels, int64_t activation,
                                                                 int64_t isa, bool of_weights) {
  bool wanted = at::GradMode::is_enabled() && (grad_y.requires_grad() || x.requires_grad() || w_in.requires_grad() ||
                                               w_out.requires_grad() || (b_in && b_in->requires_grad()));
  if (wanted) {
    auto found = CmmBackwardFunction::apply(grad_y, x, w_in, b_in, w_out, logits, leaves, levels, activation, isa, of_weights);
    return {found[0], found[1], found[2], found[3]};
  }
  at::AutoDispatchBelowADInplaceOrView guard;
  static auto op = operator_named("fffsweep::cmm_backward").typed<decltype(cmm_backward)>();
  return op.call(grad_y, x, w_in, b_in, w_out, logits, leaves, levels, activation, isa, of_weights);
}

class CmmFunction : public torch::autograd::Function<CmmFunction> {
 public:
  static Tensor forward(torch::autograd::AutogradContext* context, const Tensor& x, const Tensor& w_in, const OptionalTensor& b_in,
                        const Tensor& w_out, int64_t levels, int64_t activation, int64_t isa) {
    at::AutoDispatchBelowADInplaceOrView guard;
    static auto op = operator_named("fffsweep::cmm_train").typed<decltype(cmm_train)>();
    auto [y, logits, leaves] = op.call(x, w_in, b_in, w_out, levels, activation, isa);
    context->save_for_backward({x, w_in, b_in.value_or(Tensor()), w_out, logits, leaves});
    context->saved_data["integers"] = std::vector<int64_t>{levels, activation, isa};
    return y;
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* context, torch::autograd::variable_list grads) {
    static auto op = operator_named("fffsweep::cmm_backward").typed<decltype(cmm_backward)>();
    auto saved = context->get_saved_variables();
    auto integers = context->saved_data["integers"].toIntVector();
    OptionalTensor b_in = saved[2].defined() ? OptionalTensor(saved[2]) : std::nullopt;
    // edges count the tensors that were given: x, w_in, b_in where there is one, w_out
    bool of_weights = context->needs_input_grad(1) || context->needs_input_grad(2) || (b_in && context->needs_input_grad(3));
    auto [x, w_in, bias, w_out] =
        op.call(grads[0], saved[0], saved[1], b_in, saved[3], saved[4], saved[5], integers[0], integers[1], integers[2], of_weights);
    if (!of_weights) return {x, Tensor(), Tensor(), Tensor(), Tensor(), Tensor(), Tensor()};
    return {x, w_in, b_in ? bias : Tensor(), w_out, Tensor(), Tensor(), Tensor()};
  }
};

Tensor cmm_autograd(const Tensor& x, const Tensor& w_in, const OptionalTensor& b_in, const Tensor& w_out, int64_t levels,
                    int64_t activation, int64_t isa) {
  TORCH_CHECK_NOT_IMPLEMENTED(!has_tangent(x, w_in, w_out, b_in ? *b_in : x),
                              "cmm: an argument has a tangent of forward-mode differentiation, which native kernels do not have: ",
                              "expected reverse mode, or implementation='masked', which has both");
  bool wanted = at::GradMode::is_enabled() &&
                (x.requires_grad() || w_in.requires_grad() || w_out.requires_grad() || (b_in && b_in->requires_grad()));
  if (wanted) return CmmFunction::apply(x, w_in, b_in, w_out, levels, activation, isa);
  at::AutoDispatchBelowADInplaceOrView guard;
  static auto op = operator_named("fffsweep::cmm").typed<decltype(cmm)>();
  return op.call(x, w_in, b_in, w_out, levels, activation, isa);
}

}  // namespace

TORCH_LIBRARY(fffsweep, m) {
  m.def("cmm(Tensor x, Tensor w_in, Tensor? b_in, Tensor w_out, int levels, int activation, int isa=-1) -> Tensor");
  m.def("cmm_train(Tensor x, Tensor w_in, Tensor? b_in, Tensor w_out, int levels, int activation, int isa=-1) -> (Tensor, Tensor, Tensor)");
  m.def(
      "cmm_backward(Tensor grad_y, Tensor x, Tensor w_in, Tensor? b_in, Tensor w_out, Tensor logits, Tensor leaves, int levels, "
      "int activation, int isa=-1, bool of_weights=True) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def("best_isa() -> int", [] { return (int64_t)cmm_best_isa(); });
  m.def("has_isa(int isa) -> bool", [](int64_t isa) { return cmm_kernels_of((int32_t)isa) != nullptr; });
}

TORCH_LIBRARY_IMPL(fffsweep, CPU, m) {
  m.impl("cmm", cmm);
  m.impl("cmm_train", cmm_train);
  m.impl("cmm_backward", cmm_backward);
}

TORCH_LIBRARY_IMPL(fffsweep, Meta, m) {
  m.impl("cmm", cmm_shape);
  m.impl("cmm_train", cmm_train_shape);
  m.impl("cmm_backward", cmm_backward_shape);
}

TORCH_LIBRARY_IMPL(fffsweep, Autograd, m) {
  m.impl("cmm", cmm_autograd);
  m.impl("cmm_backward", cmm_backward_autograd);
}
