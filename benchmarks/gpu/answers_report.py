"""What `benchmarks.gpu.same_answers` compares, and the text that it prints."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.common import failures, heading
from benchmarks.report import table


def relative(found: Tensor, expected: Tensor) -> float:
    """Norm of the difference by the norm of what is expected."""
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def _check(name: str, value: float, limit: float | None = None, note: str = "") -> dict[str, Any]:
    # a NaN is below nothing, so it never passes
    return {
        "name": name,
        "value": value,
        "limit": limit,
        "passed": None if limit is None else value < limit,
        "note": note,
    }


def compared(
    reference: Mapping[str, Any], candidate: Mapping[str, Any], limit: float, gradient_limit: float, exact_limit: float
) -> list[dict[str, Any]]:
    """Each comparison with its limit, or None where it is told and not judged."""
    checks = []
    for merging, expected in reference["variants"].items():
        checks += _variant(merging, candidate["variants"][merging], expected, limit, gradient_limit)
    name = "pack of three against the three alone, logits, "
    checks.append(_check(f"{name}device", relative(candidate["together"], candidate["alone"]), limit))
    checks.append(_check(f"{name}fp32 on CPU", relative(reference["together"], reference["alone"]), exact_limit))
    return checks


def _variant(
    merging: str, found: Mapping[str, Any], expected: Mapping[str, Any], limit: float, gradient_limit: float
) -> list[dict[str, Any]]:
    merges = bool(expected["index"])
    same = ", same tokens merged" if merges else ""
    logits, wanted = found["same"]["logits"], expected["same"]["logits"]
    checks = [_check(f"{merging}: logits{same}", relative(logits, wanted), limit)]
    agree = float((logits.argmax(-1) == wanted.argmax(-1)).double().mean())
    checks.append(_check(f"{merging}: likeliest token the same{same}", agree))
    loss = abs(found["loss"] / expected["loss"] - 1)
    checks.append(_check(f"{merging}: loss{same}", loss, limit, f"{found['loss']:.5f}, {expected['loss']:.5f}"))
    checks += _gradients(f"{merging}: gradients{same}", found["gradients"], expected["gradients"], gradient_limit)
    if merges:
        for i, (own, other) in enumerate(zip(found["index"], expected["index"], strict=True)):
            value = float((own == other).double().mean())
            checks.append(_check(f"{merging}: merge index agreement behind point {i + 1}", value))
        checks.append(_own_choice(merging, found["own"], expected["own"]))
    return checks


def _gradients(
    name: str, found: Mapping[str, Tensor], expected: Mapping[str, Tensor], limit: float
) -> list[dict[str, Any]]:
    if found.keys() != expected.keys():
        raise ValueError(f"{name}: not of the same parameters: {sorted(found.keys() ^ expected.keys())}")
    whole = [torch.cat([g[key].flatten().double() for key in expected]) for g in (found, expected)]
    each = {key: relative(found[key], value) for key, value in expected.items()}
    worst = max(each, key=lambda key: each[key])
    return [_check(name, relative(*whole), limit), _check(f"{name}, worst parameter", each[worst], None, worst)]


def _own_choice(merging: str, found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, Any]:
    """Logits where each chose by itself what merges, of the tokens that both have left."""
    both = torch.isin(found["origin"], expected["origin"])
    back = torch.isin(expected["origin"], found["origin"])
    value = relative(found["logits"][both], expected["logits"][back])
    return _check(
        f"{merging}: logits, each with its own choice", value, None, f"{int(both.sum())} tokens that both kept"
    )


def text(result: Mapping[str, Any]) -> str:
    """The whole report."""
    rows = [
        (
            check["name"],
            f"{check['value']:.3g}",
            "" if check["limit"] is None else f"{check['limit']:g}",
            {None: "told", True: "met", False: "NOT MET"}[check["passed"]],
            check["note"],
        )
        for check in result["checks"]
    ]
    body = table(("compared", "found", "below", "", "note"), rows) if rows else "Nothing was compared."
    parts = result["parts"]
    candidate = parts.get("candidate", {})
    against = (
        f"{result['model']} ({' '.join(result['set'])}): {candidate.get('layers', '?')} layers in "
        f"{result['precision']} on {candidate.get('device', '?')} against local layers in fp32 on the CPU."
    )
    return f"""{heading("The same answers", result)}

{against}

{body}{failures(parts)}

Relative: the norm of the difference by the norm of what fp32 gives. Both hold the same weights, drawn and rounded to
bf16. Gradients are those of a step of the engine, as the optimizer gets them. Where tokens merge, the choices of the
fp32 run are repeated, so that the same tokens merge; how far own choices agree is told beside it."""
