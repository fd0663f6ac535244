"""Sentence pairs: cleaning, splits, near duplicates, what is read and refused, Debian's packages, `l2t data`.

Everything is made up here, packages and catalogues included; apt-get and dpkg-deb are false ones.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import struct
import tarfile
from pathlib import Path

import pytest

from l2t import cli
from l2t.translation import corpus, libreoffice

KINDS = {"rote": "red", "grüne": "green", "alte": "old", "neue": "new", "leise": "quiet", "ferne": "distant"}
THINGS = {"Ball": "ball", "Hund": "dog", "Baum": "tree", "Stern": "star", "Fluss": "river", "Zug": "train"}
PAIRS = [
    (f"Der {kind} {thing} bewegt sich.", f"The {KINDS[kind]} {THINGS[thing]} is moving.")
    for kind, thing in itertools.product(KINDS, THINGS)
]


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    """Where data sets lie: nothing yet."""
    monkeypatch.setenv("L2T_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "data"


def put(folder: Path, files: dict[str, bytes | str]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
    return folder


def sha256(content: bytes) -> str:
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


def mo(entries: dict[str, str], header: str = "Content-Type: text/plain; charset=UTF-8\n") -> bytes:
    """A compiled catalogue, as the manual of GNU gettext describes it."""
    sorted_entries = sorted(({"": header} | entries).items())
    count = len(sorted_entries)
    names, texts, data = b"", b"", b""
    for name, _ in sorted_entries:
        names += struct.pack("<II", len(name.encode()), 28 + 16 * count + len(data))
        data += name.encode() + b"\0"
    for _, text in sorted_entries:
        texts += struct.pack("<II", len(text.encode()), 28 + 16 * count + len(data))
        data += text.encode() + b"\0"
    return struct.pack("<7I", 0x950412DE, 0, count, 28, 28 + 8 * count, 0, 0) + names + texts + data


def texts(**splits: list[tuple[str, str]]) -> dict[str, str]:
    """Files of Moses layout."""
    return {
        f"{name}.{language}": "".join(f"{pair[side]}\n" for pair in pairs)
        for name, pairs in splits.items()
        for side, language in enumerate(("de", "en"))
    }


# ---- cleaning


@pytest.mark.parametrize(
    ("source", "target", "kept"),
    [
        ("Das ist gut.", "This is good.", [("Das ist gut.", "This is good.")]),
        ("Das\n ist\u00a0 gut.", " This is good. ", [("Das ist gut.", "This is good.")]),
        (
            "Das ist gut! „Ist es das?“ Ja, das ist es.",
            "This is good! 'Is it?' Yes, it is.",
            [
                ("Das ist gut!", "This is good!"),
                ("„Ist es das?“ Ja, das ist es.", "'Is it?' Yes, it is."),
            ],
        ),
        (
            "Es ist gut. So ist es.",
            "It is good, so it is.",
            [("Es ist gut. So ist es.", "It is good, so it is.")],
        ),
        ("Gut so", "Well done now", []),
        ("wort " * 17, "word " * 17, []),
        ("wort " * 16, "word " * 16, [(" ".join(["wort"] * 16), " ".join(["word"] * 16))]),
        ("eins zwei drei", "one two three four five six seven eight nine ten eleven", []),
        ("Das ist gut", "Das ist gut", []),
        ("1 + 2 = 3", "The sum is three", []),
        ("X : X", "X of X", []),
        ("Der X ist", "The X is", [("Der X ist", "The X is")]),
    ],
)
def test_what_is_kept_of_a_pair(source, target, kept):
    assert corpus.cleaned([(source, target)]) == kept


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("S_peichern unter…", "Speichern unter…"),
        ("~Datei &amp;öffnen &Hilfe", "Datei öffnen Hilfe"),
        ("a & b, 3 ~ 4, x_", "a & b, 3 ~ 4, x_"),
        ("<b>fett</b> &lt; 3 < 4", "fett < 3 < 4"),
        ("%s von %(count)d, %1 und %PRODUCTNAME", "X von X, X und X"),
        ("$(ARG1) {name} {} ${x} $string$ 50 % 3 $", "X X X X X 50 % 3 $"),
    ],
)
def test_messages_lose_what_programs_need(text, plain):
    assert corpus.message(text) == plain


def test_no_source_and_no_target_comes_twice():
    twice = [
        ("Es sind 3 Hunde", "There are 3 dogs"),
        ("es sind 12 hunde", "These are 12 dogs"),
        ("Da sind 5 Hunde", "THERE are 47 dogs"),
        ("Da sind 5 Katzen", "There are 5 cats"),
    ]
    assert corpus.cleaned(twice) == [twice[0], twice[3]]


# ---- splits, near duplicates


def test_splits_are_of_all_pairs_and_drawn_by_the_seed():
    made = [corpus.split(PAIRS, "de", "en", {"origin": "here"}, seed) for seed in (0, 0, 1)]
    for one in made:
        assert (len(one.train), len(one.dev), len(one.test)) == (30, 3, 3)
        assert sorted(one.train + one.dev + one.test) == sorted(PAIRS)
        assert one.info["counts"] == {"train": 30, "dev": 3, "test": 3}
        assert (one.source, one.target, one.info["origin"]) == ("de", "en", "here")
    assert made[0] == made[1]
    assert made[0].test != made[2].test
    assert made[0].dev == [PAIRS[at] for at in (35, 25, 15)], "the same on every machine, for ever"


def test_dev_and_test_are_a_thousand_each_where_there_are_enough():
    many = [(f"{'a' * (at % 200)} {'b' * (at // 200)} {at}", "") for at in range(10_500)]
    made = corpus.split(many, "de", "en", {})
    assert (len(made.train), len(made.dev), len(made.test)) == (8500, 1000, 1000)


def test_near_duplicates_are_those_that_brute_force_finds():
    def grams(text: str) -> set[str]:
        words = text.lower().replace(".", " .").split()
        return {" ".join(words[at : at + 3]) for at in range(len(words) - 2)}

    made = corpus.split(PAIRS, "de", "en", {})
    for held in (made.dev, made.test, PAIRS):
        best = [
            max(len(grams(one) & grams(other)) / len(grams(one) | grams(other)) for other, _ in made.train)
            for one, _ in held
        ]
        for index, share in corpus.near_duplicates(made.train, held).items():
            assert share == pytest.approx(sum(found >= float(index) for found in best) / len(held))
    assert corpus.near_duplicates(made.train, made.train) == {"0.5": 1.0, "0.7": 1.0}
    assert corpus.near_duplicates([("Gut so", ""), ("Oh", "")], [("gut SO", ""), ("Ah", "")])["0.7"] == 0.5


# ---- the folder


def test_a_folder_says_what_it_holds_and_is_read_as_it_was_written(tmp_path):
    made = corpus.split(PAIRS, "de", "en", {"origin": "here", "licence": "none"}, seed=3)
    corpus.write_folder(made, tmp_path / "new/pairs")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["pairs"]
    names = {f"{split}.{language}" for split in ("train", "dev", "test") for language in ("de", "en")}
    assert {path.name for path in (tmp_path / "new/pairs").iterdir()} == names | {"corpus.json"}
    lines = (tmp_path / "new/pairs/dev.en").read_bytes().split(b"\n")
    assert lines == [*(target.encode() for _, target in made.dev), b""]
    about = json.loads((tmp_path / "new/pairs/corpus.json").read_text())
    assert {key: about[key] for key in ("source", "target", "origin", "licence", "seed", "tokens")} == {
        "source": "de",
        "target": "en",
        "origin": "here",
        "licence": "none",
        "seed": 3,
        "tokens": [3, 16],
    }
    assert about["files"] == {name: sha256((tmp_path / "new/pairs" / name).read_bytes()) for name in names}
    found = corpus.read_folder(tmp_path / "new/pairs")
    assert found[:5] == made[:5]
    assert found.info == made.info | {"files": about["files"]}
    with pytest.raises(
        FileExistsError, match=r"pairs, must not be there, got one\. Remove it, or set L2T_DATA"
    ):
        corpus.write_folder(made, tmp_path / "new/pairs")


def test_a_folder_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    made = corpus.split(PAIRS, "de", "en", {})
    monkeypatch.setattr(corpus, "write_json", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        corpus.write_folder(made, tmp_path / "pairs")
    assert not any(tmp_path.iterdir())


def test_a_folder_that_has_changed_is_refused(tmp_path):
    folder = tmp_path / "pairs"
    corpus.write_folder(corpus.split(PAIRS, "de", "en", {}), folder)
    before = (folder / "dev.de").read_bytes()
    put(folder, {"dev.de": before.replace(b"Der", b"Das", 1)})
    with pytest.raises(ValueError, match=r"dev.de must be what was written, sha256:\w+, got sha256:"):
        corpus.read_folder(folder)
    (folder / "dev.de").unlink()
    with pytest.raises(FileNotFoundError, match=r"pairs must have a file dev.de, got none\. It needs two"):
        corpus.read_folder(folder)
    for content in ("{", "[]", "{}", '{"source": "de", "target": "en", "files": 3}'):
        put(folder, {"corpus.json": content})
        with pytest.raises(
            ValueError, match=r"corpus\.json must be as `l2t data translation` writes it, got an"
        ):
            corpus.read_folder(folder)
    (folder / "corpus.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"must have a corpus\.json, got .* without one"):
        corpus.read_folder(folder)


def test_a_corpus_is_found_in_the_folders_of_data_sets(home, tmp_path):
    with pytest.raises(
        FileNotFoundError,
        match=r"pairs must be in .*data/translation-fr-en, got none\. "
        r"Run: l2t data translation --source fr --target en\.",
    ):
        corpus.find("fr")
    corpus.write_folder(corpus.split(PAIRS, "de", "en", {}), tmp_path / "cache/l2t/translation-de-en")
    assert corpus.find() == tmp_path / "cache/l2t/translation-de-en"
    corpus.write_folder(corpus.split(PAIRS, "de", "en", {}), home / "translation-de-en")
    assert corpus.find() == home / "translation-de-en"
    assert corpus.built() == [home / "translation-de-en", tmp_path / "cache/l2t/translation-de-en"]


# ---- texts of one's own


@pytest.mark.parametrize("dev", ["dev", "valid"])
def test_texts_are_taken_as_they_are(tmp_path, dev):
    parts = {"train": [*PAIRS[:9], ("Oh", "Oh")], dev: PAIRS[:3], "test": PAIRS[12:15]}
    found = corpus.from_folder(put(tmp_path, texts(**parts)), "de", "en")
    assert (found.train, found.dev, found.test) == tuple(parts.values())
    assert found.info["counts"] == {"train": 10, "dev": 3, "test": 3}
    assert found.info["near_duplicates"]["dev"] == {"0.5": 1.0, "0.7": 1.0}
    assert found.info["origin"] == f"the folder {tmp_path}"


def test_lines_are_those_of_other_tools(tmp_path):
    files = texts(train=PAIRS[:2], dev=PAIRS[:1], test=PAIRS[:1])
    put(
        tmp_path,
        files | {"train.de": "\ufeffEins\u2028zwei\x0bdrei\r\n\n  \nVier", "train.en": "One\nTwo\n \nFour\n"},
    )
    found = corpus.from_folder(tmp_path, "de", "en")
    assert found.train == [("Eins zwei drei", "One"), ("Vier", "Four")]
    assert found.info["left_out"] == 2


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"train.en": "One\nTwo\n"},
            r"train.en must be as many lines long as train.de, which has 3, got 2\. Mend",
        ),
        ({"test.en": b"Well\xff"}, "test.en must be UTF-8 text, got another byte at 4"),
        ({"dev.de": ""}, "dev.en must be as many lines long as dev.de, which has 0, got 3"),
        (
            {"dev.de": "", "dev.en": ""},
            r"dev.de must be a text with sentences that dev.en translates, got none\.",
        ),
        ({"test.de": "\n\n\n"}, "test.de must be a text with sentences that test.en translates, got none"),
        ({"test.en": None}, "must have a file test.en, got none"),
        (
            {"dev.de": None},
            r"must have a file dev.de, got none\. It needs two aligned texts for each of train",
        ),
        ({"train.en": None}, "must have a file train.en, got none"),
    ],
)
def test_broken_texts_are_refused_in_a_sentence(home, tmp_path, capsys, changes, sentence):
    folder = put(tmp_path / "mine", texts(train=PAIRS[:3], dev=PAIRS[3:6], test=PAIRS[6:9]))
    for name, content in changes.items():
        if content is None:
            (folder / name).unlink()
        else:
            put(folder, {name: content})
    with pytest.raises((ValueError, FileNotFoundError), match=f"^l2t.translation: .*{sentence}"):
        corpus.from_folder(folder, "de", "en")
    assert cli.main(["data", "translation", "--from", str(folder)]) == 2
    captured = capsys.readouterr()
    assert (captured.out, captured.err.count("\n")) == ("", 1)
    assert not home.exists()


# ---- catalogues of one's own

GERMAN = {target: source for source, target in PAIRS}
FRENCH = {target: f"Fr: {target}" for _, target in PAIRS[:20]}


def test_compiled_catalogues(tmp_path):
    entries = {
        "menu\4_Save it now": "Jetzt _speichern",
        "Not translated": "",
        "One file\0%d files": "Eine Datei\0%d Dateien",
    }
    put(tmp_path, {"x/de/LC_MESSAGES/a.mo": mo(entries), "y/de.mo": mo(GERMAN), "y/nl.mo": mo({"a": "b"})})
    found = corpus.read_catalogues(tmp_path, "de", "en")
    assert sorted(found) == sorted([("Jetzt speichern", "Save it now"), ("Eine Datei", "One file"), *PAIRS])
    assert corpus.read_catalogues(tmp_path, "en", "de") == [(b, a) for a, b in found]


def test_catalogues_in_source_form(tmp_path):
    text = r"""
