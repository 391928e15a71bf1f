"""The tiny model's tool: its text, tokenizer, training and folder."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from make_tiny_model import (
    LONG_STEP_EVERY,
    MAX_LENGTH,
    ROW_TOKENS,
    ROWS_PER_STEP,
    make_tiny_model,
    orthogonalize,
    token_stream,
    train_model,
    train_tokenizer,
    training_rows,
)
from tiny_corpus import BEGIN, END, Doc, chat_examples, first_paragraphs, read_docstrings, training_examples

DOCS = [
    Doc("shop", "module", "Things to buy.\n\nAnd to sell."),
    Doc("shop.Basket", "class", "Holds things until they are paid for."),
    Doc("shop.pay", "function", "Pay for a basket. Naïve, but 日本 works."),
]


def test_read_docstrings_takes_what_is_public_in_order(tmp_path: Path) -> None:
    (tmp_path / "shop").mkdir()
    (tmp_path / "shop" / "__init__.py").write_text('"""Things."""\ndef _hidden():\n    "no"\n')
    (tmp_path / "shop" / "basket.py").write_text(
        'class Basket:\n    """Holds.\n\n       More."""\n    def add(self): "Add."\n'
    )
    (tmp_path / "shop" / "_private.py").write_text('"""No."""')
    (tmp_path / "other.py").write_text('"""Not asked for."""')
    assert read_docstrings(tmp_path, modules=("absent", "shop")) == [
        Doc("shop", "module", "Things."),
        Doc("shop.basket.Basket", "class", "Holds.\n\nMore."),
        Doc("shop.basket.Basket.add", "function", "Add."),
    ]


def test_read_docstrings_finds_the_standard_library() -> None:
    docs = read_docstrings(Path(ast.__file__).parent, modules=("queue",))
    assert docs[0].kind == "module"
    assert "queue.Queue.put" in [doc.name for doc in docs]


def test_first_paragraphs_keeps_whole_ones() -> None:
    assert first_paragraphs("one\n\ntwo\n\nthree", 9) == "one\n\ntwo"
    assert first_paragraphs("a long first one\n\ntwo", 6) == "a long"


def test_tokenizer_round_trips_and_is_deterministic() -> None:
    tokenizer, again = train_tokenizer(DOCS, 400), train_tokenizer(DOCS, 400)
    assert tokenizer.backend_tokenizer.to_str() == again.backend_tokenizer.to_str()
    text = "Bytes of any kind: é 日本 \t\x00 🙂"
    token_ids = tokenizer.encode(text)
    assert token_ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(token_ids, skip_special_tokens=True) == text


def test_chat_template_writes_what_the_model_is_trained_on() -> None:
    tokenizer = train_tokenizer(DOCS, 400)
    example = chat_examples(DOCS[1])[1]
    messages = [{"role": "user", "content": "Describe the class shop.Basket."}]
    prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert prompt == example.prompt
    assert example.completion == f"{DOCS[1].text}{END}"


def test_loss_counts_completions_only() -> None:
    tokenizer = train_tokenizer(DOCS, 400)
    examples = training_examples(DOCS)
    token_ids, labels = token_stream(examples, tokenizer)
    assert tokenizer.decode(token_ids) == "".join(prompt + completion for prompt, completion in examples)
    assert tokenizer.decode(labels[labels != -100]) == "".join(example.completion for example in examples)
    assert int((token_ids == tokenizer.bos_token_id).sum()) == len(examples) == 4 * len(DOCS)
    assert tokenizer.convert_ids_to_tokens(0) == BEGIN


@pytest.mark.parametrize("num_tokens", [100, 5000])
def test_training_rows_have_fixed_sizes_and_reach_every_position(num_tokens: int) -> None:
    stream = torch.arange(2 * num_tokens).view(2, num_tokens)
    steps = LONG_STEP_EVERY
    rows = list(training_rows(stream, steps))
    assert [tuple(row.shape) for row in rows[:-1]] == [(2, ROWS_PER_STEP, ROW_TOKENS)] * (steps - 1)
    assert tuple(rows[-1].shape) == (2, 1, MAX_LENGTH)
    assert torch.cat([row[0].flatten() for row in rows]).unique().numel() == num_tokens
    for row in rows:
        assert torch.equal(row[0] + num_tokens, row[1])


def test_orthogonalize_brings_singular_values_near_one() -> None:
    matrices = torch.randn(3, 24, 8, generator=torch.Generator().manual_seed(0))
    for batch in (matrices, matrices.mT):
        values = torch.linalg.svdvals(orthogonalize(batch))
        assert values.min() > 0.6
        assert values.max() < 1.3


def test_training_lowers_the_loss_and_repeats_itself() -> None:
    tokenizer = train_tokenizer(DOCS, 300)
    stream = token_stream(training_examples(DOCS), tokenizer)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    model, loss = train_model(config, stream, 40)
    again, same_loss = train_model(config, stream, 40)
    assert loss == same_loss < 4.5  # a guess among about 300 tokens costs ln(300) = 5.7
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, again.state_dict()[name]), name


def test_written_folder_is_a_hugging_face_model(tiny_model_dir: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    config = model.config
    assert (config.num_hidden_layers, config.num_attention_heads, config.num_key_value_heads) == (4, 16, 8)
    assert config.vocab_size == len(tokenizer) == 512
    assert not config.tie_word_embeddings
    assert model.dtype == torch.float32
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert tokenizer.chat_template
    assert sorted(path.name for path in tiny_model_dir.parent.iterdir()) == ["tiny"]


def test_an_existing_folder_is_not_replaced(tiny_model_dir: Path) -> None:
    with pytest.raises(FileExistsError, match="remove it"):
        make_tiny_model(tiny_model_dir, DOCS, vocab_size=300, steps=1)
