"""Every sentence that a user can be told, and nothing else that a user can be told.

One function a check or a sentence, grouped by the module that calls it. The form is
``l2t.<op>: <argument> must be <requirement>, got <actual>. <What to do>.`` Each is provoked by a test.
"""

from __future__ import annotations

import inspect
import math
import operator
import os
import re
import signal
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

# ---- tasks, command line, report ----


def known(op: str, what: str, name: str, names: Iterable[str]) -> str:
    """Returns name if it is one of names; raises a ValueError that lists them otherwise."""
    if name not in (names := list(names)):
        raise ValueError(
            f"l2t.{op}: the {what} must be one of {', '.join(names)}, got {name!r}. Choose one of these."
        )
    return name


def noise(num_classes: int, rate: float) -> None:
    """Label noise needs two classes and a rate in [0, 1]."""
    if num_classes < 2:
        raise ValueError(
            f"l2t.tasks: num_classes must be 2 or more, got {num_classes}. Noise needs another class."
        )
    if not 0 <= rate <= 1:
        raise ValueError(
            f"l2t.tasks: the noise rate must be in [0, 1], got {rate}. Give the share of labels to flip."
        )


def sample_count(count: int, available: int) -> None:
    """A subset cannot be larger than what it is taken from."""
    if not 0 <= count <= available:
        raise ValueError(
            f"l2t.tasks: the number of samples must be between 0 and {available}, got {count}. Ask for fewer."
        )


def imbalance(ratio: float) -> None:
    """The first class of a long tail is the largest."""
    if not ratio >= 1:
        raise ValueError(
            f"l2t.tasks: imbalance must be 1 or more, got {ratio}. Give the largest class over the smallest."
        )


def balanced_count(count: int, each: int, available: int) -> None:
    """A balanced dev set takes as many samples of every class."""
    if not 1 <= each <= available:
        raise ValueError(
            f"l2t.tasks: a balanced dev set must have between 1 and {available} samples of every class, got {each} "
            f"({count} in all). Ask for another number."
        )


def data_file(path: Path, requirement: str, actual: str) -> ValueError:
    """A file of a data set that is not what it should be."""
    return ValueError(
        f"l2t.tasks: {path} must be {requirement}, got {actual}. Put the file there again, or fetch it with `l2t data`."
    )


def own_file(path: Path, requirement: str, actual: str) -> ValueError:
    """A file or folder of the user's own images that is not what it should be."""
    return ValueError(
        f"l2t.tasks: {path} must be {requirement}, got {actual}. Mend it, or take it out of your folder."
    )


def data_missing(name: str, folder: Path, missing: Sequence[str]) -> FileNotFoundError:
    """A data set whose files are not there."""
    return FileNotFoundError(
        f"l2t.tasks: the files of {name} must be in {folder}, got none called {', '.join(missing)}. Run: l2t data {name}."
    )


def folder_missing(folder: Path) -> FileNotFoundError:
    """The task folder without a folder."""
    return FileNotFoundError(
        f"l2t.tasks: folder must have a folder with a folder of images for each class, got none at {folder}. "
        f"Link yours there: ln -s DIR {folder}."
    )


def data_home(folder: Path) -> None:
    """Data sets go into the home directory where nothing else is said."""
    if folder.parts[:1] == ("~",):
        raise FileNotFoundError(
            f"l2t.data: the folder for data sets must be one that is known, got {folder} and no home directory. "
            "Set L2T_DATA to a folder."
        )


def data_not_standard(name: str, path: Path, wanted: str, found: str) -> str:
    """Files of a known name with another content give results that compare with nobody's."""
    return (
        f"l2t.tasks: {path} must have the checksum {wanted} to be the standard {name}, got {found}. "
        "Results will not compare with others'."
    )


def data_not_fetched(name: str, folder: Path, files: Sequence[str], archive: str) -> FileNotFoundError:
    """No way to fetch a data set on this machine."""
    what = ", ".join(files) + (f" (or {archive})" if archive else " (or each as .gz)")
    return FileNotFoundError(
        f"l2t.data: {name} must be fetched by a tool that this machine has, got none. "
        f"Put {what} into {folder}, or install torchvision."
    )


def data_fetch_failed(name: str, by: str, said: str) -> OSError:
    """The tool that fetches a data set failed."""
    return OSError(
        f"l2t.data: {name} must be fetched by `{by}`, got: {said}. Look whether the net is there and try again."
    )


def data_corrupted(name: str, file: str, wanted: str) -> ValueError:
    """A fetched file that is not the standard one is not kept."""
    return ValueError(
        f"l2t.data: the fetched {file} of {name} must have the checksum {wanted}, got another. Nothing was kept; fetch it again."
    )


def corpus_file(path: Path, requirement: str, actual: str) -> ValueError:
    """A file of sentence pairs that is not what it should be."""
    return ValueError(
        f"l2t.translation: {path} must be {requirement}, got {actual}. Mend it, or build the corpus again without it."
    )


def corpus_pairs(split: str, pairs: Sequence[tuple[str, str]], whole: bool = True) -> None:
    """A split that is to be learned from, or written a sentence a line."""
    if not pairs:
        raise ValueError(f"l2t.translation: {split} must have sentence pairs, got none. Give it some.")
    for at, pair in enumerate(pairs if whole else ()):
        if not all(side.strip() for side in pair):
            raise ValueError(
                f"l2t.translation: both sides of a pair must say something, got {pair!r} at {at} of {split}. Leave it out."
            )


def corpus_file_missing(path: Path) -> FileNotFoundError:
    """A folder of sentence pairs that lacks a file."""
    return FileNotFoundError(
        f"l2t.translation: the folder {path.parent} must have a file {path.name}, got none. "
        "It needs two aligned texts for each of train, dev (or valid) and test."
    )


def corpus_not_built(folder: Path, name: str) -> FileNotFoundError:
    """A folder that `l2t data translation` has not written, of texts perhaps."""
    return FileNotFoundError(
        f"l2t.translation: the folder of sentence pairs must have a {name}, got {str(folder)!r} without one. Build it from texts "
        f"or catalogues: l2t data translation --from {folder}."
    )


def two_languages(source: str, target: str) -> None:
    """A language and another."""
    if source == target:
        raise ValueError(
            f"l2t.translation: source and target must be two languages, got {source!r} twice. Give others."
        )


def tracked_features(op: str, features: Sequence[str], known: Sequence[str]) -> None:
    """What a teacher of tokens can see of a student on its way."""
    if unknown := [name for name in features if name not in known]:
        raise ValueError(
            f"l2t.{op}: features must be some of {', '.join(known)}, which are known of a translator, got {', '.join(unknown)}. "
            "Leave it out."
        )


def compare_folders_of_translators() -> ValueError:
    """Runs of translators go by their folder, since it is one of a student."""
    return ValueError(
        "l2t.cli: a comparison of translators must be given folders of runs, got the word translation. Write for example "
        "l2t compare runs/translation-lstm."
    )


def corpus_nothing_there(folder: Path, language: str, source: str, target: str) -> FileNotFoundError:
    """A folder to build a corpus from that has nothing to do so."""
    return FileNotFoundError(
        f"l2t.translation: the folder {folder} must have train.{source} and train.{target}, or catalogues (.mo, .po) in folders "
        f"named {source} and {target}, got none for {language}. Give another folder or languages."
    )


def corpus_locked(folder: Path) -> PermissionError:
    """A folder to build a corpus from that belongs to somebody else."""
    return PermissionError(
        f"l2t.translation: the folder {folder} must be one that you may read, got one without that permission. Change its "
        "permissions, or give a copy."
    )


def corpus_size(pairs: int, least: int, most: int) -> None:
    """Pairs enough for three splits."""
    if pairs < 10:
        raise ValueError(
            f"l2t.translation: a corpus must have 10 or more unlike pairs of {least} to {most} tokens a side, got {pairs}. "
            "Give more text, or the right languages."
        )


def can_be_written(op: str, folder: Path) -> None:
    """A folder that results will go to, which may not be there yet: said before they are made."""
    place = next(one for one in (folder.absolute(), *folder.absolute().parents) if os.path.exists(one))
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        what = "no right to" if place.is_dir() else "a file at"
        raise PermissionError(
            f"l2t.{op}: the folder {folder} must be one that can be written, got {what} {place}. Choose another place, or change this one."
        )


def corpus_not_there(folder: Path) -> None:
    """A corpus is not written over another."""
    if folder.exists():
        raise FileExistsError(
            f"l2t.translation: the folder to write, {folder}, must not be there, got one. "
            "Remove it, or set L2T_DATA to write elsewhere."
        )


def corpus_missing(folder: Path, source: str, target: str) -> FileNotFoundError:
    """No corpus of these languages has been built."""
    return FileNotFoundError(
        f"l2t.translation: sentence pairs must be in {folder}, got none. "
        f"Run: l2t data translation --source {source} --target {target}."
    )


def corpus_tool_missing(tool: str, packages: Sequence[str], folder: Path) -> FileNotFoundError:
    """A machine that is not Debian's kin."""
    files = ", ".join(f"{package}_*.deb" for package in packages)
    return FileNotFoundError(
        f"l2t.data: Debian's packages must be fetched by apt-get and unpacked by dpkg-deb, got no {tool} on this machine. "
        f"Install dpkg and put {files} from packages.debian.org into {folder}, or build from texts with --from."
    )


def missing_package(user: str, package: str, extra: str = "tasks") -> ImportError:
    """An optional package is not installed."""
    return ImportError(
        f"l2t.{user}: the package {package} must be installed, got none. Run: pip install 'l2t[{extra}]'."
    )


def words_of_a_language(language: str) -> ImportError:
    """What sacrebleu cuts a language into words by is not installed."""
    return ImportError(
        f"l2t.translation: BLEU of the language {language} must have what sacrebleu cuts its words by, got none. "
        f"Run: pip install 'sacrebleu[{language}]'."
    )


def not_positive(text: str) -> str:
    """A count on the command line."""
    return f"it must be a whole number of 1 or more, got {text}"


def not_a_seed(text: str) -> str:
    """A seed on the command line."""
    return f"it must be a whole number of 64 bits, got {text}"


def weight_net_flags(given: Sequence[str]) -> None:
    """Flags that say what loss a teacher sets, for one that weighs rows."""
    if given:
        raise ValueError(
            f"l2t.cli: --teacher weight-net must come without flags of another teacher, got --{', --'.join(given)}. "
            "Leave them out: it has no such choices."
        )


def device_is_there(name: str, gpus: int) -> str:
    """A device by the name that torch gives it."""
    known = ["cpu", *(["cuda"] if gpus else []), *(f"cuda:{index}" for index in range(gpus))]
    if name not in known:
        raise ValueError(
            f"l2t.cli: --device must be one of {', '.join(known)} on this machine, got {name!r}. "
            "`l2t doctor` says what it sees."
        )
    return name


def flags_of_pairs(given: Sequence[str]) -> None:
    """Flags of sentence pairs, for a task."""
    if given:
        raise ValueError(
            f"l2t.cli: a task's data must come without flags of `l2t data translation`, got --{', --'.join(given)}. "
            "Leave them out: it has no such choices."
        )


def flags_without_meaning(what: str, given: Sequence[str]) -> None:
    """Flags of another kind of teaching or comparison."""
    if given:
        raise ValueError(
            f"l2t.cli: {what} must come without flags of another, got --{', --'.join(given)}. Leave them out: "
            "it has no such choices."
        )


def run_data(folder: Path, differing: Sequence[str]) -> None:
    """The sentence pairs of a run."""
    if differing:
        raise ValueError(
            f"l2t.cli: the sentence pairs in {folder} must be those that the run was begun with, got another "
            f"{', '.join(differing)}. Put them back, or begin another run."
        )


def run_data_there(folder: Path, there: bool) -> None:
    """The sentence pairs of a run of translators."""
    if not there:
        raise FileNotFoundError(
            f"l2t.cli: the sentence pairs of the run must be in {folder}, where they were when it was begun, or where `l2t "
            "data` looks for those of its languages, got none there. Put them back, or set L2T_DATA."
        )


def one_contest(directory: Path, differing: Sequence[str]) -> None:
    """Translators' runs that are to be compared."""
    if differing:
        raise ValueError(
            f"l2t.cli: the runs to compare must have the same students and sentence pairs, got another {', '.join(differing)} in "
            f"{str(directory)!r}. Compare it by itself."
        )


def token_teacher_there(directory: Path, there: bool) -> None:
    """A folder of a taught loss of tokens."""
    if not there:
        raise FileNotFoundError(
            f"l2t.cli: the folder must hold a run of `l2t teach translation`, got {str(directory)!r}. "
            "Give its folder, such as runs/translation-lstm/seed-0."
        )


def taught_by_adam(optimizer: str) -> None:
    """Translators are trained and compared by Adam, so a loss is taught for it."""
    if optimizer != "adam":
        raise ValueError(
            f"l2t.cli: optimizer must be adam, by which `l2t train` and `l2t compare` train translators, got {optimizer!r}. "
            "Leave it out; l2t.translation.windows.teach_translator takes the other."
        )


def setting_form(text: str, has_equals: bool) -> None:
    """An argument of --set."""
    if not has_equals:
        raise ValueError(
            f"l2t.cli: --set must be FIELD=VALUE, got {text!r}. Write for example --set steps=200."
        )


def no_run(directory: Path) -> FileNotFoundError:
    """A folder without a run."""
    return FileNotFoundError(
        f"l2t.cli: the folder must hold a taught run or seed-* folders with one, got {str(directory)!r}. "
        "Run `l2t teach` first."
    )


def run_file(path: str | os.PathLike[str], got: str) -> ValueError:
    """A file of a run that is not what was written."""
    return ValueError(
        f"l2t: {path} must be JSON as this library writes it, got {got}. Put the file back as it was, or remove it and make it again."
    )


def runs_left_out(directories: Iterable[Path]) -> str:
    """Runs that were broken off are in no table and on no page."""
    names = ", ".join(map(str, directories))
    return f"l2t.cli: left out what is not taught to the end: {names}. Go on with `l2t teach ... --resume`."


def task_or_folder(where: str, is_folder: bool, names: Iterable[str]) -> None:
    """What to compare."""
    if not is_folder:
        raise ValueError(
            f"l2t.cli: compare must be given a task ({', '.join(names)}) or an existing folder, got {where!r}. "
            "Check the spelling."
        )


