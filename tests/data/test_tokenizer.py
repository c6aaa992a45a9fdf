import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from kmem.config import UserError
from kmem.data.tokenizer import (
    END_OF_TEXT,
    Encoder,
    adopt_tokenizer,
    load_tokenizer,
    pieces_of,
    tokenizer_fingerprint,
    train_tokenizer,
)
from tests.small_corpora import make_texts

ODD_TEXTS = [
    "\x00\x01\x7f",
    "naïve 東京 🙂 \u200b",
    " \t\n\r\n ",
    END_OF_TEXT,
    f"a{END_OF_TEXT}b",
    "don't  stop\n\n\nnow",
]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("trained") / "tokenizer"


@pytest.fixture(scope="module")
def trained(home):
    return train_tokenizer(iter(make_texts(300, seed=0)), 400, home)


def auto(folder: Path):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(folder), local_files_only=True)


def test_any_text_comes_back(home, trained):
    loaded = auto(home)
    encoder = Encoder(home, trained.eos_token_id)
    for text in ODD_TEXTS:
        *ids, eos = encoder.encode([text])[0]
        assert eos == trained.eos_token_id
        assert trained.eos_token_id not in ids  # not even where the text spells it out
        assert loaded.decode(ids, skip_special_tokens=False) == text


def test_transformers_loads_it_with_the_same_ids_and_eos(home, trained):
    loaded = auto(home)
    assert (loaded.eos_token, loaded.eos_token_id, len(loaded)) == (END_OF_TEXT, trained.eos_token_id, trained.size)
    for text in make_texts(20, seed=9):
        assert loaded(text)["input_ids"] == Encoder(home, 0).encode([text])[0][:-1]
        assert loaded.decode(loaded(text)["input_ids"]) == text


def test_a_tokenizer_loads_as_transformers_loads_it(home, trained):
    from transformers import AutoTokenizer

    ours, theirs = load_tokenizer(home), AutoTokenizer.from_pretrained(str(home), local_files_only=True)
    assert type(ours) is type(theirs)
    assert repr(ours) == repr(theirs)
    assert ours.backend_tokenizer.to_str() == theirs.backend_tokenizer.to_str()
    assert ours.special_tokens_map == theirs.special_tokens_map


def test_training_does_not_depend_on_threads(tmp_path):
    program = (
        "import sys; from pathlib import Path; from tests.small_corpora import make_texts;"
        "from kmem.data.tokenizer import train_tokenizer;"
        "print(train_tokenizer(iter(make_texts(2000, seed=0)), 900, Path(sys.argv[1])).fingerprint)"
    )
    said = set()
    for threads in ("1", "3"):
        environment = {**os.environ, "RAYON_NUM_THREADS": threads, "TOKENIZERS_PARALLELISM": "true"}
        command = [sys.executable, "-c", program, str(tmp_path / threads)]
        root = Path(__file__).parents[2]
        said.add(subprocess.run(command, env=environment, cwd=root, check=True, capture_output=True, text=True).stdout)
    assert len(said) == 1


def test_a_vocabulary_without_room_for_all_bytes_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"--vocab-size 256: .*\b257\b"):
        train_tokenizer(iter(["a"]), 256, tmp_path)


def test_long_texts_are_cut_without_changing_ids(home, trained):
    draw = random.Random(0)
    gaps = [" ", "\n", "\n\n", " \n", "\n ", " \n\n  \n", "\t\n", "\r\n", "\u3000\n", ", ", "\n'", "\n\n\n"]
    for _ in range(200):
        text = "".join(draw.choice(["word", "it's", "12", "東京", "!?"]) + draw.choice(gaps) for _ in range(60))
        pieces = pieces_of(text, 20)
        assert len(pieces) > 1
        assert "".join(pieces) == text
        encoder = Encoder(home, 0)
        whole = encoder._tokenizer.encode(text, add_special_tokens=False).ids
        encoder._cut = 20
        assert encoder.encode([text])[0][:-1] == whole


def test_no_piece_is_long_whatever_the_text():
    for text in ("a" * (5 << 20), "a1" * (2 << 20), "word " * (1 << 20), "東京。" * (1 << 20)):
        pieces = pieces_of(text, 1 << 18)
        assert "".join(pieces) == text
        assert max(map(len, pieces)) <= 1 << 20


