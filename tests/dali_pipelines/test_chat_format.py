"""Messages, tokens and labels."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dali_pipelines.chat_format import encode_sample, prompt_tokens
from dali_pipelines.tokenizer import load_tokenizer, train_tokenizer
from megatron_elva.config.errors import ConfigError, InputError
from megatron_elva.layout import IGNORE, VideoSpec

QWEN2_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
VIDEO = VideoSpec.uniform(2, 2, 3)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    out = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(["user assistant\nA red seven moves to the left. How many?\n Seven."] * 30, 330, out)
    return load_tokenizer(out)


@pytest.fixture
def encode(tokenizer):
    def call(meta, media=1, task="conversation", limit=10_000, **options):
        return encode_sample(tokenizer, meta, media, task, "Describe it.", limit, **options)

    return call


def turns(*contents):
    return {"messages": [{"role": "user" if i % 2 == 0 else "assistant", "content": c} for i, c in enumerate(contents)]}


def check_labels(tokenizer, encoded, videos):
    """Every label is the next token of the same sample. Returns the runs of labels as text."""
    spec, tokens, labels = encoded.assemble(videos)
    assert len(tokens) == len(labels) == spec.tokens
    assert tokens.dtype == labels.dtype == np.int64
    assert labels[-1] == IGNORE
    wanted = labels != IGNORE
    np.testing.assert_array_equal(labels[:-1][wanted[:-1]], tokens[1:][wanted[:-1]])
    runs, last = [], -2
    for at in np.flatnonzero(wanted):
        if at != last + 1:
            runs.append([])
        runs[-1].append(int(labels[at]))
        last = at
    return [tokenizer.decode(run) for run in runs]


def as_text(tokenizer, segments):
    return "".join("[V]" if s is None else tokenizer.decode(s.tolist()) for s in segments)


def test_caption(tokenizer, encode):
    encoded = encode({"caption": "A red seven."}, task="caption")
    text = "<|im_start|>user\n[V]\nDescribe it.<|im_end|>\n<|im_start|>assistant\nA red seven.<|im_end|>\n"
    assert as_text(tokenizer, encoded.segments) == text
    assert check_labels(tokenizer, encoded, [VIDEO]) == ["A red seven.<|im_end|>"]
    spec, tokens, labels = encoded.assemble([VIDEO])
    first = len(encoded.segments[0])
    assert spec.segments[1] == VIDEO
    assert (tokens[first : first + VIDEO.tokens] == 0).all()
    assert (labels[: first + VIDEO.tokens] == IGNORE).all()


@settings(max_examples=150, deadline=None)
@given(
    contents=st.lists(st.text(st.characters(codec="ascii"), min_size=1).filter(str.strip), min_size=2, max_size=6),
    qwen2=st.booleans(),
)
def test_labels_are_exactly_the_answers(tokenizer, contents, qwen2):
    contents = contents[: len(contents) // 2 * 2]
    meta = turns(*contents)
    media = sum(c.count("<video>") + c.count("<image>") for c in contents[::2]) or 1
    template, tokenizer.chat_template = tokenizer.chat_template, QWEN2_TEMPLATE if qwen2 else tokenizer.chat_template
    try:
        encoded = encode_sample(tokenizer, meta, media, "conversation", "", 100_000)
    finally:
        tokenizer.chat_template = template
    assert check_labels(tokenizer, encoded, [VIDEO] * media) == [f"{c}<|im_end|>" for c in contents[1::2]]


def test_no_token_is_lost_or_doubled_at_a_border(tokenizer, encode):
    meta = turns("<video>\nHow many?", "Seven.", "And <image> now?", "\n\n Seven", "Why?", "<video> <image>")
    encoded = encode(meta, media=2)
    rendered = tokenizer.apply_chat_template(meta["messages"], tokenize=False)
    expected = rendered.replace("<video>\nHow", "[V]\nHow").replace("And <image>", "And [V]")
    assert as_text(tokenizer, encoded.segments) == expected
    assert check_labels(tokenizer, encoded, [VIDEO, VIDEO])[-1] == "<video> <image><|im_end|>"


def test_training_cuts_text_as_inference_does(tokenizer, encode):
    meta = turns("How many?", "\nSeven.", "Why?", " Left.")
    whole = encode(meta)
    prompt = prompt_tokens(tokenizer, meta["messages"][:3], 1)
    assert [s is None for s in prompt] == [s is None for s in whole.segments]
    np.testing.assert_array_equal(prompt[0], whole.segments[0])
    np.testing.assert_array_equal(prompt[2], whole.segments[2][: len(prompt[2])])
    assert not whole.targets[2][len(prompt[2]) - 1]
    assert whole.targets[2][len(prompt[2])]  # the first token of the answer


def test_placeholders_in_a_prompt(tokenizer):
    segments = prompt_tokens(tokenizer, [{"role": "user", "content": "<image> and <video>?"}])
    assert as_text(tokenizer, segments) == "<|im_start|>user\n[V] and [V]?<|im_end|>\n<|im_start|>assistant\n"
    with pytest.raises(InputError, match="2 placeholders for 1 video"):
        prompt_tokens(tokenizer, [{"role": "user", "content": "<image> and <video>?"}], 1)


def test_qa_order_and_choice(tokenizer, encode):
    qa = [{"question": f"q{i}", "answer": f"answer {i}"} for i in range(7)]

    def answers(seed):
        return [
            t.removesuffix("<|im_end|>") for t in check_labels(tokenizer, encode({"qa": qa}, turn_seed=seed), [VIDEO])
        ]

    assert answers(None) == [f"answer {i}" for i in range(4)]
    drawn = [answers((0, 1, epoch)) for epoch in range(20)]
    assert all(len(set(d)) == 4 for d in drawn)
    assert len({tuple(d) for d in drawn}) > 10
    assert answers((0, 1, 3)) == drawn[3]
    text = as_text(tokenizer, encode({"qa": qa}).segments)
    assert text.index("q0") < text.index("answer 0") < text.index("q1")
    assert text.startswith("<|im_start|>user\n[V]\nq0")


def test_text_task_and_text_only_conversations(tokenizer, encode):
    encoded = encode({"text": "A red seven moves."}, media=0, task="text")
    (target,) = check_labels(tokenizer, encoded, [])
    assert "A red seven moves.".endswith(target)
    assert (encoded.assemble([])[2] != IGNORE).sum() == encoded.text_tokens - 1
    assert encode(turns("Hi", "Ho"), media=0).segments[0] is not None


@pytest.mark.parametrize(
    ("meta", "options", "reason"),
    [
        ({}, {"task": "caption"}, "caption: empty"),
        ({"caption": " \n"}, {"task": "caption"}, "caption: empty"),
        ({"caption": 7}, {"task": "caption"}, "caption: not a text"),
        ({"caption": "a"}, {"task": "caption", "media": 0}, "without a video"),
        ({"caption": "a"}, {}, "no messages and no qa"),
        ({"qa": []}, {}, "no messages and no qa"),
        ({"qa": [{"question": "a"}]}, {}, "answer: empty"),
        ({"qa": ["a"]}, {}, "question: empty"),
        ({"messages": "a"}, {}, "not a list"),
        ({"messages": ["a"]}, {}, "needs a role"),
        ({"messages": [{"role": "robot", "content": "a"}]}, {}, "needs a role"),
        ({"messages": [{"role": "user", "content": ["a"]}]}, {}, "needs a text"),
        (turns("a"), {}, "no answers"),
        (turns("a", " "), {}, "an answer is empty"),
        (turns("<video> <video>", "a"), {}, "2 placeholders for 1 video"),
        (turns("<video>", "a"), {"media": 0}, "1 placeholders for 0 video"),
        ({"messages": [{"role": "assistant", "content": "a"}]}, {}, "0 placeholders for 1 video"),
        (turns("a", "b<|im_end|>c"), {}, "control token '<|im_end|>'"),
        (turns("a<|im_start|>assistant\nx", "b"), {}, "control token"),
        (turns("a" * 300, "b"), {"limit": 50}, "data.max_text_tokens is 50"),
        ({"text": "a"}, {"task": "text", "media": 0}, "too short"),
        ({"text": "a b c"}, {"task": "text"}, "0 placeholders for 1"),
    ],
)
def test_reasons(encode, meta, options, reason):
    with pytest.raises(InputError) as caught:
        encode(meta, **options)
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)


def test_other_templates_and_tasks_are_refused(tokenizer, encode):
    with pytest.raises(ConfigError, match="task: 'sing'; allowed: caption"):
        encode({}, task="sing")
    template, tokenizer.chat_template = tokenizer.chat_template, "{% for m in messages %}[{{ m.content }}]{% endfor %}"
    try:
        with pytest.raises(ConfigError, match="not of Qwen2's form"):
            encode(turns("a", "b"))
    finally:
        tokenizer.chat_template = template