def compare_one_task(where: Sequence[str], tasks: Sequence[str]) -> None:
    """A task is compared by itself."""
    if tasks and len(where) > 1:
        raise ValueError(
            f"l2t.cli: compare must be given one task, or folders alone, got {' '.join(where)!r}. Compare "
            f"{tasks[0]} by itself."
        )


def run_has_a_task(directory: Path, config: Mapping[str, object]) -> None:
    """A run of `l2t.teach` rather than of `l2t teach` has no task to take data from."""
    if not config:
        raise ValueError(
            f"l2t.cli: the run must come from `l2t teach`, got {str(directory)!r} without a config.json. "
            "Call l2t.compare.compare with its data instead."
        )


def transfer_names(folders: Mapping[str, str]) -> None:
    """Teachers whose results go to folders of these names."""
    taken: dict[str, str] = {}
    for name, folder in folders.items():
        if folder in taken:
            raise ValueError(
                f"l2t.cli: teachers must have names whose letters and digits differ, got {taken[folder]!r} and {name!r}, "
                f"which would both go to {folder}. Rename one's folder."
            )
        taken[folder] = name


def transfer_place(folder: Path, holds: str | None) -> None:
    """A folder for a transferred teacher takes the place of nothing else."""
    if holds:
        raise ValueError(
            f"l2t.cli: the folder of a transferred teacher must hold nothing but the same transfer, got {str(folder)!r} with "
            f"{holds}. Give another folder by --out."
        )


def transfer_classes(directory: Path, taught: int, task: str, classes: int) -> None:
    """A loss of some classes is none of others."""
    if taught != classes:
        raise ValueError(
            f"l2t.cli: --to must be a task of {taught} classes, as many as the teacher in {str(directory)!r} has, got {task!r} with "
            f"{classes}. Choose another task, or teach on this one."
        )


def command_failed(error: BaseException) -> str:
    """The one line that a failed command says on the standard error."""
    text = " ".join(str(error).split())
    if text.startswith("l2t"):
        return text
    if isinstance(error, OSError):
        return f"l2t: {text}"
    return f"l2t: {type(error).__name__}: {text}. Set L2T_TRACEBACK=1 to see where."


def process_killed(name: str, code: int, makes_missing: bool) -> str:
    """A process that somebody else has ended, and that could not say so itself."""
    try:
        by = signal.Signals(-code).name
    except ValueError:
        by = f"signal {-code}"
    again = (
        "Give the same command again, which makes what is missing" if makes_missing else "Go on with --resume"
    )
    return (
        f"l2t.cli: a process must run to its end, got {name} ended by {by}. "
        f"{again}; where memory ran out, with a smaller --jobs."
    )


# ---- teacher ---------------------------------------------------------------------------------------------------------


def teacher_choice(argument: str, name: object, names: Sequence[str], op: str = "Teacher") -> None:
    """An argument of a teacher that is one of a few names."""
    if name not in names:
        raise ValueError(
            f"l2t.{op}: {argument} must be one of {', '.join(names)}, got {name!r}. Choose one of these."
        )


def teacher_size(argument: str, value: object, least: int, op: str = "Teacher") -> None:
    """A size of a teacher."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(
            f"l2t.{op}: {argument} must be an integer of {least} or more, got {value!r}. Give a size."
        )


def teacher_positive(argument: str, value: float, or_zero: bool = False, op: str = "Teacher") -> float:
    """A bound of a teacher."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not (0 < value < float("inf") or (or_zero and value == 0)):
        raise ValueError(
            f"l2t.{op}: {argument} must be positive and finite, got {value!r}. Leave it out for the default."
        )
    return float(value)


def teacher_features(features: Sequence[str], names: Sequence[str], slots: int, op: str = "Teacher") -> None:
    """The features that a teacher sees."""
    if (
        isinstance(features, str)
        or any(name not in names for name in features)
        or (slots > 1 and not features)
    ):
        raise ValueError(
            f"l2t.{op}: features must be a non-empty sequence of {', '.join(names)}, got {features!r}. "
            "Choose among the fields of l2t.StudentState."
        )


def teacher_has_a_say(weight: str, link: str, emphasis: float, smoothing: float | None) -> None:
    """A choice under which calibration divides out all that the teacher could say."""
    if (
        link == "identity"
        and smoothing is None
        and (weight == "shared" or (weight == "per-class" and not emphasis))
    ):
        raise ValueError(
            f"l2t.Teacher: weight must be more than {weight!r} with link='identity' and emphasis={emphasis!r}, got a "
            "loss that is cross-entropy whatever the teacher says. Use weight='full' or 'low-rank', "
            "link='sigmoid', a smoothing, or weight='per-class' with an emphasis."
        )


def best_starts(starts: object, kind: type) -> None:
    """What teach_best is to choose from."""
    if not isinstance(starts, kind):
        raise ValueError(
            f"l2t.teach_best: starts must be an l2t.Starts, got {type(starts).__name__}. "
            "Give l2t.Starts(teachers, []), or those of l2t.default_starts."
        )


def best_teachers(classes: Sequence[int], taught: int) -> None:
    """The starts that teach_best is to choose from."""
    if not taught or len(set(classes)) > 1:
        raise ValueError(
            "l2t.teach_best: starts must have a teacher to teach, and all be for the same number of classes, got "
            f"{taught} to teach and classes {list(classes)}. l2t.default_starts makes some."
        )


def best_rows(name: str, rows: int, least: int) -> None:
    """The rows that teach_best cuts, to teach by one part and choose by the other."""
    if rows < least:
        raise ValueError(
            f"l2t.teach_best: {name} must have {least} or more rows, some to teach by and some to choose by, got {rows}. "
            "Give more rows, or teach one teacher with l2t.teach."
        )


def teacher_smoothing(value: float, limit: float) -> None:
    """The label smoothing that Teacher starts as."""
    if not 0.0 <= value < limit:
        raise ValueError(
            f"l2t.Teacher: smoothing must be at least 0 and below {limit:.2g}, which off_diagonal_bound allows, got "
            f"{value!r}. Use less, or raise off_diagonal_bound."
        )


def teacher_bias_start(value: float, link: str) -> float:
    """The bias that Teacher starts with."""
    if not math.isfinite(value) or (link == "identity" and value):
        raise ValueError(
            f"l2t.Teacher: bias_start must be finite, and 0 with link='identity', where a bias changes nothing, got "
            f"{value!r}. Leave it out."
        )
    return float(value)


def teacher_class_weights(weights: Sequence[float] | None, num_classes: int) -> list[float] | None:
    """The class weights that Teacher starts with."""
    if weights is None:
        return None
    found = [float(weight) for weight in weights]
    if len(found) != num_classes or not all(0.0 < weight < math.inf for weight in found):
        raise ValueError(
            f"l2t.Teacher: class_weights must be {num_classes} positive finite numbers, got {found!r}. "
            "Give one a class."
        )
    return found


def teacher_state(name: str, value: object) -> None:
    """A state that lacks a feature the teacher was made to see."""
    if value is None:
        raise ValueError(
            f"l2t.Teacher: state.{name} must be a number, got None. Measure it, or make the teacher without this feature."
        )


def teacher_states(state: object, kind: type) -> None:
    """What a teacher looks at."""
    if not isinstance(state, kind):
        raise TypeError(
            f"l2t.Teacher: state must be an l2t.StudentState, got {type(state).__name__}. Give "
            "l2t.StudentState(progress, train_loss, train_accuracy)."
        )


def token_counts(counts: Tensor, eos: int) -> Tensor:
    """How often each token of a vocabulary occurs."""
    if (
        counts.dim() != 1
        or len(counts) <= max(eos, 1)
        or not bool((counts >= 0).all())
        or not counts.sum() > 0
        or bool((counts.double() % 1 != 0).any())  # which it is of infinity, too
    ):
        raise ValueError(
            f"l2t.TokenTeacher: counts must be an integer of 0 or more for each token of the vocabulary, the end of a sentence "
            f"(eos={eos}) among them, and not all 0, got {_described(counts)}. Count the target tokens of the training set."
        )
    return counts


def token_smoothing(value: float) -> float:
    """The label smoothing that a TokenTeacher starts as."""
    if not isinstance(value, (int, float)) or not 0.0 < value < 1.0:
        raise ValueError(
            f"l2t.TokenTeacher: smoothing must be above 0 and below 1, got {value!r}. Its strength is taught from there: begin with "
            "0.05 to 0.2."
        )
    return float(value)


def teacher_file_exists(file: Path) -> None:
    """There is a teacher to load."""
    if not file.is_file():
        raise FileNotFoundError(
            f"l2t.Teacher.load: path must be a teacher file or its directory, got {str(file)!r}, which does not exist. "
            "Give what Teacher.save or `l2t teach` wrote."
        )


def teacher_file_is_none(file: Path) -> ValueError:
    """The file is no teacher."""
    return ValueError(
        f"l2t.Teacher.load: path must be a teacher that this library saved, got {str(file)!r}, which is not. "
        "Give what Teacher.save or `l2t teach` wrote."
    )


def teacher_name(name: str, module: str, alone: bool) -> None:
    """The name of a class of teachers, by which a file is read."""
    if not alone:
        raise ValueError(
            f"l2t.Teacher: a class of teachers must have a name of its own, got {name}, which {module} has. Files say by it "
            "what to load: choose another name."
        )


def gate_slots(slots: int) -> None:
    """The gate mixes two sets of coefficients."""
    if slots != 2:
        raise ValueError(f"l2t.GateTeacher: slots must be 2, got {slots!r}. Use l2t.Teacher for more slots.")


# ---- loss: the extension and the ops ---------------------------------------------------------------------


def _described(tensor: object) -> str:
    """Shape, dtype and device of a tensor as they stand in a sentence; the type of anything else."""
    if not isinstance(tensor, torch.Tensor):
        return f"{type(tensor).__name__}"
    return f"shape {tuple(tensor.shape)}, {str(tensor.dtype).removeprefix('torch.')} on {tensor.device}"


def no_such_name(name: str) -> AttributeError:
    """An attribute that the package does not have: hasattr asks for such, too."""
    return AttributeError(
        f"l2t: the name must be one of dir(l2t) or of a module, got {name!r}. Import its module first."
    )


def extension_missing(error: ImportError) -> ImportError:
    """The compiled core cannot be imported."""
    return ImportError(
        f"l2t: the compiled core l2t._native must be installed, got: {error}. "
        "Run `pip install .` in the source directory and start Python outside of it, or install a wheel."
    )


def instruction_set(name: str, known: Sequence[str], used: str) -> str:
    """An instruction set in the environment that this build or machine does not have."""
    return (
        f"l2t: L2T_INSTRUCTION_SET must be one of {', '.join(known)}, got {name!r}, so {used} is used. "
        "Set it to one of these, or not at all."
    )


def no_kernel(device: str) -> str:
    """A device that the compiled core does not know."""
    return (
        f"l2t: logits must be on the CPU for the compiled kernels, got {device}. "
        "The loss runs in plain PyTorch there: right, but slower."
    )


def op_logits(logits: torch.Tensor) -> Exception:
    """What the ops themselves take as logits."""
    return ValueError(
        f"torch.ops.l2t: logits must be of shape (N, C) and float32, float64, bfloat16 or float16, got {_described(logits)}. "
        "Use l2t.dynamic_loss for other shapes and dtypes."
    )


def op_target(target: torch.Tensor, logits: torch.Tensor) -> Exception:
    """What the ops themselves take as target."""
    return ValueError(
        f"torch.ops.l2t: target must be of shape ({logits.shape[0]},), int64 on {logits.device}, got "
        f"{_described(target)}. Use l2t.dynamic_loss for other shapes and dtypes."
    )


def op_low_rank(left: torch.Tensor | None, right: torch.Tensor | None) -> Exception:
    """Left and right come together."""
    return ValueError(
        f"torch.ops.l2t: left and right must be two matrices or None both, got {_described(left)} and "
        f"{_described(right)}. Pass l2t.LowRank to l2t.dynamic_loss."
    )


def op_argument(
    name: str, tensor: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype, logits: torch.Tensor
) -> Exception:
    """A table or a vector of rows that does not fit the logits."""
    return ValueError(
        f"torch.ops.l2t: {name} must be of shape {tuple(shape)}, {str(dtype).removeprefix('torch.')} on {logits.device}, "
        f"got {_described(tensor)}. Use l2t.dynamic_loss, which casts and checks."
    )


def op_segments(segments: int, rows: int) -> Exception:
    """Losses over stretches of rows that are not equal."""
    return ValueError(
        f"torch.ops.l2t: segments must divide the number of rows, got {segments} for {rows} rows. Use 1 for one loss."
    )


def op_wanted(wanted: Sequence[bool]) -> Exception:
    """A gradient to something that is not there."""
    return ValueError(
        "torch.ops.l2t: wanted must be a bool for each result, true only for arguments that are given, got "
        f"{list(wanted)}. Ask for gradients of given tensors."
    )


def target_range(value: int, row: int, num_classes: int, groups: int, ignore_index: int) -> Exception:
    """A target that is neither a class nor ignored; under vmap as the user gave it."""
    # Under vmap what lies beyond the classes was moved beyond those of all groups (ops.py).
    if value >= groups * num_classes:
        value -= (groups - 1) * num_classes
    if ignore_index >= groups * num_classes:
        ignore_index -= (groups - 1) * num_classes
    return IndexError(
        f"l2t.dynamic_loss: target must be in [0, {num_classes}) or ignore_index={ignore_index}, got {value} "
        f"at position {row} of the flattened target. Number the classes from 0, or pass ignore_index={value}."
    )


def third_derivative() -> Exception:
    """More than two derivatives."""
    return NotImplementedError(
        "l2t.dynamic_loss: the order of derivative must be 1 or 2, got a third derivative. "
        "Detach before differentiating again, or take differences of second derivatives."
    )


def inplace_logits(logits: torch.Tensor, direct: bool) -> None:
    """Logits that backward may overwrite: no leaf's memory, which a view shares."""
    owner = logits if logits._base is None else logits._base
    if not direct or not logits.is_contiguous() or (owner.requires_grad and owner.is_leaf):
        raise ValueError(
            "l2t.dynamic_loss: logits must be a contiguous (N, C) result of the student, of which one backward is taken in "
            f"eager mode, for inplace_backward=True, got {_described(logits)}. Leave inplace_backward out."
        )


