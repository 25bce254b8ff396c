"""A conversation typed at a real terminal: answers, commands, Ctrl-C and Ctrl-D."""

import os
import pty
from concurrent.futures import ThreadPoolExecutor

import pexpect
import pytest
from pexpect import fdpexpect

from tests.commands.generation_case import CHAT, write_run


@pytest.mark.parametrize(
    "formatting",
    [pytest.param(None, marks=pytest.mark.slow), CHAT],
    ids=["text", "chat"],
)
def test_a_conversation_at_the_terminal(formatting, tiny_model, tmp_path, zygote):
    run = write_run(tmp_path, tiny_model("llama"), formatting=formatting)
    saved = tmp_path / "talk.jsonl"
    arguments = ["generate", "--chat", "--adapter", str(run), "--no-cache"]
    arguments += ["--temperature", "0", "--max-new-tokens", "400"]
    keyboard, terminal = pty.openpty()
    child = fdpexpect.fdspawn(keyboard, encoding="utf-8", timeout=None, codec_errors="replace")
    with ThreadPoolExecutor(1) as pool:
        function = "tests.faults.victims:at_a_terminal"
        done = pool.submit(zygote.run, function, arguments=arguments, terminal=os.ttyname(terminal))
        done.add_done_callback(lambda _: os.close(terminal))  # so that what is waited for in vain ends
        child.expect("/help")
        child.expect("> ")
        child.sendline("Hello")
        child.expect("Hello\r\n")
        child.expect(r"\S")  # the answer has begun
        child.send("\x03")  # and is stopped
        child.expect("> ")
        child.sendline("/adapter /nowhere")
        child.expect("no adapter in /nowhere")
        child.expect("> ")
        child.sendline("/base Hi")
        child.expect("Hi\r\n")
        child.expect(r"\S")
        child.send("\x03")
        child.expect("> ")
        child.sendline(f"/save {saved}")
        child.expect("Added to")
        child.expect("> ")
        child.sendline("/reset")
        child.expect("begins anew")
        child.expect("> ")
        child.send("\x04")
        child.expect(pexpect.EOF)
    child.close()
    assert done.result().code == 0
    assert '"role": "user", "content": "Hello"' in saved.read_text(encoding="utf-8")
