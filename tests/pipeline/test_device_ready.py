"""What can be told of training on a GPU without one: where tensors are made, and which operations would refuse to be repeatable."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fffsweep.kernels import cmm as public
from fffsweep.pipeline import node_trees, optimisation
from fffsweep.pipeline.pretraining import Pretraining
from tests.pipeline.test_pretraining import VARIANTS, config_of

# operations of torch.use_deterministic_algorithms's list that raise on a GPU and that a model of this kind might come to use
REFUSED = {"cumsum", "cumsum_", "histc", "median", "put_", "nll_loss2d_forward", "kthvalue", "bincount"}


class Watch(TorchDispatchMode):
    """Names of the operations on floating-point tensors."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(isinstance(each, torch.Tensor) and each.is_floating_point() for each in args):
            self.seen.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def loss_of(run):
    batch = run.masking.apply(run.reading.rows(0, 4), 0, 0)
    return run._read(batch)[0]


@pytest.mark.parametrize("precision", ["float32", "bf16"])
@pytest.mark.parametrize("name", VARIANTS)
def test_no_operation_refuses_on_a_gpu(name, precision, new_context):
    run = Pretraining(config_of(name, precision=precision, dropout=0.1), new_context())
    with optimisation.reproducible(0), Watch() as watch:
        loss_of(run).backward()
        optimisation.apply_gradients(run.model, run.optimizer, 1e-3, 0.5)
    assert {"mm", "native_layer_norm_backward"} <= watch.seen  # forward and backward were seen
    assert not watch.seen & REFUSED


def test_the_watch_sees_what_a_gradient_does():
    x = torch.rand(3, requires_grad=True)
    with Watch() as watch:
        torch.cumprod(x, 0).sum().backward()
    assert "cumsum" in watch.seen & REFUSED


@pytest.mark.parametrize("implementation", [None, "triton"])
@pytest.mark.parametrize("name", VARIANTS)
def test_nothing_is_made_on_another_device_than_the_model_s(name, implementation, new_context, monkeypatch):
    """On torch's device `meta` there are shapes alone, and a tensor of the CPU among them is an error as it is on a GPU."""
    if implementation is not None:
        monkeypatch.setattr(public, "choose", lambda x, w_in, shape: implementation)
    run = Pretraining(config_of(name, dropout=0.1), new_context())
    run.model.to("meta")
    run.context.device = "meta"
    loss_of(run).backward()
    gradients = [each.grad for each in run.model.parameters()]
    assert gradients
    assert all(each is not None and each.device.type == "meta" for each in gradients)


@pytest.mark.parametrize("name", ["straight", "random"])
def test_rows_are_gathered_there_as_well(name, new_context, monkeypatch):
    """As in layouts with many nodes for one that is used; the backward gathers them again."""
    monkeypatch.setitem(node_trees._NODES_FOR_ONE, "cpu", 1)
    run = Pretraining(config_of(name, dropout=0.1), new_context())
    with optimisation.reproducible(0), Watch() as watch:
        loss_of(run).backward()
    assert "embedding_dense_backward" in watch.seen
    assert "bmm" in watch.seen
    assert not watch.seen & REFUSED
    run.model.to("meta")
    run.context.device = "meta"
    run.optimizer.zero_grad()
    loss_of(run).backward()
    assert all(each.grad is not None and each.grad.device.type == "meta" for each in run.model.parameters())


def test_random_numbers_of_another_kind_of_device_are_left_alone():
    state = {"cpu": torch.get_rng_state(), "cuda": torch.zeros(16, dtype=torch.uint8)}
    expected = torch.rand(1)
    optimisation.restore_rng(state, "cpu")  # a checkpoint of a GPU goes on where there is none
    assert torch.equal(torch.rand(1), expected)


def test_cublas_is_prepared_before_its_first_product(monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    optimisation.prepare_cublas()
    with optimisation.reproducible(0):
        assert torch.are_deterministic_algorithms_enabled()
    import os

    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