def inplace_once(inplace: bool) -> None:
    """A second derivative of what the first has overwritten."""
    if inplace:
        raise NotImplementedError(
            "l2t.dynamic_loss: inplace_backward must be False where second derivatives are taken or backward is batched or "
            "traced, got True. Leave it out."
        )


def forward_twice() -> Exception:
    """Forward over forward."""
    return NotImplementedError(
        "l2t.dynamic_loss: the second derivative must be taken over reverse mode or in it, got forward over "
        "forward. Use torch.func.jvp of torch.func.grad, or torch.func.hessian."
    )


# ---- loss: what users pass to it ---------------------------------------------------------------------------


def loss_choice(argument: str, name: object, names: Collection[str]) -> None:
    """The link and the reduction."""
    if name not in names:
        raise ValueError(
            f"l2t.dynamic_loss: {argument} must be one of {', '.join(names)}, got {name!r}. Choose one."
        )


def loss_ignore_index(value: object) -> int:
    """A target that takes no part is a number as targets are."""
    try:
        number = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        number = 2**63
    if not -(2**63) <= number < 2**63:
        raise TypeError(
            f"l2t.dynamic_loss: ignore_index must be an integer of 64 bits, got {value!r}. Leave it out where no target is ignored."
        )
    return number


def _loss_layout(name: str, tensor: object, op: str = "dynamic_loss") -> None:
    """Sparse, nested and other tensors without strides."""
    if isinstance(tensor, torch.Tensor) and (tensor.layout is not torch.strided or tensor.is_nested):
        kind = "nested" if tensor.is_nested else str(tensor.layout).removeprefix("torch.")
        raise TypeError(
            f"l2t.{op}: {name} must be a dense tensor, got a {kind} one. Convert it with .to_dense(), or put the "
            "rows of a nested one together with torch.cat(x.unbind())."
        )


def loss_tensors(logits: object, target: object) -> None:
    """Logits and target, to each other."""
    _loss_layout("logits", logits)
    _loss_layout("target", target)
    if not isinstance(logits, torch.Tensor) or not logits.is_floating_point() or logits.dim() == 0:
        raise _loss_logits(logits)
    if not isinstance(target, torch.Tensor) or target.dtype not in (torch.int64, torch.uint8):
        raise _loss_target_dtype(target)
    if target.shape != (logits.shape[:1] + logits.shape[2:] if logits.dim() > 1 else ()):
        raise _loss_target_shape(logits, target)
    if target.device != logits.device:
        raise ValueError(
            f"l2t.dynamic_loss: target must be on the device of logits, {logits.device}, got "
            f"{target.device}. Move it there with target.to({str(logits.device)!r})."
        )


def _loss_logits(logits: object) -> Exception:
    if isinstance(logits, torch.Tensor) and logits.is_floating_point():
        return ValueError(
            "l2t.dynamic_loss: logits must be of shape (N, C), (N, C, d1, ...) or (C,), got "
            f"{_described(logits)}. Give one score a class."
        )
    return TypeError(
        f"l2t.dynamic_loss: logits must be a floating-point tensor, got {_described(logits)}. "
        "Pass the raw scores of the student."
    )


def _loss_target_dtype(target: object) -> Exception:
    if isinstance(target, torch.Tensor) and target.is_floating_point():
        return TypeError(
            f"l2t.dynamic_loss: target must be class indices, got {_described(target)}. Pass "
            "target.argmax(1), or put each class's probabilities into its row of weight, link='identity'."
        )
    return TypeError(
        f"l2t.dynamic_loss: target must be an int64 or uint8 tensor, got {_described(target)}. "
        "Convert it with target.long()."
    )


def _loss_target_shape(logits: torch.Tensor, target: torch.Tensor) -> Exception:
    shape = tuple(logits.shape[:1] + logits.shape[2:]) if logits.dim() > 1 else ()
    return ValueError(
        f"l2t.dynamic_loss: target must be of shape {shape} for logits of shape {tuple(logits.shape)}, "
        f"got {_described(target)}. The classes are dimension 1 of logits, or dimension 0 of a single sample."
    )


def loss_weight(weight: object) -> Exception:
    """A weight that is none of the structures."""
    return TypeError(
        "l2t.dynamic_loss: weight must be l2t.Full, l2t.Diagonal, l2t.LowRank, a tensor or None, got "
        f"{_described(weight)}. Wrap the coefficients in one of these."
    )


def loss_matrix(weight: torch.Tensor, num_classes: int, logits: torch.Tensor) -> None:
    """A weight that is a plain tensor."""
    _loss_layout("weight", weight)
    if weight.shape not in ((num_classes,), (num_classes, num_classes)):
        raise ValueError(
            f"l2t.dynamic_loss: weight must be of shape ({num_classes}, {num_classes}) or ({num_classes},), got "
            f"{_described(weight)}. Give one coefficient for each class, or for each pair of classes."
        )
    _loss_dtype("weight", weight, logits)


def loss_table(name: str, tensor: object, shape: Sequence[int], logits: torch.Tensor) -> None:
    """A part of the weight, the bias, the scale, or the sample weights."""
    _loss_layout(name, tensor)
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(
            f"l2t.dynamic_loss: {name} must be a tensor, got {_described(tensor)}. Use torch.tensor(...)."
        )
    if tensor.shape != shape:
        raise ValueError(
            f"l2t.dynamic_loss: {name} must be of shape {tuple(shape)} for logits of shape "
            f"{tuple(logits.shape)}, got {_described(tensor)}. Give one entry for each class (or sample)."
        )
    _loss_dtype(name, tensor, logits)


def _loss_dtype(name: str, tensor: torch.Tensor, logits: torch.Tensor) -> None:
    """Coefficients have the dtype of logits or of the arithmetic, under autocast any up to float32."""
    if tensor.device != logits.device:
        raise ValueError(
            f"l2t.dynamic_loss: {name} must be on the device of logits, {logits.device}, got "
            f"{tensor.device}. Move it there with .to({str(logits.device)!r})."
        )
    if tensor.dtype is logits.dtype:
        return
    up_to_float32 = tensor.dtype in (torch.float16, torch.bfloat16, torch.float32)
    if tensor.dtype is torch.float32 and logits.dtype in (torch.float16, torch.bfloat16):
        return
    if up_to_float32 and logits.dtype is not torch.float64 and torch.is_autocast_enabled(logits.device.type):
        return
    dtype = str(logits.dtype).removeprefix("torch.")
    fits = dtype if logits.dtype in (torch.float32, torch.float64) else f"{dtype} or float32"
    raise TypeError(
        f"l2t.dynamic_loss: {name} must be {fits} with {dtype} logits, got {_described(tensor)}. Cast it "
        f"with .to(torch.{dtype})."
    )


def label_smoothing(owner: str, smoothing: float) -> None:
    """A share of the target, as that of `torch.nn.functional.cross_entropy`."""
    if not 0 <= smoothing <= 1:
        raise ValueError(
            f"l2t.{owner}.smoothed: smoothing must be between 0 and 1, got {smoothing}. Give a share, such as 0.1."
        )


def module_coefficients(tensors: Sequence[object]) -> None:
    """What a DynamicLoss is made from: tensors that nobody computed."""
    for x in tensors:
        if not isinstance(x, torch.Tensor) or not x.is_floating_point() or x.dim() == 0:
            raise TypeError(
                "l2t.DynamicLoss: coefficients must be floating-point tensors with an entry for each class, got "
                f"{_described(x)}. Start from l2t.Diagonal.identity(num_classes)."
            )
        if x.requires_grad and not isinstance(x, torch.nn.Parameter):
            raise ValueError(
                "l2t.DynamicLoss: coefficients must be parameters or tensors without gradient, got one "
                f"of {_described(x)} that requires one. Call l2t.dynamic_loss with computed coefficients."
            )


# ---- linear: the loss of a linear head -------------------------------------------------------------------------------


def linear_tensors(hidden: object, head: object, head_bias: object, target: object) -> None:
    """Hidden, head and target, to each other; dtypes only as far as autocast leaves them alone."""
    for name, x in (("hidden", hidden), ("head", head), ("head_bias", head_bias), ("target", target)):
        _loss_layout(name, x, "dynamic_linear_loss")
    for name, x in (
        ("hidden", hidden),
        ("head", head),
        *([("head_bias", head_bias)] * (head_bias is not None)),
    ):
        if not isinstance(x, torch.Tensor) or x.dtype not in (
            torch.float32,
            torch.float64,
            torch.bfloat16,
            torch.float16,
        ):
            mend = (
                f"Pass its weight, {name}.weight"
                if isinstance(x, nn.Module)
                else f"Convert it with {name}.float()"
            )
            raise TypeError(
                f"l2t.dynamic_linear_loss: {name} must be a float32, float64, bfloat16 or float16 tensor, got "
                f"{_described(x)}. {mend}."
            )
    assert isinstance(hidden, torch.Tensor)
    assert isinstance(head, torch.Tensor)
    if hidden.dim() == 0 or head.dim() != 2 or head.shape[1] != hidden.shape[-1]:
        raise ValueError(
            "l2t.dynamic_linear_loss: hidden and head must be of shapes (..., D) and (C, D), got "
            f"{_described(hidden)} and {_described(head)}. Pass the weight of a torch.nn.Linear as head."
        )
    if isinstance(head_bias, torch.Tensor) and head_bias.shape != head.shape[:1]:
        raise ValueError(
            f"l2t.dynamic_linear_loss: head_bias must be of shape ({head.shape[0]},), got {_described(head_bias)}. "
            "Pass the bias of a torch.nn.Linear; the bias inside the link is the argument bias."
        )
    if not isinstance(target, torch.Tensor) or target.dtype not in (torch.int64, torch.uint8):
        raise _loss_target_dtype(target)
    if target.shape != hidden.shape[:-1]:
        raise ValueError(
            f"l2t.dynamic_linear_loss: target must be of shape {tuple(hidden.shape[:-1])} for hidden of shape "
            f"{tuple(hidden.shape)}, got {_described(target)}. Give one class for each row of hidden."
        )
    for name, x in (("head", head), ("head_bias", head_bias), ("target", target)):
        if isinstance(x, torch.Tensor) and x.device != hidden.device:
            raise ValueError(
                f"l2t.dynamic_linear_loss: {name} must be on the device of hidden, {hidden.device}, got "
                f"{x.device}. Move it there with .to({str(hidden.device)!r})."
            )


def linear_dtypes(hidden: Tensor, head: Tensor, head_bias: Tensor | None) -> None:
    """A product has one dtype; called after autocast's conversions."""
    for name, x in (("head", head), ("head_bias", head_bias)):
        if x is not None and x.dtype is not hidden.dtype:
            dtype = str(hidden.dtype).removeprefix("torch.")
            raise TypeError(
                f"l2t.dynamic_linear_loss: {name} must be {dtype} as hidden is, got {_described(x)}. Cast one of "
                "them, or run under torch.autocast."
            )


def linear_chunk_rows(rows: object) -> int | None:
    """How many rows have their logits in memory."""
    if rows is None:
        return None
    try:
        number = 0 if isinstance(rows, bool) else operator.index(rows)  # type: ignore[arg-type]
    except TypeError:
        number = 0
    if number < 1:
        raise ValueError(
            f"l2t.dynamic_linear_loss: chunk_rows must be an integer of 1 or more, got {rows!r}. "
            "Leave it out for as many rows as 32 MB of logits hold."
        )
    return number


# ---- unroll ----------------------------------------------------------------------------------------------------------


def unroll_not_inference(op: str = "unroll") -> None:
    """Nothing can be differentiated in inference mode."""
    if torch.is_inference_mode_enabled():
        raise RuntimeError(
            f"l2t.{op}: the caller must be outside torch.inference_mode, got a call inside it. "
            "Leave the mode (torch.no_grad is fine)."
        )


def unroll_not_transformed() -> None:
    """torch.func sees nothing of what a run differentiates by itself."""
    if torch._C._are_functorch_transforms_active():
        raise RuntimeError(
            "l2t.unroll: the caller must be outside the transforms of torch.func, got a call inside one. Call "
            "run.backward() and read .grad in place of torch.func.grad; take several students as one l2t.Stack in place "
            "of torch.func.vmap."
        )


