"""The normal equations against their twin in float64."""

import pytest
import torch

from kvsculpt_vllm.kernels.gram import gram, gram_twin

CASES = [
    (2, 63, 111, 64, [111, 40]),
    (1, 1, 1, 64, [1]),
    (3, 70, 65, 96, [65, 1, 33]),
    (1, 40, 33, 256, [33]),
    (1, 50, 150, 64, [150]),  # three tiles
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_both_products_are_those_of_the_formula(case, make_problem):
    arguments, sizes = make_problem(*case)
    del arguments[5]
    wanted = gram_twin(*arguments, sizes)
    single = [tensor.float() for tensor in arguments]
    for b, count in enumerate(sizes.tolist()):
        single[5][b, count:] = single[6][b, count:] = torch.nan
    found = gram(*single, sizes)
    for mine, theirs in zip(found, wanted, strict=True):
        scale = theirs.abs().max()
        torch.testing.assert_close(mine.double() / scale, theirs / scale, rtol=0, atol=2e-5)
    torch.testing.assert_close(found[0], found[0].transpose(1, 2), rtol=1e-6, atol=0)
    assert all(map(torch.equal, found, gram(*single, sizes)))
