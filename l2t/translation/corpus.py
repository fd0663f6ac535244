"""Sentence pairs for translation: read from texts or gettext catalogues, cleaned, split, kept in a folder.

A corpus lies in a folder of Moses layout, two aligned text files a split (``train.de``, ``train.en``,
``dev.*``, ``test.*``), with ``corpus.json`` beside them: origin, licence, checksums, counts, near duplicates.
The folder is written whole or not at all. Where the default pairs come from is not here (``libreoffice.py``).
"""

from __future__ import annotations

import gettext
import html
import json
import os
import random
import re
import struct
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from l2t import check
from l2t.files import write_json, write_whole
from l2t.tasks.places import Place, digest

Pairs = list[tuple[str, str]]
"""Sentences with their translations: (source, target)."""

LEAST, MOST = 3, 16  # tokens a side
HELD = 1000  # pairs of dev and of test, where there are ten times as many
ALIKE = (0.5, 0.7)  # Jaccard indices at which a sentence counts as a near duplicate

SPLITS: Mapping[str, tuple[str, ...]] = {"train": ("train",), "dev": ("dev", "valid"), "test": ("test",)}
_ABOUT = "corpus.json"

_CAPITALS = "".join(filter(str.isupper, map(chr, range(0x590))))  # Latin, Greek, Cyrillic, Armenian
# A sentence ends before white space and a capital, quotes and brackets passed over.
_END = re.compile(rf"""(?<=[.!?])\s+(?=["'„“”‚‘«»¿¡(]*[{_CAPITALS}])""")
_TAG = re.compile(r"</?[a-zA-Z][^<>]*>")
_ACCELERATOR = re.compile(r"[_~&](?=\w)")
# A line of a .po: a comment or nothing, or a string, mostly after the name of its field.
_PO_LINE = re.compile(r'(?:#.*)?|(?:(?P<field>msg\w+(?:\[\d+\])?)\s+)?"(?P<text>(?:[^"\\]|\\.)*)"')
_PLACEHOLDER = re.compile(r"%\(\w*\)[a-z]|%\w+%?|\$\(\w*\)|\$\{\w*\}|\$\w+\$?|\{\w*\}")


class Corpus(NamedTuple):
    """Pairs in three splits.

    Attributes:
        train: what students learn from.
        dev: what measures and choices are made on.
        test: what is looked at once, at the end.
        source: language code of the first sentence of a pair, such as ``"de"``.
        target: of the second.
        info: what ``corpus.json`` says: ``origin``, ``licence``, ``packages`` or ``folder``, ``files`` (their
            checksums), ``counts`` and ``near_duplicates``.
    """

    train: Pairs
    dev: Pairs
    test: Pairs
    source: str
    target: str
    info: dict[str, Any]

    def checksum(self) -> str:
        """Of all pairs, by which one knows them again wherever they came from."""
        return digest(json.dumps([self.train, self.dev, self.test]).encode(), "sha256:")


# ---- cleaning ----


def tokens(text: str) -> list[str]:
    """Words and single punctuation marks.

    Example:
        >>> tokens("Click OK, then close.")
        ['Click', 'OK', ',', 'then', 'close', '.']
    """
    return re.findall(r"\w+|[^\w\s]", text)


def folded(text: str) -> str:
    """What two sentences share that count as the same: lower-cased, numbers as ``0``.

    Example:
        >>> folded("Version 7.4 is OUT")
        'version 0.0 is out'
    """
    return re.sub(r"\d+", "0", text.lower())


def message(text: str) -> str:
    """A message of a program without tags, entities and accelerators, its placeholders as ``X``.

    Example:
        >>> message("<b>_Save</b> %(count)d files in &quot;{name}&quot;")
        'Save X files in "X"'
    """
    text = _ACCELERATOR.sub("", html.unescape(_TAG.sub("", text)))
    return _PLACEHOLDER.sub("X", text)


def sentences(text: str) -> list[str]:
    """The sentences of a paragraph, white space folded.

    Example:
        >>> sentences("Click  OK. The window closes.")
        ['Click OK.', 'The window closes.']
    """
    return [" ".join(part.split()) for part in _END.split(text) if part.strip()]