def schedule_size(name: str, value: int, least: int) -> None:
    """A number of steps or slots."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(
            f"l2t.schedule: {name} must be an integer of {least} or more, got {value!r}. Give a number of steps or states."
        )


def unroll_schedule(schedule: object, names: Sequence[str]) -> None:
    """A name, or something that plans."""
    plans = not isinstance(schedule, type) and callable(getattr(schedule, "actions", None))
    if schedule not in names and not plans:
        raise ValueError(
            f"l2t.unroll: schedule must be one of {', '.join(names)} or an object of l2t.schedule, got {schedule!r}. "
            "Choose one of these."
        )


def unroll_memory(memory: object, schedule: object) -> int | None:
    """Returns a number of bytes, given as such or as "64MB", for a schedule that lives in a memory."""
    if memory is None:
        if schedule == "binomial":
            raise ValueError(
                f"l2t.unroll: memory must be given with schedule={schedule!r}, got None. Say for example memory='64MB'."
            )
        return None
    if schedule not in ("auto", "binomial", "disk"):
        raise ValueError(
            f"l2t.unroll: memory must be None with schedule={schedule!r}, which does not go by it, got {memory!r}. "
            "Take schedule='auto'."
        )
    found = re.fullmatch(r"\s*([0-9.]+)\s*([kKMGT]?)(i?)B\s*", memory) if isinstance(memory, str) else None
    if found:
        number, prefix, binary = found.groups()
        try:
            return int(float(number) * (1024 if binary else 1000) ** " KMGT".index(prefix.upper() or " "))
        except ValueError:
            pass
    elif isinstance(memory, int) and not isinstance(memory, bool) and memory > 0:
        return memory
    raise ValueError(
        f"l2t.unroll: memory must be a number of bytes or a text such as '64MB' or '2GiB', got {memory!r}. Give one of these."
    )


def plan_batches(batches: Any, indexed: bool) -> None:
    """The number of steps is known, and there is a first one to try."""
    if not (indexed and len(batches)):
        raise ValueError(
            f"l2t.plan: batches must have a length of 1 or more and be indexed, got {_described(batches)}. "
            "Give a list or such as [batch] * 1000."
        )


def unroll_store(store: str, verify: object, schedule: object, memory: object) -> None:
    """States are rounded where there are some, and none is expected to come back as it was."""
    if store == "exact":
        return
    if schedule == "all" or (schedule == "auto" and memory is None):
        raise ValueError(
            f"l2t.unroll: store must be 'exact' with schedule={schedule!r} and memory={memory!r}, which store no states, "
            f"got {store!r}. Give a memory, or a schedule that stores some."
        )
    if verify is not None:
        raise ValueError(
            f"l2t.unroll: verify must be None with store={store!r}, from which no state comes back as it was, got "
            f"{verify!r}. Take store='exact'."
        )


def unroll_directory(directory: object, schedule: object) -> None:
    """A directory is given where states may go to disk: by name or by an object that plans."""
    if directory is not None and isinstance(schedule, str) and schedule != "disk":
        raise ValueError(
            f"l2t.unroll: directory must be None with schedule={schedule!r}, which writes nothing to disk, got "
            f"{directory!r}. Take schedule='disk'."
        )


def states_directory(directory: object, error: OSError) -> OSError:
    """A folder cannot be made there."""
    return OSError(
        f"l2t.unroll: directory must be one that can be written to, got {str(directory)!r} ({error}). Name another."
    )


def states_room(needed: int, free: int, directory: object) -> None:
    """The disk has room for the states of a plan."""
    if needed > free:
        raise OSError(
            f"l2t.unroll: directory must have room for the states of the run, {needed} bytes, got {free} free at "
            f"{str(directory)!r}. Name another, or give more memory, so that fewer states are written."
        )


def states_write(directory: object, error: Exception) -> OSError:
    """A state cannot be written."""
    return OSError(
        f"l2t.unroll: directory must take the states of the run, got an error at {str(directory)!r} ({error}). "
        "Make room or name another, or give more memory, so that fewer states are written."
    )


def states_read(directory: object, error: Exception) -> OSError:
    """A state that was written is not there any more."""
    return OSError(
        f"l2t.unroll: directory must keep the states of the run until backward(), got an error at {str(directory)!r} "
        f"({error}). Name one that nothing else cleans up, and unroll again."
    )


def schedule_memory(memory: int, step_bytes: int) -> None:
    """A budget that holds at least one step."""
    if memory < step_bytes:
        raise ValueError(
            f"l2t.unroll: memory must hold one step of the run, {step_bytes} bytes here, got {memory}. "
            "Give more, or take curvature='recompute', whose steps are smaller."
        )


SHARING = {"DistributedDataParallel", "FullyShardedDataParallel", "FSDPModule"}


def unroll_student(student: object) -> None:
    """The student is a module whose parameters can be replaced for a call."""
    if not isinstance(student, nn.Module) or isinstance(student, torch.jit.ScriptModule):
        raise TypeError(
            f"l2t.unroll: student must be an ordinary torch.nn.Module, got {_described(student)}. "
            "Give the module that loss and measure are to be called with."
        )
    trained = [(name, p) for name, p in student.named_parameters() if p.requires_grad]
    if not trained:
        raise ValueError(
            "l2t.unroll: student must have a parameter that requires a gradient, got none. "
            "Call requires_grad_() on what is to be trained."
        )
    for name, p in trained:
        if torch.nn.parameter.is_lazy(p):
            raise ValueError(
                f"l2t.unroll: parameters of student must have a shape, got the uninitialised {name}. "
                "Run the module on one batch first."
            )
        if p.is_meta:
            raise ValueError(
                f"l2t.unroll: parameters of student must have numbers, got {name} on the device meta. Call "
                "student.to_empty(device=...) and initialise it, or make it on a device that has memory."
            )
        if p.is_complex():
            raise TypeError(
                f"l2t.unroll: parameters of student must be real, got {name} of {_described(p)}. "
                "Keep real and imaginary part as a real parameter, and use torch.view_as_complex in the module."
            )
        if p._backward_hooks or getattr(p, "_post_accumulate_grad_hooks", None):
            raise ValueError(
                f"l2t.unroll: parameters of student must have no gradient hooks, got one on {name}, which the "
                "run would pass by. Do in loss or in the module what the hook does, and remove it."
            )
    for name, part in student.named_modules():
        sharing = {kind.__name__ for kind in type(part).__mro__} & SHARING
        if sharing:
            raise TypeError(
                f"l2t.unroll: modules of student must leave gradients to the run, got a {sharing.pop()} at "
                f"{name or 'the student itself'}, which sums over ranks what backward() leaves in .grad, and nothing of "
                "a run. Give the module inside of it, and the process group as group."
            )
        if _has_fused_weight_norm(part):
            raise ValueError(
                "l2t.unroll: operations of student must have right second derivatives, got weight_norm on "
                f"{name.removesuffix('.parametrizations.weight') or 'student'}, whose fused kernel PyTorch "
                "differentiates wrongly. Give the norm's formula g * v / torch.linalg.vector_norm(v, dim=..., "
                "keepdim=True) to torch.nn.utils.parametrize."
            )


def _has_fused_weight_norm(part: nn.Module) -> bool:
    """Whether a module calls torch._weight_norm where it is fused: along the first or the last dimension."""
    norms: list[tuple[int, Any]] = []
    for hook in part._forward_pre_hooks.values():
        if type(hook).__name__ == "WeightNorm":  # the older torch.nn.utils.weight_norm
            norm: Any = hook
            norms.append((norm.dim, getattr(part, norm.name + "_v")))
    if isinstance(part, nn.utils.parametrize.ParametrizationList):
        for parametrization in part:
            if isinstance(parametrization, nn.utils.parametrizations._WeightNorm):
                norms.append((parametrization.dim, part.original1))
    return any(dim in (0, v.dim() - 1) for dim, v in norms)


def unroll_functions(loss: object, measure: object) -> None:
    """The loss and the measure are functions."""
    for name, value, form in (
        ("loss", loss, "loss(model, batch, step)"),
        ("measure", measure, "measure(model)"),
    ):
        if not callable(value):
            raise TypeError(
                f"l2t.unroll: {name} must be a function, got {_described(value)}. It is called as {form}."
            )


def unroll_batches(batches: object) -> None:
    """There is something to iterate over."""
    if not hasattr(batches, "__iter__") and not hasattr(batches, "__getitem__"):
        raise TypeError(
            f"l2t.unroll: batches must be an iterable, got {_described(batches)}. "
            "Give a list of batches, a DataLoader or a generator: one batch a step."
        )
    named = isinstance(batches, Mapping) and list(batches) != list(range(len(batches)))
    if named or getattr(batches, "ndim", 1) == 0:
        raise TypeError(
            f"l2t.unroll: batches must be one batch a step, got {_described(batches)}, which is not a sequence of them. "
            "Put a single batch in a list: [batch] * steps."
        )


def unroll_optimizer(optimizer: object, known_type: type) -> None:
    """The optimiser knows its transpose."""
    if not isinstance(optimizer, known_type):
        kind = optimizer if isinstance(optimizer, type) else type(optimizer)
        got = ("the class " if kind is optimizer else "") + f"{kind.__module__}.{kind.__qualname__}"
        raise TypeError(
            f"l2t.unroll: optimizer must be one of l2t.optim, got {got}. "
            "Use l2t.optim.SGD(lr=..., momentum=..., weight_decay=...), another one there, or l2t.optim.FromTorch("
            "torch.optim.NAdam, lr=...) for one of torch.optim."
        )


def unroll_meta(meta: Iterable[Tensor] | None) -> list[Tensor] | None:
    """Returns the meta tensors without repetition, or None for all that are reached."""
    if meta is None:
        return None
    if isinstance(meta, Tensor) or not isinstance(meta, Iterable):
        raise TypeError(
            f"l2t.unroll: meta must be a list of tensors, got {_described(meta)}. Put a single tensor in a list."
        )
    chosen = list({id(x): x for x in meta}.values())
    if not chosen:
        raise ValueError(
            "l2t.unroll: meta must hold a tensor, got an empty list or a generator that was used up. "
            "Give list(teacher.parameters()), or None for every leaf that is reached."
        )
    for i, x in enumerate(chosen):
        if not isinstance(x, Tensor):
            raise TypeError(
                f"l2t.unroll: meta must be a list of tensors, got {_described(x)} at position {i}. "
                "Give the tensors themselves."
            )
        if not (x.requires_grad and x.is_leaf):
            lacks = "does not require a gradient" if x.is_leaf else "is not a leaf"
            raise ValueError(
                f"l2t.unroll: meta must hold leaves that require a gradient, got {_described(x)} at position {i}, "
                f"which {lacks}. Call requires_grad_() on it, or give the leaves it was computed from."
            )
        if x._backward_hooks or getattr(x, "_post_accumulate_grad_hooks", None):
            raise ValueError(
                f"l2t.unroll: meta must hold tensors without gradient hooks, got one on that at position {i}, which every "
                "step of the walk back would call. Do to .grad after backward() what the hook does, and remove it."
            )
    return chosen


def unroll_hooks_of_leaf(leaf: Tensor) -> None:
    """A leaf that gets its gradient unnamed, from each step in turn."""
    if leaf._backward_hooks or getattr(leaf, "_post_accumulate_grad_hooks", None):
        raise ValueError(
            "l2t.unroll: leaves that loss and measure reach must have no gradient hooks, got one on that of "
            f"{_described(leaf)}, which every step of the walk back would call. Do to .grad after backward() what the "
            "hook does, and remove it; or name in meta the tensors whose .grad is wanted."
        )


def unroll_meta_still(i: int, requires_grad: bool) -> None:
    """A meta tensor wants its gradient when it comes to it."""
    if not requires_grad:
        raise RuntimeError(
            f"l2t.unroll: meta must require a gradient until backward(), got the one at position {i}, which does not any "
            "more. Call requires_grad_() on it."
        )


def unroll_sparse(name: str) -> None:
    """A gradient that only the plainest of optimisers can take."""
    raise ValueError(
        f"l2t.unroll: gradients must be dense but for l2t.optim.SGD with an exact curvature, got a sparse one of {name}. "
        "Leave out sparse=True of the embedding."
    )


def optim_stale(owner: str, name: str, stale: bool) -> None:
    """A setting that was computed of leaves which have changed since."""
    if stale:
        raise RuntimeError(
            f"l2t.optim.{owner}: {name} must be computed anew when what it was computed of has changed, got one of before "
            "an optimiser's step. Make the optimiser in the loop, or give a function of the step."
        )


def schedule_actions(fits: bool, schedule: object) -> None:
    """A plan takes, tapes and reverses steps in an order that can be played."""
    if not fits:
        raise ValueError(
            f"l2t.unroll: schedule must tape each step when the state before it is there and reverse each once, the last "
            f"first, got {schedule!r}, which does not. Take one of l2t.schedule, or look at what its actions() yield."
        )


def unroll_truncate(truncate: object, meta: Sequence[Tensor] | None, student: nn.Module) -> None:
    """A walk back that ends before the start does not come to the initial weights."""
    if truncate is None:
        return
    if isinstance(truncate, bool) or not isinstance(truncate, int) or truncate < 1:
        raise ValueError(
            f"l2t.unroll: truncate must be an integer of 1 or more, or None, got {truncate!r}. "
            "Give the number of last steps to walk back over."
        )
    _no_initial_weights(f"truncate={truncate}", meta, student)


def _no_initial_weights(limit: str, meta: Sequence[Tensor] | None, student: nn.Module) -> None:
    own = {id(p) for p in student.parameters()}
    if any(id(x) in own for x in meta or ()):
        raise ValueError(
            f"l2t.unroll: meta must hold no parameter of student with {limit}, got one: the walk back does "
            "not come to the initial weights. Leave it out, or take order='first' and walk back all the way."
        )


def unroll_growth(growth: object, along: object, meta: Sequence[Tensor] | None, student: nn.Module) -> None:
    """How much longer an adjoint may become."""
    if growth is None:
        return
    if isinstance(growth, bool) or not isinstance(growth, (int, float)) or not 1.0 <= growth < math.inf:
        raise ValueError(
            f"l2t.unroll: growth must be a number of 1 or more, or None, got {growth!r}. Give 10 or so, or leave it out."
        )
    if along is not None:
        raise ValueError(
            f"l2t.unroll: growth must be None with measures along the way, got {growth!r}: the adjoint begins anew at "
            "each of them. Take truncate or damping."
        )
    _no_initial_weights(f"growth={growth}", meta, student)


def unroll_damping(damping: object) -> None:
    """A factor of the adjoint."""
    if isinstance(damping, bool) or not isinstance(damping, (int, float)) or not 0.0 < damping <= 1.0:
        raise ValueError(
            f"l2t.unroll: damping must be above 0 and at most 1, got {damping!r}. Leave it out for the exact gradient."
        )


def unroll_accumulate(accumulate: object) -> None:
    """A number of micro-batches."""
    if isinstance(accumulate, bool) or not isinstance(accumulate, int) or accumulate < 1:
        raise ValueError(
            f"l2t.unroll: accumulate must be an integer of 1 or more, got {accumulate!r}. "
            "Give the number of micro-batches that a batch is a sequence of."
        )


def unroll_compile(compile: object, meta: object, curvature: str) -> None:
    """Compiled code is made for named tensors, and is a way to second derivatives of its own."""
    if not isinstance(compile, bool):
        raise TypeError(f"l2t.unroll: compile must be True or False, got {_described(compile)}. Choose one.")
    if compile and meta is None:
        raise ValueError(
            "l2t.unroll: meta must be named with compile=True, got None. Give the list of tensors whose .grad is wanted."
        )
    if compile and curvature not in ("reverse", "recompute"):
        raise ValueError(
            f"l2t.unroll: curvature must be 'reverse' or 'recompute' with compile=True, got {curvature!r}. Leave out one "
            "of the two."
        )
    if compile and any(torch.is_autocast_enabled(kind) for kind in ("cpu", "cuda")):
        raise RuntimeError(
            "l2t.unroll: autocast must be off around a call with compile=True, got it on. Enter torch.autocast inside loss."
        )


def unroll_compiled_dtypes(found: Collection[torch.dtype]) -> None:
    """Products in float16 need a scale that compiled code does not have."""
    if torch.float16 in found:
        raise ValueError(
            "l2t.unroll: loss must compute in float32, float64 or bfloat16 with compile=True, got float16. Take bfloat16, "
            "or leave out compile."
        )


def unroll_compiled_batch(leaf: object, step: int) -> Exception:
    """Everything in a batch is an argument of the compiled code."""
    wrong: type[Exception] = ValueError if isinstance(leaf, Tensor) else TypeError
    got = "one with a graph" if isinstance(leaf, Tensor) else f"{_described(leaf)}"
    return wrong(
        "l2t.unroll: a batch must be tensors without a graph, in tuples, lists and dicts, with compile=True, got "
        f"{got} at step {step}. Give the tensors themselves in place of indices and numbers, and compute in loss what "
        "depends on meta tensors."
    )


def unroll_compiled_form(step: int) -> ValueError:
    """Code is compiled for one shape."""
    return ValueError(
        "l2t.unroll: all batches must have the same shapes, dtypes and devices with compile=True, got others at step "
        f"{step}. Drop a smaller last batch (DataLoader(..., drop_last=True)), or leave out compile."
    )


def unroll_compiled_step() -> TypeError:
    """The code of one step serves all."""
    return TypeError(
        "l2t.unroll: loss must not use the number of the step with compile=True, got a use of it. Put what depends on the "
        "step into the batch as a tensor, such as torch.tensor(float(step)), or leave out compile."
    )


def unroll_compiled_operation(name: str, does: str) -> RuntimeError:
    """A trace would freeze what this gives."""
    return RuntimeError(
        f"l2t.unroll: loss must be the same operations in every step with compile=True, got {name}, which {does}. Write it "
        "as operations on tensors, with random numbers (dropout among them) drawn into the batch; or leave out compile."
    )


def unroll_compiled_target() -> str:
    """The classes of a later step, which compiled code looks at."""
    return (
        "l2t.unroll: target must hold class indices of the logits or ignore_index, got another number in a step of "
        "compiled code. Correct the labels."
    )


def unroll_not_compiled(error: Exception) -> Exception:
    """Says why there is no compiled code; a sentence of ours as it is."""
    said = str(error)
    if said.startswith("l2t."):
        return error
    return RuntimeError(
        "l2t.unroll: loss must be traced by make_fx and compiled by torch's inductor with compile=True, got "
        f"{type(error).__name__} ({said.strip().splitlines()[0].rstrip('. ') if said.strip() else 'no words'}). Leave out "
        "compile, or what it is about."
    )


def unroll_compiled_agrees(differs: str | None) -> None:
    """Compiled code gives what the loss gives."""
    if differs is not None:
        raise RuntimeError(
            f"l2t.unroll: compiled code must give what loss gives, got another {differs} at the first step. Let loss depend "
            "on model, batch and meta tensors alone, and be the same at every call; or leave out compile."
        )


def unroll_compiled_again(off: float, most: float) -> None:
    """A step in the walk back is the step that was taken."""
    if not off <= most:
        raise RuntimeError(
            f"l2t.unroll: loss must be the same when a step is run again, got values that are off by up to {off:.2g} of it. "
            "Let it depend on model, batch and meta tensors alone and change no tensor in place before backward."
        )


def unroll_compiled_still(step: int, still: bool) -> None:
    """What compiled code has read of others, its reverse reads as it was."""
    if not still:
        raise RuntimeError(
            "l2t.unroll: batches, meta tensors and what else loss reads must stay as they are until the run is walked back with "
            f"compile=True, got one that was written in place since step {step}. Call backward() first, or give it a clone()."
        )


def unroll_micro_batches(batch: object, count: int, step: int) -> Sequence[Any]:
    """Returns the micro-batches of a step."""
    sequence: Any = batch
    if not (hasattr(batch, "__len__") and hasattr(batch, "__getitem__")) or len(sequence) != count:
        got = (
            f"{type(batch).__name__} of {len(sequence)}"
            if hasattr(batch, "__len__")
            else type(batch).__name__
        )
        raise ValueError(
            f"l2t.unroll: each of batches must be a sequence of {count} micro-batches with accumulate={count}, got "
            f"a {got} at step {step}. Put that many things that loss takes in a list."
        )
    return [sequence[i] for i in range(count)]


def unroll_group(group: object, meta: object, batches: object) -> None:
    """A group of processes that this one is in, and what they must know before the run."""
    if group is None:
        return
    if not (torch.distributed.is_available() and isinstance(group, torch.distributed.ProcessGroup)):
        raise TypeError(
            f"l2t.unroll: group must be a torch.distributed process group that this process is in, got {_described(group)}. "
            "Give torch.distributed.group.WORLD after init_process_group."
        )
    if meta is None:
        raise ValueError(
            "l2t.unroll: meta must be a list of tensors with group, got None: ranks add up gradients in its order. "
            "Give the same list on every rank, such as list(teacher.parameters())."
        )
    if not hasattr(batches, "__len__"):
        raise TypeError(
            f"l2t.unroll: batches must have a length with group, got {_described(batches)}: all ranks take as many steps. "
            "Give a list."
        )


def unroll_ranks_agree(what: str, values: Sequence[Any], when: str) -> None:
    """What all ranks hold alike; tensors by name as hashes."""
    first = values[0]
    for rank, value in enumerate(values):
        if value == first:
            continue
        got = f"{first} on rank 0 and {value} on rank {rank}"
        if isinstance(value, dict):
            names = [name for name in first | value if first.get(name) != value.get(name)]
            got = f"{names[0]} that differs on rank {rank}"
        raise ValueError(
            f"l2t.unroll: {what} must be the same on all ranks of group {when}, got {got}. Give every rank the same "
            "numbers of batches, meta tensors, weights (torch.manual_seed, or broadcast them), optimizer and settings."
        )


def unroll_loss(value: object, step: int) -> Tensor:
    """Returns the loss, a scalar with a graph."""
    if not isinstance(value, Tensor) or value.dim() != 0 or not value.is_floating_point():
        raise ValueError(
            f"l2t.unroll: loss must return a real 0-dim tensor, got {_described(value)} at step {step}. "
            "Take the mean or the sum (the sum over students that share a run)."
        )
    if not value.requires_grad:
        raise ValueError(
            f"l2t.unroll: loss must return a tensor with a graph, got a detached one at step {step}. "
            "Compute it from the model that loss is given, without detach, item or no_grad."
        )
    return value


def unroll_trains(trains: bool) -> None:
    """The loss is one of the student."""
    if not trains:
        raise ValueError(
            "l2t.unroll: loss must depend on the parameters of the model that it is given, got none of them at any "
            "step. Use the model argument, not another module or tensors kept from before the run, and "
            "torch.utils.checkpoint with use_reentrant=False."
        )


def unroll_along(along: object) -> int | dict[int, float] | None:
    """Returns when measures along the way are taken: every so many steps, or weights by steps taken."""
    if along is None or (isinstance(along, int) and not isinstance(along, bool) and along > 0):
        return along
    wrong: object = along
    if isinstance(along, Mapping) and along:
        weights = dict(along)
        found: list[object] = [t for t in weights if isinstance(t, bool) or not isinstance(t, int) or t < 1]
        found += [x for x in weights.values() if not isinstance(x, (int, float)) or not math.isfinite(x)]
        if not found:
            return weights
        wrong = found[0]
    raise ValueError(
        "l2t.unroll: along must be an integer of 1 or more, or a mapping from numbers of steps taken, 1 or more, to "
        f"finite weights, got {wrong!r}. Give for example along=10, or along={{50: 0.5, 100: 0.5}}."
    )


def unroll_along_steps(along: object, steps: int) -> None:
    """Measures along the way are taken within the run."""
    beyond = [t for t in along if t > steps] if isinstance(along, dict) else []
    if beyond:
        raise ValueError(
            f"l2t.unroll: along must name numbers of steps up to {steps}, those of the run, got {beyond[0]}. "
            "Leave it out or give more batches."
        )


def unroll_measured_again(value: Tensor, recorded: Tensor, taken: int) -> None:
    """A measure that is taken again is the measure that was taken."""
    if not torch.allclose(value, recorded, rtol=0, atol=0, equal_nan=True):
        raise RuntimeError(
            f"l2t.unroll: measure must be the same when it is taken again, got {value.detach()} for {recorded} after step "
            f"{taken}. Let it depend on the model and PyTorch's default random numbers alone and change no tensor in place "
            "before backward; or leave out along."
        )


def unroll_measure(value: object, first: Tensor | None = None) -> None:
    """The measure is a scalar or one number a student, with a graph, and always alike."""
    if not isinstance(value, Tensor) or value.dim() > 1 or not value.is_floating_point():
        raise ValueError(
            f"l2t.unroll: measure must return a real tensor of shape () or (S,), got {_described(value)}. "
            "Take the mean over samples."
        )
    if not value.requires_grad:
        raise ValueError(
            "l2t.unroll: measure must return a tensor with a graph, got a detached one. Compute it from the model "
            "that measure is given, by differentiable operations (cross-entropy or 1 - p_y, not accuracy)."
        )
    if first is not None and (value.shape, value.dtype) != (first.shape, first.dtype):
        raise ValueError(
            f"l2t.unroll: measure must always be of one shape and dtype, got {_described(value)} after "
            f"{_described(first)}. Return the same at every step that along asks for."
        )


def unroll_buffers(names: Sequence[str], buffers: Sequence[object]) -> None:
    """Buffers are carried from step to step without a graph."""
    for name, buffer in zip(names, buffers, strict=True):
        if not isinstance(buffer, Tensor) or buffer.requires_grad:
            got = "one with a graph" if isinstance(buffer, Tensor) else _described(buffer)
            raise ValueError(
                f"l2t.unroll: buffer {name} must be a tensor without a graph after a call of the model, got {got}. "
                "Update it from detached values, as BatchNorm does."
            )


def unroll_buffer_appears(name: str, appears: bool) -> None:
    """A buffer that was None has been given a value."""
    if appears:
        raise ValueError(
            f"l2t.unroll: buffers must be there before the run, got {name}, which was None and has been set by the "
            "module. Run the module on one batch first, or register the buffer with its first value."
        )


def unroll_buffer_unseen(name: str, written: bool) -> None:
    """A buffer that no step seemed to write is another one now."""
    if written:
        raise RuntimeError(
            f"l2t.unroll: a large buffer must be written from the first step on or in ways that PyTorch counts, got {name}, "
            "which a later step was the first to write (as batch_norm does, without a word). Train in one mode, or give "
            "each mode a run of its own."
        )


def unroll_in_place(name: str, changed: bool) -> None:
    """Loss or measure has written to a weight, which is an operation that the walk back knows nothing of."""
    if changed:
        raise RuntimeError(
            f"l2t.unroll: loss and measure must leave the student's weights as they are, got a change of {name} in place. "
            "Compute with a changed copy instead, as torch.nn.utils.parametrize does (of nn.Embedding leave out max_norm)."
        )


def unroll_frozen_in_place(name: str, changed: bool) -> None:
    """Loss or measure has written to a parameter that is constant in a run."""
    if changed:
        raise RuntimeError(
            "l2t.unroll: parameters of student that require no gradient must stay as they are, got a change of "
            f"{name} in place. Register it as a buffer, which goes from step to step and comes back as it was."
        )


def unroll_place(name: str, holder: str, fixed: bool) -> None:
    """Weights of a step can be put where a module reads its parameters."""
    if fixed:
        raise ValueError(
            f"l2t.unroll: parameters of student must be read from places that can be set, got {name} in a tuple in "
            f"{holder}, which would stay at the start of the run. Make it a list, or read the parameter itself in forward."
        )


def unroll_open(is_open: bool) -> None:
    """A run is walked back once."""
    if not is_open:
        raise RuntimeError(
            "l2t.unroll: backward must be called once a run, got a second call, when the steps are freed already. "
            "Unroll again, or give one call the sum of the cotangents."
        )


def unroll_cotangent(gradient: object, measure: Tensor) -> Tensor:
    """Returns the cotangent of the measure, ones by default."""
    if gradient is None:
        return torch.ones_like(measure)
    if not isinstance(gradient, Tensor) or gradient.shape != measure.shape:
        raise ValueError(
            f"l2t.unroll: gradient must be a tensor of the measure's shape {tuple(measure.shape)}, "
            f"got {_described(gradient)}. Give one number a measure, or nothing for ones."
        )
    return gradient.detach().to(measure)


def unroll_leak(step: int) -> RuntimeError:
    """A later step has reached this one otherwise than through the model's weights."""
    return RuntimeError(
        "l2t.unroll: loss and measure must reach earlier steps through the model's weights alone, got a graph that "
        f"leads into step {step} from a later one. Detach what loss carries from step to step "
        "(the features of a student's state are constants of the run)."
    )


