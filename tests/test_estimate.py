"""How much a model needs, from its files: at least their weights, or an error that says what is wrong

Files are written by hand here. Where the packages `safetensors` and `gguf` are installed, they have to agree.
"""
import json
import os
import pickle
import struct
import sys
import time
import tracemalloc
from contextlib import suppress
from pathlib import Path
from unittest.mock import patch

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cjm_fasthtml_resources.core.estimate import CONTEXT_OVERHEAD, estimate_need
from cjm_fasthtml_resources.core.gguf import GGML_TYPES, read_gguf
from cjm_fasthtml_resources.core.weights import BITS, parse_tensors, read_header, read_safetensors

SOME = settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def layout(tensors):
    "The header of tensors by name, each of a type and a shape, and the bytes after it"
    header, at = {}, 0
    for name, (dtype, shape) in tensors.items():
        size = BITS[dtype]
        for n in shape: size *= n
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + size//8]}
        at += size//8
    return header, at


def write(path: Path, header, space: int = 0) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + space)   # sparse: nothing reads the tensors
    return path


def text(value: str, order="<") -> bytes: return struct.pack(order + "Q", len(value.encode())) + value.encode()


def gguf(path: Path, tensors, keys=(), order="<", version=3) -> Path:
    "Write a GGUF file of tensors (name, shape, type), and of keys (name, type, packed value)"
    header = b"GGUF" + struct.pack(order + "IQQ", version, len(tensors), len(keys))
    for key, kind, value in keys: header += text(key, order) + struct.pack(order + "I", kind) + value
    at = 0
    for name, shape, kind in tensors:
        numbers, size = GGML_TYPES[kind][1:]
        count = 1
        for n in shape: count *= n
        header += text(name, order) + struct.pack(f"{order}I{len(shape)}QIQ", len(shape), *shape, kind, at)
        at += -(-count//numbers*size//32)*32
    with open(path, "wb") as file:
        file.write(header)
        file.truncate(-(-len(header)//32)*32 + at)
    return path


@pytest.fixture(params=["package", "header"])
def either(request, monkeypatch):
    "With the safetensors package, and as if it were not installed"
    if request.param == "package": pytest.importorskip("safetensors")
    else: monkeypatch.setitem(sys.modules, "safetensors", None)


# ---- what is right

def test_a_large_model_is_estimated_in_no_time_and_nothing_of_it_is_read(tmp_path, either):
    header, space = layout({f"model.layers.{n}.weight": ("BF16", (4096, 14336)) for n in range(128)})
    path = write(tmp_path/"model.safetensors", header, space)
    began = time.perf_counter()
    need = estimate_need(path)
    assert time.perf_counter() - began < 1
    assert need.weights == space == 128*4096*14336*2
    assert need.total == need.weights + CONTEXT_OVERHEAD + int(space*0.2)
    assert need.gpu_memory_mb == need.total/2**20
    assert str(need).startswith("An estimate: 14.0 GiB of weights (128 tensors, BF16) and 3.4 GiB of overhead")


shapes = st.lists(st.integers(0, 8), max_size=4).map(tuple)
models = st.dictionaries(st.text(max_size=8).filter(lambda name: name != "__metadata__"),
                         st.tuples(st.sampled_from([*BITS]), shapes), min_size=1, max_size=6)


@SOME
@given(models)
def test_package_and_header_agree(tmp_path, tensors):
    pytest.importorskip("safetensors")
    tensors = {name: (dtype, (*shape, 4)) for name, (dtype, shape) in tensors.items()}   # whole bytes
    path = write(tmp_path/"model.safetensors", *layout(tensors))
    found = read_safetensors(path)
    with patch.dict(sys.modules, safetensors=None): assert read_safetensors(path) == found
    assert found.tensors == len(tensors)


def test_the_package_reads_what_it_writes(tmp_path):
    serialize = pytest.importorskip("safetensors.numpy").save_file
    numpy = pytest.importorskip("numpy")
    serialize({"q": numpy.zeros((3, 5), "float16"), "n": numpy.zeros(7, "float32")}, tmp_path/"a.safetensors")
    need = estimate_need(tmp_path/"a.safetensors")
    assert need.dtypes == {"F16": 30, "F32": 28}
    assert parse_tensors(*read_header(tmp_path/"a.safetensors"))


def test_types_are_those_of_the_gguf_package():
    constants = pytest.importorskip("gguf.constants")
    for kind, sizes in constants.GGML_QUANT_SIZES.items(): assert GGML_TYPES[kind] == (kind.name, *sizes)


def test_the_gguf_package_reads_the_same(tmp_path):
    reader = pytest.importorskip("gguf").GGUFReader
    keys = [("general.architecture", 8, text("llama")), ("general.alignment", 4, struct.pack("<I", 32))]
    words = struct.pack("<IQ", 8, 2) + text("a") + text("ä")
    path = gguf(tmp_path/"a.gguf", [("q", (256, 3), 12), ("n", (5,), 0), ("k", (64, 2, 2), 8)],
                [*keys, ("tokenizer.ggml.tokens", 9, words)])
    theirs = reader(path)
    assert read_gguf(path).weights.size == sum(int(t.n_bytes) for t in theirs.tensors) == 3*144 + 20 + 256*34//32
    assert read_gguf(path).values["general.architecture"] == "llama"


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("order", "<>")
def test_gguf_of_either_order_of_bytes(tmp_path, order, version):
    keys = [("split.count", 2, struct.pack(order + "H", 1))]
    need = estimate_need(gguf(tmp_path/"a.gguf", [("q", (256, 3), 14)], keys, order, version))
    assert (need.weights, need.dtypes, need.source) == (630, {"Q6_K": 630}, "GGUF")


def test_alignment_is_that_of_the_file(tmp_path):
    path = gguf(tmp_path/"a.gguf", [("q", (8,), 0)], [("general.alignment", 4, struct.pack("<I", 4096))])
    with pytest.raises(ValueError, match=r"a\.gguf is damaged"): estimate_need(path)
    with open(path, "r+b") as file: file.truncate(4096 + 32)
    assert estimate_need(path).weights == 32


@pytest.mark.parametrize("bad", [0, 3, 2**32 - 1])
def test_alignment_is_a_power_of_two(tmp_path, bad):
    path = gguf(tmp_path/"a.gguf", [("q", (8,), 0)], [("general.alignment", 4, struct.pack("<I", bad))])
    with pytest.raises(ValueError, match="alignment"): estimate_need(path)


def test_parts_are_added_whichever_is_named(tmp_path):
    for n in (1, 2, 3):
        keys = [("split.count", 2, struct.pack("<H", 3))]
        gguf(tmp_path/f"big-Q4_0-0000{n}-of-00003.gguf", [("q", (32*n,), 2)] if n > 1 else [], keys)
    parts = sorted(tmp_path.iterdir())
    for path in (*parts, tmp_path):
        need = estimate_need(path)
        assert need.weights == 18*5
        assert need.files == tuple(parts)
    parts[1].unlink()
    for path in (parts[0], parts[1], tmp_path):
        with pytest.raises(ValueError, match="part 2 of 3 is missing"): estimate_need(path)
    parts[0].rename(tmp_path/"blob")
    with pytest.raises(ValueError, match="is one of 3 parts"): estimate_need(tmp_path/"blob")


def test_an_index_leads_to_the_parts(tmp_path, either):
    header, space = layout({"q": ("BF16", (8,))})
    names = [f"model-0000{n}-of-00002.safetensors" for n in (1, 2)]
    for name in (*names, "consolidated.safetensors"): write(tmp_path/name, header, space)
    (tmp_path/"config.json").write_text("{}")
    index = {"weight_map": dict(zip("ab", names, strict=True))}
    (tmp_path/"model.safetensors.index.json").write_text(json.dumps(index))
    need = estimate_need(tmp_path)
    assert (need.weights, need.tensors) == (32, 2)
    assert need.left_out == ("consolidated.safetensors",)
    assert "Not included: consolidated.safetensors." in need.explain()


# ---- what is odd

def wrong(path, says):
    with pytest.raises(ValueError) as caught: estimate_need(path)
    assert str(path) in str(caught.value)
    assert says in str(caught.value)


HEADER, SPACE = layout({"q": ("F32", (4,)), "k": ("F32", (2,))})


@pytest.mark.parametrize("header, space, says", [
    (HEADER, SPACE - 1, "it has 0 MiB of its"),
    (HEADER, SPACE + 1, "belong to no tensor"),
    (HEADER, 0, "it has 0 MiB of its"),
    ({**HEADER, "v": {"dtype": "F32", "shape": [1], "data_offsets": [20, 24]}}, SPACE, "begins at 20"),
    ({**HEADER, "v": {"dtype": "F32", "shape": [1], "data_offsets": [2**70, 2**70 + 4]}}, SPACE, "impossible"),
    ({"q": {"dtype": "F32", "shape": [2**62]*4, "data_offsets": [0, 8]}}, 8, "not the size"),
    ({"q": {"dtype": "F32", "shape": [1e400], "data_offsets": [0, 8]}}, 8, "impossible"),
    ({"q": "F32"}, 8, "no dtype"),
    ({"__metadata__": {}}, 0, "has no tensors"),
    (b"", 0, "no valid header"),
    (b"[]", 0, "not a JSON object"),
    (b"null", 0, "not a JSON object"),
    (b"\xff\xfe", 0, "no valid header"),
    (b"{" + b'"a":{'*100_000, 0, "nested too deeply"),
    (b'{"a": ' + b"9"*10_000 + b"}", 0, ""),
    (b'{"a": {}, "a": {}}', 0, "twice"),
])
def test_a_damaged_file_is_an_error_that_names_it(tmp_path, either, header, space, says):
    wrong(write(tmp_path/"model.safetensors", header, space), says)


@pytest.mark.parametrize("length", [0, 1, 7, 8, 100, 99_999_999, 100_000_001, 2**63, 2**64 - 1])
def test_the_length_of_a_header_may_claim_anything(tmp_path, either, length):
    path = tmp_path/"model.safetensors"
    path.write_bytes(struct.pack("<Q", length) + b"{}"*20)
    wrong(path, "")


def test_a_sparse_file_with_a_huge_header_is_read_within_limits(tmp_path, either):
    path = tmp_path/"model.safetensors"
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", 2**36))
        file.truncate(2**37)
    tracemalloc.start()
    wrong(path, "its header would have")
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()


@pytest.mark.parametrize("text", [b'{"a":[' + b"0,"*3_000_000 + b"0]}", b'{"":'*250_001], ids=["list", "objects"])
def test_a_header_that_would_fill_the_memory_is_not_parsed(tmp_path, text):
    with patch.dict(sys.modules, safetensors=None):
        wrong(write(tmp_path/"model.safetensors", text), "more than 250,000 tensors")


@pytest.mark.parametrize("name", ["model.safetensors", "model.gguf", "pytorch_model.bin"])
@pytest.mark.parametrize("content, says", [
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n", "pointer of Git LFS"),
    (b"", ""),
    (b"<!DOCTYPE html><html>Access to this model is restricted", ""),
])
def test_what_stands_for_a_file(tmp_path, either, name, content, says):
    (tmp_path/name).write_bytes(content)
    wrong(tmp_path/name, says)


def test_a_pickle_is_never_unpickled(tmp_path):
    class Trap:
        def __reduce__(self): return (os.mkdir, (str(tmp_path/"trapped"),))
    for name in ("pytorch_model.bin", "model.pt", "blob"):
        for protocol in range(2, 6):
            (tmp_path/name).write_bytes(pickle.dumps(Trap(), protocol))
            wrong(tmp_path/name, "unpickling runs code")
    assert not (tmp_path/"trapped").exists()


def test_a_pipe_or_a_device_is_not_opened(tmp_path, either):
    os.mkfifo(tmp_path/"model.safetensors")
    (tmp_path/"zero.gguf").symlink_to("/dev/zero")
    wrong(tmp_path/"model.safetensors", "is not a file")
    wrong(tmp_path/"zero.gguf", "is not a file")
    with pytest.raises(ValueError, match="not a file"): read_safetensors(tmp_path/"model.safetensors")


def test_links_that_lead_nowhere_or_around(tmp_path):
    (tmp_path/"gone.safetensors").symlink_to("nowhere")
    (tmp_path/"round.safetensors").symlink_to("round.safetensors")
    for name in ("gone", "round", "none"):
        with pytest.raises(OSError, match=name): estimate_need(tmp_path/f"{name}.safetensors")


def test_names_stay_in_the_folder_and_on_one_line(tmp_path):
    (tmp_path/"model.safetensors.index.json").write_text('{"weight_map": {"q": "../../etc/passwd"}}')
    with pytest.raises(ValueError, match="it names files outside its folder"): estimate_need(tmp_path)
    odd = tmp_path/"a\x1b[2J\n.safetensors"
    odd.write_bytes(b"")
    with pytest.raises(ValueError) as caught: estimate_need(odd)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("bad", [b"GGUF", b"GGUF\3\0\0\0", b"GGUF" + struct.pack("<IQQ", 3, 2**63, 0),
                                 b"GGUF" + struct.pack("<IQQ", 3, 0, 2**63), b"GGUF" + struct.pack("<IQQ", 1, 1, 1),
                                 b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 2**64 - 1)])
def test_a_gguf_that_claims_more_than_it_has(tmp_path, bad):
    (tmp_path/"a.gguf").write_bytes(bad)
    wrong(tmp_path/"a.gguf", "damaged")


def test_a_list_that_never_ends_is_read_within_limits(tmp_path):
    path = tmp_path/"a.gguf"
    with open(path, "wb") as file:
        file.write(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + text("a") + struct.pack("<IIQ", 9, 8, 2**62))
        file.truncate(2**40)   # zeros, without a byte on the disk: empty texts
    began = time.perf_counter()
    wrong(path, "more than 100,000,000 bytes")
    assert time.perf_counter() - began < 60


# ---- anything at all

junk = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
                    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
                    max_leaves=8)
entries = st.fixed_dictionaries({}, optional={"dtype": st.sampled_from([*BITS, "F3"]) | junk,
                                              "shape": st.lists(st.integers(-1, 2**64), max_size=3) | junk,
                                              "data_offsets": st.lists(st.integers(-1, 64), max_size=3) | junk})


@SOME
@given(header=st.dictionaries(st.text(max_size=4), entries | junk, max_size=4), space=st.integers(0, 64))
def test_any_header_is_an_estimate_or_an_error(tmp_path, header, space):
    path = write(tmp_path/"model.safetensors", json.dumps(header).encode(), space)
    with suppress(ValueError, OSError):
        need = estimate_need(path)
        assert need.weights == space
        assert need.total > need.weights


@SOME
@given(tensors=models, data=st.data())
def test_any_changed_byte_is_an_estimate_of_all_its_bytes_or_an_error(tmp_path, tensors, data):
    tensors = {name: (dtype, (*shape, 4)) for name, (dtype, shape) in tensors.items()}
    header, space = layout(tensors)
    path = write(tmp_path/"model.safetensors", header, space)
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content[:data.draw(st.integers(0, len(content)))])
    with suppress(ValueError, OSError): assert estimate_need(path).weights <= path.stat().st_size


