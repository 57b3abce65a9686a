"""Weights as files: what changed, over the base that all servers hold; undamaged, or refused."""

import json
from dataclasses import asdict
from http.client import HTTPConnection
from pathlib import Path

import httpx
import pytest
import torch

from rollout.fingerprint import HeldTensor
from rollout.vllm.file_server import INDEX, fetch
from rollout.vllm.lock import TOKEN_FILE, make_token, read_token
from rollout.vllm.weight_files import ReadFiles, WeightFiles, opened, overwritten
from tests.vllm_servers import free_port

A, B, HEAD = "a.weight", "b.weight", "lm_head.weight"
CPU = torch.device("cpu")
HELD = {
    A: HeldTensor((2, 8), torch.bfloat16, CPU, A),
    B: HeldTensor((4,), torch.float32, CPU, B),
    HEAD: HeldTensor((2, 8), torch.bfloat16, CPU, A),  # tied: no stream carries it
}


def stream(a=None, b=None):
    a, b = dict(a or {}), dict(b or {})
    tensors = {A: torch.arange(16.0).view(2, 8), B: torch.arange(4.0)}
    for name, changes in ((A, a), (B, b)):
        for at, value in changes.items():
            tensors[name].view(-1)[at] = value
    return tensors.items()


def read(push):
    """{name: (values, positions)} of its files."""
    with opened(asdict(push)) as files:
        return {n: (v.tolist(), p if p is None else p.tolist()) for n, v, p in files.tensors()}


@pytest.fixture
def files(tmp_path):
    return WeightFiles(tmp_path / "weights", HELD)


@pytest.fixture
def based(files):
    files.write(stream(), version=1)
    files.commit()
    return files


def test_the_first_version_is_whole_in_the_dtypes_of_the_servers(files):
    push = files.write(stream({3: 1.00390625}), version=1)  # 1 + 2^-8: half a step of bfloat16, to even
    assert (push.version, push.base, push.changed) == (1, "", 1.0)
    a = [float(k) for k in range(16)]
    assert read(push) == {A: ([[*a[:3], 1.0, *a[4:8]], a[8:]], None), B: ([0.0, 1.0, 2.0, 3.0], None)}


def test_a_delta_has_the_changed_values_and_their_flat_positions(based):
    push = based.write(stream({3: 30.0, 9: 90.0}), version=2)
    assert read(push) == {A: ([30.0, 90.0], [3, 9])}
    assert push.changed == 2 / 20
    assert push.base.startswith("1.") and push.content == "2" + push.base[1:]


def test_what_the_servers_would_round_away_is_not_sent(based):
    assert read(based.write(stream({8: 8.001}), version=2)) == {}
    assert read(based.write(stream({8: 8.04}), version=3)) == {A: ([8.0625], [8])}  # steps of 1/16 at 8


def test_a_zero_that_changes_its_sign_and_a_nan_that_stays_are_seen_as_bits(files):
    files.write(stream({5: float("nan")}), version=1)
    files.commit()
    push = files.write(stream({5: float("nan"), 0: -0.0}), version=2)
    assert str(read(push)) == str({A: ([-0.0], [0])})


def test_a_tensor_that_changes_more_than_positions_are_worth_is_sent_whole(based):
    """A position takes 4 bytes: of 16 values of 2 bytes 5 are shorter as a delta (30 < 32), 6 are not; of 4
    values of 4 bytes 1 is.
    """
    five = based.write(stream({k: 50 + k for k in range(5)}, {0: 7.0}), version=2)
    assert [positions for _, positions in read(five).values()] == [[0, 1, 2, 3, 4], [0]]
    six = based.write(stream({k: 50 + k for k in range(6)}, {0: 7.0, 1: 8.0}), version=3)
    assert [positions for _, positions in read(six).values()] == [None, None]


def test_a_delta_is_laid_over_the_version_that_all_servers_hold(based):
    """Version 2 reached some servers only: version 3 holds what changed since version 1."""
    based.write(stream({3: 30.0}), version=2)
    push = based.write(stream({3: 30.0, 4: 40.0}), version=3)
    assert push.base.startswith("1.") and read(push) == {A: ([30.0, 40.0], [3, 4])}
    based.commit()
    push = based.write(stream({4: 40.0}), version=4)
    assert push.base.startswith("3.") and read(push) == {A: ([3.0], [3])}


def test_a_delta_laid_over_its_base_once_or_twice_gives_the_version_whole(based):
    values, positions = torch.tensor([30.0, 90.0]), torch.tensor([3, 9], dtype=torch.int32)
    base = torch.arange(16.0).view(2, 8)
    once = overwritten(base, values, positions)
    expected = [[0, 1, 2, 30, 4, 5, 6, 7], [8, 90, 10, 11, 12, 13, 14, 15]]
    assert once.tolist() == overwritten(once, values, positions).tolist() == expected
    assert base[0, 3] == 3  # a new tensor
    based.write(stream({3: 30.0, 9: 90.0}, {0: -1.0}), version=2)
    for _ in range(2):  # before all servers hold it, and after
        push = based.whole()
        assert (push.version, push.base) == (2, "")
        assert read(push) == {A: (expected, None), B: ([-1.0, 1.0, 2.0, 3.0], None)}
        based.commit()


def test_before_anything_was_written_there_is_nothing_for_a_server_that_joins(files):
    with pytest.raises(ValueError, match="no weights were written yet"):
        files.whole()


def test_another_writer_of_the_same_version_is_another_content(based, tmp_path):
    """A trainer that was started again numbers its versions like the one before."""
    other = WeightFiles(tmp_path / "again", HELD)
    assert other.write(stream(), version=1).content != based.whole().content