def unroll_replayed(value: Tensor, recorded: Tensor | None, step: int) -> None:
    """A step that is run again is the step that was taken."""
    if recorded is None or not torch.allclose(value, recorded, rtol=0, atol=0, equal_nan=True):
        raise RuntimeError(
            f"l2t.unroll: loss must be the same when a step is run again, got {value.detach()} for {recorded} at step {step}. "
            "Let it depend on model, batch, step and PyTorch's default random numbers alone and change no tensor in place "
            "before backward; or use curvature='reverse' with schedule='all', which run none again."
        )


def unroll_batch_still(step: int, still: bool) -> None:
    """A batch that is needed again is the one that it was."""
    if not still:
        raise RuntimeError(
            f"l2t.unroll: batches must stay as they are until the run is walked back, got that of step {step} changed in "
            "place since (usual cause: a loader that refills one buffer). Give each step tensors of its own, such as a clone()."
        )


def unroll_state_again(step: int, differs: str | None) -> None:
    """A state that is reached again is the one that was there."""
    if differs is not None:
        after = f"after step {step - 1}" if step else "before the first step"
        raise RuntimeError(
            f"l2t.unroll: the state {after} must be the same when it is reached again, got another one in {differs}. "
            "Usual causes: a kernel that is not deterministic (torch.use_deterministic_algorithms names it), a state that "
            "loss or a module keeps from call to call, a batch from an iterator or changed in place, a weight changed in "
            "place. Mend it, or use curvature='reverse' with schedule='all', which run no step again."
        )


