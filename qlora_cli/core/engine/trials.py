"""A model in; what small packs of random tokens through it show out: whether packing is exact, what a layer takes."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from qlora_cli.core.engine.decoder_layers import LayerBytes, capture_first_call, measure_layer
from qlora_cli.core.engine.lora_linear import AdapterValues
from qlora_cli.core.engine.memory_plan import LayerSeconds
from qlora_cli.core.engine.packed_attention import pack_mask
from qlora_cli.errors import first_line

# Rows of the pack that the engine is tried on. Their sum is no size of a weight: it tells activations from them.
TRIAL_LENGTHS = (24, 43)
LONG_ROW = 1024  # of so many tokens attention has other kernels
LEAST_TRIAL_TOKENS = 32


class Calibration:
    """Runs of one model instance before its first step.

    Args:
        model: The whole model, which says whether it is training.
        decoder: The part below the head.
        embedding: The input embeddings.
        values: The adapters' values, brought up to date before each run.
        device: Where the model computes.

    Attributes:
        packed: Whether attention takes packs by now.
        hidden_bytes: Of one token before the layer that was measured.
    """

    def __init__(
        self, model: nn.Module, decoder: Any, embedding: Any, values: AdapterValues, device: torch.device
    ) -> None:
        self.model, self.decoder, self.embedding, self.values, self.device = model, decoder, embedding, values, device
        self.packed = False
        self.hidden_bytes = 0

    @property
    def _vocabulary(self) -> int:
        return self.embedding.weight.shape[0]

    def _ids(self, tokens: int) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        return torch.randint(self._vocabulary, (1, tokens), generator=generator).to(self.device)

    def inputs(self, tokens: int) -> dict[str, Tensor]:
        """A row of random tokens, embedded where the embeddings are not on the device."""
        return self._whole(self._ids(tokens))

    def _whole(self, ids: Tensor) -> dict[str, Tensor]:
        weight = self.embedding.weight
        # Spread embeddings are gathered on the device, and FSDP2 asks for the whole model to be called first.
        away = weight.device.type != self.device.type and not isinstance(weight, DTensor)
        return {"inputs_embeds": self._embed(ids)} if away else {"input_ids": ids}

    def _embed(self, ids: Tensor) -> Tensor:
        return self.embedding(ids.to(self.embedding.weight.device)).to(self.device)

    def _pack_states(self, ids: Tensor, lengths: tuple[int, ...], longest: int = 0) -> Tensor:
        """Hidden states (T, size) of rows of those lengths, end to end; attention may expect one of `longest` tokens."""
        positions = torch.cat([torch.arange(n) for n in lengths])[None].to(self.device)
        boundaries = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
        mask = pack_mask(boundaries.to(self.device), max(longest, *lengths))
        inputs = {"attention_mask": mask, "position_ids": positions, "use_cache": False}
        return self.decoder(inputs_embeds=self._embed(ids), **inputs).last_hidden_state[0]

    def run(self, lengths: tuple[int, ...] = TRIAL_LENGTHS) -> None:
        """One forward pass of rows of those lengths."""
        self.values.refresh()
        with torch.no_grad():
            ids = self._ids(sum(lengths))
            if self.packed:
                self._pack_states(ids, lengths)
            else:
                rows = len(lengths) if len(set(lengths)) == 1 else 1
                self.decoder(inputs_embeds=self._embed(ids.view(rows, -1)), use_cache=False)

    def rows_of(self, tokens: int) -> tuple[int, ...]:
        """Lengths of rows with so many tokens together, or a few more, for each of which the model has positions."""
        context = getattr(getattr(self.decoder, "config", None), "max_position_embeddings", None) or tokens
        rows = -(-tokens // context)
        return (-(-tokens // rows),) * rows

    @torch.no_grad()
    def why_pack_differs(self) -> str | None:
        """Tries a pack of two rows: neither the other row nor a later token may change anything, not by one bit more
        than rounding, and each row must come out as it does alone."""
        was_training = self.model.training
        self.model.eval()
        try:
            self.values.refresh()
            short, long = TRIAL_LENGTHS
            ids = self._ids(short + long)
            pack = self._pack_states(ids, TRIAL_LENGTHS)
            changed = ids.clone()
            changed[0, :short] = (changed[0, :short] + 1) % self._vocabulary
            other_row = self._pack_states(changed, TRIAL_LENGTHS)[short:]
            changed = ids.clone()
            changed[0, -1] = (changed[0, -1] + 1) % self._vocabulary
            earlier = self._pack_states(changed, TRIAL_LENGTHS)[:-1]
            as_long = self._pack_states(ids, TRIAL_LENGTHS, LONG_ROW)
            alone = self.decoder(**self._whole(ids[:, short:]), use_cache=False).last_hidden_state[0]
        except torch.OutOfMemoryError:
            raise
        except (TypeError, ValueError, RuntimeError, IndexError) as error:
            return f"this architecture refused a pack ({type(error).__name__}: {first_line(error)})"
        finally:
            self.model.train(was_training)
        spread = pack.float().std()
        rounding = torch.finfo(pack.dtype).eps * 8 * spread
        if not bool(((other_row - pack[short:]).float().abs().max() <= rounding).item()):
            return "rows of a pack saw one another in a trial"
        if not bool(((earlier - pack[:-1]).float().abs().max() <= rounding).item()):
            return "tokens saw later ones in a trial"
        error_ = max((alone - found[short:]).float().norm() / alone.float().norm() for found in (pack, as_long))
        if not bool((error_ <= 0.1).item()):
            return "a packed row came out unlike the same row alone in a trial"
        return None

    def measure(self, layer: nn.Module, tokens: int) -> tuple[LayerBytes, LayerSeconds] | None:
        """Memory and time that the first layer takes at so many tokens; None where there is not the memory.

        Raises:
            torch.OutOfMemoryError: There is not even the memory for a few tokens.
        """
        try:
            call = capture_first_call(layer, lambda: self.run(self.rows_of(tokens)))
            self.hidden_bytes = call.args[0].shape[-1] * call.args[0].element_size()
            return measure_layer(layer, call)
        except torch.OutOfMemoryError:
            if tokens < 2 * LEAST_TRIAL_TOKENS:
                raise
        torch.cuda.empty_cache()
        return None
