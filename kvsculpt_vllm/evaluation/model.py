"""A transformers model whose contexts can be recorded and continued from any cache."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from kvsculpt_vllm import models
from kvsculpt_vllm.evaluation.attention import NAME, Cache, Continued, RaggedCache, Recorder
from kvsculpt_vllm.evaluation.windows import Layers
from kvsculpt_vllm.layer_kinds import FULL, full_layers
from kvsculpt_vllm.sculpt.matmul import fast_matmul
from kvsculpt_vllm.sculpt.rotary import Rotary, rotaries_of, same_queries
from kvsculpt_vllm.sculpt.turned import centre


def query_numbers(text_config: Any) -> int:
    """Count the numbers that the queries of one position are, in all layers that see everything."""
    return len(full_layers(text_config)) * text_config.num_attention_heads * head_size_of(text_config)


def head_size_of(text_config: Any) -> int:
    """The size of a head, which not every model's configuration names."""
    return getattr(text_config, "head_dim", None) or text_config.hidden_size // text_config.num_attention_heads


class EvaluationModel:
    """A model that computes in float32 and keeps keys and values in `storage` (the engine's cache dtype).

    Layers that see a window of the last tokens keep that window, and play no part in what is compressed.

    Raises:
        NotImplementedError: an architecture that cannot be evaluated faithfully; the message says why.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        storage: torch.dtype = torch.bfloat16,
        tokenize: Callable[[str], list[int]] = lambda text: [],
    ) -> None:
        """`tokenize` says a text in the model's tokens, without any around it; by default it has no words."""
        if model.dtype != torch.float32:
            raise ValueError(f"the model is to compute in float32, it has {model.dtype}")
        model.eval().set_attn_implementation(NAME)
        self._model, self.storage, self.tokenize = model, storage, tokenize
        config = model.config.get_text_config()
        self.num_positions: int = config.max_position_embeddings
        self._layers = Layers(config)
        self.num_layers: int = self._layers.num_full
        """Layers that see everything."""
        self.query_numbers = query_numbers(config)
        self.position_bytes: int = self.query_numbers * storage.itemsize
        """What the queries of one position take, as the engine keeps them."""
        self.rotary = _rotary(model, self.num_positions)
        self.rotaries = self._rotaries()
        """Of each layer that sees everything; None where queries do not depend on the position."""
        end = model.generation_config.eos_token_id if model.generation_config else None
        self._end = set(end) if isinstance(end, list) else {end}

    @classmethod
    def load(cls, directory: Path, device: str) -> EvaluationModel:
        """The model in `directory` on `device`, its weights exactly those on disk.

        Raises:
            ValueError: a device that there is not.
        """
        try:
            found = torch.device(device).type == "cpu" or torch.cuda.is_available()
        except RuntimeError:
            found = False
        if not found:
            raise ValueError(f"--device: got {device}, allowed: cpu, and cuda where torch finds a GPU")
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, local_files_only=True)
        tokenizer, _ = load_tokenizer(directory)
        return cls(
            model.to(device), tokenize=lambda text: tokenizer(text, add_special_tokens=False, verbose=False).input_ids
        )

    @property
    def device(self) -> torch.device:
        return self._model.device

    @cached_property
    def key_centres(self) -> Tensor:
        """What all keys of a head have in common (L·H, D), wherever they are (`sculpt.turned.centre`).

        It is read from the biases of key projections, and 0 for layers that have none, that norm keys behind it or that
        project queries, keys and values at once: there few bits are less precise than they could be.
        """
        per_layer = self.record([0], torch.arange(1)).keys.float().unflatten(0, (self.num_layers, -1))[:, :, 0]
        biases = list(torch.zeros_like(per_layer))
        for module in self._model.modules():
            layer = getattr(module, "layer_idx", None)
            bias = getattr(getattr(module, "k_proj", None), "bias", None)
            if layer is None or bias is None or self._layers.have_window[layer]:
                continue
            if not hasattr(module, "k_norm") and not hasattr(module, "k_layernorm"):
                biases[self._layers.numbers[layer]] = bias.detach().view_as(per_layer[0])
        return torch.cat([centre(bias, rotary) for bias, rotary in zip(biases, self.rotaries, strict=True)])

    @torch.no_grad()
    def record(
        self, tokens: Sequence[int], positions: Tensor, first_position: int = 0, past: RaggedCache | None = None
    ) -> Recorder:
        """Compute a context (n,) and keep its keys, values and the queries at `positions`. It may be the continuation
        of `past`, at `first_position`.
        """
        recorder = Recorder(positions.to(self.device), self.storage, first_position, past)
        self._forward(tokens, first_position, recorder, last_only=True)
        return recorder

    @torch.no_grad()
    def continue_from(self, cache: Cache, tokens: Sequence[int], first_position: int) -> Tensor:
        """Logits (T, vocabulary) after each of `tokens`, which follow the cached context at `first_position`."""
        return self._forward(tokens, first_position, cache, last_only=False)

    def answer(
        self, cache: RaggedCache, tokens: Sequence[int], first_position: int, limit: int, draft: Sequence[int] = ()
    ) -> list[int]:
        """The greedy continuation of `tokens`, which follow the cached context at `first_position`.

        It ends before the model's end of sequence, or after `limit` tokens. Nothing is computed twice, and as much as
        follows the `draft` in one pass.
        """
        answer: list[int] = []
        continued, new, known = Continued(cache), list(tokens), 0  # `known` tokens are computed, `new` ones are not
        while True:
            as_drafted = not answer or answer[-1:] == list(draft[len(answer) - 1 : len(answer)])
            guess = list(draft[len(answer) : limit]) if as_drafted else []
            logits = self.continue_from(continued, [*new, *guess], first_position + known)
            known += len(new) - 1
            for token, guessed in zip(logits[len(new) - 1 :].argmax(-1).tolist(), [*guess, None], strict=True):
                if token in self._end:
                    return answer
                answer.append(token)
                known += 1
                if len(answer) == limit:
                    return answer
                if token != guessed:
                    break
            continued.cut(known)
            new = answer[-1:]

    def _rotaries(self) -> list[Rotary | None]:
        """Which layers are turned. One token by itself has the same content wherever it is, so that what differs
        between its queries is their position. Behind others of its kind a learned sink would take less of it.

        Raises:
            NotImplementedError: a layer's queries depend on the position in another way.
        """
        positions, found = torch.arange(8), list[Rotary | None]()
        padding = self._model.config.get_text_config().pad_token_id
        token = 1 if padding == 0 else 0  # the padding's embedding is zero
        asked = [self.record([token], positions[p : p + 1], p).queries for p in range(len(positions))]
        for layer, queries in enumerate(torch.cat(asked, 1)):
            if self.rotary.explains(queries, positions.to(self.device)):
                found.append(self.rotary)
            elif same_queries(queries[:1], queries):
                found.append(None)
            else:
                raise NotImplementedError(f"layer {layer} turns its queries in a way that is not understood")
        return found

    def _forward(self, tokens: Sequence[int], first_position: int, cache: Cache, last_only: bool) -> Tensor:
        positions = torch.arange(first_position, first_position + len(tokens), device=self.device)
        with fast_matmul():
            return self._model(
                input_ids=torch.tensor([tokens], device=self.device),
                position_ids=positions[None],
                use_cache=False,
                logits_to_keep=1 if last_only else 0,
                evaluation_cache=cache,
                evaluation_layers=self._layers,
            ).logits[0]