def unroll_second_derivative(error: RuntimeError) -> None:
    """Says what to do about an operation that can be differentiated once only; leaves other errors alone."""
    said = str(error)
    marks = ("is not implemented", "double backward", "Double backward", "once_differentiable")
    if any(mark in said for mark in marks):
        raise RuntimeError(
            "l2t.unroll: every operation of loss must have a second derivative, got one that has none "
            f"({said.splitlines()[0].rstrip('. ')}). Write it in operations that have one; call attention inside "
            "torch.nn.attention.sdpa_kernel(SDPBackend.MATH) and an RNN on a GPU inside "
            "torch.backends.cudnn.flags(enabled=False), and compile neither model nor loss. Or take "
            "curvature='central', which asks for first derivatives only."
        ) from error


def unroll_reentrant() -> RuntimeError:
    """A loss with a graph that does not name the weights of what is in a checkpoint."""
    return RuntimeError(
        "l2t.unroll: activation checkpoints of loss must be of the kind that gradients see through, got one with "
        "use_reentrant=True, whose modules would not be trained. Call torch.utils.checkpoint with use_reentrant=False."
    )


def unroll_precompiled() -> RuntimeError:
    """Compiled code in a loss, with a torch that may leave its second derivative out in silence."""
    return RuntimeError(
        "l2t.unroll: every operation of loss must have a second derivative, got compiled code, whose torch before 2.13 may "
        "lose in silence. Update torch, or compile neither model nor loss, or take curvature='central', which asks for "
        "first derivatives only."
    )


def unroll_once_differentiable() -> RuntimeError:
    """A function whose second derivative would be left out in silence."""
    return RuntimeError(
        "l2t.unroll: every operation of loss must have a second derivative, got an autograd Function whose backward is "
        "marked @once_differentiable. Take curvature='central', which asks for first derivatives only, or write it in "
        "operations that have one."
    )


class WeightsGoneError(RuntimeError):
    """A step's backward pass reads weights that are no longer kept."""

    def __init__(self) -> None:
        super().__init__(
            "l2t.unroll: with curvature='reverse' the backward pass of a step must not read the student's weights past "
            "its graph, got one that does (an autograd Function that runs a module again?). Take "
            "curvature='recompute', which keeps the weights of every step."
        )


class ForwardModeError(Exception):
    """A step cannot be differentiated in forward mode."""


class AsymmetryError(ForwardModeError):
    """A step gives forwards another product than backwards."""


def unroll_forward_mode(error: RuntimeError) -> None:
    """Says which operation has no derivative in forward mode; leaves other errors alone."""
    said = str(error)
    if re.search(r"forward AD|forward mode AD|forward-mode|jvp|_efficientzerotensor", said, re.IGNORECASE):
        raise ForwardModeError(
            "l2t.unroll: with curvature='forward' every operation of a step must have a derivative in forward mode, "
            f"got one that has none ({said.splitlines()[0].rstrip('. ')}). The run goes on with curvature='recompute'; "
            "name that, or curvature='central', to be rid of this warning."
        ) from error


def unroll_symmetric(off: float, size: float, room: float) -> None:
    """Forward mode gives H a, and the walk back wants its transpose."""
    if off > room * size:
        raise AsymmetryError(
            "l2t.unroll: with curvature='forward' a step's gradient must be that of its loss, so that its derivative is "
            f"symmetric, got one that is not, by {off / size:.2g} (torch.no_grad in an activation checkpoint, or a hook that "
            "changes gradients?). The run goes on with curvature='recompute', torch's own second derivative, in which a hook "
            "acts once more; name that to be rid of this warning."
        )


def unroll_symmetric_so_far(error: ForwardModeError, steps: int) -> None:
    """Where steps came before one whose derivative is not symmetric, theirs may have been wrong."""
    if isinstance(error, AsymmetryError) and steps:
        raise RuntimeError(
            "l2t.unroll: with curvature='forward' all steps must have a symmetric derivative, got one that has none after "
            f"{steps} steps of the walk back. Take curvature='recompute'."
        ) from error


def unroll_difference(curvature: str, error: float | None, unit: float) -> str | None:
    """A warning where differences are far off, by more than kinks and the rounding unit explain."""
    if error is None or error <= 0.1 + 5 * unit**0.5:
        return None
    return (
        f"l2t.unroll: with curvature={curvature!r} differences must come near to the exact products, got an error of "
        f"{error:.2g} at the first step of the walk back. They move what loss detaches or computes in torch.no_grad as if it "
        "were not constant: where it does so, take curvature='reverse' or 'recompute'."
    )


# ---- preflight -------------------------------------------------------------------------------------------------------


def preflight_nothing() -> str:
    """A step without findings."""
    return "Every part can be differentiated twice and in forward mode, and repeats its numbers."


def preflight_advice(curvature: str | None) -> str:
    """The curvature to use."""
    if curvature is None:
        return "No curvature is left: a step must have a second derivative or repeat its numbers."
    if curvature == "reverse":
        return "Take curvature='reverse' (or any other)."
    return f"As it is, take curvature={curvature!r}."


def preflight_differs(what: str) -> str:
    """A part that gives other numbers the second time."""
    return f"two runs from the same random state gave different {what}"


def preflight_wrong(error: float) -> str:
    """A derivative that is not that of the first one."""
    return f"it is off by {error:.2g} of its size, against differences of the first derivative"


def preflight_asymmetric() -> str:
    """A gradient that is that of no number: forward mode gives the derivative where its transpose is asked for."""
    return "the derivative of its gradient is not symmetric, and a run needs the transpose"


def preflight_mend(lacks: str, said: str) -> str:
    """The switch that helps, told by what PyTorch said."""
    if lacks == "determinism":
        return (
            "Let it draw from PyTorch's default random numbers alone and set torch.use_deterministic_algorithms(True); "
            "or take curvature='reverse' with schedule='all', which run no step again."
        )
    if "not symmetric" in said:
        return "Do without curvature='forward', which takes one for the other."
    if "attention" in said:
        return "Call it inside torch.nn.attention.sdpa_kernel(SDPBackend.MATH)."
    if "cudnn" in said.lower():
        return "Call it inside torch.backends.cudnn.flags(enabled=False)."
    if "mkldnn" in said:
        return "Call it inside torch.backends.mkldnn.flags(enabled=False)."
    if "aot_autograd" in said or "torch.compile" in said:
        return "Leave it uncompiled."
    if lacks == "forward mode":
        return "Give its autograd Function a jvp, or do without curvature='forward'."
    return "Write it in operations that have one, or take curvature='central', which needs none."


def preflight_keeps_nothing(first: float, last: float) -> None:
    """A loss that gives the same each time it is called at the same weights."""
    if not math.isclose(first, last, rel_tol=1e-3) and not (math.isnan(first) and math.isnan(last)):
        raise RuntimeError(
            f"l2t.unroll: loss must be the same when it is called again, for a look at the autograd Functions and hooks in "
            f"its first step, got {last} for {first}. Let it keep nothing from call to call, or take preflight=False."
        )


def preflight_suits(suits: bool, curvature: str, found: object) -> None:
    """A run that can be walked back."""
    if not suits:
        raise RuntimeError(
            f"l2t.unroll: a step must be fit for curvature={curvature!r}, got one that is not. Mend what follows, take "
            f"another curvature, or preflight=False where you know better.\n{found}"
        )


# ---- optim -----------------------------------------------------------------------------------------------------------

Setting = TypeVar("Setting")


def optim_setting(owner: str, name: str, value: Setting, step: int | None = None) -> Setting:
    """Returns a setting of an optimiser that is a number or a 0-dim tensor."""
    at = "" if step is None else f" from its function at step {step}"
    if isinstance(value, Tensor):
        good = value.dim() == 0 and value.is_floating_point()
    else:
        good = isinstance(value, int | float) and not isinstance(value, bool)
    if not good:
        raise TypeError(
            f"l2t.optim.{owner}: {name} must be a number, a 0-dim floating-point tensor or a function of the "
            f"step, got {_described(value)}{at}. Give one value for all parameters."
        )
    if isinstance(value, int | float) and not 0 <= value < float("inf"):
        raise ValueError(
            f"l2t.optim.{owner}: {name} must be finite and not negative, got {value}{at}. "
            "Only a tensor may hold any value."
        )
    return value


def optim_share(owner: str, name: str, value: float) -> float:
    """Returns the share of a running average; outside [0, 1) its bias correction has no meaning."""
    if not 0 <= value < 1:
        raise ValueError(
            f"l2t.optim.{owner}: {name} must be in [0, 1), got {value}. "
            "It is how much of a running average is kept, 0.9 say; write a learned one as a sigmoid."
        )
    return value


def optim_pair(owner: str, name: str, value: Sequence[Setting]) -> Sequence[Setting]:
    """Returns a pair of settings."""
    if not isinstance(value, tuple | list) or len(value) != 2:
        raise TypeError(
            f"l2t.optim.{owner}: {name} must be a pair of settings, got {_described(value)}. "
            "Give two numbers, 0-dim tensors or functions of the step."
        )
    return value


def optim_groups(
    owner: str, groups: object, options: Sequence[str]
) -> list[tuple[list[str | Tensor], dict[str, Any]]]:
    """Returns the groups of parameters: what names them, and their settings."""
    found = []
    for group in groups if isinstance(groups, Sequence) and not isinstance(groups, str) else [groups]:
        if not isinstance(group, Mapping) or "params" not in group:
            got = (
                f"a dict of {', '.join(map(repr, group)) or 'nothing'}"
                if isinstance(group, Mapping)
                else _described(group)
            )
            raise TypeError(
                f"l2t.optim.{owner}: groups must be a list of dicts with the key 'params', got {got}. "
                "Say for example groups=[{'params': '*.bias', 'lr': 0.1}]."
            )
        params = group["params"]
        entries = (
            [params] if isinstance(params, str | Tensor) or not isinstance(params, Iterable) else list(params)
        )
        if not entries or not all(isinstance(x, str | Tensor) for x in entries):
            got = next((_described(x) for x in entries if not isinstance(x, str | Tensor)), "none")
            raise TypeError(
                f"l2t.optim.{owner}: params of a group must be patterns of names, or parameters, got {got}. "
                "Give a pattern such as 'head.*', a parameter, or a list of these."
            )
        for name in group:
            if name != "params" and name not in options:
                raise ValueError(
                    f"l2t.optim.{owner}: settings of a group must be among {', '.join(options)}, got {name!r}. "
                    "Leave it out, or set it for all parameters."
                )
        found.append((entries, {name: value for name, value in group.items() if name != "params"}))
    return found


def optim_in_student(owner: str, entry: str | Tensor, is_there: bool, names: Sequence[str]) -> None:
    """A group names parameters that are trained."""
    if not is_there:
        got = repr(entry) if isinstance(entry, str) else f"one of {_described(entry)}"
        raise ValueError(
            f"l2t.optim.{owner}: params of a group must be among the trained parameters of the student, got {got}. "
            f"They are {', '.join(names)}."
        )


def optim_one_group(owner: str, name: str, one: int, other: int) -> None:
    """A parameter has the settings of one group; groups count from 1."""
    if one:
        raise ValueError(
            f"l2t.optim.{owner}: a parameter must be in one group at most, got {name} in groups {one} and {other}. "
            "Make their patterns narrower."
        )


def optim_torch_kind(kind: object) -> None:
    """A class of torch.optim of which an update can be differentiated."""
    known = inspect.signature(kind).parameters if isinstance(kind, type) else {}
    own = getattr(kind, "__module__", "").startswith("torch.optim.")
    if not own or "differentiable" not in known:
        got = f"{kind.__module__}.{kind.__qualname__}" if isinstance(kind, type) else _described(kind)
        raise TypeError(
            f"l2t.optim.FromTorch: kind must be a class of torch.optim that has a mode differentiable=True, got {got}. "
            "Give torch.optim.NAdam say, and its options beside it; or write a subclass of l2t.optim.Optimizer."
        )


def optim_torch_options(kind: str, options: Iterable[str], known: Sequence[str]) -> None:
    """The options are those of the class, without the modes that are chosen here."""
    for name in options:
        if name not in known:
            raise TypeError(
                f"l2t.optim.FromTorch: options of {kind} must be among {', '.join(known)}, got {name!r}. Leave it out."
            )


def optim_nesterov(nesterov: bool, has_momentum: bool, has_dampening: bool) -> None:
    """Nesterov's momentum needs a momentum, and none of it dampened."""
    if nesterov and not has_momentum:
        raise ValueError(
            "l2t.optim.SGD: momentum must be positive with nesterov=True, got 0. Give one, 0.9 say."
        )
    if nesterov and has_dampening:
        raise ValueError(
            "l2t.optim.SGD: dampening must be the number 0 with nesterov=True, got another. Leave one of them out."
        )


def optim_amsgrad(owner: str, amsgrad: bool) -> None:
    """The largest second moment so far is not kept."""
    if amsgrad:
        raise ValueError(
            f"l2t.optim.{owner}: amsgrad must be False, got {amsgrad}. Leave it out, or take "
            f"l2t.optim.FromTorch(torch.optim.{owner}, amsgrad=True)."
        )


# ---- students, teach -------------------------------------------------------------------------------------------------


def student_is_made(student: object) -> None:
    """What makes students can be called, and is none itself: every run wants fresh ones."""
    if isinstance(student, nn.Module) or not callable(student):
        raise ValueError(
            f"l2t.teach: student must be a function that returns a fresh torch.nn.Module, got a made "
            f"{type(student).__name__}. Pass the class or a lambda, not a made student."
        )


def student_is_fresh(fresh: bool, op: str) -> None:
    """What makes students makes another one every time."""
    if not fresh:
        raise ValueError(
            f"l2t.{op}: student must be a function that returns a fresh torch.nn.Module, got the same one twice. "
            "Make it inside the function: lambda: torch.nn.Linear(8, 3)."
        )


def student_is_module(student: object) -> None:
    """What makes students returned one."""
    if not isinstance(student, nn.Module):
        raise ValueError(
            f"l2t.teach: student must be a function that returns a fresh torch.nn.Module, got a function that returns "
            f"{type(student).__name__}. Pass the class or a lambda, not a made student."
        )


def students_count(count: int) -> None:
    """A stack needs students."""
    if count < 1:
        raise ValueError("l2t.Stack: seeds must be one or more, got none. Give a seed for each student.")


def students_alike(alike: bool) -> None:
    """Students of a stack differ in their numbers only."""
    if not alike:
        raise ValueError(
            "l2t.Stack: make must return students of the same parameter names and shapes, got different ones. "
            "Make the architecture the same for every seed."
        )


