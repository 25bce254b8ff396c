"""A conversation typed at a real terminal: answers, commands, Ctrl-C and Ctrl-D."""

import os
import sys

import pexpect
import pytest

from tests.commands.generation_case import CHAT, write_run


@pytest.mark.parametrize(
    "formatting",
    [None, CHAT],
    ids=["text", "chat"],
)
def test_a_conversation_at_the_terminal(formatting, tiny_model, tmp_path):
    run = write_run(tmp_path, tiny_model("llama"), formatting=formatting)
    saved = tmp_path / "talk.jsonl"
    arguments = ["-m", "qlora_cli", "generate", "--chat", "--adapter", str(run), "--no-cache"]
    arguments += ["--temperature", "0", "--max-new-tokens", "400"]
    environment = {**os.environ, "NO_COLOR": "1", "TERM": "dumb", "COLUMNS": "200"}
    child = pexpect.spawn(
        sys.executable, arguments, env=environment, encoding="utf-8", timeout=None, codec_errors="replace"
    )
    try:
        child.expect("/help")
        child.expect("> ")
        child.sendline("Hello")
        child.expect("Hello\r\n")
        child.expect(r"\S")  # the answer has begun
        child.sendintr()  # and is stopped
        child.expect("> ")
        child.sendline("/adapter /nowhere")
        child.expect("no adapter in /nowhere")
        child.expect("> ")
        child.sendline("/base Hi")
        child.expect("Hi\r\n")
        child.expect(r"\S")
        child.sendintr()
        child.expect("> ")
        child.sendline(f"/save {saved}")
        child.expect("Added to")
        child.expect("> ")
        child.sendline("/reset")
        child.expect("begins anew")
        child.expect("> ")
        child.sendeof()
        child.expect(pexpect.EOF)
        child.close()
        assert child.exitstatus == 0
    finally:
        child.close(force=True)
    assert '"role": "user", "content": "Hello"' in saved.read_text(encoding="utf-8")
