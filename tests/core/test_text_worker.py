"""What a stranger's tokenizer or template computes has bounds, and Python goes on after them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from supra_core.errors import FormatError, SupraError
from supra_core.runtime.token_texts import decode_within
from supra_core.text import ModelTokenizer, load_tokenizer, worker
from supra_core.text.chat_template import ANSWER
from tests.tiny_chat import CHATML
from tests.tiny_tokenizers import byte_level

TALK = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module", autouse=True)
def _short() -> Iterator[None]:
    """Less than whatever is right needs, by far."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(worker, "SECONDS", 0.5)
        patch.setattr(worker, "MEMORY", 1 << 30)
        worker.WORKER.end()
        yield
    worker.WORKER.end()


def hostile(template: str | None = CHATML, **parts: Any) -> ModelTokenizer:
    described = json.loads(byte_level().to_str()) | parts
    config = {} if template is None else {"chat_template": template}
    return load_tokenizer(
        {
            "tokenizer.json": json.dumps(described).encode(),
            "tokenizer_config.json": json.dumps(config).encode(),
        },
        "the folder",
    )


def split(regex: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}


def replace(old: str, new: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": {"String": old}, "content": new}


# Below the library's own limit of retries at each place, of which there are many.
SLOW = r"(a|aa){0,21}b|."
DOUBLING = {"type": "Sequence", "normalizers": [replace("a", "aa")] * 40}


@pytest.mark.parametrize(
    ("parts", "problem"),
    [
        ({"pre_tokenizer": split(SLOW)}, "takes too long"),
        ({"normalizer": DOUBLING}, "takes too (long|much memory)"),
    ],
    ids=["regex", "growth"],
)
def test_a_tokenizer_without_bounds_is_ended(parts: dict[str, Any], problem: str) -> None:
    tokenizer = hostile(**parts)
    right = hostile()
    before = right.encode("ab").ids.tolist()
    text = "a" * 400
    for ask in (
        tokenizer.encode,
        tokenizer.encode_prompt,
        lambda text: tokenizer.encode_batch([text]),
    ):
        with pytest.raises(FormatError, match=f"tokenizer {problem} for this text"):
            ask(text)
    # A message is encoded, too.
    with pytest.raises(FormatError, match=problem.partition(" (")[0]):
        tokenizer.render([{"role": "user", "content": text}], ANSWER)
    assert right.encode("ab").ids.tolist() == before


@pytest.mark.parametrize(
    "program",
    [
        "{{ '%1000000000d' % 1 }}{{ '%4000000000d' % 1 }}",
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% set ns = namespace(x='aaaaaaaa') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}"
        "{% endfor %}{{ ns.x }}",
        "{{ 7 ** (7 ** 9) }}",
        "{{ ('a' * 40) * 10 ** 9 }}",
        "{{ messages[0].content | center(3000000000) | length }}",
    ],
)
def test_a_template_without_bounds_is_ended(program: str) -> None:
    with pytest.raises(FormatError, match="template (takes too|cannot be rendered)"):
        hostile(program).render(TALK, ANSWER)
    assert hostile().render(TALK, ANSWER)


@pytest.mark.parametrize(
    "decoder",
    [
        {"type": "Sequence", "decoders": [replace("a", "aaaa")] * 30},
        replace("", "a"),
        {"type": "Sequence", "decoders": [{"type": "Fuse"}, replace("a", "b" * 99)]},
        {"type": "Replace", "pattern": {"Regex": "(a+)+b"}, "content": ""},
    ],
)  # fmt: skip
def test_a_decoder_that_grows_is_refused(decoder: dict[str, Any]) -> None:
    with pytest.raises(FormatError, match="makes long texts of short ones|patterns"):
        hostile(decoder=decoder)