def student_cannot_stack(error: RuntimeError) -> RuntimeError:
    """The student ran alone but not under vmap."""
    return RuntimeError(
        "l2t.Stack: student must be a module that torch.vmap can run (no data-dependent control flow, no .item(), "
        f"no in-place writes to plain tensors), got: {error}. Rewrite that part, or use GroupNorm in place of a "
        "BatchNorm with momentum=None."
    )


def student_keeps_buffer(name: str, kept: bool) -> None:
    """A student that puts a new tensor in the place of a buffer loses it under vmap."""
    if not kept:
        raise ValueError(
            f"l2t.Stack: the student's buffer {name!r} must be updated in place, got a new tensor in its place. "
            f"Write self.{name}.copy_(...) where the student assigns self.{name}."
        )


def students_tensor(name: str, alike: bool) -> None:
    """A tensor that a student keeps as a plain attribute: the stack has that of its first student alone."""
    if not alike:
        leaf = name.rpartition(".")[2]
        raise ValueError(
            f"l2t.Stack: the student's plain tensor {name!r} must be the same for every seed, got different ones. "
            f"Make it a buffer, by self.register_buffer({leaf!r}, ...)."
        )


def students_number(name: str, value: object, alike: bool) -> None:
    """A number that a student keeps: the stack has that of its first student alone."""
    if not alike:
        raise ValueError(
            f"l2t.Stack: the student's number {name!r} must be the same for every seed, got {value!r} and others. Make it a "
            "tensor in a buffer, by self.register_buffer; one that only names or counts is best left out of the module."
        )


def students_place(name: str, holder: str, place: object) -> None:
    """Stacked tensors can be put where a student reads them."""
    if isinstance(place, tuple):
        raise ValueError(
            f"l2t.Stack: parameters and buffers of the student must be read from places that can be set, got {name} in a "
            f"tuple in {holder}, which would stay that of one student. Make it a list, or read the tensor itself in forward."
        )


def students_losses(losses: object, students: int) -> None:
    """What a loss gives students side by side."""
    if not isinstance(losses, Tensor) or losses.shape != (students,):
        raise ValueError(
            f"l2t.Lesson: the loss of an arm must be of shape ({students},), a number for each student, got "
            f"{_described(losses)}. Take the mean over a student's rows, not over the students."
        )


def recipe_count(name: str, value: object, least: int, op: str = "Recipe") -> None:
    """A whole number of a recipe."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(
            f"l2t.{op}: {name} must be an integer of {least} or more, got {value!r}. Give a count."
        )


def recipe_number(
    name: str, value: object, low: float, high: float, open_low: bool = False, op: str = "Recipe"
) -> None:
    """A number of a recipe."""
    good = isinstance(value, (int, float)) and not isinstance(value, bool) and value != float("inf")
    if not good or not ((low < value if open_low else low <= value) and value <= high):  # type: ignore[operator]
        span = f"in {'(' if open_low else '['}{low:g}, {high:g}{']' if high < float('inf') else ')'}"
        raise ValueError(
            f"l2t.{op}: {name} must be a number {span}, got {value!r}. Leave it out for the default."
        )


def recipe_numbers(name: str, values: object, count: int | None = None, op: str = "Recipe") -> None:
    """A sequence of numbers of a recipe."""
    good = isinstance(values, (tuple, list)) and (len(values) > 0 if count is None else len(values) == count)
    if not good or not all(isinstance(x, (int, float)) and 0 < x < float("inf") for x in values):  # type: ignore[attr-defined]
        raise ValueError(
            f"l2t.{op}: {name} must be a sequence of {'' if count is None else f'{count} '}positive numbers, got "
            f"{values!r}. Leave it out for the default."
        )


def recipe_choice(name: str, value: object, names: Iterable[str], op: str = "Recipe") -> None:
    """A name of a recipe."""
    if value not in (names := list(names)):
        raise ValueError(
            f"l2t.{op}: {name} must be one of {', '.join(names)}, got {value!r}. Choose one of these."
        )


def teach_tensors(op: str, **given: object) -> None:
    """Data are two tensors."""
    for name, data in given.items():
        kinds = [type(part).__name__ for part in data] if isinstance(data, (tuple, list)) else []
        if len(kinds) != 2 or not all(isinstance(part, Tensor) for part in data):  # type: ignore[attr-defined]
            got = f"({', '.join(kinds)})" if kinds else type(data).__name__
            raise TypeError(
                f"l2t.{op}: {name} must be two tensors, inputs (N, ...) and targets (N,), got {got}. Make them of arrays by "
                "torch.as_tensor, of a Dataset by torch.utils.data.default_collate(list(dataset))."
            )


def teach_precision(dtype: torch.dtype, op: str = "teach") -> None:
    """Derivatives through a whole run need the numbers of float32."""
    if dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"l2t.{op}: teacher must be float32 or float64, got {str(dtype).removeprefix('torch.')}. Call teacher.float(), and give "
            "float32 data and students."
        )


def teach_data(
    name: str, data: tuple[Tensor, Tensor], num_classes: int, dtype: torch.dtype, op: str = "teach"
) -> None:
    """Inputs and targets that belong together."""
    inputs, targets = data
    if inputs.device != targets.device:
        raise ValueError(
            f"l2t.{op}: {name} must be on one device, got inputs on {inputs.device} and targets on {targets.device}. "
            "Move one of them with .to(device)."
        )
    if inputs.dtype != dtype:
        raise ValueError(
            f"l2t.{op}: {name} inputs must have the teacher's dtype {dtype}, got {inputs.dtype}. Convert one of them."
        )
    if targets.dtype != torch.int64 or targets.dim() != 1:
        raise ValueError(
            f"l2t.{op}: {name} targets must be int64 of shape (N,), got {targets.dtype} of shape {tuple(targets.shape)}. "
            "Give class indices."
        )
    if len(inputs) != len(targets) or len(targets) < 2:
        raise ValueError(
            f"l2t.{op}: {name} must be two or more inputs with a target each, got {len(inputs)} inputs and "
            f"{len(targets)} targets. Give one target a row."
        )
    low, high = int(targets.min()), int(targets.max())
    if low < 0 or high >= num_classes:
        raise ValueError(
            f"l2t.{op}: {name} targets must be in [0, {num_classes}), got {low} to {high}. "
            "Make the teacher for as many classes as the data have."
        )


def one_device(op: str, train: Tensor, **others: Tensor) -> None:
    """All data are where the students learn."""
    for name, inputs in others.items():
        if inputs.device != train.device:
            raise ValueError(
                f"l2t.{op}: {name} must be on the device of train, {train.device}, got {inputs.device}. "
                "Move it there with .to(device)."
            )


def rows_alike(op: str, train: Tensor, **others: Tensor) -> None:
    """All rows are what the students take."""
    for name, inputs in others.items():
        if inputs.shape[1:] != train.shape[1:]:
            raise ValueError(
                f"l2t.{op}: {name} inputs must have rows of shape {tuple(train.shape[1:])}, as those of train have, got "
                f"{tuple(inputs.shape[1:])}. Prepare them alike."
            )


def augments(op: str, kind: str, inputs: Tensor) -> None:
    """Only images are cropped and mirrored."""
    if kind != "none" and inputs.dim() != 4:
        raise ValueError(
            f"l2t.{op}: train inputs must be images (N, C, H, W) with augment={kind!r}, got shape "
            f"{tuple(inputs.shape)}. Take augment='none'."
        )


def teach_student_fits(
    student: Callable[[], nn.Module], inputs: Tensor, num_classes: int, batch_size: int, op: str = "teach"
) -> None:
    """A student alone learns from a batch of the data and has a logit for each class."""
    student_is_made(student)
    with torch.random.fork_rng(devices=[]):
        made = student()
        student_is_module(made)
        for name, p in [*made.named_parameters(), *made.named_buffers()]:
            if torch.nn.parameter.is_lazy(p):
                raise ValueError(
                    f"l2t.{op}: parameters of student must have a shape, got the uninitialised {name}. "
                    "Let the function that makes students run them on one batch first."
                )
        for rows in (inputs[:batch_size].cpu(), inputs[:2].cpu()):
            try:
                with torch.no_grad():
                    logits = made(rows)
            except Exception as error:
                raise ValueError(
                    f"l2t.{op}: student must run on train inputs of shape {tuple(rows.shape)}, {rows.dtype}, but raised "
                    f"{type(error).__name__}: {error}. Make students for these inputs and this batch size."
                ) from error
            made.eval()
        student_is_fresh(student() is not made, op)
    if not isinstance(logits, Tensor) or tuple(logits.shape) != (2, num_classes):
        got = tuple(logits.shape) if isinstance(logits, Tensor) else f"a {type(logits).__name__}"
        raise ValueError(
            f"l2t.{op}: student must return logits of shape (2, {num_classes}) for two rows, got {got}. "
            "Give it one output a class."
        )


def seed_number(op: str, seed: object) -> int:
    """A seed as Python has it, of whatever integer it is given."""
    try:
        return operator.index(seed)  # type: ignore[arg-type]
    except TypeError as error:
        raise ValueError(
            f"l2t.{op}: seed must be a whole number, got {seed!r}. Give one, 0 for example: all that is random follows from it."
        ) from error


def teach_learns(learns: bool) -> None:
    """A teacher that is frozen altogether."""
    if not learns:
        raise ValueError(
            "l2t.teach: teacher must have a parameter that requires grad, got one that is frozen. Call teacher.requires_grad_()."
        )


def teach_transposes(curvature: str, known: Sequence[str]) -> None:
    """A curvature that gives a step's derivative along a direction, for a step that is the gradient of no loss."""
    if curvature not in known:
        raise ValueError(
            f"l2t.teach: curvature must be {' or '.join(known)} for a WeightNet, got {curvature!r}. Its students' steps "
            "are the gradients of no loss, so their derivatives are not symmetric. Use one of these."
        )


def window_fits(steps: int, run_steps: int) -> None:
    """A window that is a part of the run."""
    if steps > run_steps:
        raise ValueError(
            f"l2t.WindowRecipe: steps must be at most run_steps={run_steps}, got {steps!r}. A window is a part of the run."
        )


def window_gradient(gradient: str, unused: Sequence[str]) -> None:
    """No setting of the reverse pass where there is none."""
    if unused:
        raise ValueError(
            f"l2t.WindowRecipe: {unused[0]} has no part in gradient={gradient!r}, which makes no reverse pass. "
            f'Leave it out, or set gradient="reverse".'
        )


def window_data(dev: Sequence[object], head: tuple[int, ...], vocabulary: int) -> None:
    """A dev set, and a translator of the teacher's vocabulary."""
    if not dev:
        raise ValueError(
            "l2t.teach_translator: dev must be one or more batches, got none. Give sentence pairs to measure on."
        )
    if head[0] != vocabulary:
        raise ValueError(
            f"l2t.teach_translator: student must have a head of the teacher's {vocabulary} tokens, got one of {head[0]}. Make both "
            "for one vocabulary."
        )


def windows_chose_neutral(measure: str, levels: Mapping[str, float]) -> str:
    """The taught teacher is not what the trial on windows chose."""
    return (
        f"l2t.teach_translator: windows from the last pool do not end lower under what was taught ({measure}: "
        f"{', '.join(f'{name} {level:.4f}' for name, level in levels.items())}); the result is the neutral teacher: the loss "
        "that teaching started with."
    )


def runs_chose_known(chosen: str, levels: Mapping[str, float]) -> str:
    """The taught teacher is not what the trial on whole runs chose."""
    return (
        "l2t.teach_translator: whole runs do not translate better under what was taught (1 - BLEU on dev: "
        f"{', '.join(f'{name} {level:.4f}' for name, level in levels.items())}); the result is {chosen}: "
        f"{'the loss that teaching started with' if chosen == 'neutral' else 'a known loss'}."
    )


def report_of_one_kind(mixed: bool) -> None:
    """A page about runs that have nothing in common."""
    if mixed:
        raise ValueError(
            "l2t.report: the runs of a page must be of one kind, got some of translators and some of students that classify. "
            "Report on each folder by itself."
        )


def report_of_trial(directory: Path, trial: Mapping[str, Any] | None) -> None:
    """A run whose trial counted errors."""
    if trial is not None and "expected_error" not in trial:
        raise ValueError(
            f"l2t.report: the trial of a run must have expected errors, got one of an earlier version in {str(directory)!r}. "
            "Teach again, into another folder."
        )


def may_start(op: str, directory: Path, resume: bool) -> None:
    """A directory with a run or a course in it."""
    if not resume:
        raise ValueError(
            f"l2t.{op}: directory must hold no run, got {str(directory)!r} with one. "
            "Go on with resume=True (--resume), or choose another directory."
        )


def is_the_same(op: str, directory: Path, differing: Sequence[str]) -> None:
    """The run in a directory is another one than that which was asked for."""
    if differing:
        raise ValueError(
            f"l2t.{op}: the run in {str(directory)!r} must have been started with the same arguments, got different "
            f"{', '.join(differing)}. Resume with the arguments of the start, or choose another directory."
        )


def teach_interrupted(update: int, updates: int, directory: Path) -> str:
    """Ctrl-C."""
    return (
        f"l2t.teach: stopped after {update} of {updates} updates; all of them are in {str(directory)!r}. "
        "Go on with resume=True (--resume)."
    )


def teach_takes_again(needs: int, free: int, budget: int) -> str:
    """An episode would take much of the memory."""
    return (
        f"l2t.teach: an update would remember {needs / 1e9:.3g} GB and {free / 1e9:.3g} GB are free, so it remembers "
        f"{budget / 1e9:.3g} GB and takes steps again, to the same bits. Say otherwise with memory='8GB' or so."
    )


def probe_found_none(lr: float, norm: float, agreement: float) -> str:
    """No learning rate passed the probe."""
    return (
        f"l2t.teach: no learning rate that the probe tried gave students whose teacher gradients are small and agree; "
        f"the best is {lr:g} (norm {norm:.2g}, agreement {agreement:.2f}). Expect little: try smaller rates "
        "(probe_lrs), damping=0.98, or a student that normalises."
    )


def students_skipped(skipped: int, students: int, usual: float, total: int) -> str:
    """Some students of an episode do not count."""
    return (
        f"l2t.teach: skipped {skipped} of {students} students whose teacher gradient was not finite or far above the "
        f"usual norm of {usual:.2g} ({total} so far)."
    )


