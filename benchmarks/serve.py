"""A server of OpenAI's interface under load: tokens a second, and the wait for the first one.

    supra serve MODEL --port 8080 &
    python benchmarks/serve.py http://127.0.0.1:8080/v1 --clients 1 4 16 --out serve.json

Any server of that interface will do, so that two can be compared. Each client asks one question
after another, of ``--words`` words each, and reads the answer as a stream; all
sample greedily, and answers are cut at ``--tokens``. Tokens are counted by the server.
"""

from __future__ import annotations

import argparse
import random
import shlex
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from openai import OpenAI

from supra_cli.shared.record import write_record

_WORDS = ("river", "stone", "market", "winter", "letter", "garden", "engine", "island", "paper")


class Answer(NamedTuple):
    """Seconds to the first piece of text; prompt tokens and generated tokens."""

    first: float
    prompt: int
    generated: int


def main() -> None:
    arguments = parsed()
    client = OpenAI(base_url=arguments.url, api_key=arguments.key, max_retries=0)
    model = arguments.model or client.models.list().data[0].id
    ask(client, model, "Say something.", 8)  # compiling, and first touches of the weights
    print(f"| clients | tokens/s | a client | first token, s (median) | longest |\n|{'---:|' * 5}")
    rows = []
    for clients in arguments.clients:
        row = load(client, model, clients, arguments)
        rows.append(row)
        print(
            f"| {clients} | {row['tokens_per_second']:.1f} "
            f"| {row['tokens_per_second'] / clients:.1f} "
            f"| {row['first_median']:.2f} | {row['first_longest']:.2f} |",
            flush=True,
        )
    if arguments.out is not None:
        hidden = ["***" if text == arguments.key else text for text in sys.argv[1:]]
        command = shlex.join(["python", "benchmarks/serve.py", *hidden])
        write_record(arguments.out, {"command": command, "benchmark": "serve", "rows": rows})


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("url", help="URL of the server, ending in /v1")
    parser.add_argument("--model", help="name of the model; default: the server's first")
    parser.add_argument("--key", default="none", help="API key, if the server needs one")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--questions", type=int, default=2, help="questions of each client")
    parser.add_argument("--words", type=int, default=100, help="words in a question")
    parser.add_argument("--tokens", type=int, default=64, help="upper limit of tokens in an answer")
    parser.add_argument("--out", type=Path, help="the record, a JSON file")
    return parser.parse_args()


def load(client: OpenAI, model: str, clients: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """All clients at once, each with its questions one after another."""

    def one(number: int) -> list[Answer]:
        words = random.Random(1000 * clients + number)
        answers = []
        for _ in range(arguments.questions):
            chosen = " ".join(words.choices(_WORDS, k=arguments.words))
            question = f"Write a long story with these words: {chosen}"
            answers.append(ask(client, model, question, arguments.tokens))
        return answers

    start = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        answers = [answer for given in pool.map(one, range(clients)) for answer in given]
    seconds = time.perf_counter() - start
    generated = sum(answer.generated for answer in answers)
    return {
        "clients": clients,
        "answers": len(answers),
        "seconds": seconds,
        "prompt_tokens": sum(answer.prompt for answer in answers),
        "tokens": generated,
        "tokens_per_second": generated / seconds,
        "first_median": statistics.median(answer.first for answer in answers),
        "first_longest": max(answer.first for answer in answers),
    }


def ask(client: OpenAI, model: str, question: str, tokens: int) -> Answer:
    """One streamed answer."""
    start = time.perf_counter()
    first, prompt, generated = None, 0, 0
    stream = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": question}],
        max_tokens=tokens,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    for chunk in stream:
        if first is None and chunk.choices and chunk.choices[0].delta.content:
            first = time.perf_counter() - start
        if chunk.usage is not None:
            prompt, generated = chunk.usage.prompt_tokens, chunk.usage.completion_tokens
    return Answer(first if first is not None else time.perf_counter() - start, prompt, generated)


if __name__ == "__main__":
    main()