kinds = st.sampled_from([*GGML_TYPES])
rows = st.lists(st.tuples(st.text(max_size=5), st.lists(st.integers(0, 2), max_size=3), kinds), max_size=4)


@SOME
@given(rows=rows, data=st.data())
def test_any_gguf_is_an_estimate_or_an_error(tmp_path, rows, data):
    tensors = [(name, (GGML_TYPES[kind].numbers, *shape), kind) for name, shape, kind in rows]
    path = gguf(tmp_path/"a.gguf", tensors, [("a", 8, text("b")), ("c", 9, struct.pack("<IQ3h", 3, 3, 1, 2, 3))])
    whole = read_gguf(path).weights
    assert whole.tensors == len(tensors)
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(0, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content[:data.draw(st.integers(0, len(content)))])
    with suppress(ValueError, OSError): assert estimate_need(path).weights <= path.stat().st_size


@SOME
@given(content=st.binary(max_size=200), name=st.sampled_from(["a.safetensors", "a.gguf", "a.bin", "a"]))
def test_any_bytes_are_an_error(tmp_path, content, name):
    for start in (b"", b"GGUF\3\0\0\0"):
        (tmp_path/name).write_bytes(start + content)
        with pytest.raises((ValueError, OSError), match=name): estimate_need(tmp_path/name)


@SOME
@given(index=junk | st.fixed_dictionaries({"weight_map": junk}))
def test_any_index_is_an_estimate_or_an_error(tmp_path, index):
    write(tmp_path/"a.safetensors", HEADER, SPACE)
    for name in ("model.safetensors.index.json", "model_index.json", "adapter_config.json", "config.json"):
        path = tmp_path/name
        path.write_text(json.dumps(index))
        with suppress(ValueError, OSError): assert estimate_need(tmp_path).weights == SPACE
        path.unlink()
