"""Modelfile for Ollama: the GGUF file with the prompt format that was trained, where answers stop, and how they are sampled.

The template is found by rendering the run's own format around marks (https://docs.ollama.com/modelfile).
"""

from transformers import PreTrainedTokenizerBase

from qlora_cli.core.export.gguf import FILE
from qlora_cli.core.generation.requests import closing_ids
from qlora_cli.core.prompts.formatting import Formatting, format_prompt
from qlora_cli.errors import DataError

MODELFILE = "Modelfile"
LEAST_CONTEXT = (
    4096  # tokens that Ollama reads unasked, or more on larger cards; what goes before them is cut off in silence
)
PROMPT, SYSTEM = "qloraPromptHere", "qloraSystemHere"


def write_modelfile(formatting: Formatting, tokenizer: PreTrainedTokenizerBase, max_length: int = 0) -> str:
    """The text of a Modelfile beside `model.gguf`, of a model that was trained on rows of so many tokens at most."""
    stops = dict.fromkeys(text for text in (tokenizer.eos_token, *_closing(formatting, tokenizer)) if text)
    lines = [f"FROM ./{FILE}", f'TEMPLATE """{template_for(formatting, tokenizer)}"""']
    lines += [f'PARAMETER stop "{_quoted(stop)}"' for stop in stops]
    # As `qlora generate` samples; a penalty of 1.1, which Ollama had by default, spoils code and JSON.
    lines += ["PARAMETER temperature 0.7", "PARAMETER top_p 0.95", "PARAMETER repeat_penalty 1.0"]
    lines += [f"PARAMETER num_ctx {max_length}"] if max_length > LEAST_CONTEXT else []
    return "\n".join(lines) + "\n"


def template_for(formatting: Formatting, tokenizer: PreTrainedTokenizerBase) -> str:
    """The format of one turn in Go's template language; a beginning token is left to the runtime, which adds it."""
    plain = _rendered([{"role": "user", "content": PROMPT}], formatting, tokenizer)
    if formatting.format != "chat":
        return plain + "{{ .Response }}"
    try:
        asked = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": PROMPT}]
        whole = _rendered(asked, formatting, tokenizer)
    except DataError:
        whole = plain
    end = next(iter(_closing(formatting, tokenizer)), "")
    if "{{ .System }}" not in whole:
        return plain + "{{ .Response }}" + end
    return "{{ if .System }}" + whole + "{{ else }}" + plain + "{{ end }}{{ .Response }}" + end


def _rendered(messages: list[dict[str, str]], formatting: Formatting, tokenizer: PreTrainedTokenizerBase) -> str:
    prompt = messages if formatting.format == "chat" else PROMPT
    text = tokenizer.decode(format_prompt(prompt, formatting, tokenizer), skip_special_tokens=False)
    assert isinstance(text, str)
    if tokenizer.bos_token:
        text = text.removeprefix(tokenizer.bos_token)
    text = text.replace("{{", '{{ "{{" }}')  # braces of the format's own
    return text.replace(PROMPT, "{{ .Prompt }}").replace(SYSTEM, "{{ .System }}")


def _closing(formatting: Formatting, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    return [str(tokenizer.convert_ids_to_tokens(token)) for token in sorted(closing_ids(tokenizer, formatting))]


def _quoted(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
