"""Answers by transformers' own generate: for models that no decoder of ours covers, and for comparison."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)

from qlora_cli.core.decoding.sampling import (
    NOT_A_NUMBER,
    choose_tokens,
    draw_uniforms,
    is_greedy,
    penalises_repetition,
)
from qlora_cli.core.generation.requests import Completion, GrowingCompletion, Request, StartCompletion, not_a_number
from qlora_cli.settings.generation import SamplingSettings


def answer_plainly(
    requests: Sequence[Request],
    start: StartCompletion,
    model: Any,
    batch_size: int,
    sampling: SamplingSettings,
    *,
    seed: int,
) -> Iterator[Completion]:
    """Answers requests in batches of like lengths, padded on the left; a batch ends with its longest answer.

    Args:
        start: Makes a request's answer, nothing of which is there yet.
        model: A transformers causal language model, its adapter inside.
        sampling: How tokens are chosen: the same choice as in `Decoder`.
        seed: With a request's index it decides what is sampled.

    Raises:
        ModelError: The model's output is not a number.
    """
    device = model.get_input_embeddings().weight.device
    ordered = sorted(requests, key=lambda request: -len(request.ids))
    for at in range(0, len(ordered), batch_size):
        batch = ordered[at : at + batch_size]
        growing = [start(request) for request in batch]
        longest = max(len(request.ids) for request in batch)
        ids = torch.zeros(len(batch), longest, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, request in enumerate(batch):
            ids[row, longest - len(request.ids) :] = torch.tensor(request.ids)
            mask[row, longest - len(request.ids) :] = 1
        settings = GenerationConfig(
            do_sample=False,
            num_beams=1,
            max_new_tokens=max(request.max_new_tokens for request in batch),
            pad_token_id=0,
            eos_token_id=sorted(growing[0].end_ids),
            repetition_penalty=1.0,
            use_cache=True,
        )
        with torch.no_grad(), _own_settings_alone(model):
            model.generate(
                input_ids=ids.to(device),
                attention_mask=mask.to(device),
                generation_config=settings,
                logits_processor=LogitsProcessorList([_OwnSampling(batch, sampling, seed, device)]),
                stopping_criteria=StoppingCriteriaList([_StopFinished(growing)]),
            )
        yield from (answer.completion() for answer in growing)


@contextmanager
def _own_settings_alone(model: Any) -> Iterator[None]:
    """Keeps the settings that come with a model out: `generate` fills in from them whatever is not given it."""
    own, model.generation_config = model.generation_config, GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own


class _OwnSampling(LogitsProcessor):
    """Leaves of each row's logits only the token that our own sampling takes."""

    def __init__(self, batch: Sequence[Request], sampling: SamplingSettings, seed: int, device: torch.device) -> None:
        self.batch, self.sampling = batch, sampling
        self.step = 0
        self.seen: Tensor | None = None
        self.uniforms: Tensor | None = None
        if not is_greedy(sampling):
            most = max(request.max_new_tokens for request in batch)
            rows = [draw_uniforms(seed, r.index, r.max_new_tokens) for r in batch]
            self.uniforms = torch.stack([torch.nn.functional.pad(row, (0, most - len(row))) for row in rows]).to(device)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if penalises_repetition(self.sampling):
            if self.seen is None:
                self.seen = torch.zeros(scores.shape, dtype=torch.bool, device=scores.device)
                for row, request in enumerate(self.batch):
                    self.seen[row, torch.tensor(request.ids, device=scores.device)] = True
            else:
                self.seen.scatter_(1, input_ids[:, -1:], True)
        uniforms = None if self.uniforms is None else self.uniforms[:, self.step]
        self.step += 1
        chosen = choose_tokens(scores, self.sampling, uniforms, self.seen)
        if bool((chosen == NOT_A_NUMBER).any()):
            raise not_a_number()
        only = torch.full_like(scores, -torch.inf)
        return only.scatter_(1, chosen[:, None], 0.0)


class _StopFinished(StoppingCriteria):
    """Hands each row's new token to its answer and stops the rows whose answer is finished."""

    def __init__(self, growing: Sequence[GrowingCompletion]) -> None:
        self.growing = growing

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        for token, answer in zip(input_ids[:, -1].tolist(), self.growing, strict=True):
            if answer.finish is None:
                answer.push(token)
        done = [answer.finish is not None for answer in self.growing]
        return torch.tensor(done, device=input_ids.device)
