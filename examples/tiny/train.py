"""Train the tiny model and write its checkpoint: ``make tiny``.

Two processes of one thread each, with their gradients averaged: with two threads, every one of
thousands of small operations would wait for the slower thread. The learning rate is constant after
the warm-up and falls to zero over the last part.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional

from examples.tiny.config import TinySizes
from examples.tiny.make_checkpoint import write_checkpoint
from examples.tiny.model import TinyModel
from examples.tiny.tasks import FIRST, TASKS, Example, Mixture, defaults, evaluation_examples
from examples.tiny.tensors import TensorSpec, tensor_value
from examples.tiny.tokenizer import CORPUS, EOS, build_tokenizer
from examples.tiny.trained import CHECKPOINT, RECIPE, hashes, load, published_tensors

SIZES = TinySizes(
    hidden_size=128,
    intermediate_size=256,
    moe_intermediate_size=64,
    num_hidden_layers=4,
    first_k_dense_replace=1,
    kv_lora_rank=64,
    qk_nope_head_dim=32,
    qk_rope_head_dim=32,
    v_head_dim=64,
)
SEED = 1
TOKENIZER_SEED, TOKENIZER_EXAMPLES = 2, 8000
HELD_OUT_SEED, HELD_OUT_PER_TASK = 3, 200
PROCESSES = 2
BATCH, CHUNKS = 64, 3
"""Examples of one step in one process, and the parts, of similar lengths, it is computed in."""
STEPS = 6000
LEARNING_RATE, WARM_UP, DECAY = 2e-3, 100, 0.3
BIAS_STEP = 1e-3
"""Step of the router's correction bias towards an even load, as DeepSeek V3 was trained."""


def trained_tokenizer() -> Tokenizer:
    """The tokenizer of the trained checkpoint: the tasks' words, and one token a digit."""
    mixture = Mixture(TOKENIZER_SEED)
    lines = CORPUS.read_text("utf-8").splitlines(keepends=True)
    for _ in range(TOKENIZER_EXAMPLES):
        example = mixture.draw()
        lines += [example.question, example.answer]
    # Without digits in the corpus no two of them merge.
    return build_tokenizer(SIZES.vocab_size, (re.sub(r"\d", "", line) for line in lines))


class Batch(NamedTuple):
    """Examples of similar lengths: inputs, int64 [B, T], targets, the same with -100 where none
    is, and the task of each row."""

    inputs: Tensor
    targets: Tensor
    tasks: list[str]


def batches(tokenizer: Tokenizer, examples: list[Example], parts: int) -> list[Batch]:
    """The examples in about ``parts`` batches."""
    prompts = tokenizer.encode_batch([e.prompt for e in examples])
    answers = tokenizer.encode_batch([e.answer + EOS for e in examples])
    rows = sorted(
        ((p.ids, a.ids, e.task) for p, a, e in zip(prompts, answers, examples, strict=True)),
        key=lambda row: len(row[0]) + len(row[1]),
    )
    size = -(-len(rows) // parts)
    result = []
    for start in range(0, len(rows), size):
        chunk = rows[start : start + size]
        length = max(len(p) + len(a) for p, a, _ in chunk) - 1
        inputs = torch.zeros(len(chunk), length, dtype=torch.long)
        targets = torch.full_like(inputs, -100)
        for i, (p, a, _) in enumerate(chunk):
            both = torch.tensor(p + a)
            inputs[i, : len(both) - 1] = both[:-1]
            targets[i, len(p) - 1 : len(both) - 1] = both[len(p) :]
        result.append(Batch(inputs, targets, [task for _, _, task in chunk]))
    return result


@torch.no_grad()
def accuracy(model: TinyModel, tokenizer: Tokenizer, examples: list[Example]) -> dict[str, float]:
    """Share of each task's examples whose greedy answer is right to the last token."""
    model.eval()
    right: dict[str, list[bool]] = {task: [] for task in TASKS}
    for batch in batches(tokenizer, examples, -(-len(examples) // 50)):
        hits = model.logits(batch.inputs).argmax(-1) == batch.targets
        for task, hit in zip(batch.tasks, all_right(hits, batch.targets), strict=True):
            right[task].append(hit)
    model.train()
    return {task: sum(values) / len(values) for task, values in right.items()}


def all_right(hits: Tensor, targets: Tensor) -> list[bool]:
    """Whether each row is right wherever it has a target."""
    answers: list[bool] = (hits | (targets < 0)).all(1).tolist()
    return answers


def rate(step: int, steps: int) -> float:
    """Factor on the learning rate."""
    return min(1.0, (step + 1) / WARM_UP, (steps - step) / (DECAY * steps))


def train(rank: int, steps: int, state_path: Path) -> None:
    """One of the processes; process 0 reports, and saves what a killed training needs to go on."""
    torch.set_num_threads(1)
    store = dist.FileStore(str(state_path.with_suffix(".store")), PROCESSES)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=PROCESSES)
    torch.manual_seed(SEED)
    model = TinyModel(SIZES)
    tokenizer = trained_tokenizer()
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.05}, {"params": vectors, "weight_decay": 0.0}],
        betas=(0.9, 0.98),
        fused=True,
    )
    first, tokens, cpu = 0, 0, 0.0
    answered: dict[str, float] = {}
    if state_path.exists():
        state = torch.load(state_path)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first, tokens, cpu = state["step"], state["tokens"], state["CPU seconds"]
        answered = state["right"]
    # A training that went on draws examples that it has not drawn before.
    mixture = Mixture(SEED + 1000 * rank + 1_000_000 * first, FIRST, answered)
    held_out = evaluation_examples(HELD_OUT_SEED, 60)
    started, losses = time.monotonic(), []
    cpu -= PROCESSES * time.process_time()
    for step in range(first, steps):
        parts = batches(tokenizer, [mixture.draw() for _ in range(BATCH)], CHUNKS)
        count = sum(int((part.targets >= 0).sum()) for part in parts)
        total = 0.0
        for part in parts:
            wanted = part.targets >= 0
            logits = model(part.inputs)[wanted] @ model.head.t()
            loss = functional.cross_entropy(logits, part.targets[wanted], reduction="sum")
            (loss / count).backward()
            total += float(loss.detach()) / count
            tokens += PROCESSES * part.inputs.numel()
            hits = torch.zeros_like(wanted)
            hits[wanted] = logits.argmax(-1) == part.targets[wanted]
            for task, right in zip(part.tasks, all_right(hits, part.targets), strict=True):
                mixture.learn(task, right)
        losses.append(total)
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        loads = [moe.load for moe in model.moe_layers]
        flat = torch.cat([g.flatten() for g in (*gradients, *loads)])
        dist.all_reduce(flat)
        for value, mean in zip(
            (*gradients, *loads), flat.split([g.numel() for g in (*gradients, *loads)]), strict=True
        ):
            value.copy_(mean.view_as(value) / PROCESSES)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * rate(step, steps)
        optimizer.step()
        optimizer.zero_grad()
        shares = []
        for moe in model.moe_layers:
            moe.bias += BIAS_STEP * (moe.load.mean() - moe.load).sign()
            shares.append(moe.load / moe.load.mean())
            moe.load.zero_()
        if rank == 0 and (step + 1) % 50 == 0:
            load = torch.stack(shares)
            print(
                f"step {step + 1}/{steps}: loss {sum(losses) / len(losses):.3f}, load "
                f"{load.min():.2f}..{load.max():.2f}, {time.monotonic() - started:.0f} s, "
                f"{cpu + PROCESSES * time.process_time():.0f} CPU s, {tokens / 1e6:.2f} M tokens",
                flush=True,
            )
            losses = []
        if rank == 0 and ((step + 1) % 200 == 0 or step + 1 == steps):
            scores = accuracy(model, tokenizer, held_out)
            print({task: round(score, 3) for task, score in scores.items()}, flush=True)
            state = {
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "step": step + 1,
                "tokens": tokens,
                "right": mixture.right,
                "CPU seconds": cpu + PROCESSES * time.process_time(),
            }
            torch.save(state, state_path.with_suffix(".new"))
            state_path.with_suffix(".new").replace(state_path)


