"""Training gives the losses of timm's training classes, step by step; bench/parity.py runs 100 steps."""

import pytest
import torch

from bench.parity import CASES, compare


@pytest.mark.parametrize("case", CASES)
def test_the_losses_of_a_small_student_are_those_of_timms_training_classes(case):
    torch.set_num_threads(1)
    found = compare(case, 6)
    assert found.loss < 1e-5
    assert found.ema < 1e-5
