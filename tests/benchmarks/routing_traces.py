"""How much of a text do expert shares tell? A probe guesses each token from the shares that --explain gives out.

    python -m tests.benchmarks.routing_traces MERGED TEXT.jsonl...

The attacker has other text of the same kinds with its tokens and shares, and learns from it. Two probes: the token of
the nearest shares, and a small network. Both see the shares of the token and of its two neighbours, mean over layers.
Of a document, --samples gives the mean alone: a third probe guesses which file a document is from.
"""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.neighbors import KNeighborsClassifier

from flexctl.bundle.runnable import open_runnable
from flexctl.evaluation.explaining import explain_tokens
from flexctl.model.building import build_model, load_tokenizer
from flexctl.text.documents import read_documents
from flexctl.text.tokens import frame_documents

TOKENS_A_FILE, TOKENS_A_DOCUMENT, STEPS = 3000, 255, 300


def collect(merged: Path, files: list[Path]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return for each token the shares of the position that it stands at, its id, its document and its file."""
    runnable = open_runnable(merged, merged)
    model = build_model(runnable.weights, device=torch.device("cpu"), dtype=torch.float32)
    tokenizer = load_tokenizer(merged)
    rows: list[list[float]] = []
    ids: list[int] = []
    documents: list[int] = []
    kinds: list[int] = []
    number = 0
    for kind, file in enumerate(files):
        taken = 0
        for framed in frame_documents(tokenizer, read_documents([file])):
            if taken >= TOKENS_A_FILE:
                break
            tokens = framed.tokens[: TOKENS_A_DOCUMENT + 1].tolist()
            # A piece has the shares of the position before it, where the token before it is read.
            pieces = explain_tokens(model, tokenizer, tokens, runnable.experts, TOKENS_A_DOCUMENT)
            rows += [list(piece.shares.values()) for piece in pieces]
            ids += tokens[:-1]
            documents += [number] * len(pieces)
            kinds += [kind] * len(pieces)
            number, taken = number + 1, taken + len(pieces)
        print(f"{file}: {taken} tokens", file=sys.stderr, flush=True)
    return np.array(rows), np.array(ids), np.array(documents), np.array(kinds)


def with_neighbours(shares: np.ndarray, documents: np.ndarray) -> np.ndarray:
    """Return log shares of each token and of the two beside it, zeros beyond a document."""
    logs = np.log(shares + 1e-6)
    before, after = np.zeros_like(logs), np.zeros_like(logs)
    same = documents[1:] == documents[:-1]
    before[1:][same], after[:-1][same] = logs[:-1][same], logs[1:][same]
    return np.concatenate([before, logs, after], axis=1)


def regression(x: np.ndarray, y: np.ndarray, seen: np.ndarray) -> Any:
    """Return what softmax regression says of ``seen``, trained on ``x`` and tokens ``y``."""
    torch.manual_seed(0)
    names, targets = np.unique(y, return_inverse=True)
    mean, std = x.mean(0), x.std(0) + 1e-6
    inputs, wanted = torch.tensor((x - mean) / std).float(), torch.tensor(targets)
    probe = torch.nn.Sequential(torch.nn.Linear(x.shape[1], 256), torch.nn.GELU(), torch.nn.Linear(256, len(names)))
    optimiser = torch.optim.AdamW(probe.parameters(), lr=3e-3)
    for _ in range(STEPS):
        picked = torch.randint(len(inputs), (2048,))
        loss = torch.nn.functional.cross_entropy(probe(inputs[picked]), wanted[picked])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    with torch.no_grad():
        return names[probe(torch.tensor((seen - mean) / std).float()).argmax(1).numpy()]


def main() -> None:
    """Collect, learn on four fifths of the documents, guess the rest."""
    shares, ids, documents, kinds = collect(Path(sys.argv[1]), list(map(Path, sys.argv[2:])))
    test = documents % 5 == 4
    x = with_neighbours(shares, documents)
    common = Counter(ids[~test].tolist()).most_common(1)[0][0]
    nearest = KNeighborsClassifier(1).fit(x[~test], ids[~test]).predict(x[test])
    learned = regression(x[~test], ids[~test], x[test])
    print(f"{len(ids)} tokens of {documents.max() + 1} documents, {shares.shape[1]} experts; {test.sum()} are guessed")
    print(f"the commonest token   {(ids[test] == common).mean():.3f}")
    print(f"nearest shares        {(ids[test] == nearest).mean():.3f}")
    print(f"a small network       {(ids[test] == learned).mean():.3f}")
    means = np.stack([shares[documents == number].mean(0) for number in range(documents.max() + 1)])
    of = np.array([kinds[documents == number][0] for number in range(documents.max() + 1)])
    held = np.arange(len(of)) % 5 == 4
    guessed = KNeighborsClassifier(3).fit(means[~held], of[~held]).predict(means[held])
    most = Counter(of[~held].tolist()).most_common(1)[0][0]
    print(f"file of a document    {(of[held] == guessed).mean():.3f}, the commonest {(of[held] == most).mean():.3f}")


if __name__ == "__main__":
    main()
