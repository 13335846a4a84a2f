"""The tokenizer against transformers' own, on folders made here."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from pagoda.v1 import generation_pb2 as pb

from scheduler.chat_template import ChatTemplateError
from scheduler.tokenizer import SamplingDefaults, Tokenizer, TokenizerError
from tests.unit import model_folders

TEXTS = [
    "",
    " ",
    "Hello, world",
    "  two spaces  \n\n\ttabs",
    "café 日本語 🤯 👩‍👩‍👧 \u0000 \ufffd",
    "<s>special</s> <|user|> <think>in text",
    "def read_lines(path):\n    return 1\n" * 5,
]
CHATS = [
    [("user", "Hello")],
    [("system", "Be brief."), ("user", " a\nb "), ("assistant", "ok 🤯"), ("user", "<s>again</s>")],
]
FOLDERS = {"byte_level": model_folders.byte_level, "byte_fallback": model_folders.byte_fallback}


@pytest.fixture(scope="module", params=FOLDERS)
def folder(request, tmp_path_factory) -> Path:
    return FOLDERS[request.param](tmp_path_factory.mktemp("model"))


def reference(folder: Path):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def test_ids_and_texts_equal_transformers(folder):
    ours, theirs = Tokenizer.load(folder), reference(folder)
    for text in TEXTS:
        token_ids = ours.encode(text)
        assert token_ids == theirs(text)["input_ids"], text
        assert ours.decode(token_ids) == theirs.decode(token_ids, skip_special_tokens=True), text


def test_chat_equals_transformers(folder):
    ours, theirs = Tokenizer.load(folder), reference(folder)
    for chat in CHATS:
        messages = [{"role": role, "content": content} for role, content in chat]
        expected = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert ours.encode_chat(chat) == expected
        assert ours.encode_chat(chat).count(ours.encode("")[0]) == 1 + str(chat).count("<s>")  # no double BOS


@pytest.mark.parametrize(("bos", "eos"), [(True, True), (False, False), (True, False)])
def test_the_post_processor_goes_before_the_configuration_as_with_transformers(tmp_path, bos, eos):
    folder = model_folders.byte_level(tmp_path, tokenizer_config={"add_bos_token": bos, "add_eos_token": eos})
    assert Tokenizer.load(folder).encode("hello") == reference(folder)("hello")["input_ids"]


def test_every_id_has_its_piece(folder):
    tokenizer = Tokenizer.load(folder)
    before = tokenizer.encode("a")
    prefix = tokenizer.decode(before)
    for token_id in range(tokenizer.vocab_size):
        piece = tokenizer.piece(token_id)
        text = piece.decode(errors="replace") if isinstance(piece, bytes) else piece
        assert tokenizer.decode([*before, token_id]) == prefix + text


def test_ids_past_the_tokenizers_are_nothing(folder):
    tokenizer = Tokenizer.load(folder)
    assert tokenizer.piece(tokenizer.vocab_size + 5) == ""


def test_truncation_and_padding_left_in_the_file_are_ignored(tmp_path):
    folder = model_folders.byte_level(tmp_path)
    spec = json.loads((folder / "tokenizer.json").read_text())
    spec["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    spec["padding"] = {
        "strategy": {"Fixed": 64}, "direction": "Right", "pad_to_multiple_of": None,
        "pad_id": 0, "pad_type_id": 0, "pad_token": "<s>",
    }  # fmt: skip
    expected = Tokenizer.load(folder).encode("one two three four five")
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    assert Tokenizer.load(folder).encode("one two three four five") == expected


def test_a_template_file_goes_before_the_one_in_the_configuration(tmp_path):
    folder = model_folders.byte_level(tmp_path)
    (folder / "chat_template.jinja").write_text("{{ messages[0]['content'] }}!")
    tokenizer = Tokenizer.load(folder)
    assert tokenizer.decode(tokenizer.encode_chat([("user", "hi")])) == "hi!"


def test_of_several_templates_the_default_is_taken(tmp_path):
    templates = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "yes"}]
    folder = model_folders.byte_level(tmp_path, tokenizer_config={"chat_template": templates})
    tokenizer = Tokenizer.load(folder)
    assert tokenizer.decode(tokenizer.encode_chat([("user", "hi")])) == "yes"


def test_template_errors_say_why(tmp_path):
    tokenizer = Tokenizer.load(model_folders.byte_level(tmp_path / "a"))
    with pytest.raises(ChatTemplateError, match="unknown role robot"):
        tokenizer.encode_chat([("robot", "beep")])
    bare = Tokenizer.load(model_folders.byte_level(tmp_path / "b", tokenizer_config={"chat_template": None}))
    assert not bare.has_chat_template
    with pytest.raises(ChatTemplateError, match="no chat template"):
        bare.encode_chat([("user", "hi")])


@pytest.mark.parametrize(
    "escape",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ cycler.__init__.__globals__.os }}",
    ],
)
def test_a_template_stays_in_its_sandbox(tmp_path, escape):
    tokenizer = Tokenizer.load(model_folders.byte_level(tmp_path, tokenizer_config={"chat_template": escape}))
    with pytest.raises(ChatTemplateError, match=r"unsafe|undefined"):
        tokenizer.encode_chat([("user", "hi")])


@pytest.mark.parametrize(
    ("generation", "config", "eos", "defaults"),
    [
        (None, {}, (380,), SamplingDefaults(1.0, 0, 1.0)),  # the tokenizer's own eos_token
        (None, {"eos_token_id": 7}, (7,), SamplingDefaults(1.0, 0, 1.0)),
        ({"eos_token_id": [3, 4, 3]}, {"eos_token_id": 7}, (3, 4), SamplingDefaults(1.0, 0, 1.0)),
        (
            {"eos_token_id": 3, "do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.9},
            {},
            (3,),
            SamplingDefaults(0.6, 20, 0.9),
        ),
        ({"do_sample": False, "temperature": None}, {"eos_token_id": 7}, (7,), SamplingDefaults(0.0, 0, 1.0)),
    ],
)
def test_eos_ids_and_defaults(tmp_path, generation, config, eos, defaults):
    extra = {"config": {"vocab_size": 500, **config}}
    if generation is not None:
        extra["generation_config"] = generation
    tokenizer = Tokenizer.load(model_folders.byte_level(tmp_path, **extra))
    assert tokenizer.vocab_size == 500
    assert tokenizer.eos_token_ids == eos
    found = tokenizer.defaults
    assert (found.temperature, found.top_p) == pytest.approx((defaults.temperature, defaults.top_p))
    assert found.top_k == defaults.top_k
    for value in (found.temperature, found.top_p):  # exactly as a request would carry it
        assert pb.SamplingParams(temperature=value).temperature == value


@pytest.mark.parametrize(
    ("file", "text", "words"),
    [
        ("tokenizer.json", None, "is missing"),
        ("tokenizer.json", "{", "can't be read as a tokenizer"),
        ("tokenizer.json", '{"version": "1.0", "model": {"type": "Nothing"}}', "can't be read as a tokenizer"),
        ("tokenizer_config.json", "{", "can't be read as JSON"),
        ("tokenizer_config.json", "[]", "must hold a JSON object"),
        ("config.json", "\udcff", "can't be read as JSON"),
        ("generation_config.json", '{"eos_token_id": "two"}', "eos_token_id must be"),
        ("generation_config.json", '{"temperature": "hot"}', "temperature must be a number"),
        ("generation_config.json", '{"top_p": 2.0}', "out of range"),
        ("chat_template.jinja", "{% if %}", "template is broken"),
    ],
)
def test_a_bad_file_is_named_in_one_line(tmp_path, file, text, words):
    folder = model_folders.byte_level(tmp_path)
    (folder / file).unlink(missing_ok=True)
    if text is not None:
        (folder / file).write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(TokenizerError) as caught:
        Tokenizer.load(folder)
    assert words in str(caught.value)
    assert file in str(caught.value)
    assert "\n" not in str(caught.value)


def test_neither_torch_nor_transformers_is_imported():
    code = "import scheduler.tokenizer, sys; print([m for m in ('torch', 'transformers') if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