def export(state_path: Path, output: Path) -> int:
    """Write the trained model as a checkpoint into ``output``; returns the bytes of its tensors.

    What was not trained, the indexer and the MTP layer, has the random checkpoint's values.
    """
    model = TinyModel(SIZES)
    model.load_state_dict(torch.load(state_path)["model"])
    trained = dict(published_tensors(model))

    def value(spec: TensorSpec) -> Tensor:
        found = trained.get(spec.copy_of or spec.name)
        if found is None:
            return torch.from_numpy(tensor_value(spec, SEED))
        return found.detach().contiguous()

    return write_checkpoint(output, SIZES, value, trained_tokenizer())


@torch.no_grad()
def scores(folder: Path, known: dict[str, str]) -> dict[str, Any]:
    """Accuracy of each task on held-out questions, and each MoE layer's lightest and heaviest load.

    Of the checkpoint in ``folder``, so after rounding to FP8; a load of 1 is an even share.
    ``known``: the settings' defaults that it was trained on.
    """
    model = load(folder, TinyModel(SIZES))
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    examples = evaluation_examples(HELD_OUT_SEED, HELD_OUT_PER_TASK, known)
    result: dict[str, Any] = {"accuracy": accuracy(model, tokenizer, examples)}
    for moe in model.moe_layers:
        moe.load.zero_()
    model.train()  # only then is the load counted
    mixture = Mixture(HELD_OUT_SEED)
    for batch in batches(tokenizer, [mixture.draw() for _ in range(2000)], 20):
        model(batch.inputs)
    loads = [moe.load / moe.load.mean() for moe in model.moe_layers]
    result["expert load"] = [[round(float(x), 2) for x in (v.min(), v.max())] for v in loads]
    return result


def main(argv: list[str] | None = None) -> int:
    """Train (or go on where a killed training was), write the files and print their scores."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.tiny.train", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--work", type=Path, default=Path(".cache/tiny"), help="training state")
    args = parser.parse_args(argv)
    args.work.mkdir(parents=True, exist_ok=True)
    state_path = args.work / "state.pt"
    # A rendezvous that an earlier training left would be taken for this one's.
    state_path.with_suffix(".store").unlink(missing_ok=True)
    torch.multiprocessing.spawn(train, (args.steps, state_path), nprocs=PROCESSES)
    nbytes = export(state_path, CHECKPOINT)
    state = torch.load(state_path)
    recipe = {
        "command": "make tiny",
        "seed": SEED,
        "steps": state["step"],
        "tokens": state["tokens"],
        "CPU minutes": round(state["CPU seconds"] / 60, 1),
        **scores(CHECKPOINT, defaults()),
        "facts": defaults(),
        "sha256": hashes(CHECKPOINT),
    }
    RECIPE.write_text(json.dumps(recipe, indent=1) + "\n", "utf-8")
    print(f"{CHECKPOINT}: {nbytes / 1e6:.1f} MB of tensors")
    print(json.dumps({k: v for k, v in recipe.items() if k not in ("facts", "sha256")}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
