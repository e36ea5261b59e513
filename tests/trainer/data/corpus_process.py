"""Prepares a corpus in a process of its own: CORPUS_PROCESS is {"data", "cache", "hang"}.

Each prints "ready", starts when stdin closes, and prints what it opened and how often it encoded.
"""

import json
import os
import sys
import time
from pathlib import Path

import torch  # noqa: F401  imported before the start, so that all start together
from longspan.trainer.data import cache, corpus, documents
from longspan.trainer.data.settings import DataSettings, TrainedTokenizer
from longspan.trainer.data.tokenizer import TextTokenizer

job = json.loads(os.environ["CORPUS_PROCESS"])
data = DataSettings.model_validate(job["data"])
cache._PATIENCE_SECONDS = 0.3
corpus._BATCH_DOCUMENTS = 20
documents._megatron()
batches = 0
encode = TextTokenizer.encode_batch


def counted(tokenizer, texts):
    global batches
    batches += 1
    if job["hang"] and batches == 3:
        print("hanging", flush=True)
        time.sleep(600)
    return encode(tokenizer, texts)


TextTokenizer.encode_batch = counted
print("ready", flush=True)
sys.stdin.read()
prepared = corpus.prepare_corpus(
    data,
    TrainedTokenizer(kind="train", vocab=300),
    tokenizer_data=(data,),
    cache=Path(job["cache"]),
    progress=True,
)
inode = (prepared.tokenizer_path.parent / "train.bin").stat().st_ino
tokens = sum(
    int(prepared.train.read(d, 0, int(n)).sum()) for d, n in enumerate(prepared.train.lengths)
)
print(json.dumps({"key": prepared.key, "inode": inode, "tokens": tokens, "batches": batches}))