def cleaned(pairs: Iterable[tuple[str, str]]) -> Pairs:
    """Paragraphs as sentence pairs that are worth learning from, no source and no target twice.

    Paragraphs with as many sentences on both sides are taken sentence by sentence, others whole. Of these are
    kept, in order, those with 3 to 16 tokens and a word on each side, unlike each other and of similar
    length, whose source and whose target (`folded`) have not been seen: so a later split shares neither.

    Example:
        >>> pairs = [("Gut so. Und nun weiter.", "Well done. And now go on."), ("Und NUN weiter.", "Go on!")]
        >>> cleaned(pairs)
        [('Gut so.', 'Well done.'), ('Und nun weiter.', 'And now go on.')]
    """
    kept: Pairs = []
    seen: tuple[set[str], set[str]] = set(), set()
    for paragraph in pairs:
        sides = [sentences(text) for text in paragraph]
        if len(sides[0]) != len(sides[1]):
            sides = [[" ".join(text.split())] for text in paragraph]
        for source, target in zip(*sides, strict=True):
            keys = folded(source), folded(target)
            if _fit(source, target) and keys[0] not in seen[0] and keys[1] not in seen[1]:
                kept.append((source, target))
                seen[0].add(keys[0])
                seen[1].add(keys[1])
    return kept


def _fit(source: str, target: str) -> bool:
    """Whether a pair is worth learning from by itself."""
    sides = tokens(source), tokens(target)
    short, long = sorted(map(len, sides))
    return (
        source != target
        and short >= LEAST
        and long <= min(MOST, 2.5 * short + 3)
        and all(any(token.isalpha() and token != "X" for token in side) for side in sides)
    )


# ---- splits and near duplicates ----