def guard_not_finite(bad: int, students: int) -> str:
    """Why the guard goes back."""
    return f"{bad} of {students} students have no finite teacher gradient"


def guard_norm(norm: float, least: float) -> str:
    """Why the guard goes back."""
    return f"the teacher gradient's norm is {norm:.2g}, which has been {least:.2g}"


def guard_measure(now: float, best: float) -> str:
    """Why the guard goes back."""
    return f"the dev measure has risen to {now:.4f}, which has been {best:.4f}"


def guard_returns(reason: str, teacher_lr: float) -> str:
    """The guard has gone back."""
    return f"l2t.teach: {reason}; back to the last good teacher, with a teacher learning rate of {teacher_lr:.3g}."


def guard_gives_up(returns: int) -> str:
    """The guard has gone back too often."""
    return (
        f"l2t.teach: {returns} returns are enough; teaching ends with the last good teacher. "
        "Teach with a smaller learning rate of the students, or with damping=0.98."
    )


def low_agreement(agreement: float) -> str:
    """Students do not agree on which teacher they want."""
    return (
        f"l2t.teach: the teacher gradients of independent students agree by {agreement:.2f} only (mean cosine, first "
        "ten updates): the teacher learns next to nothing. Use a smaller learning rate while teaching, damping=0.98, "
        "or a student that normalises."
    )


def trial_chose_neutral(errors: dict[str, float]) -> str:
    """No taught teacher was ahead of the start."""
    seen = ", ".join(f"{name} {level:.1f}%" for name, level in errors.items())
    return (
        f"l2t.teach: fresh students are not ahead under what was taught (calibrated expected error on dev: {seen}); "
        "the result is the neutral teacher: the loss that teaching started with."
    )


# ---- networks --------------------------------------------------------------------------------------------------------


def image_size(name: str, size: int, least: int) -> None:
    """A network whose layers leave nothing of a small image."""
    if size < least:
        raise ValueError(
            f"l2t.tasks: images for {name} must be at least {least} pixels a side, got {size}. Choose another student."
        )


def timm_is_missing(name: str) -> ImportError:
    """A model of a package that is not installed."""
    return ImportError(
        f"l2t.tasks: the package timm must be installed for student 'timm:{name}', got none. Run: pip install timm."
    )


def timm_model(name: str, is_there: bool) -> None:
    """A model by its name in timm."""
    if not is_there:
        raise ValueError(
            f"l2t.tasks: student must be timm: and a model that timm knows, got 'timm:{name}'. "
            "timm.list_models() has their names."
        )


def task_has_images(task: str, student: str, shape: Sequence[int]) -> None:
    """A network for images and a task of something else."""
    if len(shape) != 4:
        raise ValueError(
            f"l2t.tasks: inputs must be images (N, C, H, W) for student {student!r}, got shape {tuple(shape)} of "
            f"{task}. Choose another student."
        )


def network_depth(name: str, depth: int, beyond: int) -> None:
    """A residual network of so many layers."""
    if depth < 6 + beyond or (depth - beyond) % 6:
        raise ValueError(
            f"l2t.tasks: depth of {name} must be 6 n + {beyond} with n = 1, 2, ..., got {depth}. "
            f"The nearest one above is {6 * max(1, -(-(depth - beyond) // 6)) + beyond}."
        )


# ---- compare ---------------------------------------------------------------------------------------------------------


def compare_counts(teachers: int, students: int, tuning_students: int | None, grid: Sequence[float]) -> None:
    """Enough to compare."""
    if teachers < 1:
        raise ValueError("l2t.compare: teachers must be one or more, got none. Teach one with l2t.teach.")
    counts = [("students", students, 2)]
    if tuning_students is not None:
        counts.append(("tuning_students", tuning_students, 1))
    for name, count, least in counts:
        if not isinstance(count, int) or count < least:
            raise ValueError(
                f"l2t.compare: {name} must be a whole number of {least} or more, got {count}. A spread needs two, a test "
                "twenty."
            )
    if not isinstance(grid, (tuple, list)) or not grid or not all(0 < lr < float("inf") for lr in grid):
        raise ValueError(
            f"l2t.compare: grid must be positive learning rates, got {grid}. Leave it out for the default."
        )


def compare_teachers(name: str, teachers: object, kind: type) -> None:
    """Teachers by name."""
    made = teachers.values() if isinstance(teachers, Mapping) else [teachers]
    if not isinstance(teachers, Mapping) or not all(isinstance(one, kind) for one in made):
        raise TypeError(
            f"l2t.compare: {name} must be a dict of teachers by name, got "
            f"{' and '.join(sorted({type(one).__name__ for one in made}))}. Write for example {{'mine': taught.teacher}}."
        )


def compare_alike(teachers: Sequence[tuple[str, int, torch.dtype]]) -> None:
    """Teachers that the same students can learn from."""
    if len({(classes, dtype) for _, classes, dtype in teachers}) > 1:
        got = ", ".join(f"{name!r} with {classes} and {dtype}" for name, classes, dtype in teachers)
        raise ValueError(
            f"l2t.compare: teachers must be of one number of classes and one dtype, got {got}. Compare them one by one."
        )


def compare_arms(arms: object, kind: type, dev: bool) -> None:
    """Baselines by name, and what they learn from."""
    made = arms if isinstance(arms, Mapping) else {"arms": arms}
    for name, arm in made.items():
        if not isinstance(arms, Mapping) or not isinstance(arm, kind):
            raise TypeError(
                f"l2t.compare: arms must be a dict of l2t.baselines.Arm by name, got a {type(arm).__name__} for {name!r}. "
                "Wrap a loss of logits and targets as Arm(stateless(loss))."
            )
        known("compare", f"rows of the arm {name!r}", arm.rows, ("all", "dev", "both"))  # type: ignore[attr-defined]
        if arm.rows != "all" and not dev:  # type: ignore[attr-defined]
            raise ValueError(
                f"l2t.compare: dev must be given where an arm learns from it, as {name!r} does, got None. Pass the clean rows "
                "as dev."
            )


def compare_names(names: Sequence[str], taken: Collection[str]) -> None:
    """Arms that can be told apart."""
    for place, name in enumerate(names):
        if name in taken or name in names[:place]:
            raise ValueError(
                f"l2t.compare: arms and also must have names that no other arm has, got {name!r}. Take another name."
            )


def compare_noise(noise: Tensor, classes: int) -> None:
    """The true noise matrix of an oracle."""
    rows_sum = noise.dim() == 2 and bool(((noise.sum(1) - 1.0).abs() < 1e-4).all() and (noise >= 0).all())
    if tuple(noise.shape) != (classes, classes) or not rows_sum:
        raise ValueError(
            f"l2t.compare: noise must be of shape ({classes}, {classes}) with rows of probabilities that sum to 1, got shape "
            f"{tuple(noise.shape)}. Give T[i, j], the probability that class i was seen as class j."
        )


def compare_done(missing: Sequence[str]) -> None:
    """A result needs all arms."""
    if missing:
        raise ValueError(
            f"l2t.compare: all arms must be made before the result, got none of {', '.join(missing)}. Call run(name) for each "
            "name in missing()."
        )


def compare_half_batches(batch_size: int, arms: Sequence[str]) -> None:
    """A batch that has rows of two pools."""
    if arms and batch_size < 2:
        raise ValueError(
            f"l2t.compare: recipe.batch_size must be 2 or more where half of a batch is from dev, as for {arms[0]!r}, got "
            f"{batch_size}. Take larger batches, or leave the arm out."
        )


def compare_dev_is_there(there: bool, dev_is_clean: bool) -> None:
    """A clean dev set has to be given."""
    if dev_is_clean and not there:
        raise ValueError(
            "l2t.compare: dev must be given where dev_is_clean is True, got None. Pass the clean rows as dev."
        )


def a_rate_trains(arm: str, rates: Sequence[float], trains: Sequence[bool]) -> None:
    """A learning rate under which no student of an arm diverges."""
    if not any(trains):
        raise ValueError(
            f"l2t.compare: the grid must have a learning rate at which no student of {arm!r} diverges, got "
            f"{', '.join(f'{rate:g}' for rate in rates)}. Give smaller ones (--grid)."
        )


# ---- translation: students, batches ----------------------------------------------------------------------------------


def translator_size(owner: str, vocab: int, dim: int, layers: int, dropout: float, divisor: int) -> None:
    """A network for translation that can be made."""
    if vocab < 5:
        raise ValueError(
            f"l2t.{owner}: vocab must be 5 or more, got {vocab}. Four pieces are padding, unknown, begin and end."
        )
    if dim < 1 or dim % divisor:
        raise ValueError(
            f"l2t.{owner}: dim must be a multiple of {divisor}, got {dim}. Its parts are of equal size; take another."
        )
    if layers < 1:
        raise ValueError(f"l2t.{owner}: layers must be 1 or more, got {layers}. Give their number.")
    if not 0 <= dropout < 1:
        raise ValueError(
            f"l2t.{owner}: dropout must be in [0, 1), got {dropout}. Give the share to leave out."
        )


def translation_batches(sources: int, targets: int, tokens: int) -> None:
    """Pairs that can be put into batches."""
    if not sources or sources != targets:
        raise ValueError(
            f"l2t.translation: encoded must be as many sources as targets, and some, got {sources} and {targets}. "
            "Give each sentence its translation."
        )
    if tokens < 1:
        raise ValueError(
            f"l2t.translation: tokens must be 1 or more, got {tokens}. Give the padded tokens of a batch."
        )


# ---- translation: vocabulary, search, scores, course -----------------------------------------------------------------


def vocabulary_bytes(count: int) -> ValueError:
    """Bytes that sentencepiece does not know."""
    return ValueError(
        f"l2t.Vocabulary: model must be a sentencepiece model, got {count} bytes of something else. Take what was saved."
    )


def vocabulary_ids(found: Sequence[int], wanted: Sequence[int]) -> None:
    """A model of somebody else may have other ids."""
    if list(found) != list(wanted):
        raise ValueError(
            f"l2t.Vocabulary: the ids of padding, unknown, begin and end must be {list(wanted)}, got {list(found)}. "
            "Train the model with these."
        )


def vocabulary_size(size: int, error: Exception) -> ValueError:
    """Sentences that do not give so many pieces."""
    said = str(error).replace("\n", " ").strip()
    return ValueError(
        f"l2t.Vocabulary: size must be a number of pieces that the sentences give, got {size}. Take another; "
        f"sentencepiece says: {said}."
    )


def search_sizes(width: int, longest: int | None, penalty: float) -> None:
    """The sizes of a search for translations."""
    if width < 1 or (longest is not None and longest < 1):
        raise ValueError(
            f"l2t.translation: width and length must be 1 or more, got {width} and {longest}. A width of 1 is greedy."
        )
    if not penalty >= 0:
        raise ValueError(f"l2t.translation: penalty must be 0 or more, got {penalty}. Take 1, or 0 for none.")


def sentences(given: Iterable[str]) -> None:
    """Sentences to translate: a string would be taken for as many as it has letters."""
    if isinstance(given, (str, bytes)):
        raise ValueError(
            f"l2t.translation: sentences must be a list of strings, got the string {given[:40]!r}. Put it into a list."
        )
    for sentence in given:
        try:
            sentence.encode()
        except UnicodeEncodeError as error:  # what Python makes of bytes that it cannot decode
            raise ValueError(
                f"l2t.translation: sentences must be Unicode text, got {sentence[:40]!r}. Decode it by its encoding first."
            ) from error


def text_to_translate(error: UnicodeDecodeError) -> ValueError:
    """Bytes on the standard input that are no text."""
    return ValueError(
        f"l2t.translation: the lines to translate must be {error.encoding} text, got another byte at {error.start:,}. "
        "Convert them, by iconv for example."
    )


def translations_cut(count: int, total: int) -> str:
    """Translations that have not come to an end."""
    return (
        f"l2t.translation: a translation must end within 2 n + 10 pieces of a source of n, got {count} of {total} that had not "
        "and were cut there. A student that repeats itself needs more training."
    )


def score_sentences(hypotheses: int, references: int) -> None:
    """Translations and references of the same sentences."""
    if not references or hypotheses != references:
        raise ValueError(
            f"l2t.translation: translations must be as many as references, and some, got {hypotheses} for {references}. "
            "Give one for each sentence."
        )


def translator_there(directory: Path, there: bool) -> None:
    """A folder of a trained translator."""
    if not there:
        raise FileNotFoundError(
            f"l2t.translation: {directory} must hold a trained translator, got none. Run: l2t train translation --out "
            f"{directory}."
        )


def translator_fits(directory: Path, found: str, wanted: str) -> None:
    """Weights and vocabulary of one translator, by its checksum."""
    if found != wanted:
        raise ValueError(
            f"l2t.translation: the vocabulary in {directory} must be the one of the weights, {wanted}, got {found}. "
            "Put back the file that was saved with them."
        )


def folder_takes_nothing(op: str, directory: Path, error: OSError) -> ValueError:
    """A folder to write into that cannot be made or written."""
    return ValueError(
        f"l2t.{op}: directory must be a folder that can be made and written, got {str(directory)!r} ({error.strerror}). "
        "Choose another (--out)."
    )


def tensors_whole(op: str, path: Path, error: Exception) -> ValueError:
    """A file of tensors that something has cut short."""
    return ValueError(
        f"l2t.{op}: {path} must be a safetensors file, whole, got another content ({error}). Put it back, or remove the folder "
        "and begin again."
    )


class DivergedError(ValueError):
    """The loss of a course is not finite any more."""


def course_finite(name: str, value: float, step: int) -> None:
    """A loss of a course that has not diverged."""
    if not math.isfinite(value):
        raise DivergedError(
            f"l2t.translation: the {name} must be finite, got {value} at step {step}. Take a smaller lr."
        )


def course_name(called: str, known: bool) -> None:
    """What a course in a directory is known again by."""
    if not known:
        raise ValueError(
            f"l2t.translation: name must be given with a directory for a loss that is not in LOSSES, got None for {called}. Say what "
            "it is called, name='my loss' for example: a course is resumed by it."
        )


def course_loss(value: object, step: int) -> None:
    """What a loss of tokens returns."""
    if not isinstance(value, Tensor) or value.dim():
        raise TypeError(
            f"l2t.translation: loss must return a 0-dim tensor, got {_described(value)} at step {step}. Return the mean "
            "over tokens."
        )
    course_finite("loss", float(value.detach()), step)
