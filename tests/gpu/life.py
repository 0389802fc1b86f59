"""An expert's whole life at the size of OLMo-2-1B, through the command line: every command with ``--device cuda``.

The checkpoint's weights, the tokenizer and the text are random and made here; nothing is fetched.
"""

from __future__ import annotations

import contextlib
import io
import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from flexctl.cli import app
from flexctl.cli.output import Output
from flexctl.runtime import peak_rss_bytes
from tests.benchmarks.shapes import ONE_B, SMALL, Shape, dense_model
from tests.benchmarks.timeline import Timeline
from tests.gpu.section import Section

_KEPT = ("tokens_per_s", "final_loss", "held_out", "steps", "bytes_written", "perplexity", "text", "num_experts")


def main() -> None:
    """Live it."""
    section = Section()
    shape = SMALL if section.small else replace(ONE_B, layers=section.layers)
    with tempfile.TemporaryDirectory() as folder:
        _live(section, shape, Path(folder))
    section.end()


def _live(section: Section, shape: Shape, root: Path) -> None:
    with section.part("checkpoint, tokenizer and text"):
        make_checkpoint(root / "checkpoint", shape, section.device)
        words = 30 if section.small else 500
        make_text(root / "public.jsonl", shape.vocab, documents=240, words=words, seed=0)
        make_text(root / "law.jsonl", shape.vocab, documents=240, words=words, seed=1)
        make_text(root / "test.jsonl", shape.vocab, documents=16, words=words, seed=1, draw=2)
    where = ["--device", section.device.type, "--dtype", "bfloat16"]
    anchor, merged = ["--anchor", str(root / "anchor")], str(root / "merged")
    steps = ["--max-steps", "3" if section.small else "16", "--batch-tokens", str(shape.tokens)]
    steps += ["--seq-len", str(shape.seq_len), "--lr", "3e-4"]
    data = ["--data", str(root / "law.jsonl")]
    law, low = str(root / "law.st"), str(root / "low.st")
    test = f"law={root / 'test.jsonl'}"
    commands = {
        "init-anchor": [
            str(root / "checkpoint"),
            "--data",
            str(root / "public.jsonl"),
            "-o",
            str(root / "anchor"),
            *where,
        ],
        "train-expert": [*data, *anchor, "-o", law, "--name", "law", *steps, *where],
        "merge": [law, *anchor, "-o", merged],
        "evaluate": [merged, "--data", test, *where],
        "generate": [merged, "--prompt", "w00010 w00011 w00012", "--max-new-tokens", "32", *where],
        "train-expert --rank 16": [*data, *anchor, "-o", low, "--name", "low", "--rank", "16", *steps, *where],
        "merge of two": [law, low, *anchor, "-o", f"{merged}-2"],
        "generate from two": [f"{merged}-2", "--prompt", "w00010 w00011", "--max-new-tokens", "32", *where],
    }
    for name, arguments in commands.items():
        with section.part(name) as figures:
            figures |= _run([name.split()[0], *arguments, "--json"])
            figures["peak_rss_bytes"] = peak_rss_bytes()


def _run(arguments: list[str]) -> dict[str, Any]:
    """Run a command in this process and return the figures of its result, and where its time went."""
    said, timeline = io.StringIO(), Timeline()

    class Timed(Output):
        reporter = timeline

    app.Output = Timed  # type: ignore[misc]
    with contextlib.redirect_stdout(said):
        code = app.main(arguments)
    if code:
        raise RuntimeError(f"{arguments[0]}: exit code {code}")
    timeline.mark("the rest")
    result = json.loads(said.getvalue())
    print(json.dumps(result)[:4000])
    figures = {key: result[key] for key in _KEPT if result.get(key) is not None}
    return figures | {"timeline": {name: round(seconds, 2) for name, seconds in timeline.seconds.items()}}


def make_checkpoint(path: Path, shape: Shape, device: torch.device) -> None:
    """Write a stock checkpoint in bfloat16 with random weights, and a tokenizer with a word for every id."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    dense_model(shape, device, torch.bfloat16).cpu().save_pretrained(path)
    words = ["<|endoftext|>", "<|pad|>", *(_word(i) for i in range(2, shape.vocab))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<|pad|>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=words[0], pad_token=words[1], unk_token=words[1], model_max_length=1024
    ).save_pretrained(path)


def make_text(path: Path, vocab: int, *, documents: int, words: int, seed: int, draw: int = 0) -> None:
    """Write documents of random words, a few of which are frequent: which ones, ``seed`` decides."""
    order = np.random.Generator(np.random.PCG64(seed)).permutation(np.arange(2, vocab))
    ranks = np.random.Generator(np.random.PCG64([seed, draw])).zipf(1.3, size=(documents, words)) % len(order)
    with path.open("w") as file:
        for row in order[ranks]:
            file.write(json.dumps({"text": " ".join(map(_word, row))}) + "\n")


def _word(number: int) -> str:
    return f"w{number:05}"


if __name__ == "__main__":
    main()
