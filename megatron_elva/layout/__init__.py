"""Token layout and merge index: pure tensor code without parallelism."""

from megatron_elva.layout.pack import IGNORE, Pack, Skipped
from megatron_elva.layout.spec import PackSpec, SampleSpec, VideoSpec
from megatron_elva.layout.state import PackState, initial_state, restored_state
from megatron_elva.layout.tokens import Kind, TokenLayout, build_layout

__all__ = [
    "IGNORE",
    "Kind",
    "Pack",
    "PackSpec",
    "PackState",
    "SampleSpec",
    "Skipped",
    "TokenLayout",
    "VideoSpec",
    "build_layout",
    "initial_state",
    "restored_state",
]