def test_files_that_no_server_needs_go(based):
    names = lambda: sorted(path.name.partition(".")[0] for path in based.folder.iterdir())  # noqa: E731
    assert names() == ["1"]
    for version in (2, 3):
        based.write(stream({version: 99.0}), version=version)
        assert names() == ["1", str(version)]
    based.commit()
    based.write(stream(), version=4)
    assert names() == ["3", "4"]


def test_a_stream_of_another_model_is_refused_by_name(based):
    with pytest.raises(ValueError, match=r"have no weight c\.weight, or it came twice"):
        based.write([*stream(), ("c.weight", torch.ones(1))], version=2)
    with pytest.raises(ValueError, match=r"have no weight lm_head\.weight"):
        based.write([*stream(), (HEAD, torch.ones(2, 8))], version=2)
    with pytest.raises(ValueError, match=r"have no weight b\.weight, or it came twice"):
        based.write([*stream(), (B, torch.arange(4.0))], version=2)
    with pytest.raises(ValueError, match=r"stream of weights lacks b\.weight"):
        based.write(list(stream())[:1], version=2)


def cut(path):
    path.write_bytes(path.read_bytes()[:-3])


def flip(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [cut, flip])
def test_a_damaged_file_is_refused_with_the_names_in_it(based, damage):
    push = based.write(stream({3: 30.0}), version=2)
    (file,) = Path(push.where).glob("*.safetensors")
    damage(file)
    with pytest.raises(match=r"damaged or cut short .*; it holds a\.weight"):
        read(push)
    file.unlink()
    with pytest.raises(match=r"model-00001\.safetensors cannot be read: No such file"):
        read(push)


def test_the_index_of_another_version_is_refused(based):
    first, second = based.whole(), based.write(stream({3: 30.0}), version=2)
    with pytest.raises(match=f"has the checksum {second.checksum}, not {first.checksum}"):
        ReadFiles(Path(second.where), first.checksum)


def held(**changes):
    return {
        A: HeldTensor(*(changes.get("shape", (2, 8)), changes.get("dtype", torch.bfloat16), CPU, A)),
        B: HELD[B],
    }


@pytest.mark.parametrize(
    ("model", "sentence"),
    [
        (held(shape=(8, 2)), r"a\.weight is \(2, 8\) in the files and \(8, 2\) in the model"),
        (held(dtype=torch.float16), r"a\.weight is torch\.bfloat16 in the files and torch\.float16"),
        ({A: HELD[A]}, r"the model has no weight b\.weight"),
        (HELD | {"c": HeldTensor((1,), torch.float32, CPU, "c")}, r"the files lack c"),
    ],
)
def test_weights_of_another_form_are_refused_before_they_are_loaded(files, model, sentence):
    push = files.write(stream(), version=1)
    found = ReadFiles(Path(push.where), push.checksum)
    found.check(HELD, False)
    with pytest.raises(match=sentence):
        found.check(model, False)


def test_positions_outside_of_a_tensor_are_refused(based):
    push = based.write(stream({15: 99.0}), version=2)
    found = ReadFiles(Path(push.where), push.checksum)
    found.check(HELD, True)
    with pytest.raises(match=r"a\.weight: 1 values do not fit its 15 places"):
        found.check(held(shape=(15,)), True)
    with pytest.raises(match=r"the files lack b\.weight"):  # a delta that says it is whole
        found.check(HELD, False)


def test_large_weights_come_in_several_files(files, monkeypatch):
    monkeypatch.setattr("rollout.vllm.weight_files.FILE_BYTES", 40)  # 32 bytes of A and 16 of B are more
    push = files.write(stream(), version=1)
    index = json.loads((Path(push.where) / INDEX).read_text())
    assert index["weight_map"] == {A: "model-00001.safetensors", B: "model-00002.safetensors"}
    assert list(read(push)) == [A, B]
    assert push.num_bytes == sum(path.stat().st_size for path in Path(push.where).iterdir())


def test_files_come_over_http_to_who_bears_the_token_until_the_end(tmp_path, monkeypatch):
    for name in ("token", "other"):
        make_token(tmp_path / name)
    token, folder = read_token(tmp_path / "token"), tmp_path / "weights"
    url = f"http://127.0.0.1:{free_port()}"
    files = WeightFiles(folder, HELD, url=url, token=token)
    push = files.write(stream({3: 30.0}), version=1)
    assert push.where.startswith(f"{url}/1.")
    with pytest.raises(ValueError, match=f"engine.weights_url={url}: this host cannot listen .* in use"):
        WeightFiles(tmp_path / "of another run", HELD, url=url, token=token)
    monkeypatch.setenv(TOKEN_FILE, str(tmp_path / "token"))
    assert read(push)[B] == ([0.0, 1.0, 2.0, 3.0], None)
    bearing = {"Authorization": f"Bearer {token}"}
    name = push.where.rpartition("/")[2]
    codes = {f"/{name}/{INDEX}": 200, "/../token": 404, f"/{name}/../../token": 404, "/": 404}
    for path, code in codes.items():
        plain = HTTPConnection(url.removeprefix("http://"))  # which leaves the dots as they are
        plain.request("GET", path, headers=bearing)
        assert plain.getresponse().status == code, path
        plain.close()
    assert httpx.get(f"{push.where}/{INDEX}", trust_env=False).status_code == 401
    monkeypatch.setenv(TOKEN_FILE, str(tmp_path / "other"))
    with pytest.raises(ValueError, match="401") as caught:
        fetch(push.where, tmp_path)
    assert token not in str(caught.value)
    files.close()
    assert not folder.exists()
    with pytest.raises(ValueError, match=r"cannot fetch weights from http://.*: ConnectError"):
        fetch(push.where, tmp_path)
