"""Checkpoints: whole at every layout, exact on the same one, and nothing half-written or of another model is loaded."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_elva.config.errors import ConfigError, InputError
from megatron_elva.config.schema import Config, ModelConfig, ParallelConfig, PrecisionConfig
from megatron_elva.layout import Pack
from megatron_elva.model.hf_names import from_hf
from megatron_elva.training.runs import MARKER, check_shapes
from megatron_elva.training.stored_weights import read_weights
from tests.builders import random_pack, small_config, small_model
from tests.distributed import run_distributed
from tests.model.test_elva import qwen2
from tests.model.test_weights import together

ALONE = ParallelConfig(tensor=1, pipeline=1, sequence=False)
PP2 = ParallelConfig(tensor=1, pipeline=2, sequence=False)
TP2 = ParallelConfig(tensor=2, pipeline=1, sequence=True)
TP2PP2SP = ParallelConfig(tensor=2, pipeline=2, sequence=True)
PP2VP2 = ParallelConfig(tensor=1, pipeline=2, virtual_pipeline=2, sequence=False)
BF16 = PrecisionConfig(name="bf16", dtype="bf16", fp8=None)
VOCAB = 96


def config_of(run_dir: Path | str, parallel: ParallelConfig = ALONE, **changes: Any) -> Config:
    """Parameter groups that all differ: vectors, patch embedding at its own learning rate, a frozen layer."""
    config = small_config(parallel=parallel, run_dir=str(run_dir), **changes)
    return replace(
        config,
        train=replace(config.train, lr=3e-3, lr_patch_embedding=1e-2),
        stage=replace(config.stage, frozen=["decoder.layers.1.*", "decoder.layers.3.*"], frozen_share=0.5),
    )


def packs_of_step(config: Config, step: int) -> list[Pack]:
    """Four packs, other ones in each step, one of them text alone."""
    kinds = [(1, 0), (0, 0), (2,), (1, 1)]
    return [random_pack(config.model, 10 * step + i, videos) for i, videos in enumerate(kinds)]


def build(config: Config, vocab: int = VOCAB):
    from megatron_elva.parallel.engine import Engine, build_chunks
    from megatron_elva.parallel.ranks import start

    ranks = start(config.parallel, "cpu", config.seed)
    return Engine(config, build_chunks(config, vocab, ranks), ranks), ranks


def train(engine, ranks, steps: range, share: float | None = None) -> list[tuple[float, float]]:
    """Loss and gradient norm of the given steps (counted from 0): frozen in the first, other learning rates in each."""
    from megatron_elva.model.inputs import prepare
    from megatron_elva.parallel.collectives import sum_over_ranks

    history = []
    for step in steps:
        engine.set_learning_rate(1 / (1 + step) if share is None else share, frozen=step < 1)
        own = packs_of_step(engine.config, step)[ranks.data :: ranks.data_size]
        result = engine.train_step([prepare(p, engine.config, "cpu") for p in own])
        loss_sum, tokens = sum_over_ranks([result.loss_sum, result.loss_tokens], ranks)
        history.append((loss_sum / tokens, result.grad_norm))
    return history


def shards(engine, ranks) -> dict[str, tuple[int, int | None, Tensor]]:
    """This rank's part of every parameter: tensor rank, the dimension that is split, values."""
    return {
        name: (
            ranks.tensor,
            p.partition_dim if getattr(p, "tensor_model_parallel", False) else None,
            p.detach().clone(),
        )
        for p, name in engine.names.items()
    }


def whole(parts: list[dict]) -> dict[str, Tensor]:
    """Whole weights from all ranks' parts; copies must agree to the last bit."""
    found: dict[str, dict[int, Tensor]] = {}
    split: dict[str, bool] = {}
    for part in parts:
        for name, (rank, dim, values) in part.items():
            split[name] = dim is not None
            known = found.setdefault(name, {}).setdefault(rank, values)
            assert torch.equal(known, values), f"{name}: copies differ"
    out = {}
    for name, by_rank in found.items():
        in_order = [by_rank[r] for r in sorted(by_rank)]
        if split[name] and len(in_order) > 1:
            out[name] = together(name, in_order)
            continue
        assert all(torch.equal(s, in_order[0]) for s in in_order), f"{name}: tensor ranks differ"
        out[name] = in_order[0]
    return out


