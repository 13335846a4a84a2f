"""Owns a look at the model with plain transformers: `python -m deploy.demo.sample [PROMPT ...]`."""

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

PROMPTS = (
    "def read_lines(path):\n",
    'def read_lines(path):\n    """',
    "import os\n",
    "class Stack:\n",
    '"""Utilities for reading and writing text files.\n',
)
QUESTIONS = ("What does json.dumps do?", "What is threading.Lock?", "Who are you?")


def show_samples(folder: Path, num_tokens: int, device: str = "cpu", prompts: tuple[str, ...] = PROMPTS) -> None:
    """Print how the model in `folder` goes on, greedily and sampled with its own defaults."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    chats = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
        )
        for question in (QUESTIONS if prompts is PROMPTS else ())
    ]
    for prompt in (*prompts, *chats):
        ids = tokenizer(prompt, return_tensors="pt").input_ids.to(device)
        for do_sample in (False, True):
            torch.manual_seed(0)
            output = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=num_tokens,
                pad_token_id=tokenizer.eos_token_id,
                **({} if do_sample else {"do_sample": False, "temperature": None, "top_p": None}),
            )
            print(f"=== {'sampled' if do_sample else 'greedy'} ===\n{tokenizer.decode(output[0])}")


if __name__ == "__main__":
    show_samples(Path(__file__).parent / "model", 160, prompts=tuple(sys.argv[1:]) or PROMPTS)
