"""The tests of `test_cuda` on a GPU that is none: nothing there meets a tensor of the other device by mistake."""

from __future__ import annotations

import pytest
import test_cuda
import torch
from fake_gpu import There, fake_gpu
from test_cuda import (  # noqa: F401
    test_a_descent_among_symmetric_networks_goes_on_where_it_was_on_either_device,
    test_a_descent_on_the_gpu_takes_the_steps_of_the_cpu,
    test_every_pass_agrees_with_the_cpu,
    test_features_of_a_stage_are_the_same_on_the_gpu,
    test_full_gradients_slide_on_the_gpu_as_on_the_cpu,
    test_gated_features_agree_with_the_cpu,
    test_the_optimum_over_a_dictionary_is_the_same_on_the_gpu,
    test_the_other_solvers_run_on_the_gpu,
)

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a real GPU")


@pytest.fixture(autouse=True)
def gpu():
    with fake_gpu():
        yield


def test_the_fake_refuses_what_a_gpu_would():
    """Negative control."""
    there, here = torch.ones(3, device="cuda"), torch.ones(3)
    assert isinstance(there, There)
    with pytest.raises(RuntimeError, match="same device"):
        there + here
    with pytest.raises(RuntimeError, match="numpy"):
        there.numpy()
    with pytest.raises(RuntimeError, match="same device"):
        there @ here[:, None]
    view = there[1:]
    view += 1
    assert there.cpu().tolist() == [1.0, 2.0, 2.0]
    assert not isinstance(there.cpu(), There)


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["squared", "cross-entropy"])
def test_training(loss):
    test_cuda.test_training_on_the_gpu_is_certified_alike_on_both(loss, streamed=True)


@pytest.mark.slow
def test_branch_and_bound():
    test_cuda.test_branch_and_bound_on_the_gpu_is_as_tight(2)