def same_weights(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]), name


def save_and_go_on(config: Config) -> dict:
    """Two steps, a checkpoint, two more steps."""
    from megatron_elva.training.saver import Saver

    engine, ranks = build(config)
    first = train(engine, ranks, range(2))
    at = shards(engine, ranks)
    Saver(engine, config, VOCAB, ranks).save(2, 8, None, wait=True)
    assert all(torch.equal(at[n][2], s[2]) for n, s in shards(engine, ranks).items())  # saving changes nothing
    return {"weights": at, "first": first, "rest": train(engine, ranks, range(2, 4)), "end": shards(engine, ranks)}


def resume_and_go_on(config: Config) -> dict:
    """The newest checkpoint, two more steps; the weights as drawn would give other losses."""
    from megatron_elva.training import checkpoint

    engine, ranks = build(replace(config, seed=config.seed + 1))
    found = checkpoint.resume(engine, config)
    if found is None:
        return {"found": None}
    at = shards(engine, ranks)
    rest = train(engine, ranks, range(2, 4))
    where = (found.path.name, found.step, found.meta["samples"], found.meta["vocab"])
    return {"found": where, "weights": at, "rest": rest, "end": shards(engine, ranks)}


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> tuple[Path, list[dict]]:
    """A run directory written at tensor 2 x pipeline 2 with sequence parallelism, and what its ranks went on to."""
    folder = tmp_path_factory.mktemp("run")
    return folder, run_distributed(save_and_go_on, 4, config_of(folder, TP2PP2SP))


def test_training_moves_losses_and_weights(run):
    """Else the comparisons below would prove nothing."""
    _, results = run
    losses = [loss for loss, _ in results[0]["first"] + results[0]["rest"]]
    assert len(set(losses)) == 4
    before, after = whole([r["weights"] for r in results]), whole([r["end"] for r in results])
    assert all(not torch.equal(before[n], after[n]) for n in before if not n.endswith("linear_qkv.bias"))


def test_one_process_reads_the_whole_weights(run):
    folder, results = run
    got = read_weights(folder / "checkpoints" / "step_2")
    assert not torch.distributed.is_initialized()
    same_weights(got, whole([r["weights"] for r in results]))


def test_the_marker_says_where_the_run_stood(run):
    folder, _ = run
    meta = json.loads((folder / "checkpoints" / "step_2" / MARKER).read_text())
    config = small_config()
    where = {"step": 2, "samples": 8, "stage": 2, "global_batch": config.train.global_batch, "pack_tokens": None}
    what = {"vocab": VOCAB, "model": asdict(config.model), "merging": asdict(config.merging)}
    assert meta == {**where, **what, "order": {"seed": config.seed, "stage.blend": config.stage.blend}}


def test_resume_on_the_same_layout_is_exact_to_the_last_bit(run):
    folder, results = run
    resumed = run_distributed(resume_and_go_on, 4, config_of(folder, TP2PP2SP))
    for before, after in zip(results, resumed, strict=True):
        assert after["found"] == ("step_2", 2, 8, VOCAB)
        assert after["rest"] == before["rest"]
        for key in ("weights", "end"):
            same_weights({n: s[2] for n, s in after[key].items()}, {n: s[2] for n, s in before[key].items()})


def test_resume_in_bf16_is_exact_to_the_last_bit(tmp_path):
    config = config_of(tmp_path, PP2, precision=BF16)
    before = run_distributed(save_and_go_on, 2, config)
    for a, b in zip(before, run_distributed(resume_and_go_on, 2, config), strict=True):
        assert b["found"] is not None and b["rest"] == a["rest"]
        same_weights({n: s[2] for n, s in b["end"].items()}, {n: s[2] for n, s in a["end"].items()})


