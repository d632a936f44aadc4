"""Which weights an optimiser changes, and how."""

import pytest
import torch

from fffsweep.pipeline.model import FffConfig, FffForMaskedLM
from fffsweep.pipeline.optimisation import apply_gradients, make_optimizer
from fffsweep.pipeline.stages.pretrain import PretrainRecipe

RECIPE = PretrainRecipe(steps=1, learning_rate=1e-2, weight_decay=0.1)


def model_with_gradients():
    torch.manual_seed(0)
    feedforward = {"variant": "fff", "trees": 2, "depth": 2, "output_bias": True}
    sizes = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 8}
    model = FffForMaskedLM(FffConfig(**sizes, feedforward=feedforward))
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    return model


def test_muon_takes_the_matrices_and_adamw_the_rest():
    changed = {}
    for kind in ("adamw", "muon"):
        model = model_with_gradients()
        apply_gradients(model, make_optimizer(model, RECIPE, kind), 1e-2, None)
        changed[kind] = {name: value.detach().clone() for name, value in model.named_parameters()}
    by_muon = {name for name, value in changed["muon"].items() if not torch.equal(value, changed["adamw"][name])}
    expected = ("attention.query_key_value.weight", "attention.output.weight", "feedforward.w_in", "feedforward.w_out")
    assert by_muon == {f"encoder.layers.0.{name}" for name in expected}


@pytest.mark.parametrize("name", ["w_in", "w_out"])
def test_a_tree_s_weights_are_one_matrix_to_muon(name):
    model = model_with_gradients()
    weight = getattr(model.encoder.layers[0].feedforward, name)
    assert weight.shape == (2, 7, 16)
    alone = torch.nn.Parameter(weight.detach().clone().reshape(14, 16))
    alone.grad = weight.grad.reshape(14, 16).clone()
    torch.optim.Muon([alone], lr=3e-3, weight_decay=0.1, adjust_lr_fn="match_rms_adamw").step()
    before = weight.detach().clone()
    apply_gradients(model, make_optimizer(model, RECIPE, "muon"), 3e-3, None)
    assert torch.equal(weight.detach().reshape(14, 16), alone.detach())
    # the step is near orthogonal, its rows scaled to 0.2 in root mean square
    step = (weight.detach() - before * (1 - 3e-3 * 0.1)).reshape(14, 16) / 3e-3
    assert step.square().mean().sqrt().item() == pytest.approx(0.2, rel=0.25)
    assert all(parameter.grad is None for parameter in model.parameters())
