from __future__ import annotations

import re

from model import ARCHS
from tests.helpers import assert_refused, run_forked


def test_all_nets_are_listed_with_their_parameters() -> None:
    result = run_forked("tools/describe.py")
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()[1:]
    assert [line.split()[0] for line in lines] == list(ARCHS)
    row = next(line for line in lines if line.startswith("resnet152_v1"))
    assert row.split()[1:5:2] == ["224x224", "M"]
    assert "60.19 M" in row
    assert "11.282" in row


def test_table_1_of_a_net() -> None:
    result = run_forked("tools/describe.py", "resnet50", "resnet18", "--image-size", 448)
    assert result.returncode == 0, result.stderr
    first, second = result.stdout.split("\n\n")
    assert re.search(r"conv1 +64x224x224 +7x7, 64, stride 2; 3x3 max pool, stride 2", first)
    assert re.search(r"layer3 +1024x28x28 +\[1x1, 256; 3x3, 256; 1x1, 1024\] x 6", first)
    assert re.search(r"layer4 +512x14x14 +\[3x3, 512; 3x3, 512\] x 2", second)
    assert re.search(r"all +25,557,032", first)


def test_an_unknown_net_is_refused() -> None:
    assert_refused(run_forked("tools/describe.py", "vgg19"), "vgg19", "resnet50")
