"""Show which cells of a video a run merges, as a picture and as text.

python -m megatron_elva.inference.show_merging --run runs/demo --video clip.mp4
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_elva.config.errors import ConfigError, InputError
from megatron_elva.config.merge_schedule import ResolvedPoint
from megatron_elva.inference.chat import read, turn, watch
from megatron_elva.inference.elva import Prefilled
from megatron_elva.inference.merge_picture import Block, destinations, draw_sheet, frames_of
from megatron_elva.inference.merging_option import read_merging
from megatron_elva.inference.model import Assistant, Video


@dataclass(frozen=True)
class Shown:
    """What a merge point left.

    Attributes:
        point: the rule and its layer.
        kept: cells that still have their own token.
        cells: cells of the video.
    """

    point: ResolvedPoint
    kept: int
    cells: int

    def line(self, layers: int) -> str:
        """In words: where, by which rule, and how many cells are left."""
        point = self.point
        rule = f"threshold {point.tau:g}" if point.rule == "threshold" else f"keep {100 * (point.keep or 0):g}%"
        share = f"{self.kept / self.cells:.1%}"
        return f"after layer {point.layer} of {layers}: {rule}: kept {self.kept:,} of {self.cells:,} cells ({share})"


def main(argv: Sequence[str] | None = None) -> int:
    """Write the picture and print its lines. Returns the exit code: 2 for input that cannot be used."""
    given = _arguments(argv)
    out = Path(given.out or f"{Path(given.video).stem}_merging.png")
    try:
        merging = None if given.merging is None else read_merging(given.merging)
        if not out.parent.is_dir():
            raise InputError(f"{out}: no such folder")
        data = read(given.video)
        assistant = Assistant(given.run, merging)
        if not assistant.model.points:
            kind = assistant.config.merging.kind
            whose = "--merging" if merging else str(given.run)
            raise InputError(f"{whose}: merging.kind={kind} has no merge points; give --merging one that has, as paper")
        video = watch(assistant, given.video, data)
        prefilled = look(assistant, video, given.question)
        lines = write_picture(assistant, video, prefilled, Path(given.video).name, out)
    except (InputError, ConfigError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print("\n".join([*lines, f"wrote {out}"]))
    return 0


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="show_merging", description="Show which cells of a video a run merges.")
    parser.add_argument("--run", required=True, help="run directory, stage=all directory or checkpoint folder")
    parser.add_argument("--video", required=True, help="video or image file")
    parser.add_argument("--question", help="text of the prompt; text behind the video changes nothing")
    parser.add_argument("--merging", help="YAML file or name of configs/merging, in place of the run's own")
    parser.add_argument("--out", help="PNG file to write; by default named after the video, in this folder")
    return parser.parse_args(argv)


def look(assistant: Assistant, video: Video, question: str | None = None) -> Prefilled:
    """Read a prompt about a video, merging on the way; without a question the run's caption prompt."""
    asked = turn(assistant.config.data.caption_prompt if question is None else question)
    sample, tokens = assistant.prompt([asked], [video])
    return assistant.model.prefill(sample, tokens, video.patches)


def write_picture(assistant: Assistant, video: Video, read: Prefilled, name: str, out: Path) -> list[str]:
    """Write the picture; returns the lines that stand in it.

    Raises:
        InputError: the file cannot be written.
    """
    model, spec, survivor = assistant.config.model, video.spec, assistant.config.merging.survivor
    shown = [Shown(m.point, sum(m.state.counts), spec.cells) for m in read.merges]
    grids = " and ".join(f"{rows} x {columns}" for rows, columns in spec.grids)
    plural = "frame" if spec.frames == 1 else "frames"
    lines = [
        f"input: {spec.frames} {plural} of {grids} cells: {spec.cells:,} cells",
        *(s.line(model.layers) for s in shown),
    ]
    head = [
        f"{name} as {assistant.checkpoint.run} merges it",
        "A shaded cell has no token of its own any more: it went into the outlined cell at the same place of the frame "
        "with that colour and number.",
    ]
    merged = [destinations(m.state, survivor) for m in read.merges]
    blocks = [Block(line, now) for line, now in zip(lines, [None, *merged], strict=True)]
    frames = frames_of(video.patches, spec, model.patch_size, model.cell_reduction)
    try:
        draw_sheet(spec, frames, head, blocks).save(out, format="PNG")
    except OSError as error:
        raise InputError(f"{out}: {error.strerror or error}") from error
    return lines


if __name__ == "__main__":
    sys.exit(main())
