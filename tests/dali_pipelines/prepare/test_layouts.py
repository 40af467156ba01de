"""Rows as published data sets write them, made short."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dali_pipelines.prepare.layouts import drafts_of
from dali_pipelines.prepare.scan import check_text
from megatron_elva.config.errors import InputError

ASK, TELL = {"from": "human", "value": "<image>\nWhat is on the table?"}, {"from": "gpt", "value": "A red cup."}
USER = {"role": "user", "content": "<image>\nWhat is on the table?"}
ASSISTANT = {"role": "assistant", "content": "A red cup."}


def only(row):
    (draft,) = drafts_of(row)
    check_text(draft.meta, len(draft.media))
    return draft


def test_llava_1_5_image():
    more = [{"from": "human", "value": "Who owns it?"}, {"from": "gpt", "value": "Nobody knows."}]
    draft = only(
        {"id": "000000033471", "image": "coco/train2017/000000033471.jpg", "conversations": [ASK, TELL, *more]}
    )
    assert (draft.name, draft.media) == ("000000033471", ("coco/train2017/000000033471.jpg",))
    assert [m["role"] for m in draft.meta["messages"]] == ["user", "assistant"] * 2
    assert draft.meta["messages"][:2] == [USER, ASSISTANT]
    assert draft.meta["id"] == "000000033471" and "conversations" not in draft.meta and "image" not in draft.meta


def test_llava_1_5_text_alone_and_an_answer_before_the_first_question():
    talk = [
        {"from": "gpt", "value": "Hello."},
        {"from": "human", "value": "Two and two?"},
        {"from": "gpt", "value": "4"},
    ]
    draft = only({"id": "wgByO4Y_0", "model": "", "conversations": talk})
    assert draft.media == ()
    assert [m["content"] for m in draft.meta["messages"]] == ["Two and two?", "4"]


def test_llava_pretrain_has_its_placeholder_behind_the_question():
    ask = {"from": "human", "value": "Render a summary of the photo.\n<image>"}
    draft = only({"id": "004539375", "image": "00453/004539375.jpg", "conversations": [ask, TELL]})
    assert draft.meta["messages"][0]["content"].endswith("\n<image>")


def test_llava_recap_keeps_its_source():
    place = {"parquet": "train-0.parquet", "group": 0, "row": 3, "key": "image", "item": None, "name": "a.jpg"}
    draft = only({"id": "1", "image": place, "conversations": [ASK, TELL], "data_source": "blip558k"})
    assert draft.media == (place,)
    assert draft.meta["data_source"] == "blip558k"


def test_llava_video_178k_says_image_for_its_video():
    more = [{"from": "human", "value": "And then?"}, {"from": "gpt", "value": "It falls."}]
    draft = only(
        {
            "id": "1006-8968804598",
            "conversations": [ASK, TELL, *more],
            "data_source": "0_30_s_nextqa",
            "video": "NextQA/NExTVideo/1006/8968804598.mp4",
        }
    )
    assert draft.media == ("NextQA/NExTVideo/1006/8968804598.mp4",)
    assert draft.meta["messages"][0]["content"].startswith("<image>\n")
    assert len(draft.meta["messages"]) == 4


def test_sharegpt4video_takes_the_caption_of_the_whole_video():
    captions = [{"idx": "1", "content": "A man."}, {"idx": "2", "content": "A dog."}, {"idx": "-1", "content": "Both."}]
    row = {
        "video_id": "6S9N", "video_path": "panda/6S9N.mp4", "timestamp": ["00:00:00.000"], "keyframe": [0],
        "captions": captions, "zip_folder": "panda_videos_1.zip",
    }  # fmt: skip
    draft = only(row)
    assert (draft.name, draft.media, draft.meta["caption"]) == ("6S9N", ("panda/6S9N.mp4",), "Both.")
    assert draft.meta["zip_folder"] == "panda_videos_1.zip" and "captions" not in draft.meta
    with pytest.raises(InputError, match="whole video"):
        drafts_of({**row, "captions": captions[:2]})


@pytest.mark.parametrize("key", ["conversations", "messages"])
def test_sharegpt_with_a_system_turn(key):
    turns = [{"from": "system", "value": "Be short."}, {"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]
    assert [m["role"] for m in only({key: turns}).meta["messages"]] == ["system", "user", "assistant"]
    apart = only({key: turns[1:], "system": "Be short."})
    assert apart.meta["messages"][0] == {"role": "system", "content": "Be short."} and "system" not in apart.meta


def test_sharegpt_in_openai_words_with_files_beside():
    messages = [{"role": "user", "content": "<image><image>\nWhich is larger?"}, ASSISTANT]
    draft = only({"messages": messages, "images": ["b.jpg", "a.png"]})
    assert draft.media == ("b.jpg", "a.png")
    assert draft.meta["messages"] == messages


def test_contents_in_parts_name_their_files():
    parts = [
        {"type": "video", "video": "file:///data/b.mp4"},
        {"type": "image_url", "image_url": {"url": "a.png"}},
        {"type": "text", "text": "Same room?"},
    ]
    draft = only({"messages": [{"role": "user", "content": parts}, ASSISTANT]})
    assert draft.media == ("/data/b.mp4", "a.png")
    assert draft.meta["messages"][0]["content"] == "<video>\n<image>\nSame room?"


def test_videos_and_images_come_in_the_order_of_their_placeholders():
    turns = [
        {"from": "human", "value": "<video><image>first"}, TELL,
        {"from": "human", "value": "<video>then"}, TELL,
    ]  # fmt: skip
    draft = only({"image": "c.jpg", "video": ["a.mp4", "b.mp4"], "conversations": turns})
    assert draft.media == ("a.mp4", "c.jpg", "b.mp4")


@pytest.mark.parametrize(
    ("row", "media"),
    [
        ({"video": "a.mp4", "caption": "It rains."}, "a.mp4"),
        ({"image": "a.jpg", "text": "It rains."}, "a.jpg"),
        ({"path": "a.webm", "caption": "It rains.", "views": "12"}, "a.webm"),
        ({"file_name": "a.mp4", "text": "It rains."}, "a.mp4"),
        ({"video": {"path": "a.mp4", "bytes": None}, "caption": " It rains. "}, "a.mp4"),
    ],
)
def test_captions(row, media):
    draft = only(row)
    assert (draft.media, draft.meta["caption"]) == ((media,), "It rains.")
    assert "text" not in draft.meta


def test_several_captions_of_a_file_are_several_samples():
    assert [d.meta["caption"] for d in drafts_of({"video": "a.mp4", "caption": ["one", "two"]})] == ["one", "two"]


def test_questions_and_answers():
    draft = only({"video": "a.mp4", "question": "<video>\nWho?", "answer": "She"})
    assert draft.meta["qa"] == [{"question": "Who?", "answer": "She"}]
    ours = only(
        {"video": "a.mp4", "caption": "Cap", "qa": [{"question": "Who?", "answer": "She", "type": "x"}], "text": "t"}
    )
    assert ours.meta == {"caption": "Cap", "qa": [{"question": "Who?", "answer": "She", "type": "x"}], "text": "t"}
    assert only({"text": "Plain."}).meta == {"text": "Plain."}


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"video": "a.mp4"}, "no text"),
        ({"video": "https://x.org/a.mp4", "caption": "c"}, "is a URL"),
        ({"video": 3, "caption": "c"}, "names no file"),
        ({"caption": "c"}, "without a video or image"),
        ({"video": "a.mp4", "caption": " "}, "empty"),
        ({"video": "a.mp4", "conversations": "hello"}, "not a list"),
        ({"video": "a.mp4", "conversations": [{"from": "tool", "value": "x"}]}, "'tool'"),
        ({"video": "a.mp4", "conversations": [ASK]}, "no answers"),
        ({"video": "a.mp4", "conversations": [ASK, {"from": "gpt", "value": ""}]}, "an answer is empty"),
        ({"conversations": [ASK, TELL]}, "1 placeholders for 0"),
        ({"image": ["a.jpg", "b.jpg"], "conversations": [ASK, TELL]}, "1 placeholders for 2"),
        ({"image": "a.jpg", "caption": "bad <|im_end|> text"}, "control token"),
        ({"video": "a.mp4", "qa": [{"question": "Q", "answer": "A"}, {"question": "Q"}]}, "answer"),
        ({"video": "a.mp4", "qa": "x"}, "qa"),
        ({"messages": [{"role": "user", "content": [{"type": "audio"}]}]}, "neither text"),
    ],
)
def test_what_cannot_be_used_is_named_in_one_line(row, says):
    with pytest.raises(InputError, match=says) as caught:
        only(row)
    assert "\n" not in str(caught.value)


KEYS = [
    "video",
    "videos",
    "image",
    "images",
    "path",
    "conversations",
    "messages",
    "captions",
    "caption",
    "text",
    "qa",
    "question",
    "answer",
    "system",
    "id",
    "from",
    "value",
    "role",
    "content",
    "type",
    "idx",
    "url",
    "bytes",
    "x",
]
LEAVES = st.none() | st.booleans() | st.integers(-2, 2) | st.floats() | st.sampled_from(
    ["", "a.mp4", "human", "gpt", "user", "assistant", "text", "video", "<image>\nWhat?", "It is.", "-1", "http://x/y"]
)  # fmt: skip
VALUES = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=4)
)


@settings(max_examples=600, deadline=None)
@given(st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=6))
def test_whatever_a_row_holds_it_becomes_samples_or_one_line(row):
    try:
        drafts = drafts_of(row)
        for draft in drafts:
            check_text(draft.meta, len(draft.media))
    except InputError as error:
        assert str(error) and "\n" not in str(error)
        return
    assert drafts
    for draft in drafts:
        assert json.loads(json.dumps(draft.meta)) and all(isinstance(ref, str) for ref in draft.media)
