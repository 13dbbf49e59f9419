"""Problems whose retained entries are known, and the formulas written out: one softmax over everything, in float64."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from kvsculpt_vllm.sculpt.problem import Problems


def under(soft_cap: float | None, logits: Tensor) -> Tensor:
    """The logits under a soft cap, if there is one."""
    return logits if soft_cap is None else soft_cap * torch.tanh(logits / soft_cap)


@dataclass(frozen=True)
class Case:
    """Problems together with the retained entries that `Problems` only knows the attention over."""

    problems: Problems
    retained_keys: Tensor  # (B, r, D) float64
    retained_values: Tensor
    sink_logits: Tensor | None = None  # (B, Q) float64: a learned sink is retained, too

    def attention(self, keys: Tensor, values: Tensor, b: int) -> tuple[Tensor, Tensor]:
        """Output (Q, D) and log-sum-exp (Q,) of problem b over these (m, D) pairs and the retained ones."""
        keys = torch.cat([keys.double(), self.retained_keys[b]])
        values = torch.cat([values.double(), self.retained_values[b]])
        logits = under(self.problems.soft_cap, self.problems.queries[b].double() @ keys.T * self.problems.scale)
        if self.sink_logits is not None:
            logits = torch.cat([logits, self.sink_logits[b][:, None]], dim=1)
            values = torch.cat([values, torch.zeros_like(values[:1])])
        return torch.softmax(logits, -1) @ values, torch.logsumexp(logits, -1)

    def teacher(self) -> tuple[Tensor, Tensor]:
        """Output (B, Q, D) and log-sum-exp (B, Q) of the full cache."""
        both = [self.attention(k, v, b) for b, (k, v) in enumerate(zip(*self.entries, strict=True))]
        out, lse = zip(*both, strict=True)
        return torch.stack(out), torch.stack(lse)

    @property
    def entries(self) -> tuple[Tensor, Tensor]:
        return self.problems.keys, self.problems.values

    def loss(self, keys: Tensor, values: Tensor, b: int, rows: Tensor) -> Tensor:
        """The documented loss of problem b on the queries in `rows` (bool), differentiable."""
        true_out, true_lse = self.attention(self.problems.keys[b], self.problems.values[b], b)
        out, lse = self.attention(keys, values, b)
        out_norm = true_out.square().sum(-1).mean()
        output = (out - true_out)[rows].square().sum(-1).mean() / out_norm
        return output + (lse - true_lse)[rows].square().mean()

    def selected(self, b: int, size: int, power: int = 1) -> Tensor:
        """Indices of the `size` entries of problem b with the most attention^power, summed over all queries."""
        logits = self.problems.queries[b].double() @ self.problems.keys[b].double().T * self.problems.scale
        logits = under(self.problems.soft_cap, logits)
        _, lse = self.attention(self.problems.keys[b], self.problems.values[b], b)
        scores = (logits - lse[:, None]).exp().pow(power).sum(0)
        return scores.topk(size).indices


def _make(
    num_problems: int = 3,
    num_queries: int = 21,
    num_entries: int = 40,
    head_size: int = 8,
    num_retained: int = 5,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
    sinks: bool = False,
    soft_cap: float | None = None,
) -> Case:
    """Random problems, the later ones with sharper attention. Every third query is held out. With learned `sinks` there
    are two query heads, whose sinks take much and little.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    sharpness = torch.linspace(0.5, 3.0, num_problems, dtype=torch.float64)[:, None, None]
    # Queries share a direction, as a model's do: some entries matter to many of them.
    queries = (normal(num_problems, num_queries, head_size) + normal(num_problems, 1, head_size)) * sharpness
    keys = normal(num_problems, num_entries, head_size).to(dtype)
    values = normal(num_problems, num_entries, head_size).to(dtype)
    retained_keys = normal(num_problems, num_retained, head_size)
    retained_values = normal(num_problems, num_retained, head_size)
    queries, scale = queries.to(dtype), head_size**-0.5
    if num_retained:
        logits = under(soft_cap, queries.double() @ retained_keys.transpose(1, 2) * scale)
        out, lse = torch.softmax(logits, -1) @ retained_values, torch.logsumexp(logits, -1)
    else:
        out, lse = torch.zeros(queries.shape), torch.full(queries.shape[:2], -torch.inf)
    sink_logits = None
    if sinks:
        sink_logits = torch.tensor([3.0, 0.5], dtype=torch.float64).repeat(num_problems, num_queries)[:, :num_queries]
        alone, lse = lse.double(), torch.logaddexp(lse.double(), sink_logits)
        out = out * (alone - lse).exp()[..., None]
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    held_out = torch.arange(num_queries) % 3 == 2
    problems = Problems(queries, keys, values, lse.to(exact), out.to(exact), held_out, scale, soft_cap)
    return Case(problems, retained_keys, retained_values, sink_logits)


@pytest.fixture(scope="module", autouse=True)
def tiny_products(one_thread):
    """All tests here compute with one thread."""


@pytest.fixture(scope="session")
def make_case():
    return _make