def test_other_tokenizers_are_not_given_cut_texts(home, trained, tmp_path):
    assert Encoder(home, 0)._cut is not None
    tree = json.loads((home / "tokenizer.json").read_text())
    tree["normalizer"] = {"type": "NFC"}
    (tmp_path / "tokenizer.json").write_text(json.dumps(tree))
    assert Encoder(tmp_path, 0)._cut is None


def test_adopting_a_file_or_a_folder_keeps_the_fingerprint(home, trained, tmp_path):
    for source, folder in ((home / "tokenizer.json", tmp_path / "file"), (home, tmp_path / "folder")):
        adopted = adopt_tokenizer(source, None, folder)
        assert adopted.fingerprint == trained.fingerprint == tokenizer_fingerprint(folder)
        assert (adopted.eos_token, adopted.eos_token_id, adopted.size) == (END_OF_TEXT, 0, trained.size)
        assert auto(folder).eos_token_id == 0


def test_adopting_a_folder_without_tokenizer_json(home, trained, tmp_path):
    model = json.loads((home / "tokenizer.json").read_text())["model"]
    folder = tmp_path / "gpt2"
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
    (folder / "merges.txt").write_text("".join(f"{left} {right}\n" for left, right in model["merges"]))
    (folder / "tokenizer_config.json").write_text(
        f'{{"tokenizer_class": "GPT2Tokenizer", "eos_token": "{END_OF_TEXT}"}}'
    )
    adopted = adopt_tokenizer(folder, None, tmp_path / "adopted")
    assert (adopted.eos_token_id, adopted.size) == (trained.eos_token_id, trained.size)
    for text in make_texts(5, seed=2):
        assert Encoder(tmp_path / "adopted", 0).encode([text]) == Encoder(home, 0).encode([text])


def test_code_shipped_with_a_tokenizer_is_not_run(tmp_path):
    folder = tmp_path / "custom"
    folder.mkdir()
    (folder / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "Custom", "auto_map": {"AutoTokenizer": ["custom.Custom", null]}}'
    )
    (folder / "custom.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(UserError, match=f"--tokenizer {folder}: .*AutoTokenizer"):
        adopt_tokenizer(folder, None, tmp_path / "adopted")
    assert not (tmp_path / "ran").exists()


def test_fingerprint_ignores_layout_and_sees_content(home, trained, tmp_path):
    path = tmp_path / "tokenizer.json"
    tree = json.loads((home / "tokenizer.json").read_text())
    tree["model"]["merges"] = [" ".join(pair) for pair in tree["model"]["merges"]]
    path.write_text(json.dumps({**tree, "truncation": {"max_length": 5}}, indent=7))
    assert tokenizer_fingerprint(tmp_path) == trained.fingerprint
    tree["model"]["merges"] = tree["model"]["merges"][:-1]
    path.write_text(json.dumps(tree))
    assert tokenizer_fingerprint(tmp_path) != trained.fingerprint


def test_truncation_saved_in_a_tokenizer_does_not_shorten_documents(home, trained, tmp_path):
    tree = json.loads((home / "tokenizer.json").read_text())
    tree["truncation"] = {"max_length": 4, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}
    (tmp_path / "tokenizer.json").write_text(json.dumps(tree))
    adopt_tokenizer(tmp_path / "tokenizer.json", None, tmp_path / "adopted")
    text = "a text of more than four tokens"
    assert Encoder(tmp_path / "adopted", 0).encode([text]) == Encoder(home, 0).encode([text])


def templated(home, folder, style):
    """The trained tokenizer with "!" as BOS and "?" as a further mark, in the forms in which models publish them."""
    from tokenizers import Tokenizer, processors
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer.from_file(str(home / "tokenizer.json"))
    bos, other = tokenizer.token_to_id("!"), tokenizer.token_to_id("?")

    def template(single, **marks):
        return processors.TemplateProcessing(single=single, pair=f"{single} $B", special_tokens=list(marks.values()))

    bytes_first = processors.ByteLevel(trim_offsets=False)
    tokenizer.post_processor = {
        "bos": lambda: template("! $A", bos=("!", bos)),
        "llama-3": lambda: processors.Sequence([bytes_first, template("! $A", bos=("!", bos))]),
        "eos appended": lambda: template(f"$A {END_OF_TEXT}", eos=(END_OF_TEXT, 0)),
        "bos and eos": lambda: template(f"! $A {END_OF_TEXT}", bos=("!", bos), eos=(END_OF_TEXT, 0)),
        "bert": lambda: processors.BertProcessing(("?", other), ("!", bos)),
        "roberta": lambda: processors.RobertaProcessing(("?", other), ("!", bos)),
        "nothing": lambda: bytes_first,
    }[style]()
    expected = [] if style in ("eos appended", "nothing") else [bos]
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END_OF_TEXT).save_pretrained(str(folder))
    return expected


