"Names, keys, files, random numbers: values worked out with hashlib, and what is left on disk after a fault."
import dataclasses, errno, hashlib
from pathlib import Path

import numpy as np, pytest, torch

from diffda import core
from diffda.core import (DiffDAError, Registry, canonical, digest, disk_errors, file_digest, lookup, make_dir,
                         one_of, read_json, seed_for, write_json, write_text, writing)
from diffda.store import Stage
from diffda.torch_core import generator_for, resumable, seeded

@dataclasses.dataclass(frozen=True)
class Part:
    strength: float = .5
    names: tuple = ("a", "b")

Part.__module__ = "diffda.part"                  # as if it came with the package

def sha(text): return hashlib.sha256(text.encode()).hexdigest()
def files(folder): return sorted(p.name for p in Path(folder).iterdir())

# names

def test_lookup_finds():
    assert lookup("b", {"a": 1, "b": 2}, "letter") == 2

def test_lookup_names_the_nearest():
    with pytest.raises(DiffDAError, match=r"Unknown method 'real-guidence': did you mean real-guidance\?"):
        lookup("real-guidence", {"real-guidance": 1, "cutmix": 2}, "method")

def test_lookup_lists_all_when_nothing_is_near():
    with pytest.raises(DiffDAError, match="known: cutmix, mixup"):
        lookup("zzzzz", {"mixup": 1, "cutmix": 2}, "method")

def test_one_of_gives_the_name_back():
    assert one_of("a", ("a", "b"), "letter") == "a"
    with pytest.raises(DiffDAError, match="Unknown letter 'c'"): one_of("c", ("a", "b"), "letter")

# registries

@dataclasses.dataclass(frozen=True)
class Named:
    name: str
    value: int = 0

def register_from(module, registry, thing):
    "Register `thing` as the module called `module` would do it."
    space = {"__name__": module, "registry": registry, "thing": thing}
    exec("registry.register(thing)", space)
    return thing

def test_a_registry_gives_what_it_has_in_its_order():
    known = Registry("letter")
    b, a = known.register(Named("b")), known.register(Named("a"))
    assert known.names() == ["b", "a"] and known.get("a") is a and known.get("b") is b
    with pytest.raises(DiffDAError, match="Unknown letter 'x': known: a, b."): known.get("x")

def test_a_name_has_one_owner():
    "The same thing again, or another one by the same owner, is fine; another one by another owner is not."
    known, first = Registry("letter"), Named("a", 1)
    register_from("mine", known, first)
    register_from("mine", known, Named("a", 2))
    register_from("theirs", known, Named("a", 2))
    with pytest.raises(DiffDAError, match="The letter 'a' is already registered, by theirs; choose another"):
        register_from("third", known, Named("a", 3))
    assert known.get("a") == Named("a", 2)

