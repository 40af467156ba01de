"""The inference model with the weights that training starts from, and a run that four ranks wrote."""

from __future__ import annotations

from megatron_elva.config.schema import Config, ParallelConfig
from megatron_elva.inference.elva import Elva
from megatron_elva.model.hf_names import to_hf
from megatron_elva.model.weights import draw

TP2PP2 = ParallelConfig(tensor=2, pipeline=2, sequence=True)


def elva_with_drawn_weights(config: Config, names: dict[str, tuple[int, ...]]) -> Elva:
    """The inference model with the weights that training would start from."""
    model = Elva(config.model, 96, config.merging).eval()
    full = {n: draw(n, shape, config.seed, config.model.init_std, config.model.layers) for n, shape in names.items()}
    state = to_hf(full, config.model)
    visual = {n: t for n, t in state.items() if n.startswith(("patch_embedding.", "projector."))}
    model.load_state_dict({**visual, **{f"language.{n}": t for n, t in state.items() if n not in visual}})
    return model


def shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """Whole shapes of all parameters by global name; runs on one rank."""
    from megatron_elva.model.weights import named_global_parameters
    from megatron_elva.parallel.engine import build_chunks
    from megatron_elva.parallel.ranks import start

    chunks = build_chunks(config, 96, start(config.parallel, "cpu", config.seed))
    return {n: tuple(p.shape) for n, p in named_global_parameters(chunks)}


def write_run(config: Config) -> None:
    """Save a checkpoint of drawn weights; runs on every rank."""
    from megatron_elva.parallel.engine import Engine, build_chunks
    from megatron_elva.parallel.ranks import start
    from megatron_elva.training.saver import Saver

    ranks = start(config.parallel, "cpu", config.seed)
    engine = Engine(config, build_chunks(config, 320, ranks), ranks)
    Saver(engine, config, 320, ranks).save(3, 12, None, wait=True)
