"""Training and loading of tokenizers."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dali_pipelines.tokenizer import SPECIAL_TOKENS, load_tokenizer, main, train_tokenizer
from megatron_elva.config.errors import ConfigError, InputError
from tests.dali_pipelines.make_samples import write_shard

TEXTS = ["A red seven moves to the left.", "Which digit moves? Seven.", "How many digits are there? 12"] * 20


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(TEXTS, 290, out)
    return out


@pytest.fixture(scope="module")
def tokenizer(folder):
    return load_tokenizer(folder)


def test_special_tokens_and_size(tokenizer):
    assert len(tokenizer) == 290
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.pad_token == "<|endoftext|>"
    for token in SPECIAL_TOKENS:
        assert len(tokenizer.encode(token, add_special_tokens=False)) == 1
    assert tokenizer.decode(tokenizer.encode("<|im_start|>a<|im_end|>"), skip_special_tokens=True) == "a"


@given(text=st.text(st.characters(exclude_categories=["Cs"])))
def test_any_text_comes_back(tokenizer, text):
    import unicodedata

    ids = tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.decode(ids) == unicodedata.normalize("NFC", text)


def test_words_are_learned_and_digits_stay_single(tokenizer):
    assert len(tokenizer.encode(" digit")) < 4
    assert len(tokenizer.encode("12")) == 2


def test_chat_template(tokenizer):
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    plain = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nho<|im_end|>\n"
    assert tokenizer.apply_chat_template(messages, tokenize=False) == plain
    assert (
        tokenizer.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True)
        == plain[: -len("ho<|im_end|>\n")]
    )


def test_beside_a_model_config_it_stays_the_same(folder, tokenizer):
    text = "<|im_start|>user\nA red  seven é\n\n12<|im_end|>\n"
    ids = tokenizer.encode(text)
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}))
    again = load_tokenizer(folder)
    assert again.encode(text) == ids
    assert again.eos_token == "<|im_end|>"
    assert again.pad_token == "<|endoftext|>"


def test_training_is_repeatable(folder, tmp_path):
    train_tokenizer(TEXTS, 290, tmp_path)
    assert (tmp_path / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()


def test_command(tmp_path, capsys):
    meta = {"caption": "zebra zebra", "qa": [{"question": "quail?", "answer": "quail"}]}
    more = {"messages": [{"role": "user", "content": "wombat wombat"}], "text": "yak yak"}
    write_shard(tmp_path / "a.tar", [("a", {"json": meta, "mp4": b"x"}), ("b", {"json": more})])
    assert main(["--shards", str(tmp_path / "*.tar"), "--vocab", "300", "--out", str(tmp_path / "t")]) == 0
    learned = load_tokenizer(tmp_path / "t")
    for word in ("zebra", "quail", " wombat", " yak"):
        assert len(learned.encode(word)) < len(word)
    assert main(["--shards", str(tmp_path / "no*.tar"), "--vocab", "300", "--out", str(tmp_path / "t")]) == 2
    assert "no file matches" in capsys.readouterr().err
    assert main(["--shards", str(tmp_path / "a.tar"), "--vocab", "100", "--out", str(tmp_path / "t")]) == 2
    assert "at least 259" in capsys.readouterr().err


def test_what_cannot_be_loaded(tmp_path):
    with pytest.raises(InputError, match="holds neither"):
        load_tokenizer(tmp_path / "none")
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(InputError, match="cannot be loaded"):
        load_tokenizer(tmp_path)
    with pytest.raises(ConfigError, match="at least 259"):
        train_tokenizer(TEXTS, 258, tmp_path)
