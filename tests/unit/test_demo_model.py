"""The demo model in the repository, and the code that trained it."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast

from deploy.demo import corpus, dialogues, prepare
from deploy.demo.corpus import Document
from deploy.demo.loop import Settings, Trainer, batch_of, held_out_rows, learning_rate
from deploy.demo.model import model_config
from deploy.demo.muon import orthogonalise
from deploy.demo.tokenizer import END_OF_TEXT, END_OF_TURN, SPECIAL_TOKENS, Message, render_chat

DEMO = Path(__file__).parents[2] / "deploy" / "demo"
MODEL = DEMO / "model"
MAX_FOLDER_BYTES = 16_000_000
# Even odds over 4,096 tokens cost ln 4096 = 8.3 nats each, and the tokens' frequencies alone leave about 6.
MAX_HELD_OUT_LOSS = 4.0


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Everything here is so small that threads only wait for each other."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(MODEL)


@pytest.fixture
def library(tmp_path: Path) -> Path:
    """A standard library of a few files."""
    root = tmp_path / "lib"
    for name in ("alpha", "beta/__init__", "beta/gamma", "test/test_alpha", "site-packages/other"):
        file = root / f"{name}.py"
        file.parent.mkdir(parents=True, exist_ok=True)
        module = name.rpartition("/")[2]
        body = "\n".join(f"    value = value + {module}_{line}" for line in range(9))
        function = f'def run(value):\n    """Run it through all steps."""\n{body}\n'
        file.write_text(f'"""What {name} is about, at some length."""\n\n\n{function}')
    (root / "table.py").write_text("codes = [" + "0x1234, " * 100 + "]\n")
    (root / "broken.py").write_bytes(b"# \xff\n" * 100)
    return root


def test_the_checkpoint_is_small_and_in_bfloat16() -> None:
    assert (
        sum(file.stat().st_size for file in DEMO.rglob("*") if file.is_file() and file.suffix != ".pyc")
        < MAX_FOLDER_BYTES
    )
    config = json.loads((MODEL / "config.json").read_text())
    assert config["dtype"] == "bfloat16"
    assert config["num_key_value_heads"] < config["num_attention_heads"]
    assert config["max_position_embeddings"] == 2048


def test_generation_defaults_sample_and_stop_at_both_ends(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    defaults = model.generation_config
    assert (defaults.do_sample, defaults.temperature, defaults.top_p) == (True, 0.7, 0.95)
    assert defaults.eos_token_id == tokenizer.convert_tokens_to_ids([END_OF_TEXT, END_OF_TURN])


@pytest.mark.parametrize(
    "text", ["def f():\n\treturn 1\n", "Grüße, мир, 你好", "🙂👩‍👩‍👧‍👦 and   spaces ", "\x00\r\n\ufeff"]
)
def test_the_tokenizer_gives_any_text_back(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert tokenizer.decode(ids) == text
    assert max(ids) < model_config().vocab_size


def test_the_chat_template_renders_what_was_trained_on(tokenizer: PreTrainedTokenizerFast) -> None:
    messages = [
        Message("system", "Be brief."),
        Message("user", " What is a list? "),
        Message("assistant", "A sequence."),
    ]
    rendered = tokenizer.apply_chat_template(
        [{"role": message.role, "content": message.content} for message in messages], tokenize=False
    )
    assert rendered == render_chat(messages)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert prompt == "<|user|>\nHi<|end|>\n<|assistant|>\n"
    assert [tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS] == list(range(len(SPECIAL_TOKENS)))


@torch.no_grad()
def test_the_model_has_learned_python_it_never_saw(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    root = corpus.stdlib_root()
    unseen = [file for name in ("typing", "ipaddress", "string", "timeit") if (file := root / f"{name}.py").exists()]
    assert unseen
    assert all(corpus.is_held_out(file.name, seed=0) for file in unseen)
    losses, margins = [], []
    for file in unseen:
        ids = tokenizer(file.read_text(encoding="utf-8")[:3000], return_tensors="pt").input_ids
        output = model(ids, labels=ids)
        losses.append(float(output.loss))
        top = output.logits.topk(2).values
        margins.append(float((top[..., 0] - top[..., 1]).median()))
    assert np.mean(losses) < MAX_HELD_OUT_LOSS
    assert min(margins) > 0.3  # random weights: below 0.1


def test_the_corpus_leaves_out_packages_tables_and_broken_files(library: Path) -> None:
    documents = corpus.read_sources(library)
    assert [document.path for document in documents] == [
        "alpha.py",
        "beta/__init__.py",
        "beta/gamma.py",
        "test/test_alpha.py",
    ]
    assert [corpus.is_test(document.path) for document in documents] == [False, False, False, True]


def test_files_are_held_out_by_path_and_seed() -> None:
    documents = [Document(f"file_{index}.py", "") for index in range(2000)]
    parts = corpus.split(documents, seed=0)
    assert 20 <= len(parts.held_out) <= 60
    assert len(parts.train) + len(parts.held_out) == len(documents)
    assert corpus.split(documents[::-1], seed=0).held_out == parts.held_out[::-1]
    assert corpus.split(documents, seed=1).held_out != parts.held_out


def test_chats_are_made_of_docstrings(library: Path) -> None:
    subjects = {
        subject.name: subject
        for document in corpus.read_sources(library)
        for subject in dialogues.source_subjects(document)
    }
    assert set(subjects) == {"alpha", "alpha.run", "beta", "beta.run", "beta.gamma", "beta.gamma.run"}
    assert subjects["alpha.run"].doc == "Run it through all steps."
    assert subjects["alpha.run"].signature == "def run(value)"
    assert subjects["beta.gamma.run"].source.startswith("def run(value):\n    ")


def test_preparing_twice_gives_the_same_tokens(library: Path, tmp_path: Path) -> None:
    documents = corpus.read_sources(library)
    parts = corpus.Corpus(tuple(documents[1:]), tuple(documents[:1]))
    chats = [Document("chat", render_chat([Message("user", "What is beta?"), Message("assistant", "A module.")]))]
    for name in ("one", "two"):
        prepare.prepare(tmp_path / name, parts, chats, seed=0)
    train, held_out = prepare.load_tokens(tmp_path / "one")
    np.testing.assert_array_equal(train, prepare.load_tokens(tmp_path / "two")[0])
    tokenizer = Tokenizer.from_file(str(tmp_path / "one" / "tokenizer.json"))
    assert tokenizer.decode(held_out.tolist(), skip_special_tokens=False) == documents[0].text + END_OF_TEXT
    # Three files and, once more, the two that are no tests; the chat twice.
    assert np.count_nonzero(train == tokenizer.token_to_id(END_OF_TEXT)) == 3 + 2 + 2


def test_an_epoch_shows_every_row_once() -> None:
    settings = Settings(num_steps=100, tokens_per_step=64, length=16, long_share=0.0)
    tokens = torch.arange(16 * 42)
    firsts = torch.cat([batch_of(step, tokens, settings)[:, 0] for step in range(10)])
    assert len(firsts.unique()) == len(firsts) == 40
    assert not torch.equal(batch_of(10, tokens, settings), batch_of(0, tokens, settings))
    assert torch.equal(batch_of(3, tokens, settings), batch_of(3, tokens, settings))


def test_the_last_steps_see_long_rows_of_as_many_tokens() -> None:
    settings = Settings(num_steps=10, tokens_per_step=64, length=16, long_length=32, long_share=0.2)
    tokens = torch.arange(1000)
    assert batch_of(7, tokens, settings).shape == (4, 17)
    assert batch_of(8, tokens, settings).shape == (2, 33)


def test_the_learning_rate_rises_and_falls() -> None:
    settings = Settings(num_steps=100, num_warmup_steps=10, lr=1.0)
    rates = [learning_rate(step, settings) for step in range(100)]
    assert rates[:10] == pytest.approx([0.1 * (step + 1) for step in range(10)])
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[-1] < 0.001


def test_held_out_rows_are_spread_over_the_stream() -> None:
    rows = torch.cat(list(held_out_rows(torch.arange(101), length=10, num_rows=3)))
    assert rows[:, 0].tolist() == [0, 40, 90]
    assert rows.shape == (3, 11)


def test_orthogonalised_matrices_have_singular_values_near_one() -> None:
    torch.manual_seed(0)
    for shape in ((2, 32, 80), (2, 80, 32)):
        values = torch.linalg.svdvals(orthogonalise(torch.randn(shape)))
        assert values.min() > 0.5
        assert values.max() < 1.3


def test_a_run_that_was_cut_and_resumed_is_the_same_run(tmp_path: Path) -> None:
    config = model_config(num_layers=2, hidden_size=32, vocab_size=64)
    settings = Settings(
        num_steps=6,
        tokens_per_step=64,
        length=16,
        long_length=32,
        long_share=0.34,
        dropout=0.1,
        num_warmup_steps=2,
        eval_every=3,
    )
    rng = np.random.default_rng(0)
    train, held_out = (rng.integers(64, size=size).astype(np.uint16) for size in (2000, 200))

    whole = Trainer(config, settings, "cpu")
    assert whole.run(train, held_out, tmp_path / "whole", max_minutes=5)
    first = Trainer(config, settings, "cpu")
    assert not first.run(train, held_out, tmp_path / "cut", max_minutes=0)
    assert first.progress.step == 3

    torch.manual_seed(1234)
    second = Trainer(config, settings, "cpu")
    assert second.resume(tmp_path / "cut")
    assert second.run(train, held_out, tmp_path / "cut", max_minutes=5)
    assert second.progress.history == whole.progress.history
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, second.model.state_dict()[name]), name
    with pytest.raises(ValueError, match="was made with"):
        Trainer(config, Settings(num_steps=7), "cpu").resume(tmp_path / "cut")