STARTS = ("bos", "llama-3", "bos and eos")


@pytest.mark.parametrize("file", [False, True])
@pytest.mark.parametrize("style", [*STARTS, "eos appended", "bert", "roberta", "nothing"])
def test_documents_begin_as_prompts_do_and_no_prompt_ends_one(home, trained, tmp_path, style, file):
    before = templated(home, tmp_path / "given", style)
    given = tmp_path / "given" / "tokenizer.json" if file else tmp_path / "given"
    adopted = adopt_tokenizer(given, END_OF_TEXT, tmp_path / "adopted")
    loaded = auto(tmp_path / "adopted")
    (document,) = Encoder(tmp_path / "adopted", 0).encode(["now we stop"])
    assert document == [*before, *loaded.encode("now we stop", add_special_tokens=False), 0]
    assert loaded("now we stop")["input_ids"] == document[:-1]
    assert loaded("")["input_ids"] == before == list(adopted.before_ids)
    assert (adopted.fingerprint == trained.fingerprint) == (not before)
    again = adopt_tokenizer(tmp_path / "adopted", None, tmp_path / "again")
    assert again.fingerprint == adopted.fingerprint


def test_deepseek_style_tokenizers_give_documents_what_they_give_prompts(home, trained, tmp_path):
    """Their class sets the template from `add_bos_token`, which versions of Transformers read differently."""
    given = tmp_path / "given"
    given.mkdir()
    (given / "tokenizer.json").write_bytes((home / "tokenizer.json").read_bytes())
    config = {"tokenizer_class": "LlamaTokenizerFast", "bos_token": "!", "eos_token": END_OF_TEXT, "legacy": True}
    (given / "tokenizer_config.json").write_text(json.dumps({**config, "add_bos_token": True, "add_eos_token": True}))
    adopted = adopt_tokenizer(given, None, tmp_path / "adopted")
    loaded = auto(tmp_path / "adopted")
    (document,) = Encoder(tmp_path / "adopted", 0).encode(["now we stop"])
    assert loaded("now we stop")["input_ids"] == document[:-1]
    assert list(adopted.before_ids) == loaded("")["input_ids"]


def test_dropout_is_switched_off(home, trained, tmp_path, capsys):
    tree = json.loads((home / "tokenizer.json").read_text())
    tree["model"]["dropout"] = 0.3
    (tmp_path / "tokenizer.json").write_text(json.dumps(tree))
    adopted = adopt_tokenizer(tmp_path / "tokenizer.json", None, tmp_path / "adopted")
    assert "dropout" in capsys.readouterr().err
    assert adopted.fingerprint == trained.fingerprint
    encoder = Encoder(tmp_path / "adopted", 0)
    assert len({str(encoder.encode(["now we stop"])) for _ in range(20)}) == 1


def test_a_tokenizer_must_say_how_documents_end(home, trained, tmp_path):
    tree = json.loads((home / "tokenizer.json").read_text())
    tree["added_tokens"] = []
    (tmp_path / "tokenizer.json").write_text(json.dumps(tree))
    with pytest.raises(UserError, match=r"tokenizer\.json: .*--eos-token TOKEN"):
        adopt_tokenizer(tmp_path / "tokenizer.json", None, tmp_path / "a")
    with pytest.raises(UserError, match=r"--eos-token </s>: .*tokenizer\.json"):
        adopt_tokenizer(tmp_path / "tokenizer.json", "</s>", tmp_path / "b")
    assert adopt_tokenizer(tmp_path / "tokenizer.json", "!", tmp_path / "c").eos_token == "!"


@pytest.mark.parametrize("content", ["", "{}", '{"model": 1}'])
def test_files_that_are_no_tokenizer_are_refused(tmp_path, content):
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(UserError, match=rf"--tokenizer {tmp_path / 'tokenizer.json'}: .*Hugging Face"):
        adopt_tokenizer(tmp_path / "tokenizer.json", None, tmp_path / "a")
    with pytest.raises(UserError, match=f"--tokenizer {tmp_path}: .*AutoTokenizer"):
        adopt_tokenizer(tmp_path, None, tmp_path / "b")