def test_a_registry_imports_the_modules_of_its_package_first(tmp_path, monkeypatch):
    folder = tmp_path/"some_letters"
    folder.mkdir()
    (folder/"__init__.py").write_text("")
    (folder/"one.py").write_text("import registries\nregistries.KNOWN.register(registries.Named('one'))")
    (tmp_path/"registries.py").write_text(
        "import dataclasses\nfrom diffda.core import Registry\nKNOWN = Registry('letter', 'some_letters')\n"
        "@dataclasses.dataclass(frozen=True)\nclass Named:\n    name: str\n    value: int = 0\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    import registries
    with pytest.raises(DiffDAError, match="'one' is already registered, by some_letters.one"):
        registries.KNOWN.register(registries.Named("one", 5))
    assert registries.KNOWN.names() == ["one"]

# digests

def test_digest_golden():
    assert digest({"b": 1, "a": [1.5, None, True]}) == sha('{"a":[1.5,null,true],"b":1}')[:16]
    assert digest("Bär", 64) == sha('"Bär"')

def test_digest_of_a_dataclass_names_its_class_and_fields():
    assert digest(Part()) == sha('{"class":"Part","names":["a","b"],"strength":0.5}')[:16]
    assert digest(Part()) != digest(Part(strength=.6))

@dataclasses.dataclass(frozen=True)
class Grown(Part):
    depth: int = core.later(3)
    kind: str = core.later("plain")

Grown.__module__, Grown.__name__ = "diffda.part", "Part"

def test_a_later_field_leaves_earlier_keys_alone():
    assert canonical(Grown()) == canonical(Part()) and digest(Grown(strength=.6)) == digest(Part(strength=.6))
    assert canonical(Grown(depth=4)) == {**canonical(Part()), "depth": 4}
    grown = [Grown(), Grown(depth=4), Grown(kind="x"), Grown(depth=4, kind="x")]
    assert len(set(map(digest, grown))) == 4
    assert Stage("train", {"part": Grown()}).key == Stage("train", {"part": Part()}).key

def written(body, value=2):
    "A part as somebody writes it in a notebook."
    space = {"dataclasses": dataclasses, "__name__": "__main__"}
    text = f"class Mine:\n    value: int = {value}\n    def draw(self, x):\n        {body}"
    exec(f"@dataclasses.dataclass(frozen=True)\n{text}", space)
    return space["Mine"]()

def test_the_code_of_a_part_from_outside_belongs_to_its_digest():
    "A part that is being written is another one after each change; the same text is the same part."
    one, same, other = (digest(written(f"return x in {{'a', '{letter}'}}")) for letter in "bbc")
    assert one == same != other
    bodies = ("return x + 1", "return x + 2", "return x - 1", "return (lambda: x + 1)()",
              "return (lambda: x + 2)()")
    assert len({digest(written(body)) for body in bodies}) == 5
    assert digest(written("return 1", 2)) != digest(written("return 1", 3))

USED = """
BLUR, UNUSED, radius = {blur}, {unused}, {radius}
def helper(x): return x + {added}
@dataclasses.dataclass(frozen=True)
class Mine:
    radius = {constant}
    def draw(self, x): return helper(x) * BLUR + self.radius
"""

def using(**said):
    "The digest of a part that leans on a function and a number of its module."
    space = {"dataclasses": dataclasses, "__name__": "__main__"}
    exec(USED.format(**{**dict(blur=1, unused=1, radius=1, added=1, constant=1), **said}), space)
    return digest(space["Mine"]())

@pytest.mark.parametrize("name", ["blur", "added", "constant"])
def test_what_a_part_from_outside_uses_belongs_to_its_digest(name): assert using(**{name: 2}) != using()

@pytest.mark.parametrize("name", ["unused", "radius"])
def test_what_a_part_from_outside_does_not_use_is_no_part_of_its_digest(name):
    assert using(**{name: 2}) == using()

UNSTABLE = [{1, 2}, Path("/tmp"), object(), np.zeros(2), b"x", lambda: 0]

@pytest.mark.parametrize("obj", UNSTABLE, ids=lambda o: type(o).__name__)
def test_no_digest_of_what_depends_on_the_machine(obj):
    with pytest.raises(TypeError): canonical({"a": [obj]})

def test_file_digest_golden(tmp_path):
    (tmp_path/"a").write_bytes(b"one")
    (tmp_path/"b").write_bytes(b"two")
    whole = hashlib.sha256(hashlib.sha256(b"one").digest() + hashlib.sha256(b"two").digest()).hexdigest()
    assert file_digest(tmp_path/"a", tmp_path/"b", length=64) == whole
    assert file_digest(tmp_path/"b", tmp_path/"a", length=64) != whole

# random numbers

def test_seed_golden():
    assert seed_for(0, "cat/1", 2, "noise") == int(sha('[0, "cat/1", 2, "noise"]')[:16], 16)//2

def test_generators_depend_on_their_parts_only():
    def draw(*parts): return torch.randn(4, generator=generator_for(*parts)).tolist()
    before = torch.get_rng_state()
    first = draw(0, "x", 1, "noise")
    torch.randn(3)
    assert draw(0, "x", 1, "noise") == first
    others = [(1, "x", 1, "noise"), (0, "y", 1, "noise"), (0, "x", 2, "noise"), (0, "x", 1, "crop")]
    assert len({tuple(draw(*parts)) for parts in [(0, "x", 1, "noise"), *others]}) == 5
    torch.set_rng_state(before)
    draw(0)
    assert torch.equal(torch.get_rng_state(), before)

def test_seeded_gives_the_state_back():
    before = torch.get_rng_state()
    with seeded(1, "a"): one = torch.rand(3)
    with pytest.raises(ValueError):
        with seeded(1, "a"):
            assert torch.equal(torch.rand(3), one)
            raise ValueError
    assert torch.equal(torch.get_rng_state(), before)

@pytest.mark.gpu
def test_seeded_leaves_the_gpu_alone():
    torch.rand(2, device="cuda")
    before = torch.cuda.get_rng_state()
    with seeded(1, "a"): torch.rand(3)
    assert torch.equal(torch.cuda.get_rng_state(), before)

# files

def test_writing_is_all_or_nothing(tmp_path):
    f = tmp_path/"x.json"
    write_json(f, {"a": 1})
    with pytest.raises(RuntimeError):
        with writing(f) as temp:
            temp.write_text("half")
            assert read_json(f) == {"a": 1} and temp.parent == f.parent
            raise RuntimeError
    assert read_json(f) == {"a": 1} and files(tmp_path) == ["x.json"]
    write_text(f, "ü")
    assert f.read_bytes() == "ü".encode() and files(tmp_path) == ["x.json"]

def test_file_reaches_the_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(core.os, "fsync", lambda fd: calls.append(("fsync", (tmp_path/"x").exists())))
    write_text(tmp_path/"x", "1")
    assert calls == [("fsync", False)] and (tmp_path/"x").exists()

REFUSALS = [(errno.ENOSPC, "the disk is full"), (errno.EROFS, "read-only"), (errno.EACCES, "permission")]

@pytest.mark.parametrize("code, says", REFUSALS)
def test_the_disk_refuses(tmp_path, monkeypatch, code, says):
    def refuse(fd): raise OSError(code, "no")
    write_text(tmp_path/"x", "old")
    monkeypatch.setattr(core.os, "fsync", refuse)
    with pytest.raises(DiffDAError, match=f"Cannot write .*x: .*{says}"): write_text(tmp_path/"x", "new")
    assert (tmp_path/"x").read_text() == "old" and files(tmp_path) == ["x"]

def test_other_os_errors_are_not_hidden(tmp_path):
    with pytest.raises(FileNotFoundError):
        with disk_errors(tmp_path): open(tmp_path/"none")

def test_a_file_in_the_way(tmp_path):
    (tmp_path/"f").write_text("x")
    for bad in (tmp_path/"f", tmp_path/"f"/"sub"):
        with pytest.raises(DiffDAError, match=f"Cannot write {bad}: .*file"): make_dir(bad)
    assert (tmp_path/"f").read_text() == "x"

# loops that can be interrupted

class Walk:
    "A state that depends on every step before: x <- 1.5 x + i."
    def __init__(self): self.x = torch.zeros(1, dtype=torch.float64)
    def state_dict(self): return {"x": self.x.clone()}
    def load_state_dict(self, s): self.x = s["x"].clone()
    def step(self, i):
        self.x = self.x*1.5 + i
        return {"i": i, "x": self.x.item()}

def interrupted(walk, path, at, n=8):
    def step(i):
        if i == at: raise KeyboardInterrupt
        return walk.step(i)
    return resumable(n, step, {"walk": walk}, path, every_s=0, progress=False)

@pytest.mark.parametrize("at", [0, 1, 7])
def test_resumed_loop_equals_the_undisturbed_one(tmp_path, at):
    expected = [0.]
    for i in range(8): expected.append(expected[-1]*1.5 + i)
    path = tmp_path/"c.pt"
    with pytest.raises(KeyboardInterrupt): interrupted(Walk(), path, at)
    assert path.exists() == (at > 0)
    walk, steps = Walk(), []
    def step(i):
        steps.append(i)
        return walk.step(i)
    history = resumable(8, step, {"walk": walk}, path, every_s=0, progress=False)
    assert steps == list(range(at, 8)) and history == [{"i": i, "x": x} for i, x in enumerate(expected[1:])]
    assert walk.x.item() == expected[-1]

def test_a_finished_loop_is_restored_without_a_step(tmp_path):
    a, b = Walk(), Walk()
    # the last step always saves
    first = resumable(4, a.step, {"walk": a}, tmp_path/"c.pt", progress=False)
    def again(i): pytest.fail("ran again")
    assert resumable(4, again, {"walk": b}, tmp_path/"c.pt", progress=False) == first
    assert a.x.item() == b.x.item() and files(tmp_path) == ["c.pt"]

def test_a_damaged_checkpoint_is_one_sentence(tmp_path):
    (tmp_path/"c.pt").write_bytes(b"not a checkpoint")
    with pytest.raises(DiffDAError, match="c.pt is damaged; delete it and run again"):
        resumable(3, lambda i: i, {}, tmp_path/"c.pt", progress=False)

def test_a_checkpoint_from_before_there_was_a_scaler(tmp_path):
    "Training that began on a CPU has no state of a gradient scaler, and goes on where there is one."
    walk = Walk()
    off = torch.amp.GradScaler("cpu", enabled=False)
    resumable(2, walk.step, {"walk": walk, "scaler": off}, tmp_path/"a.pt", progress=False)
    resumable(2, walk.step, {"walk": walk}, tmp_path/"b.pt", progress=False)
    for name in "ab":
        again, scaler = Walk(), torch.amp.GradScaler("cpu", init_scale=8.)
        state = {"walk": again, "scaler": scaler}
        assert len(resumable(3, again.step, state, tmp_path/f"{name}.pt", progress=False)) == 3
        assert scaler.get_scale() == 8.
    with pytest.raises(DiffDAError, match="has no 'other', so another version wrote it"):
        resumable(3, walk.step, {"other": walk}, tmp_path/"b.pt", progress=False)

@dataclasses.dataclass(frozen=True)
class Read:
    path: str = None
    path_key: str = None

def test_where_a_file_is_does_not_count_but_what_it_holds():
    def known(*fields): return {k: v for k, v in canonical(Read(*fields)).items() if k != "code"}
    assert known("/a/x", "1f") == known("/b/x", "1f") == {"class": "Read", "path_key": "1f"}
    assert known("attributes") == {"class": "Read", "path": "attributes", "path_key": None}
