"""Fine-tuning with Hugging Face's Trainer: which feed-forward neurons die, as its own reports say it.

A GPT-2 with ReLU, small and made from a config (nothing is downloaded), first learns the letters of Python's reference
manual (the texts behind ``help()``) and is then fine-tuned on another kind of text, the docstrings of the standard
library, at a learning rate that is too high. One callback does it all: it needs no change of the training.

Output (shortened; numbers differ a little between machines and versions)::

    docstrings: 1062 pieces of 64 letters
    {'neuronscope/dead_pct': '0.1953', 'neuronscope/dormant_pct': '20.12', ..., 'neuronscope.more/deaths': '0'}
    {'loss': '3.359', ..., 'epoch': '0.7407'}
    {'neuronscope/dead_pct': '23.83', 'neuronscope/dormant_pct': '9.57', ..., 'neuronscope.more/deaths': '121'}
    ...
    {'eval_loss': '2.972', ..., 'eval_neuronscope/dead_pct': '20.51', 'eval_neuronscope/val_dead_pct': '32.42'}

    105 of 512 neurons are dead (21 %). 1 never fired since watching began (born dead); 104 worked before ...
    Worst layer: `transformer.h.1.mlp.c_fc/relu`, with 105 of 256 dead.

Run it with::

    python examples/transformers_finetuning.py
    tensorboard --logdir runs/transformers_finetuning
"""

import argparse
import inspect
import pydoc
from pathlib import Path
from pydoc_data.topics import topics

import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

from neuronscope.callbacks.transformers import DeadNeuronCallback

CONTEXT = 64


def docstrings() -> str:
    """The documentation of the standard library's classes and functions, as ``help()`` would show it."""
    names = ("argparse", "asyncio", "collections", "datetime", "email.message", "json", "logging", "pathlib", "zipfile")
    modules = [pydoc.locate(name) for name in names]
    members = [member for module in modules for _, member in inspect.getmembers(module)]
    documented = [inspect.getdoc(member) for member in members if inspect.isclass(member) or inspect.isroutine(member)]
    return "\n\n".join(sorted({text for text in documented if text}))


def examples(text: str, alphabet: str) -> list[dict[str, Tensor]]:
    """Pieces of a text, as a Trainer takes them; a letter that is not in the alphabet is its last."""
    numbers = {letter: number for number, letter in enumerate(alphabet)}
    letters = torch.tensor([numbers.get(letter, len(alphabet) - 1) for letter in text])
    pieces = letters[: len(letters) // CONTEXT * CONTEXT].view(-1, CONTEXT)
    return [{"input_ids": piece, "labels": piece} for piece in pieces]


def main() -> None:
    torch.set_num_threads(1)  # quicker for networks this small
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60, help="optimizer steps of each of the two trainings")
    parser.add_argument("--out", type=Path, default=Path("runs/transformers_finetuning"))
    arguments = parser.parse_args()
    torch.manual_seed(0)
    manual = "\n".join(topics[name] for name in sorted(topics))
    alphabet = "".join(sorted(set(manual)))
    config = GPT2Config(
        vocab_size=len(alphabet),
        n_positions=CONTEXT,
        n_embd=64,
        n_layer=2,
        n_head=4,
        activation_function="relu",
        bos_token_id=0,
        eos_token_id=0,
    )
    model = GPT2LMHeadModel(config)  # type: ignore[no-untyped-call]

    for name, text, rate in (("manual", manual, 3e-3), ("docstrings", docstrings(), 3e-2)):
        pieces = examples(text, alphabet)
        callback = DeadNeuronCallback(every_n_steps=2, window_steps=20)
        trainer = Trainer(
            model,
            TrainingArguments(
                str(arguments.out / name),
                max_steps=arguments.steps,
                per_device_train_batch_size=32,
                learning_rate=rate,
                lr_scheduler_type="constant",
                logging_steps=20,
                eval_strategy="steps",
                eval_steps=arguments.steps,
                report_to=["tensorboard"],
                disable_tqdm=True,
                use_cpu=True,
            ),
            train_dataset=pieces[200:],
            eval_dataset=pieces[:200],
            callbacks=[callback],
        )
        print(f"\n{name}: {len(pieces)} pieces of {CONTEXT} letters")
        trainer.train()
        print(callback.report())
    print(f"\nNow look at it: tensorboard --logdir {arguments.out}")


if __name__ == "__main__":
    main()