def split(pairs: Pairs, source: str, target: str, info: Mapping[str, Any], seed: int = 0) -> Corpus:
    """A corpus of pairs that are `cleaned`: dev and test are 1,000 each, or a tenth where there are fewer.

    Args:
        pairs: no source and no target twice.
        source: language code.
        target: language code.
        info: origin and licence; counts and near duplicates are added.
        seed: draws the splits.

    Raises:
        ValueError: for fewer than 10 pairs.

    Example:
        >>> pairs = [(f"Satz {'i' * n} hier", f"sentence {'i' * n} here") for n in range(20)]
        >>> corpus = split(pairs, "de", "en", {"origin": "made up"})
        >>> len(corpus.train), len(corpus.dev), len(corpus.test)
        (16, 2, 2)
    """
    check.corpus_size(len(pairs), LEAST, MOST)
    generator = random.Random(seed)
    drawn = [pairs[at] for _, at in sorted((generator.random(), at) for at in range(len(pairs)))]
    held = min(HELD, len(drawn) // 10)
    parts = {"train": drawn[2 * held :], "dev": drawn[:held], "test": drawn[held : 2 * held]}
    return _corpus(parts, source, target, {**info, "tokens": [LEAST, MOST], "seed": seed})


def _corpus(parts: Mapping[str, Pairs], source: str, target: str, info: Mapping[str, Any]) -> Corpus:
    """The splits with what is to be said of them."""
    about = {
        **info,
        "counts": {name: len(pairs) for name, pairs in parts.items()},
        "near_duplicates": {name: near_duplicates(parts["train"], parts[name]) for name in ("dev", "test")},
    }
    return Corpus(parts["train"], parts["dev"], parts["test"], source, target, about)


def near_duplicates(train: Pairs, held: Pairs) -> dict[str, float]:
    """The share of pairs whose source is much like one in training.

    Sentences are compared by the sets of their token trigrams, `folded`: by the Jaccard index, what two sets
    share over what they have together, of the training source that is nearest.

    Args:
        train: pairs to look among.
        held: pairs to look for, one or more.

    Returns:
        For each index of 0.5 and 0.7 the share of ``held`` that has it or more.

    Example:
        >>> near_duplicates([("a b c d", "")], [("A b c d", ""), ("a b c x", ""), ("e f g h", "")])
        {'0.5': 0.3333333333333333, '0.7': 0.3333333333333333}
    """
    looked_for = [_trigrams(source) for source, _ in held]
    wanted = set().union(*looked_for)
    sizes, holders = [], defaultdict(list)
    for at, (source, _) in enumerate(train):
        trigrams = _trigrams(source)
        sizes.append(len(trigrams))
        for trigram in trigrams & wanted:
            holders[trigram].append(at)
    best = []
    for trigrams in looked_for:
        shared = Counter(at for trigram in trigrams for at in holders[trigram])
        best.append(
            max((both / (len(trigrams) + sizes[at] - both) for at, both in shared.items()), default=0.0)
        )
    return {str(index): sum(found >= index for found in best) / len(best) for index in ALIKE}


def _trigrams(text: str) -> set[tuple[str, ...]]:
    words = tokens(folded(text))
    return set(zip(words, words[1:], words[2:], strict=False)) or {tuple(words)}


# ---- reading ----


def from_folder(folder: Path, source: str, target: str, seed: int = 0) -> Corpus:
    """A corpus from somebody's folder: aligned text files a split, or gettext catalogues.

    Text files are taken as they are (`read_texts`), catalogues are cleaned and split (`read_catalogues`).

    Raises:
        ValueError: the languages are one.
        FileNotFoundError: the folder has neither.
        PermissionError: it may not be read.
        ValueError: a file is broken, or there are too few pairs.
    """
    check.two_languages(source, target)
    try:
        os.listdir(folder)
    except PermissionError as error:
        raise check.corpus_locked(folder) from error
    except OSError:
        pass  # said below
    info = {"origin": f"the folder {folder}", "licence": "that of the folder's texts", "folder": str(folder)}
    if any(folder.glob(f"train.{source}")):
        return read_texts(folder, source, target, info)
    pairs = read_catalogues(folder, source, target)
    return split(cleaned(pairs), source, target, info, seed)


def read_texts(folder: Path, source: str, target: str, info: Mapping[str, Any]) -> Corpus:
    """A corpus of aligned text files, a sentence a line, two files a split: ``train.de``, ``train.en``,
    ``dev`` or ``valid``, ``test``.

    White space is folded and pairs with an empty side are left out, whose number stands in
    ``info["left_out"]``; nothing else is changed, so that standard test sets stay what they are.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is not UTF-8, two files are of unlike length, or a split has no pairs.
    """
    parts, left_out = _parts(folder, source, target)
    return _corpus(parts, source, target, {**info, "left_out": left_out})


def _parts(folder: Path, source: str, target: str) -> tuple[dict[str, Pairs], int]:
    """The splits in a folder, and how many pairs had an empty side."""
    parts: dict[str, Pairs] = {}
    left_out = 0
    for name, stems in SPLITS.items():
        stem = next((stem for stem in stems if (folder / f"{stem}.{source}").is_file()), stems[0])
        paths = [folder / f"{stem}.{language}" for language in (source, target)]
        sides = [[" ".join(line.split()) for line in _lines(path)] for path in paths]
        if len(sides[0]) != len(sides[1]):
            want = f"as many lines long as {paths[0].name}, which has {len(sides[0]):,}"
            raise check.corpus_file(paths[1], want, f"{len(sides[1]):,}")
        parts[name] = [(one, other) for one, other in zip(*sides, strict=True) if one and other]
        left_out += len(sides[0]) - len(parts[name])
        if not parts[name]:
            raise check.corpus_file(
                paths[0], f"a text with sentences that {paths[1].name} translates", "none"
            )
    return parts, left_out


def text_of(path: Path) -> str:
    """The text of a file.

    Raises:
        FileNotFoundError: it is not there.
        ValueError: it is not UTF-8.
    """
    if not path.is_file():
        raise check.corpus_file_missing(path)
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise check.corpus_file(path, "UTF-8 text", f"another byte at {error.start:,}") from error


def _lines(path: Path) -> list[str]:
    """Lines that end in a newline and nothing else, as other tools count them."""
    text = text_of(path)
    return text.removesuffix("\n").split("\n") if text else []


def read_catalogues(folder: Path, source: str, target: str) -> Pairs:
    """Pairs from gettext catalogues (.mo and .po) anywhere below a folder, as `message` leaves them.

    A catalogue is of a language whose code is the name of a folder that it is in, or its own:
    ``de/LC_MESSAGES/app.mo``, ``app/de.po``. English needs no catalogues: without any it is what messages
    are called by. Two other languages meet in messages of the same name in catalogues of the same place.
    Of a plural the first form is taken; entries that are fuzzy or not translated are left out.

    Raises:
        FileNotFoundError: there are no catalogues for a language.
        ValueError: a catalogue is broken.
    """
    sides: dict[str, dict[tuple[object, ...], str]] = {source: {}, target: {}}
    for path in sorted(path for path in folder.rglob("*.[mp]o") if path.is_file()):
        place = path.relative_to(folder).with_suffix("").parts
        for language in sides.keys() & set(place):
            domain = tuple("" if part == language else part for part in place)
            entries = _mo(path) if path.suffix == ".mo" else _po(path)
            sides[language].update({(domain, name): text for name, text in entries.items() if text})
    for language, other in ((source, target), (target, source)):
        if language == "en" and not sides[language]:
            sides[language] = {key: str(key[1]).rpartition("\4")[2] for key in sides[other]}
        if not sides[language]:
            raise check.corpus_nothing_there(folder, language, source, target)
    return [
        (message(text), message(sides[target][key]))
        for key, text in sides[source].items()
        if key in sides[target]
    ]


def _mo(path: Path) -> dict[str, str]:
    """Messages of a compiled catalogue by name, which a context may precede."""
    try:
        with path.open("rb") as file:
            catalogue: dict[Any, str] = vars(gettext.GNUTranslations(file))["_catalog"]
    except (OSError, ValueError, LookupError, struct.error) as error:
        raise check.corpus_file(path, "a whole gettext catalogue", str(error) or "another file") from error
    first = {name: text for name, text in catalogue.items() if isinstance(name, str)}
    first |= {name[0]: text for name, text in catalogue.items() if isinstance(name, tuple) and name[1] == 0}
    return {name: text for name, text in first.items() if name}


def _po(path: Path) -> dict[str, str]:
    """The same of a catalogue in source form."""
    entries: list[dict[str, str]] = [{}]
    field = ""
    for line in text_of(path).split("\n"):
        found = _PO_LINE.fullmatch(line.strip())
        if found is None or not (found["text"] is None or found["field"] or field):
            raise check.corpus_file(path, "a gettext catalogue", f"the line {line[:60]!r}")
        begins = found["text"] is None or found["field"] in ("msgctxt", "msgid")
        if (begins and "msgid" in entries[-1]) or line.startswith("#~"):  # an entry that is out of use
            entries.append({})
        field = found["field"] or (field if found["text"] is not None else "")
        if found["text"] is not None:
            entries[-1][field] = entries[-1].get(field, "") + _unescaped(found["text"])
        elif line.startswith("#,") and "fuzzy" in line:
            entries[-1]["fuzzy"] = line
    return {
        (f"{entry['msgctxt']}\4" if "msgctxt" in entry else "") + entry["msgid"]: entry.get("msgstr")
        or entry.get("msgstr[0]", "")
        for entry in entries
        if entry.get("msgid") and "fuzzy" not in entry
    }


def _unescaped(text: str) -> str:
    return re.sub(r"\\(.)", lambda found: {"n": "\n", "t": "\t", "r": "\r"}.get(found[1], found[1]), text)


# ---- the folder ----


def folders(source: str = "de", target: str = "en") -> list[Path]:
    """Where a corpus of two languages is looked for, among data sets; it is written into the first.

    Example:
        >>> folders("fr")[0].name
        'translation-fr-en'
    """
    return Place(f"translation-{source}-{target}", {}).folders()


def built(source: str = "*", target: str = "*") -> list[Path]:
    """The folders that have a corpus of these languages, or of any, in the order of `folders`."""
    return [
        path.parent
        for folder in folders(source, target)
        for path in sorted(folder.parent.glob(f"{folder.name}/{_ABOUT}"))
    ]


def find(source: str = "de", target: str = "en") -> Path:
    """The first folder that has a corpus of two languages.

    Raises:
        FileNotFoundError: there is none; the sentence names the command that builds it.
    """
    for folder in built(source, target):
        return folder
    raise check.corpus_missing(folders(source, target)[0], source, target)


def write_folder(corpus: Corpus, folder: Path) -> None:
    """Writes a corpus as a folder of Moses layout with ``corpus.json``: whole, or not at all.

    White space is folded, so that a sentence is a line.

    Raises:
        FileExistsError: the folder is there.
        ValueError: both languages are one, whose files would be the same; a split has no pairs, or one with
            nothing on a side.
    """
    check.two_languages(corpus.source, corpus.target)
    check.corpus_not_there(folder)
    for name in SPLITS:
        check.corpus_pairs(name, getattr(corpus, name))
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".part-", dir=folder.parent) as part:
        made = Path(part) / folder.name
        files = {}
        for name in SPLITS:
            for side, language in enumerate((corpus.source, corpus.target)):
                text = "".join(f"{' '.join(pair[side].split())}\n" for pair in getattr(corpus, name))
                write_whole(made / f"{name}.{language}", text)
                files[f"{name}.{language}"] = digest(text.encode(), "sha256:")
        about = {"source": corpus.source, "target": corpus.target, **corpus.info, "files": files}
        write_json(made / _ABOUT, about)
        os.replace(made, folder)


def read_folder(folder: Path) -> Corpus:
    """Reads what `write_folder` wrote; ``info["files"]`` are its files with their checksums.

    Raises:
        FileNotFoundError: there is no corpus in the folder, or a file of it is missing.
        ValueError: a file is not what was written.
    """
    path = folder / _ABOUT
    if not os.path.isfile(path):
        raise check.corpus_not_built(folder, path.name)
    try:
        about = json.loads(text_of(path))
        source, target, files = about.pop("source"), about.pop("target"), dict(about["files"])
    except (json.JSONDecodeError, LookupError, TypeError, AttributeError) as error:
        raise check.corpus_file(path, "as `l2t data translation` writes it", "another content") from error
    parts, _ = _parts(folder, source, target)
    for name, checksum in files.items():
        if (found := digest((folder / name).read_bytes(), checksum)) != checksum:
            raise check.corpus_file(folder / name, f"what was written, {checksum}", found)
    return Corpus(parts["train"], parts["dev"], parts["test"], source, target, about)