@pytest.mark.parametrize(
    ("parallel", "world"), [(PP2, 2), (TP2, 4), (PP2VP2, 2), (ALONE, 1)], ids=["pp2", "tp2sp-dp2", "pp2vp2", "alone"]
)
def test_resume_at_another_layout_goes_on_as_if_nothing_happened(run, parallel, world):
    folder, results = run
    resumed = run_distributed(resume_and_go_on, world, config_of(folder, parallel))
    same_weights(whole([r["weights"] for r in resumed]), whole([r["weights"] for r in results]))
    for result in resumed:
        torch.testing.assert_close(result["rest"], results[0]["rest"], rtol=1e-5, atol=1e-5)
    end, expected = whole([r["end"] for r in resumed]), whole([r["end"] for r in results])
    for name in expected:  # moments, learning rates and decay of each group went along, or the weights would part
        torch.testing.assert_close(end[name], expected[name], rtol=1e-3, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def half_written(config: Config) -> dict:
    """What is resumed with a torn checkpoint beside, and the same step written again over it."""
    from megatron_elva.training import checkpoint
    from megatron_elva.training.saver import Saver

    engine, ranks = build(config)
    first = checkpoint.resume(engine, config)
    train(engine, ranks, range(1))
    Saver(engine, config, VOCAB, ranks).save(9, 36, None, wait=True)
    path = Path(config.run_dir, "checkpoints", "step_9")
    again = checkpoint.resume(engine, config)
    return {"first": first and first.path.name, "again": again.path.name, "files": {p.name for p in path.iterdir()}}


def test_a_half_written_checkpoint_is_never_used_and_is_written_over(run, tmp_path):
    folder, _ = run
    shutil.copytree(folder / "checkpoints", tmp_path / "checkpoints")
    torn = shutil.copytree(tmp_path / "checkpoints" / "step_2", tmp_path / "checkpoints" / "step_9")
    (torn / MARKER).unlink()
    (torn / "left_over.distcp").write_bytes(b"half")
    (result,) = run_distributed(half_written, 1, config_of(tmp_path))
    assert result["first"] == "step_2" and result["again"] == "step_9"
    assert "left_over.distcp" not in result["files"] and MARKER in result["files"]


def test_a_run_whose_only_checkpoint_is_half_written_starts_anew(tmp_path):
    (tmp_path / "checkpoints" / "step_4").mkdir(parents=True)
    (result,) = run_distributed(resume_and_go_on, 1, config_of(tmp_path))
    assert result == {"found": None}


@pytest.mark.parametrize(("field", "saved"), [("layers", 8), ("tied_head", False), ("patch_embedding", "naive")])
def test_weights_of_another_model_are_refused_in_one_line(field, saved):
    model = small_model()
    check_shapes(asdict(model), model, "init_from=runs/a")
    with pytest.raises(ConfigError) as error:
        check_shapes({**asdict(model), field: saved}, model, "init_from=runs/a")
    message = str(error.value)
    assert "\n" not in message and message.startswith(f"model.{field}={getattr(model, field)}: ")
    assert "init_from=runs/a" in message and f"set model.{field}={saved}" in message


def failure(config: Config, init_from: str | None, vocab: int) -> str:
    """The line with which resuming (or starting from `init_from`) refuses."""
    from megatron_elva.training import checkpoint

    engine, ranks = build(config, vocab)
    try:
        if init_from is None:
            checkpoint.resume(engine, config)
        else:
            checkpoint.initialise_from(engine, init_from, config, ranks)
    except (ConfigError, InputError) as error:
        return str(error)
    return ""


def test_resume_with_another_model_names_run_dir_and_the_key(run):
    folder, _ = run
    config = config_of(folder, model=small_model(ffn_hidden=64))
    (message,) = run_distributed(failure, 1, config, None, VOCAB)
    assert message.startswith(f"model.ffn_hidden=64: run_dir={folder} ") and "ffn_hidden=48" in message
    assert "\n" not in message


@pytest.mark.parametrize(("source", "vocab"), [("resume", 128), ("resume", 64), ("init_from", 64)])
def test_another_vocabulary_is_refused(run, source, vocab):
    """megatron-core alone would cut or fill the word embedding without a word."""
    folder, _ = run
    config = config_of(folder)
    (message,) = run_distributed(failure, 1, config, str(folder) if source == "init_from" else None, vocab)
    assert "vocab" in message and "96" in message and str(vocab) in message and "\n" not in message


def test_a_run_with_fewer_words_leaves_the_new_rows_zero(run):
    folder, results = run
    (got,) = run_distributed(initialised, 1, config_of(""), str(folder), 128)
    words = got["taken"]["embedding.word_embeddings.weight"][2]
    expected = whole([r["weights"] for r in results])["embedding.word_embeddings.weight"]
    assert torch.equal(words[:VOCAB], expected) and words.shape[0] == 128 and not words[VOCAB:].any()


def initialised(config: Config, source: str, vocab: int) -> dict:
    """Weights after `initialise_from`, and after a step at learning rate 0, which must not bring the old ones back."""
    from megatron_elva.training import checkpoint

    engine, ranks = build(config, vocab)
    drawn = shards(engine, ranks)
    line = checkpoint.initialise_from(engine, source, config, ranks)
    taken = shards(engine, ranks)
    train(engine, ranks, range(2, 3), share=0.0)
    return {"drawn": drawn, "taken": taken, "after": shards(engine, ranks), "line": line}


def save_qwen2(folder: Path, model: ModelConfig, vocab: int) -> dict[str, Tensor]:
    """Write a random Qwen2 as transformers does; gives its whole tensors under global names."""
    hf = qwen2(model, seed=5)
    hf.resize_token_embeddings(vocab, mean_resizing=False)
    hf.save_pretrained(folder)
    return from_hf(hf.state_dict(), model)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_weights_come_from_a_folder_of_transformers_qwen2(tmp_path, tied, precision):
    model = small_model(tied_head=tied)
    expected = save_qwen2(tmp_path, model, vocab=90)
    config = config_of("", TP2, model=model, **({"precision": BF16} if precision == "bf16" else {}))
    results = run_distributed(initialised, 2, config, str(tmp_path), VOCAB)
    assert str(tmp_path) in results[0]["line"] and "\n" not in results[0]["line"]
    drawn, taken, after = (whole([r[key] for r in results]) for key in ("drawn", "taken", "after"))
    same_weights(after, taken)
    for name, tensor in expected.items():
        rows = tensor.shape[0]
        assert torch.equal(taken[name][:rows], tensor.to(taken[name].dtype)), name
        if name in ("embedding.word_embeddings.weight", "output_layer.weight"):
            assert rows == 90 and taken[name].shape[0] == VOCAB and not taken[name][90:].any()
        else:
            assert tensor.shape == taken[name].shape, name
    visual = taken.keys() - expected.keys()
    assert visual and all(n.startswith(("patch_embedding.", "projector.")) for n in visual)
    assert all(torch.equal(taken[n], drawn[n]) for n in visual)


def test_weights_come_from_a_run_at_another_layout(run):
    folder, results = run
    config = config_of("", PP2, seed=99)
    got = run_distributed(initialised, 2, config, str(folder), VOCAB)
    expected = whole([r["weights"] for r in results])
    for key in ("taken", "after"):
        same_weights(whole([r[key] for r in got]), expected)
    assert got[0]["line"] == f"weights from {folder / 'checkpoints' / 'step_2'}"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"layers": 2}, ["layers"]),
        ({"layers": 6}, ["layers"]),
        ({"ffn_hidden": 64}, ["ffn_hidden"]),
        ({"kv_heads": 4}, ["kv_heads"]),
        ({"tied_head": False}, ["tied_head"]),
    ],
    ids=["fewer-layers", "more-layers", "ffn", "kv-heads", "untied"],
)
def test_a_qwen2_of_other_sizes_is_refused_in_one_line(tmp_path, changes, words):
    save_qwen2(tmp_path, small_model(**changes), vocab=90)
    (message,) = run_distributed(failure, 1, config_of(""), str(tmp_path), VOCAB)
    assert "\n" not in message and message.startswith("model.") and all(w in message for w in words), message