def test_a_panic_is_an_error_of_the_file() -> None:
    """Precompiled normalizers of a broken map panic, which is no Exception in Python."""
    broken = {"type": "Precompiled", "precompiled_charsmap": "AAAA"}
    with pytest.raises(SupraError):
        hostile(normalizer=broken).encode("a")
    # Tokens are made text here, not in the process of its own.
    short = hostile(decoder={"type": "Strip", "content": "a", "start": 3, "stop": 3})
    ids = short.encode("ab").ids.tolist()
    for decode in (
        lambda: short.decode(ids),
        lambda: list(map(short.stream(), ids)),
        lambda: short.stream(ids),
    ):
        with pytest.raises(FormatError, match="tokenizer.json cannot be used"):
            decode()


def test_errors_are_told_as_they_are() -> None:
    refusing = hostile("{{ raise_exception('not today') }}")
    with pytest.raises(FormatError, match="^the model's chat template refuses .*: not today$"):
        refusing.render(TALK)
    with pytest.raises(SupraError, match="half of a surrogate pair"):
        hostile().encode("\ud83d")
    with pytest.raises(FormatError, match="cannot be used"):
        load_tokenizer({"tokenizer.json": b"{}"}, "the folder")


def test_many_tokenizers_share_a_process() -> None:
    found = [hostile(CHATML + str(number)) for number in range(2 * worker._KEPT)]
    texts = [tokenizer.render(TALK)[-1] for tokenizer in found for _ in range(2)]
    digits = [byte_level().token_to_id(str(number)) for number in range(len(found))]
    assert texts == [digit for digit in digits for _ in range(2)]


def test_threads_get_their_own_answers() -> None:
    tokenizer, wrong = hostile(), []

    def ask(letter: str) -> None:
        expected = [tokenizer.raw.token_to_id(letter)]
        for _ in range(50):
            if tokenizer.encode(letter).ids.tolist() != expected:
                wrong.append(letter)

    threads = [threading.Thread(target=ask, args=(letter,)) for letter in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_short_text_does_not_wait_for_a_long_one() -> None:
    tokenizer = hostile()
    long = worker.worker_for(worker.LONG + 1)
    with long._lock:
        waiting = threading.Thread(target=tokenizer.encode, args=("ab " * worker.LONG,))
        waiting.start()
        assert len(tokenizer.encode("ab").ids) == 2
        assert waiting.is_alive()
    waiting.join()


def test_a_tokenizer_is_read_by_several_threads() -> None:
    """As a server's are, whose model speaks while requests are read and answers written."""
    tokenizer, wrong = hostile(), []
    text = "the quick brown fox " * 5
    ids = tokenizer.encode(text).ids.tolist()

    def read(index: int) -> None:
        for _ in range(100):
            said = tokenizer.stream()
            told = (
                tokenizer.decode(ids), "".join(map(said, ids)), decode_within(tokenizer.raw, ids)
            )  # fmt: skip
            if set(told) != {text} or tokenizer.problem(np.array(ids)):
                wrong.append(told)

    threads = [threading.Thread(target=read, args=(index,)) for index in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


PROGRAM = """
import sys
from supra_core.text import load_tokenizer
from tests.tiny_tokenizers import byte_level
import json
told = json.loads(byte_level().to_str())
told["pre_tokenizer"] = {"type": "Split", "pattern": {"Regex": "(a|aa){0,21}b|."},
                         "behavior": "Isolated", "invert": False}
tokenizer = load_tokenizer({"tokenizer.json": json.dumps(told).encode()}, "x")
print("ready", flush=True)
try:
    tokenizer.encode("a" * 2000)
except KeyboardInterrupt:
    print("stopped", flush=True)
from supra_core.text.worker import WORKER
print(WORKER._process is None)
"""


def test_ctrl_c_is_heard_and_nothing_is_left() -> None:
    root = os.getcwd()
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([root, *sys.path])}
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM], stdout=subprocess.PIPE, text=True, env=env, cwd=root
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    time.sleep(0.3)
    begun = time.monotonic()
    process.send_signal(signal.SIGINT)
    rest, _ = process.communicate(timeout=20)
    assert rest == "stopped\nTrue\n"
    assert time.monotonic() - begun < 5
