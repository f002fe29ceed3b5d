"The sentences that users read, held against the rules that can be checked"
import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import cjm_fasthtml_resources
from cjm_fasthtml_resources.core.conflict import ResourceBusy, ResourceUnavailable
from cjm_fasthtml_resources.core.explain import SENTENCES
from cjm_fasthtml_resources.core.manager import ResourceManager
from cjm_fasthtml_resources.simulate import PRESETS, SimulatedDriver, SimulatedGpu, load_scenario

PACKAGE = Path(cjm_fasthtml_resources.__file__).parent
OLD = (r"cannot be told|outsiders?|for ever|meanwhile|anew|beside|beneath|whom|shall|in the way|somebody|nobody|"
       r"promised|promises|the app itself|others hold|is wanted|are wanted|is no (?!longer)\w+|may|looks?")
ALLOWED = {"looks like a pickle", "; promised is reserved"}   # a plain verb, and the name of a metric's owner
LONGEST = 36   # words: the longest sentence names a file, a reason and a command


def words_of(node: ast.AST) -> str | None:
    "A text in the code with X for what is filled in; `None` for anything else"
    if isinstance(node, ast.Constant) and isinstance(node.value, str): return node.value
    if isinstance(node, ast.JoinedStr): return "".join(words_of(v) or "X" for v in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return (words_of(node.left) or "X") + (words_of(node.right) or "X")
    return None


def is_prose(text: str) -> bool:
    "Whether a text is for people: four words, and no SQL, HTML, pattern, command or type"
    other = r"SELECT |INSERT |DELETE |UPDATE |CREATE |PRAGMA |JOIN |WHERE |</?[a-z]|\\|\(\?|%[YHdb]| \| |\n"
    return len(re.findall(r"\b[A-Za-z]{2,}\b", text)) > 3 and not re.search(other, text)


def texts_of(path: Path) -> Iterator[tuple[str, str]]:
    "The place and the text of each sentence in a module, except docstrings"
    where, tree = path.relative_to(PACKAGE), ast.parse(path.read_text(encoding="utf-8"))
    whole = [node for node in ast.walk(tree) if isinstance(node, (ast.JoinedStr, ast.BinOp))]
    parts = {id(part) for node in whole for part in ast.walk(node) if part is not node}
    parts |= {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}   # docstrings
    for node in ast.walk(tree):
        if id(node) not in parts and (text := words_of(node)) and is_prose(text): yield f"{where}:{node.lineno}", text


def sentences() -> list[tuple[str, str]]:
    found = [(f"explain: {key}", text) for key, text in SENTENCES.items()]
    return found + [row for path in sorted(PACKAGE.rglob("*.py"))
                    if path.name != "_modidx.py" for row in texts_of(path)]


def complaints(text: str) -> list[str]:
    "What is wrong with a text"
    plain = re.sub(r"`[^`]*`|--?[a-z][-\w]*|\{[^}]*\}", "X", text)
    for allowed in ALLOWED: plain = plain.replace(allowed, "X")
    found = [f"says {match!r}" for match in re.findall(rf"\b(?:{OLD})\b", plain, re.I)]
    if re.search(r"\b1 GPUs\b", plain): found.append("a plural after 1")
    for part in re.split(r"(?<=[.!?])\s", plain):
        if len(part.split()) > LONGEST: found.append(f"a sentence of {len(part.split())} words")
    return found


def test_every_sentence_is_plain():
    found = sentences()
    assert len(found) > 300
    wrong = [f"{where}: {', '.join(bad)}: {text}" for where, text in found if (bad := complaints(text))]
    assert not wrong, "\n".join(wrong)


def test_the_rules_find_what_they_are_for():
    for bad in ("RAM cannot be told.", "Not now, others hold the GPU.", "It was promised to PID 1.", "'x' is no size",
                "1 GPUs were asked for", "In the way is a worker.", " ".join(["word"]*40)):
        assert complaints(bad), bad
    assert not complaints("No GPU is available: other programs use 45 % or more of GPU 0.")


def test_the_sentences_of_a_check_end_with_a_full_stop():
    assert {key for key, text in SENTENCES.items() if not text.endswith(".")} == {
        "gpu free", "gpu free, in use", "gpu free, in use or reserved"}
    for preset in PRESETS:
        with load_scenario(preset):
            manager = ResourceManager(track_self=False)
            for check in (manager.check_gpu_availability, manager.check_memory_availability):
                message = check().message
                assert message.endswith(".") and message.count("(estimate)") < 2, message
                assert not [bad for bad in complaints(message) if "words" not in bad], message   # lists can be long


@pytest.mark.parametrize("count", [1, 2])
def test_a_number_of_gpus_agrees_with_its_noun(count):
    with SimulatedDriver([SimulatedGpu(memory_total_mb=1024)]*count):
        manager = ResourceManager(track_self=False)
        said = []
        for call in (lambda: manager.pick_gpus(3), lambda: manager.pick_gpus(count, min_free_mb=2048)):
            with pytest.raises((ResourceBusy, ResourceUnavailable)) as error: call()
            said.append(str(error.value))
    assert not re.search(r"\b1 GPUs\b|\b[2-9] GPU\b", " ".join(said)), said
