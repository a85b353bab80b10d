"""Pairs on disk: a function of (seed, pair) whatever batches, stops and ranks; and only those that are asked for."""

import os
import re
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from fewstep.data.pairs import Given, write_pairs
from fewstep.errors import UserError
from fewstep.seeding import generator
from kept_rows import NUM, PLAN, PROMPTS, draw, files, load_pairs

SHAPE = [2, 3, 3]


def expected(index: int, seed: int = 5) -> tuple[Tensor, Tensor]:
    noise = torch.randn(SHAPE, generator=generator(seed, "pair", index)).half()
    return noise, (noise.float().square() + index).half()


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_every_row_is_its_pair(batch_size: int, tmp_path: Path) -> None:
    assert write_pairs(draw, PROMPTS, PLAN, tmp_path, batch_size) == 0
    pairs, wanted = load_pairs(tmp_path), [10, 0, 4, 4, 7, 2]
    batch = pairs.batch(torch.tensor(wanted))
    assert pairs.length == NUM
    assert batch["caption"] == [f"prompt {index}" for index in wanted]
    noise, x0 = (torch.stack(tensors) for tensors in zip(*map(expected, wanted), strict=True))
    assert torch.equal(batch["noise"], noise)
    assert torch.equal(batch["x0"], x0)


def test_labels_and_no_condition(tmp_path: Path) -> None:
    write_pairs(lambda noise, given: noise, {"label": list(range(NUM))}, PLAN, tmp_path / "labels")
    assert load_pairs(tmp_path / "labels").batch(torch.tensor([9, 1]))["label"].tolist() == [9, 1]
    write_pairs(lambda noise, given: noise, {}, PLAN, tmp_path / "none")
    assert load_pairs(tmp_path / "none").batch(torch.tensor([9, 1])).keys() == {"noise", "x0"}


def test_other_programs_read_it_as_documented(tmp_path: Path) -> None:
    import datasets
    import pandas

    write_pairs(draw, PROMPTS, PLAN, tmp_path / "out")
    table = pandas.read_parquet(tmp_path / "out" / "00001.parquet")
    x0 = np.frombuffer(table.x0[2], "<f2").reshape(*SHAPE)
    assert np.array_equal(x0, expected(6)[1].numpy())
    paths = sorted(map(str, (tmp_path / "out").glob("*.parquet")))
    dataset = datasets.load_dataset("parquet", data_files=paths, cache_dir=str(tmp_path / "cache"), split="train")
    assert np.array_equal(np.frombuffer(dataset[10]["noise"], "<f2"), expected(10)[0].flatten().numpy())
    assert dataset["prompt"][:] == PROMPTS["prompt"]


@pytest.mark.parametrize("num_ranks", [2, 3, 5])
def test_ranks_share_the_files_and_make_what_one_makes(num_ranks: int, tmp_path: Path) -> None:
    write_pairs(draw, PROMPTS, PLAN, tmp_path / "one")
    made, torn = [], tmp_path / "many" / ".00000.parquet.5678.tmp"
    torn.parent.mkdir()
    torn.write_bytes(b"rank 0 may be writing it")
    for rank in reversed(range(num_ranks)):
        assert torn.exists()
        before = set(tmp_path.rglob("many/*.parquet"))
        missing = write_pairs(draw, PROMPTS, PLAN, tmp_path / "many", rank=rank, num_ranks=num_ranks)
        made += sorted(path.stem for path in set(tmp_path.rglob("many/*.parquet")) - before)
        assert missing == 3 - len(made)
    assert made == [f"{index:05d}" for rank in reversed(range(num_ranks)) for index in range(rank, 3, num_ranks)]
    assert files(tmp_path / "many") == files(tmp_path / "one")


def test_ranks_that_start_at_once_do_no_harm(tmp_path: Path) -> None:
    """Of two writers of the same share one is refused, whatever the other ranks do."""
    errors: list[BaseException] = []
    barrier, three = threading.Barrier(8), threading.Semaphore(0)

    def slow(noise: Tensor, given: Given) -> Tensor:
        assert three.acquire(timeout=10)  # the shares 0, 1 and 2 have a file each, and two writers
        three.release()
        return draw(noise, given)

    def rank(index: int) -> None:
        barrier.wait()
        try:
            write_pairs(slow, PROMPTS, PLAN, tmp_path / "many", rank=index % 4, num_ranks=4)
        except BaseException as error:
            errors.append(error)
            if len(errors) == 3:
                three.release()

    threads = [threading.Thread(target=rank, args=(index,)) for index in range(8)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    write_pairs(draw, PROMPTS, PLAN, tmp_path / "one")
    assert all(re.search(f"many: process ({os.getpid()}|another) writes there", str(error)) for error in errors)
    assert len(errors) == 3
    assert files(tmp_path / "many") == files(tmp_path / "one")


@pytest.mark.parametrize("value", [float("nan"), 1e9])
def test_what_float16_can_not_hold_is_an_error(value: float, tmp_path: Path) -> None:
    def broken(noise: Tensor, given: Given) -> Tensor:
        x0 = draw(noise, given)
        x0[[text == "prompt 6" for text in given["prompt"]], 0, 0, 0] = value
        return x0

    with pytest.raises(UserError, match=r"pair 6: .*not finite; give another --precision"):
        write_pairs(broken, PROMPTS, PLAN, tmp_path)
    assert list(files(tmp_path)) == ["00000.parquet", "pairs.json"]


def test_a_file_in_place_of_another_is_damage(tmp_path: Path) -> None:
    write_pairs(draw, PROMPTS, PLAN, tmp_path)
    (tmp_path / "00002.parquet").rename(tmp_path / "00001.parquet")
    (tmp_path / "00002.parquet").write_bytes((tmp_path / "00000.parquet").read_bytes())
    with pytest.raises(UserError, match=r"0000[12]\.parquet: missing or damaged"):
        load_pairs(tmp_path)


def test_a_flipped_bit_is_found_when_its_row_is_read(tmp_path: Path) -> None:
    write_pairs(draw, PROMPTS, PLAN, tmp_path)
    path = tmp_path / "00001.parquet"
    content = bytearray(path.read_bytes())
    place = content.index(expected(5)[1].numpy().tobytes())
    content[place + 7] ^= 1
    path.write_bytes(content)
    pairs = load_pairs(tmp_path)
    assert torch.equal(pairs.batch(torch.tensor([3, 6]))["x0"][1], expected(6)[1])  # another group of rows
    with pytest.raises(UserError, match=r"00001\.parquet: missing or damaged"):
        pairs.batch(torch.tensor([5]))
