"""Identity of a base: siblings of one shape are told apart."""

from dataclasses import asdict, replace

import torch

from qlora_cli.core.models.files import resolve_model
from qlora_cli.core.models.identity import BaseIdentity
from qlora_cli.settings.groups import QuantizationSettings


def test_identity_tells_siblings_of_one_shape_apart(tiny_model):
    def identity(seed, **changes):
        return resolve_model(str(tiny_model("llama", seed=seed))).identity(
            QuantizationSettings(**changes), torch.float32
        )

    first = identity(0)
    assert BaseIdentity.from_dict(asdict(first)) == first == identity(0)
    for other, field in ((identity(1), "weights_sha256"), (identity(0, quant_type="fp4"), "quant_type")):
        assert replace(first, model=other.model, **{field: getattr(other, field)}) == other != first
