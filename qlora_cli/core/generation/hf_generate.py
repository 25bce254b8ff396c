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
from qlora_cli.events import Notice, Report
from qlora_cli.settings.generation import SamplingSettings

TRIAL_TOKENS, TRIAL_STEPS = 24, 5  # of a trial of batches: in all, and that follow
MOST_APART = 0.1  # of the logits, of which rounding changes a hundredth


def answer_plainly(
    requests: Sequence[Request],
    start: StartCompletion,
    model: Any,
    batch_size: int,
    sampling: SamplingSettings,
    *,
    seed: int,
    report: Report,
) -> Iterator[Completion]:
    """Answers requests in batches of like lengths, padded on the left; a batch ends with its longest answer.

    A model whose answers come out otherwise in a batch, in a trial, answers one prompt after another.

    Args:
        start: Makes a request's answer, nothing of which is there yet.
        model: A transformers causal language model, its adapter inside.
        sampling: How tokens are chosen: the same choice as in `Decoder`.
        seed: With a request's index it decides what is sampled.
        report: Receives a notice where prompts are answered one after another.

    Raises:
        ModelError: The model's output is not a number.
    """
    if min(batch_size, len(requests)) > 1 and not _answers_in_batches(model, requests):
        report(Notice("Prompts are answered one after another: together this model's answers come out otherwise."))
        batch_size = 1
    device = model.get_input_embeddings().weight.device
    ordered = sorted(requests, key=lambda request: -len(request.ids))
    for at in range(0, len(ordered), batch_size):
        batch = ordered[at : at + batch_size]
        growing = [start(request) for request in batch]
        ids, mask = _pad_left([request.ids for request in batch], device)
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
                input_ids=ids,
                attention_mask=mask,
                generation_config=settings,
                logits_processor=LogitsProcessorList([_OwnSampling(batch, sampling, seed, device)]),
                stopping_criteria=StoppingCriteriaList([_StopFinished(growing)]),
            )
        yield from (answer.completion() for answer in growing)


def _pad_left(prompts: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids and their mask, (prompts, longest) int64 each."""
    longest = max(map(len, prompts))
    ids = torch.zeros(len(prompts), longest, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.tensor(prompt)
        mask[row, longest - len(prompt) :] = 1
    return ids.to(device), mask.to(device)


def _answers_in_batches(model: Any, requests: Sequence[Request]) -> bool:
    """Whether two prompts of other lengths have the logits in a batch that each has alone, while some tokens follow.

    rwkv ignores the padding, and mixes up the states of its rows from the third token on (transformers 5.23).
    """
    device = model.get_input_embeddings().weight.device
    tokens = [token for request in requests for token in request.ids[:TRIAL_TOKENS]]
    tokens = (tokens * TRIAL_TOKENS)[:TRIAL_TOKENS]
    prompts, follow = (tokens[: -TRIAL_STEPS - 5], tokens[: TRIAL_STEPS - 1]), tokens[-TRIAL_STEPS:]
    settings = GenerationConfig(
        do_sample=False, max_new_tokens=TRIAL_STEPS, pad_token_id=0, output_logits=True, return_dict_in_generate=True
    )

    def logits(*rows: Sequence[int]) -> Tensor:
        """(rows, steps, vocabulary) float32."""
        ids, mask = _pad_left(rows, device)
        given = LogitsProcessorList([_Given(follow)])
        with torch.no_grad(), _own_settings_alone(model):
            out = model.generate(input_ids=ids, attention_mask=mask, generation_config=settings, logits_processor=given)
        return torch.stack(out.logits, dim=1).float()

    together, alone = logits(*prompts), torch.cat([logits(prompt) for prompt in prompts])
    return bool(((together - alone).norm(dim=-1) <= MOST_APART * alone.norm(dim=-1)).all())


class _Given(LogitsProcessor):
    """Leaves of the logits only the tokens that are to follow, the same for each row."""

    def __init__(self, tokens: Sequence[int]) -> None:
        self.left = list(tokens)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        only = torch.full_like(scores, -torch.inf)
        only[:, self.left.pop(0)] = 0.0
        return only


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
