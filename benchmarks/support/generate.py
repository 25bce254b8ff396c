"""transformers' own `generate`, as every benchmark of answers calls it for comparison."""


def generate_greedily(model, input_ids, *, new_tokens: int):
    """Continues each row by exactly so many tokens, the likeliest at each step.

    Args:
        model: Of transformers, with or without a PEFT adapter.
        input_ids: (batch, seq) int64, on the model's device; no padding.
        new_tokens: Of each row.

    Returns:
        (batch, seq + new_tokens) int64.
    """
    import torch  # not before Unsloth, which changes what follows

    with torch.inference_mode():
        return model.generate(
            input_ids=input_ids,
            attention_mask=torch.ones_like(input_ids),
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            do_sample=False,
            use_cache=True,
            pad_token_id=0,
        )