def model_directory(name: str) -> Path:
    """Where the model is that `--model` names, downloaded first if it is one of `models.MODELS`.

    Raises:
        ValueError: there is none.
        models.ModelError: it cannot be prepared.
    """
    directory = models.prepare(name) if name in models.MODELS else Path(name)
    if not (directory / "config.json").is_file():
        raise ValueError(f"--model: {name} is neither a model's directory nor one of {', '.join(models.MODELS)}")
    return directory.resolve()


def load_tokenizer(directory: Path) -> tuple[AutoTokenizer, list[int]]:
    """The tokenizer in `directory`, and the tokens that it puts before every text."""
    tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    bos = tokenizer.bos_token_id
    return tokenizer, [bos] if bos is not None and tokenizer("a").input_ids[:1] == [bos] else []


def _rotary(model: PreTrainedModel, num_positions: int) -> Rotary:
    """The rotary embedding of the layers that see everything, as vLLM would cache it, checked against the model's own
    rotation of queries.
    """
    modules = [module for name, module in model.named_modules() if name.rpartition(".")[2] == "rotary_emb"]
    apply = getattr(sys.modules[type(model).__module__], "apply_rotary_pos_emb", None)
    if len(modules) != 1 or apply is None:
        raise NotImplementedError(f"{type(model).__name__} has no single rotary embedding, so it cannot be evaluated")
    positions = torch.arange(num_positions, device=model.device)[None]
    kind = {"layer_type": FULL} if "layer_type" in inspect.signature(modules[0].forward).parameters else {}
    cos, sin = modules[0](torch.zeros((), device=model.device), positions, **kind)  # (1, positions, rotary_dim)
    asked_at = torch.tensor([0, 1, 3, num_positions - 1], device=cos.device)
    given_once = model.config.get_text_config().model_type == "gpt_oss"  # each angle; others give a copy beside it
    width = cos.shape[-1] * (2 if given_once else 1)
    query = torch.randn(1, 1, 1, width, generator=torch.Generator().manual_seed(0)).to(cos.device)
    query = query.expand(-1, -1, len(asked_at), -1)
    queries = apply(query, query, cos[:, asked_at], sin[:, asked_at])[0][0].transpose(0, 1)  # (P, 1, rotary_dim)
    for rotary in rotaries_of(cos[0], sin[0]):
        if rotary.explains(queries, asked_at):
            return rotary
    raise NotImplementedError("the model rotates queries in a way that is not understood, so it cannot be evaluated")
