"""Ways to train, as `inspect` lists them of a model."""

import pytest
from transformers import LlamaConfig

from qlora_cli.config import InspectConfig
from qlora_cli.core.inspection.model_summary import WAYS, describe_model
from qlora_cli.events import report_nothing


@pytest.mark.parametrize("engine", ["fast", "plain"])
def test_ways_to_train_take_less_from_one_to_the_next_and_stream_where_a_base_may(tmp_path, engine):
    sizes = {"vocab_size": 1000, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 8}
    config = LlamaConfig(
        **sizes, num_attention_heads=4, max_position_embeddings=1024, architectures=["LlamaForCausalLM"]
    )
    config.save_pretrained(tmp_path)
    facts = describe_model(InspectConfig(model=str(tmp_path), engine=engine, vram="24GiB"), report_nothing)
    table = next(table for table in facts["tables"] if table["title"] == "Ways to train")
    ways = [row[0] for row in table["rows"]]
    assert ways == [*WAYS][: len(ways)] and (len(ways) == len(WAYS)) == (engine == "fast")
    sizes = [row[table["columns"].index("device_bytes")] for row in table["rows"]]
    assert sizes == sorted(sizes, reverse=True) and sizes[0] > sizes[-1]