def test_a_tied_qwen2_does_not_leave_an_untied_head_random(tmp_path):
    save_qwen2(tmp_path, small_model(tied_head=True), vocab=90)
    (message,) = run_distributed(failure, 1, config_of("", model=small_model(tied_head=False)), str(tmp_path), VOCAB)
    assert "\n" not in message and "tied_head" in message, message


def test_a_folder_without_its_weights_is_an_input_error(tmp_path):
    save_qwen2(tmp_path, small_model(), vocab=90)
    (tmp_path / "model.safetensors").unlink()
    (message,) = run_distributed(failure, 1, config_of(""), str(tmp_path), VOCAB)
    assert message == f"{tmp_path}: model.safetensors is missing"


def first_decides(configs: list[Config], sources: list[str]) -> tuple[str, str]:
    """What is resumed and what is taken where each rank looks at a disk of its own."""
    from megatron_elva.training import checkpoint

    rank = int(os.environ["RANK"])
    engine, ranks = build(configs[rank])
    found = checkpoint.resume(engine, configs[rank])
    return found.path.name, checkpoint.initialise_from(engine, sources[rank], configs[rank], ranks)


def test_all_ranks_take_the_checkpoint_that_the_first_one_sees(run, tmp_path):
    """A file server may show another node an older state, and a run that is taken from may go on meanwhile."""
    folder, _ = run
    old, new = (shutil.copytree(folder / "checkpoints", tmp_path / n / "checkpoints").parent for n in ("old", "new"))
    newest = shutil.copytree(new / "checkpoints" / "step_2", new / "checkpoints" / "step_3")
    meta = json.loads((newest / MARKER).read_text())
    (newest / MARKER).write_text(json.dumps({**meta, "step": 3}))
    configs = [config_of(new, TP2), config_of(old, TP2)]
    results = run_distributed(first_decides, 2, configs, [str(new), str(old)])
    assert results == [("step_3", f"weights from {newest}")] * 2