# somebody
#, fuzzy
msgid ""
msgstr "Content-Type: text/plain; charset=UTF-8\n"

#: file.c:3
#, c-format
msgid "One "
"long\tline\n"
msgstr ""
"Eine \"lange\" Zeile\\"
msgctxt "menu"
msgid "Open"
msgstr "Öffnen"
#, c-format, fuzzy
#| msgid "Older"
msgid "Old"
msgstr "Veraltet"

msgid "%d file"
msgid_plural "%d files"
msgstr[0] "%d Datei"
msgstr[1] "%d Dateien"

msgid "Empty"
msgstr ""

#~ msgid "Gone"
#~ msgstr "Weg"
"""
    for folder, end in (("one", "\n"), ("two", "\r\n")):
        put(tmp_path / folder, {"app/de.po": text.replace("\n", end)})
        assert corpus.read_catalogues(tmp_path / folder, "de", "en") == [
            ('Eine "lange" Zeile\\', "One long\tline\n"),
            ("Öffnen", "Open"),
            ("X Datei", "X file"),
        ]


def test_two_languages_meet_in_messages_of_the_same_place(tmp_path):
    other = {PAIRS[0][1]: "Other"}
    put(tmp_path, {"de/LC_MESSAGES/a.mo": mo(GERMAN), "fr/LC_MESSAGES/a.mo": mo(FRENCH)})
    put(tmp_path, {"fr/LC_MESSAGES/b.mo": mo(other), "en/LC_MESSAGES/a.mo": mo({})})
    found = corpus.read_catalogues(tmp_path, "de", "fr")
    assert sorted(found) == sorted((source, f"Fr: {target}") for source, target in PAIRS[:20])
    made = corpus.from_folder(tmp_path, "de", "en")
    assert sorted(made.train + made.dev + made.test) == sorted(PAIRS)
    put(tmp_path, {"en/LC_MESSAGES/a.mo": mo({PAIRS[0][1]: "Red ball moving"})})
    assert corpus.read_catalogues(tmp_path, "de", "en") == [(PAIRS[0][0], "Red ball moving")]


@pytest.mark.parametrize(
    ("files", "sentence"),
    [
        ({"de.mo": b"no catalogue at all"}, "de.mo must be a whole gettext catalogue, got "),
        ({"de.mo": b""}, "de.mo must be a whole gettext catalogue, got "),
        ({"de.mo": mo(GERMAN)[:-90]}, "de.mo must be a whole gettext catalogue, got "),
        ({"de.mo": mo(GERMAN).replace("ü".encode(), b"\xff\xff")}, "de.mo must be a whole gettext catalogue"),
        ({"de.mo": mo(GERMAN, "Content-Type: text/plain; charset=none\n")}, "de.mo must be a whole gettext"),
        ({"de.po": b"msgid \xff"}, "de.po must be UTF-8 text, got another byte at 6"),
        ({"de.po": 'msgid "a"\nmsgstr b'}, "de.po must be a gettext catalogue, got the line 'msgstr b'"),
        ({"de.po": '"a"'}, "de.po must be a gettext catalogue, got the line '\"a\"'"),
        ({"fr.mo": mo(GERMAN)}, r"named de and en, got none for de\. Give another folder or languages"),
        ({"de.mo": mo({})}, "must have train.de and train.en, or catalogues .* got none for de"),
        ({}, "must have train.de and train.en, or catalogues .* got none for de"),
        (
            {"de.mo": mo({target: source for source, target in PAIRS[:9]})},
            r"a corpus must have 10 or more unlike pairs of 3 to 16 tokens a side, got 9\. Give more text",
        ),
    ],
)
def test_broken_catalogues_are_refused_in_a_sentence(home, tmp_path, capsys, files, sentence):
    folder = put(tmp_path / "mine", files)
    with pytest.raises((ValueError, FileNotFoundError), match=f"^l2t.translation: .*{sentence}"):
        corpus.from_folder(folder, "de", "en")
    assert cli.main(["data", "translation", "--from", str(folder)]) == 2
    captured = capsys.readouterr()
    assert (captured.out, captured.err.count("\n")) == ("", 1)
    assert not home.exists()


# ---- Debian's packages


def page(texts_by_id: dict[str, str]) -> str:
    inside = "\n".join(f'<p id="{name}" class="x">{text}</p>' for name, text in texts_by_id.items())
    return f'<!DOCTYPE html><html><title>No</title><body><p>No name</p>{inside}<p id="e"></p></html>'


HELP = "usr/share/libreoffice/help"
MESSAGES = "usr/lib/libreoffice/program/resource/de/LC_MESSAGES"
CONTENTS: dict[str, dict[str, bytes | str]] = {
    "libreoffice-help-en-us": {
        f"{HELP}/en-US/text/a/one.html": page({f"p{n}": en for n, (_, en) in enumerate(PAIRS[:20])}),
        f"{HELP}/en-US/text/two.html": page({"h": "Only in <i>English</i> here"}),
        f"{HELP}/en-US/text/three.html": page(
            {"h": "Fish &amp; chips<br>for <b>you</b>", "p0": "Not the same"}
        ),
    },
    "libreoffice-help-de": {
        f"{HELP}/de/text/a/one.html": page({f"p{n}": de for n, (de, _) in enumerate(PAIRS[:19])}),
        f"{HELP}/de/text/other.html": page({"h": "Nur auf Deutsch hier"}),
        f"{HELP}/de/text/three.html": page({"h": "Fisch &amp; Pommes<br>für <b>dich</b>"}),
    },
    "libreoffice-l10n-de": {
        f"{MESSAGES}/a.mo": mo({f"ID\4{en}": de for de, en in PAIRS[30:]}),
    },
}
WANTED = [*PAIRS[:19], ("Fisch & Pommes für dich", "Fish & chips for you"), *PAIRS[30:]]


@pytest.fixture
def debian(home, tmp_path, monkeypatch) -> Path:
    """False tools: apt-get copies packages, which are tar files of another name, and notes what it was told;
    dpkg-deb unpacks them.
    """
    (tmp_path / "archive").mkdir()
    for name, files in CONTENTS.items():
        with tarfile.open(tmp_path / f"archive/{name}_1%3a7-2_all.deb", "w") as archive:
            archive.add(put(tmp_path / name, files) / "usr", "usr")
    put(
        tmp_path / "bin",
        {
            "apt-get": f'#!/bin/sh\necho "$@" >> {tmp_path}/told\nshift\n'
            f'for name in "$@"; do cp {tmp_path}/archive/"$name"_* . || exit 100; done\n',
            "dpkg-deb": '#!/bin/sh\nset -e\ncase $1 in\n-f) [ "$3" = Version ]; echo 1:7-2;;\n'
            '-x) mkdir -p "$3"; tar -xf "$2" -C "$3";;\n*) exit 1;;\nesac\n',
        },
    )
    for tool in (tmp_path / "bin").iterdir():
        tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    return tmp_path


def test_packages_are_fetched_read_and_written_down(debian, home, capsys):
    assert cli.main(["data", "translation"]) == 0
    shown = capsys.readouterr().out
    assert (
        debian / "told"
    ).read_text() == "download libreoffice-help-en-us libreoffice-help-de libreoffice-l10n-de\n"
    made = corpus.read_folder(home / "translation-de-en")
    assert sorted(made.train + made.dev + made.test) == sorted(WANTED)
    assert (made.source, made.target, made.info["licence"]) == ("de", "en", "MPL-2.0")
    for name in CONTENTS:
        checksum = sha256((debian / f"archive/{name}_1%3a7-2_all.deb").read_bytes())
        assert made.info["packages"][name] == {"version": "1:7-2", "checksum": checksum, "tested": False}
        assert f"package: {name} 1:7-2  {checksum}, a version that has not been tried" in shown
    assert "translation-de-en: de to en, 22 / 2 / 2 pairs (train / dev / test)" in shown
    assert "from: help pages and messages of LibreOffice, in Debian's packages\nlicence: MPL-2.0" in shown
    for name, checksum in made.info["files"].items():
        assert f"there: {home / 'translation-de-en' / name}  {checksum}" in shown
    assert f"in test: {100 * made.info['near_duplicates']['test']['0.5']:.1f}% at 0.5 or more" in shown
    assert [path.name for path in home.iterdir()] == ["translation-de-en"]

    assert cli.main(["data", "translation"]) == 0
    assert capsys.readouterr().out == shown[shown.index("translation-de-en: ") :]
    assert (debian / "told").read_text().count("\n") == 1, "fetched once"
    assert cli.main(["data"]) == 0
    lines = capsys.readouterr().out.splitlines()[-2:]
    assert lines[0].split()[:2] == ["translation", "there"]
    assert lines[0].endswith("translation-de-en")
    assert lines[1].endswith("licence: MPL-2.0")
    assert cli.main(["data", "translation", "--seed", "1"]) == 2
    assert "must not be there, got one" in capsys.readouterr().err


def test_listing_fetches_nothing(debian, capsys):
    assert cli.main(["data"]) == 0
    assert capsys.readouterr().out.splitlines()[-2].split()[:3] == ["translation", "not", "here"]
    assert not (debian / "told").exists()


def test_without_an_index_of_packages_one_is_made_in_a_folder_of_ours(debian):
    apt = (debian / "bin/apt-get").read_text()
    ours = 'shift 4; [ "$1" = update ] && { touch "${2:-$state}/lists/seen"; exit 0; }; shift\n'
    script = (
        'state=; case "$2" in Dir::State=*) state=${2#Dir::State=};; *) exit 100;; esac\n'
        '[ -d "$state/lists/partial" ] || exit 100\n' + ours + '[ -f "$state/lists/seen" ] || exit 100\n'
    )
    put(debian / "bin", {"apt-get": apt.replace("shift\n", script, 1)})
    made = libreoffice.build("de", progress=False)
    assert sorted(made.train + made.dev + made.test) == sorted(WANTED)
    told = (debian / "told").read_text().splitlines()
    assert [line.split()[0] for line in told] == ["download", "-o", "-o"]
    assert [line.split()[4] for line in told[1:]] == ["update", "download"]


@pytest.mark.parametrize(
    ("tool", "script", "sentence"),
    [
        (
            "apt-get",
            "echo 'W: well' >&2; echo 'E: no net' >&2; exit 100",
            "`apt-get .*update`, got: E: no net",
        ),
        ("apt-get", "exit 0", "`apt-get download libreoffice-.*`, got: no such files"),
        ("dpkg-deb", "exit 7", "`dpkg-deb -f .*Version`, got: exit code 7"),
        ("dpkg-deb", '[ "$1" = -f ] || { echo broken >&2; exit 2; }', "`dpkg-deb -x .*`, got: broken"),
    ],
)
def test_a_failing_tool_is_quoted_and_nothing_is_written(debian, home, capsys, tool, script, sentence):
    put(debian / "bin", {tool: f"#!/bin/sh\n{script}\n"})
    with pytest.raises(OSError, match=f"l2t.data: translation must be fetched by {sentence}"):
        libreoffice.build("de", progress=False)
    assert cli.main(["data", "translation"]) == 1
    assert "Look whether the net is there" in capsys.readouterr().err
    assert not home.exists()


def test_a_version_that_was_tried_has_to_be_what_it_was(debian, home, monkeypatch, capsys):
    name = "libreoffice-l10n-de"
    checksum = sha256((debian / f"archive/{name}_1%3a7-2_all.deb").read_bytes())
    tested = {package: {"1:7-1": "sha256:01"} for package in CONTENTS}
    monkeypatch.setattr(libreoffice, "TESTED", tested | {name: {"1:7-2": "sha256:00"}})
    assert cli.main(["data", "translation"]) == 1
    assert (
        f"the fetched {name}_1%3a7-2_all.deb of translation must have the checksum sha256:00, got another"
        in (capsys.readouterr().err)
    )
    assert not home.exists()
    monkeypatch.setattr(libreoffice, "TESTED", tested | {name: {"1:7-2": checksum}})
    packages = libreoffice.build("de", progress=False).info["packages"]
    assert [package["tested"] for package in packages.values()] == [False, False, True]


def test_packages_put_by_hand_need_no_net(debian, home, monkeypatch):
    home.mkdir()
    (debian / "bin/apt-get").unlink()
    monkeypatch.setattr(libreoffice.shutil, "which", lambda tool: None if tool == "apt-get" else tool)
    with pytest.raises(
        FileNotFoundError,
        match=r"by dpkg-deb, got no apt-get on this machine\. Install dpkg and put "
        r"libreoffice-help-en-us_\*\.deb, libreoffice-help-de_\*\.deb, libreoffice-l10n-de_\*\.deb "
        r"from packages\.debian\.org into .*data/libreoffice, or build from texts with --from",
    ):
        libreoffice.build("de", progress=False)
    (debian / "archive").rename(home / "libreoffice")
    assert len(libreoffice.build("de", progress=False).train) == 22
    monkeypatch.setattr(libreoffice.shutil, "which", lambda tool: None)
    with pytest.raises(FileNotFoundError, match="got no dpkg-deb on this machine"):
        libreoffice.build("de", progress=False)


@pytest.mark.parametrize(
    ("package", "files", "sentence"),
    [
        (
            "libreoffice-help-en-us",
            {"usr/x": ""},
            "help must be a folder with pages in de and en-US, got none",
        ),
        ("libreoffice-l10n-de", {"usr/x": ""}, "got none for de"),
        (
            "libreoffice-help-de",
            {f"{HELP}/de/text/a/one.html": b"<p id='a'>\xff"},
            "one.html must be UTF-8 text, got another byte at 10",
        ),
    ],
)
def test_packages_without_what_is_read_are_told(debian, home, capsys, package, files, sentence):
    with tarfile.open(debian / f"archive/{package}_1%3a7-2_all.deb", "w") as archive:
        archive.add(put(debian / "other", files) / "usr", "usr")
    assert cli.main(["data", "translation"]) == 1
    assert sentence in capsys.readouterr().err
    assert not home.exists()


def test_of_an_id_that_comes_twice_the_first_counts():
    assert libreoffice.paragraphs('<p id="a">one</p><h2 id="a">two</h2>three<p id="b">fo<p id="c">ur') == {
        "a": "one",
        "b": "fo",
        "c": "ur",
    }


# ---- l2t data translation


def test_a_corpus_of_ones_own(home, tmp_path, capsys):
    folder = put(tmp_path / "mine", texts(train=[*PAIRS[:9], ("Oh", "")], valid=PAIRS[:3], test=PAIRS[12:15]))
    for path in folder.glob("*.en"):
        path.rename(path.with_suffix(".nl"))
    command = ["data", "translation", "--from", str(folder), "--target", "nl"]
    assert cli.main(command) == 0
    shown = capsys.readouterr().out
    assert (
        f"translation-de-nl: de to nl, 9 / 3 / 3 pairs (train / dev / test)\nfrom: the folder {folder}\n"
        in shown
    )
    assert "left out: 1 pairs with an empty side" in shown
    assert "in dev: 100.0% at 0.5 or more, 100.0% at 0.7" in shown
    assert corpus.read_folder(home / "translation-de-nl").train == PAIRS[:9]
    assert cli.main(command) == 2
    assert "translation-de-nl, must not be there, got one" in capsys.readouterr().err
    assert cli.main(["data"]) == 0
    assert "sentences and their translations: translation-de-nl" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["translation", "--source", "nl"], "the source language without --from must be one of de, fr, es"),
        (["translation", "--target", "nl"], "the target language without --from must be one of en, got 'nl'"),
        (["translations"], "the data set must be one of cifar10, "),
        (["mnist", "--source", "fr"], "come without flags of `l2t data translation`, got --source"),
        (["--from", "x", "--seed", "0"], "come without flags of `l2t data translation`, got --from, --seed"),
    ],
)
def test_what_is_not_there_is_refused_in_one_line(debian, home, capsys, arguments, sentence):
    assert cli.main(["data", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert sentence in captured.err
    assert not home.exists()
    assert not (debian / "told").exists()


@pytest.fixture
def locked(home, monkeypatch) -> Path:
    """A folder that nobody may look into, root included."""
    home.mkdir()

    def barred(function):
        def looks(path=".", *more, **given):
            if (
                isinstance(path, (str, Path))
                and home in (Path(path), *Path(path).parents)
                and Path(path) != home
            ):
                raise PermissionError(13, "Permission denied", str(path))
            return function(path, *more, **given)

        return looks

    for name in ("stat", "listdir", "scandir"):
        monkeypatch.setattr(os, name, barred(getattr(os, name)))
    return home


def test_a_data_folder_that_may_not_be_read_has_nothing_and_stops_no_command(
    locked, tmp_path, capsys, monkeypatch
):
    assert cli.main([]) == 0
    assert cli.main(["data"]) == 0
    assert "folder        not here" in capsys.readouterr().out
    assert cli.main(["translate", str(tmp_path / "none"), "ein Haus"]) == 2
    assert "must hold a trained translator" in capsys.readouterr().err
    monkeypatch.setenv("L2T_DATA", str(tmp_path / "open"))
    assert cli.main(["data", "translation", "--from", str(locked / "mine"), "--target", "nl"]) == 2
    assert f"the folder {locked / 'mine'} must be one that you may read, got one" in capsys.readouterr().err


def test_sentences_end_before_a_capital_of_any_script_that_has_them():
    for one, other in (
        ("Откройте файл.", "Затем нажмите."),
        ("Otevři.", "Časem zavři."),
        ("Άνοιξε.", "Ώρα είναι."),
    ):
        assert corpus.sentences(f"{one} {other}") == [one, other]
    assert corpus.sentences("Siehe z. čtvrtek, см. далее.") == ["Siehe z. čtvrtek, см. далее."]


def test_texts_that_are_not_built_name_the_command_that_builds_them(home, tmp_path, capsys):
    raw = put(tmp_path / "raw", {"train.de": "ein Haus\n", "train.en": "a house\n"})
    for command in (["train", "translation"], ["teach", "translation"]):
        assert cli.main([*command, "--data", str(raw), "--out", str(tmp_path / "out")]) == 2
        assert (
            f"Build it from texts or catalogues: l2t data translation --from {raw}."
            in capsys.readouterr().err
        )


def test_a_language_and_itself_are_no_pair(home, tmp_path, capsys):
    said = "source and target must be two languages, got 'en' twice"
    for more in ([], ["--from", str(tmp_path)]):
        assert cli.main(["data", "translation", "--source", "en", *more]) == 2
        assert said in capsys.readouterr().err
    pairs = [("one", "other")]
    with pytest.raises(ValueError, match=said):
        corpus.write_folder(corpus.Corpus(pairs, pairs, pairs, "en", "en", {}), tmp_path / "made")
    with pytest.raises(ValueError, match=said):
        corpus.from_folder(tmp_path, "en", "en")
    assert not (tmp_path / "made").exists()


def test_entries_of_a_po_that_are_out_of_use_say_nothing_of_the_next(tmp_path):
    (tmp_path / "de.po").write_text(
        'msgid "first"\nmsgstr "erste"\n\n#, fuzzy\n#~ msgid "old"\n#~ msgstr "alt"\n\n'
        'msgid "new"\nmsgstr "neu\\r\\nhier"\n\n#, fuzzy\nmsgid "guess"\nmsgstr "geraten"\n'
    )
    found = corpus.read_catalogues(tmp_path, "de", "en")
    assert sorted(found) == [("erste", "first"), ("neu\r\nhier", "new")]


def test_a_folder_has_a_sentence_a_line_whatever_is_in_it(tmp_path):
    pairs = [("ein\nHaus", "a  house"), ("zwei\u2028Hüte", "two\r\nhats")]
    made = corpus.Corpus(pairs, pairs[:1], pairs[1:], "de", "en", {})
    corpus.write_folder(made, tmp_path / "there")
    found = corpus.read_folder(tmp_path / "there")
    assert found.train == [("ein Haus", "a house"), ("zwei Hüte", "two hats")]
    said = r"both sides of a pair must say something, got \('x', ' '\) at 1 of dev"
    with pytest.raises(ValueError, match=said):
        corpus.write_folder(made._replace(dev=[*pairs[:1], ("x", " ")]), tmp_path / "other")
    with pytest.raises(ValueError, match=r"l2t\.translation: test must have sentence pairs, got none"):
        corpus.write_folder(made._replace(test=[]), tmp_path / "other")
    assert not (tmp_path / "other").exists()
