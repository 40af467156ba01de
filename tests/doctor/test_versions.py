"""Ranges of versions as `packaging` reads them, which the doctor may not have."""

from __future__ import annotations

from importlib import metadata

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from megatron_elva.doctor.versions import parse, plain, release, within

RANGES = (">=2.11,<2.14", "==2.4.0", "==2.4.*", "!=2.11.*", "~=2.11", "~=2.11.0", ">2", "<=2.13", "!=2.12", "")


@pytest.mark.parametrize("ranges", RANGES)
@pytest.mark.parametrize(
    "version", ["2.4", "2.4.0", "2.10.9", "2.11", "2.11.0+cu130", "2.12", "2.13.0", "2.14", "3", "0.9"]
)
def test_a_range_holds_what_packaging_says(version, ranges):
    assert within(version, ranges) == SpecifierSet(ranges).contains(version)


def test_a_vendors_build_before_the_release_counts_as_the_release():
    assert within("2.11.0a0+0123abc.nv26.03", ">=2.11,<2.14")
    assert release("2.11.0a0+0123abc.nv26.03") == (2, 11, 0)


def test_the_requirements_of_this_distribution_are_understood():
    lines = metadata.requires("megatron-elva")
    assert lines
    for line in lines:
        wanted, found = Requirement(line), parse(line)
        assert found is not None
        assert found.name == plain(wanted.name)
        assert SpecifierSet(found.ranges) == wanted.specifier
        assert bool(found.extra) == (wanted.marker is not None) and not found.marked
        assert found.extra in str(wanted.marker)
    assert parse("torch<3 ; python_version < '3.12'").marked
    assert parse("torch @ https://example.org/torch.whl") is None