def load_failure(config: Config, dies: bool) -> str:
    """How resuming fails; with `dies` on the first rank, whose peer ends while they load."""
    from megatron.core import dist_checkpointing

    from megatron_elva.training import checkpoint

    engine, ranks = build(config)
    if dies and ranks.rank == 1:
        dist_checkpointing.load = lambda *_: os._exit(0)
    try:
        checkpoint.resume(engine, config)
    except Exception as error:
        if dies:
            Path(config.run_dir, "error").write_text(type(error).__name__)
        return f"{type(error).__name__}: {error}"
    return ""


def test_a_damaged_file_is_refused_on_all_ranks(run, tmp_path):
    folder, _ = run
    shutil.copytree(folder / "checkpoints", tmp_path / "checkpoints")
    file = next((tmp_path / "checkpoints" / "step_2").glob("__0_*.distcp"))
    file.write_bytes(file.read_bytes()[:1000])
    for message in run_distributed(load_failure, 2, config_of(tmp_path, TP2), False):
        assert message.startswith(f"InputError: {file.parent}: cannot be loaded: ") and "\n" not in message


def test_a_rank_that_is_lost_while_loading_is_no_damaged_checkpoint(run, tmp_path):
    """What is refused is never started again; this may go well the next time."""
    folder, _ = run
    shutil.copytree(folder / "checkpoints", tmp_path / "checkpoints")
    with contextlib.suppress(FileNotFoundError):  # the result of the rank that died
        run_distributed(load_failure, 2, config_of(tmp_path, TP2), True)
    assert (tmp_path / "error").read_text() == "RuntimeError"
