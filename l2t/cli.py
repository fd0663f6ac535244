"""The command `l2t`: data, teach, compare, transfer, train, translate, report, doctor.

Arguments, what is refused before any work is done, exit codes and what is printed. The work itself is in
teach.py, compare.py, report.py and doctor.py, which are imported when they are needed, so that `l2t --help`
is quick.

Exit codes: 0 done, 1 failed, 2 asked for something that is not there, 130 stopped by Ctrl-C or SIGTERM.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import json
import math
import multiprocessing
import multiprocessing.connection
import os
import shlex
import signal
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from l2t import check, doctor
from l2t.files import read_json, write_json

if TYPE_CHECKING:
    from multiprocessing.process import BaseProcess

    from l2t.contest import Budget, Contest
    from l2t.plan import Plan
    from l2t.starts import Starts
    from l2t.tasks import Data
    from l2t.teach import Recipe
    from l2t.translation.corpus import Corpus

RUNS = Path("runs")
_OF_TOKENS = ("data", "pieces", "steps", "window", "measure", "smoothing")  # flags of `l2t teach translation`
TRANSLATION = "translation"  # sentence pairs: data of no task
DEFAULT = "default"  # class of a teacher whose kind, link and start the dev set chooses
WEIGHT_NET_LR = 0.01  # of its Adam: a network takes smaller steps than the bounded numbers of a Teacher

FIRST_SCREEN = """\
Teach a teacher which loss its students should be trained with, and see whether that beats tuned baselines.

three commands make a result:
  l2t teach mnist1d            teach a teacher; it goes to {runs}/mnist1d-<regime>/seed-0
  l2t compare mnist1d          20 fresh students for each loss, every baseline tuned on the dev set: a table
  l2t report {runs}/mnist1d-*    one HTML page: results, the learned loss, the course of the teaching

tasks and regimes (`l2t data` says which have their data here, `l2t data TASK` fetches them):
{tasks}

`l2t COMMAND --help` says more. Ctrl-C leaves a run that --resume goes on with.
"""

DATA = """\
Without a name: every task, whether its data are there, where they come from and what their makers allow.
With one: fetches its files where they are not there, and shows each with its checksum. This is the only
command that fetches anything. Files of your own are looked for in a folder of the task's name in $L2T_DATA,
then in ~/.cache/l2t: the standard ones, packed or not.
"""

DATA_EXAMPLES = """\
examples:
  l2t data                                 what there is
  l2t data fashion-mnist                   31 MB from Debian, into ~/.cache/l2t, installed nowhere
  L2T_DATA=~/sets l2t data cifar10         into ~/sets/cifar10
  l2t data translation                     6 MB from Debian: German and English sentences in pairs
  l2t data translation --source fr         French and English
  l2t data translation --from iwslt14      from texts or gettext catalogues of your own
"""

TEACH = """\
Teaches one teacher a seed: episodes of fresh students, each trained from start to end under the teacher's
loss, then one step of the teacher along the exact gradient of their dev-set measure. Progress shows the
measure, the dev error, the gradient's norm and the agreement of independent students about its direction:
near 0 the teacher learns nothing; a smaller --lr helps, or --set damping=0.98.
"""

TEACH_EXAMPLES = """\
examples:
  l2t teach digits --regime symmetric                   a regime of its own recipe
  l2t teach mnist1d --seeds 0 1 2 --jobs 2              three teachers, two at a time
  l2t teach digits --weight full --link identity        soft targets per class and stage
  l2t teach digits --features none                      one loss for every stage: a static teacher
  l2t teach digits --teacher weight-net                 learned weights of rows, to compare with
  l2t teach digits --updates 100 --set steps=200        any field of l2t.Recipe
  l2t teach digits --set steps=5000 memory=64MB         a long run in bounded memory, its plan printed first
  l2t teach digits --updates 100 --set steps=200 --resume    the same run again after Ctrl-C or a crash
  l2t teach translation --student transformer --steps 2500   a loss over a vocabulary, on windows of the run
"""

COMPARE = """\
Trains fresh students under each frozen teacher and under every baseline. All arms have the same students,
steps and batches; each has its learning rate tuned on dev from the same grid with the same budget. The test
set is looked at once an arm, at its end. Losses against a baseline are reported like wins. Each arm is kept
when it is done: the same command again, also after Ctrl-C, makes only what is missing.
"""

COMPARE_EXAMPLES = """\
examples:
  l2t compare digits                       every teacher in {runs}/digits-<default regime>
  l2t compare digits --regime symmetric    those of another regime
  l2t compare {runs}/demo --jobs 2           every teacher below a folder, two arms at a time
  l2t compare digits --arms list           names of the baselines
  l2t compare digits --arms cross-entropy label-smoothing-0.1 --grid 0.1 0.2 0.4
"""


TRANSFER = """\
Teachers that were taught on one task, student or run length hand their loss, frozen, to fresh students of
another, beside cross-entropy and every baseline: what `l2t compare` does, elsewhere. Learning rates are tuned
anew. The number of classes must be the same. The folder that is written can be reported on.
"""

TRANSFER_EXAMPLES = """\
examples:
  l2t transfer {runs}/mnist1d-clean --to digits                      from one data set to another
  l2t transfer {runs}/mnist1d-clean --to mnist1d --student mlp-relu  to another student
  l2t transfer {runs}/mnist1d-clean --to mnist1d --steps 1000        from short runs to long ones
  l2t report {runs}/transfer/digits-clean-mlp
"""


TRAIN = """\
Trains one translator by a known or taught loss, on the sentence pairs that `l2t data translation` builds,
and scores it on the test set (greedy). The folder holds it, and after Ctrl-C the checkpoint from which
--resume goes on.
"""

TRAIN_EXAMPLES = """\
examples:
  l2t train translation                                   an LSTM, into {runs}/translation-lstm
  l2t train translation --student transformer --steps 2500
  l2t train translation --loss label-smoothing-0.1 --out {runs}/smoothed
  l2t train translation --loss {runs}/translation-lstm/seed-0 --out {runs}/taught
"""

TRANSLATE = """\
Translates sentences by the translator in a folder that `l2t train translation` has written, a line each;
without any the lines of the standard input, of which an empty one gives an empty line.
"""


class _FirstScreen(argparse.ArgumentParser):
    """The parser of `l2t` itself, which lists the tasks where that is asked for, and only there."""

    def format_help(self) -> str:
        self.description = FIRST_SCREEN.format(runs=RUNS, tasks=_tasks())
        return super().format_help()


def _parser() -> argparse.ArgumentParser:
    import l2t

    parser = _FirstScreen(
        prog="l2t", formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"l2t {l2t.__version__}")
    commands = parser.add_subparsers(
        dest="command", metavar="COMMAND", title="commands", parser_class=argparse.ArgumentParser
    )

    data = _command(commands, "data", "which data sets are there; fetches one", DATA, DATA_EXAMPLES)
    data.add_argument(
        "task", metavar="NAME", nargs="?", help="name of a task, or translation; default: list all"
    )
    pairs = data.add_argument_group(f"of {TRANSLATION} alone")
    pairs.add_argument("--source", metavar="LANG", help="language to translate: de (default), fr, es")
    pairs.add_argument("--target", metavar="LANG", help="language to translate into; default: en")
    pairs.add_argument(
        "--from",
        dest="folder",
        metavar="DIR",
        type=Path,
        help="build from texts of your own, in any two languages: train.LANG, dev.LANG (or valid.LANG) and "
        "test.LANG, a sentence a line; or gettext catalogues, as in de/LC_MESSAGES/app.mo",
    )
    pairs.add_argument("--seed", metavar="N", type=_seed, help="draws dev and test; default: 0")

    teach = _command(commands, "teach", "teach a teacher on a task", TEACH, TEACH_EXAMPLES)
    teach.add_argument("task", metavar="TASK", help="name of a task (see l2t --help), or translation")
    teach.add_argument(
        "--regime", metavar="NAME", help="what is wrong with the training data; default: the task's first"
    )
    teach.add_argument("--student", metavar="NAME", help="which student network; default: the task's first")
    teach.add_argument(
        "--seed",
        "--seeds",
        dest="seeds",
        metavar="N",
        nargs="+",
        action="extend",
        type=_seed,
        help="one teacher a seed; default: 0",
    )
    teach.add_argument(
        "--data-seed",
        metavar="N",
        type=_seed,
        help="draws noise, subset and dev set, never the test set; default: 0",
    )
    teach.add_argument(
        "--jobs",
        metavar="N",
        type=_positive,
        default=1,
        help="teachers at a time, each in a process; default: 1",
    )
    place = teach.add_argument_group("where")
    place.add_argument(
        "--out",
        metavar="DIR",
        type=Path,
        help=f"folder of the run, or over several; default: {RUNS}/<task>-<regime>/seed-<seed>",
    )
    place.add_argument(
        "--resume",
        action="store_true",
        help="go on with the run that is there; a finished one is left as it is",
    )
    teacher = teach.add_argument_group(
        "the teacher (default: starts of several kinds, of which the dev set chooses)"
    )
    teacher.add_argument(
        "--teacher",
        metavar="KIND",
        help="what it is: loss (sets the loss, as the flags below say; default), or weight-net (weighs rows "
        "by their loss: Meta-Weight-Net, a baseline)",
    )
    teacher.add_argument(
        "--weight",
        metavar="KIND",
        help="what it sets: shared, per-class, low-rank or full; of translation shared, diagonal or low-rank",
    )
    teacher.add_argument("--link", metavar="LINK", help="sigmoid, identity or log-sigmoid")
    teacher.add_argument(
        "--slots", metavar="K", type=_positive, help="slots of the attention; 1 is a static loss"
    )
    teacher.add_argument("--rank", metavar="R", type=_positive, help="columns of a low-rank weight")
    teacher.add_argument(
        "--features",
        metavar="NAME",
        nargs="+",
        action="extend",
        help="what it sees of a student: some of progress, train_loss, train_accuracy, dev_loss and "
        "dev_accuracy, or none, which is a static loss",
    )
    recipe = teach.add_argument_group("the teaching (default: what suits the task and regime)")
    recipe.add_argument("--updates", metavar="N", type=_positive, help="updates of the teacher")
    recipe.add_argument(
        "--students", metavar="S", type=_positive, help="students an episode, or windows an update"
    )
    recipe.add_argument(
        "--lr", metavar="RATE", type=float, help="the students' learning rate; without it a probe picks it"
    )
    _device_argument(recipe)
    recipe.add_argument(
        "--set",
        metavar="FIELD=VALUE",
        nargs="+",
        action="extend",
        default=[],
        help="any field of l2t.Recipe; of translation any of WindowRecipe, some of Course and TokenTeacher",
    )
    recipe.add_argument(
        "--no-guard", action="store_true", help="do not go back to the last good teacher when a run breaks"
    )
    pairs = teach.add_argument_group(f"of {TRANSLATION} alone")
    pairs.add_argument(
        "--data",
        metavar="DIR",
        type=Path,
        help="folder of sentence pairs; default: that of German and English",
    )
    pairs.add_argument("--pieces", metavar="V", type=_positive, help="of the vocabulary; default: 3000")
    pairs.add_argument("--steps", metavar="N", type=_positive, help="of a whole run; default: 5000")
    pairs.add_argument("--window", metavar="T", type=_positive, help="steps of a window; default: 50")
    pairs.add_argument(
        "--measure",
        metavar="NAME",
        help="sharp-error (the default), calibrated-cross-entropy, cross-entropy, expected-error, "
        "sharp-bleu or expected-bleu",
    )
    pairs.add_argument("--smoothing", metavar="EPS", type=float, help="strength to start with; default: 0.1")
    teach.add_argument("--quiet", action="store_true", help="no progress, no summary")

    compare = _command(
        commands,
        "compare",
        "fresh students under teachers and baselines",
        COMPARE,
        COMPARE_EXAMPLES.format(runs=RUNS),
    )
    compare.add_argument("where", metavar="TASK|DIR", nargs="+", help="a task, or folders of runs")
    compare.add_argument(
        "--regime", metavar="NAME", help="with a task: which regime; default: the task's first"
    )
    _add_budget(compare)

    transfer = _command(
        commands,
        "transfer",
        "teachers from elsewhere teach students of another task",
        TRANSFER,
        TRANSFER_EXAMPLES.format(runs=RUNS),
    )
    transfer.add_argument("runs", metavar="RUN", nargs="+", type=Path, help="runs, or folders over runs")
    transfer.add_argument("--to", metavar="TASK", required=True, help="where they teach")
    transfer.add_argument("--regime", metavar="NAME", help="which regime; default: the task's first")
    transfer.add_argument("--student", metavar="NAME", help="which student; default: the task's first")
    transfer.add_argument(
        "--steps", metavar="N", type=_positive, help="steps of a student; default: those of the task's recipe"
    )
    transfer.add_argument(
        "--out",
        metavar="DIR",
        type=Path,
        help=f"default: {RUNS}/transfer/<task>-<regime>-<student>[-<steps>-steps]",
    )
    _add_budget(transfer)

    _add_translation(commands)

    report = _command(
        commands,
        "report",
        "one self-contained HTML page",
        "Writes DIR/report.html. It needs no network and no other file.",
        "example:\n  l2t report runs/digits-clean",
    )
    report.add_argument("directory", metavar="DIR", type=Path, help="a run, or a folder over runs")

    _command(
        commands,
        "doctor",
        "versions, machine, what was built in, whether it works",
        "Examines the installation; exit code 1 where something has to be mended.",
        "",
    )
    return parser


def _add_translation(commands: Any) -> None:
    """The commands of translators."""
    train = _command(
        commands, "train", "train a translator by a known loss", TRAIN, TRAIN_EXAMPLES.format(runs=RUNS)
    )
    train.add_argument("task", metavar="TASK", choices=[TRANSLATION], help=TRANSLATION)
    train.add_argument(
        "--student", metavar="NAME", default="lstm", help="lstm (default), lstm-2, transformer"
    )
    train.add_argument("--steps", metavar="N", type=_positive, default=5000, help="default: 5000")
    train.add_argument(
        "--lr", metavar="RATE", type=float, help="highest rate of Adam; default: the student's"
    )
    train.add_argument(
        "--loss",
        metavar="NAME|DIR",
        default="maximum-likelihood",
        help="name of a loss, or folder of a run of `l2t teach translation`; default: %(default)s",
    )
    train.add_argument("--seed", metavar="N", type=_seed, default=0, help="default: 0")
    train.add_argument(
        "--pieces",
        metavar="V",
        type=_positive,
        help="of the vocabulary; default: 3000, or a taught loss's own",
    )
    train.add_argument(
        "--data",
        metavar="DIR",
        type=Path,
        help="folder of sentence pairs; default: that of German and English",
    )
    train.add_argument("--out", metavar="DIR", type=Path, help=f"default: {RUNS}/translation-<student>")
    train.add_argument("--resume", action="store_true", help="go on with the course that is there")
    train.add_argument("--quiet", action="store_true", help="no progress; the scores alone")

    translate = _command(
        commands,
        "translate",
        "translate sentences",
        TRANSLATE,
        f'examples:\n  l2t translate {RUNS}/translation-lstm "Öffnen Sie das Dokument."\n'
        f"  l2t translate {RUNS}/translation-lstm < text.de > text.en",
    )
    translate.add_argument("directory", metavar="DIR", type=Path, help="folder of a trained translator")
    translate.add_argument(
        "sentences", metavar="SENTENCE", nargs="*", help="default, or -: lines of the standard input"
    )
    translate.add_argument(
        "--beam", metavar="W", type=_positive, default=4, help="width of the search; 1 is greedy; default: 4"
    )


def _add_budget(command: argparse.ArgumentParser) -> None:
    """What every arm gets, and how the work is done."""
    command.add_argument(
        "--arms",
        metavar="NAME",
        nargs="+",
        action="extend",
        help="these baselines alone; `--arms list` names those that there are",
    )
    command.add_argument(
        "--students", metavar="S", type=_positive, help="fresh students an arm; default: 20, translators 5"
    )
    command.add_argument(
        "--tuning-students",
        metavar="S",
        type=_positive,
        help="students an arm and learning rate in tuning; default: 10, or more where dev rows are fewer "
        "than 100; translators 1",
    )
    command.add_argument(
        "--grid",
        metavar="RATE",
        nargs="+",
        action="extend",
        type=float,
        help="learning rates to tune; default: 0.01 to 1, translators 0.5, 1 and 2 times that of teaching",
    )
    command.add_argument(
        "--seed", metavar="N", type=_seed, default=0, help="of students, batches and splits; default: 0"
    )
    command.add_argument(
        "--jobs", metavar="N", type=_positive, default=1, help="arms at a time, each in a process; default: 1"
    )
    _device_argument(command)
    command.add_argument("--again", action="store_true", help="make arms again that are there already")
    command.add_argument("--quiet", action="store_true", help="no progress; the table alone")


def _command(
    commands: Any, name: str, summary: str, description: str, epilog: str
) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=summary,
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    return parser


def _device_argument(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--device",
        metavar="NAME",
        help="where students learn: cpu, cuda or cuda:1; default: cuda where torch sees a GPU and l2t has "
        "its kernels, else cpu",
    )


def _device(options: argparse.Namespace) -> str:
    """The device that was asked for, or the best one that there is."""
    import torch

    from l2t import ops

    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if options.device is None:
        return "cuda" if gpus and ops.HAS_CUDA else "cpu"
    return check.device_is_there(options.device, gpus)


def _tasks() -> str:
    """The tasks and their regimes, a line each."""
    from l2t import tasks

    lines = []
    for name in tasks.names():
        task = tasks.outline(name)
        lines += [f"  {name:<14}{task.title}", f"{'':16}{', '.join(task.regimes)}"]
        lines += [f"{'':16}students: {', '.join(task.students)}"]
        lines += [f"{'':16}{task.origin}; licence: {task.licence}"]
    return "\n".join(lines)


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(check.not_positive(text))
    return number


def _seed(text: str) -> int:
    number = int(text)
    if not -(2**63) <= number < 2**63:
        raise argparse.ArgumentTypeError(check.not_a_seed(text))
    return number


_positive.__name__ = _seed.__name__ = "whole number"  # what argparse calls a value that is none


class _UsageError(Exception):
    """What was asked for is not there or is refused: exit code 2."""


@contextlib.contextmanager
def _asking() -> Iterator[None]:
    """Around the part of a command that looks at what was asked for, before any work is done."""
    try:
        yield
    except (ValueError, FileNotFoundError, FileExistsError, PermissionError) as error:
        raise _UsageError(str(error)) from error


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line `argv` (without the program's name; sys.argv by default) and returns the exit
    code.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = _parser()
    if not arguments:
        parser.print_help()
        return 0
    try:
        options = parser.parse_args(arguments)
    except SystemExit as stop:  # argparse has said what is wrong
        return stop.code if isinstance(stop.code, int) else 2
    if argv is None:  # the process is ours: what a scheduler sends counts as Ctrl-C
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        return _COMMANDS[options.command](options)
    except KeyboardInterrupt:
        again = ["l2t", *(argument for argument in arguments if argument != "--resume"), "--resume"]
        if options.command in ("compare", "transfer"):  # which go on by themselves
            again = ["l2t", *(argument for argument in arguments if argument != "--again")]
        goes_on = ("teach", "compare", "transfer", "train")
        hint = f" Go on with: {shlex.join(again)}" if options.command in goes_on else ""
        print(f"\nl2t {options.command}: stopped.{hint}", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `l2t compare digits | head`
        sys.stdout = None
        return 1
    except Exception as error:
        if "L2T_TRACEBACK" in os.environ:
            raise
        return _failed(error)


def _failed(error: Exception) -> int:
    """Says what is wrong, in one sentence; the exit code that is due."""
    refused = isinstance(error, _UsageError)
    print(check.command_failed(error.__cause__ if refused and error.__cause__ else error), file=sys.stderr)
    return 2 if refused else 1


# ---- data ----


def _data(options: argparse.Namespace) -> int:
    from l2t import tasks

    if options.task == TRANSLATION:
        return _data_of_pairs(options)
    with _asking():
        given = {"source": options.source, "target": options.target, "from": options.folder}
        given["seed"] = options.seed
        check.flags_of_pairs([name for name, value in given.items() if value is not None])
        if options.task is not None:
            check.known("data", "data set", options.task, [*tasks.names(), TRANSLATION])
    if options.task is None:
        for name in tasks.names():
            task = tasks.get(name)
            print(f"{name:<14}{'there' if task.is_there() else 'not here':<10}{task.title}")
            print(f"{'':24}{task.origin}; licence: {task.licence}")
        _list_pairs()
        return 0
    task = tasks.get(options.task)
    if task.place is not None and not task.is_there():
        if task.place.files:
            print(f"fetching {task.name} into {task.place.folders()[0]}", flush=True)
        task.place.fetch()
    task.require()
    print(f"{task.name}: {task.title}\nfrom: {task.origin}\nlicence: {task.licence}")
    if task.place is None:
        print(f"there: in the package {task.package}")
    else:
        for path, checksum, standard in task.place.checksums():
            print(f"there: {path}  {checksum}{'' if standard else ', which is not the standard one'}")
    return 0


def _list_pairs() -> None:
    """The lines of `l2t data` about sentence pairs, with the languages that are there."""
    from l2t.translation import corpus, libreoffice

    built = ", ".join(path.name for path in corpus.built())
    title = f"sentences and their translations{': ' if built else ''}{built}"
    print(f"{TRANSLATION:<14}{'there' if built else 'not here':<10}{title}")
    print(f"{'':24}{libreoffice.ORIGIN}; licence: {libreoffice.LICENCE}")


def _data_of_pairs(options: argparse.Namespace) -> int:
    """Builds sentence pairs where they are not there, or where it is said how, and shows what they are."""
    from l2t.translation import corpus, libreoffice

    source, target, seed = options.source or "de", options.target or "en", options.seed or 0
    folder, made = corpus.folders(source, target)[0], None
    wanted = options.folder is not None or options.seed is not None or not corpus.built(source, target)
    with _asking():
        check.two_languages(source, target)
        if wanted:
            check.data_home(folder)
            check.corpus_not_there(folder)
            check.can_be_written("translation", folder)
        if options.folder is not None:
            made = corpus.from_folder(options.folder, source, target, seed)
        elif wanted:
            check.known("data", "target language without --from", target, ["en"])
            print(f"building from {', '.join(libreoffice.packages(source))}", flush=True)
    if wanted:
        corpus.write_folder(made or libreoffice.build(source, seed, sys.stderr.isatty()), folder)
    folder = corpus.find(source, target)
    print("\n".join(_pairs_lines(folder, corpus.read_folder(folder))))
    return 0


def _pairs_lines(folder: Path, pairs: Corpus) -> list[str]:
    """What is to be said of sentence pairs that are there."""
    info, counts = pairs.info, pairs.info["counts"]
    lines = [
        f"{folder.name}: {pairs.source} to {pairs.target}, {' / '.join(f'{n:,}' for n in counts.values())} "
        f"pairs ({' / '.join(counts)})",
        f"from: {info['origin']}",
        f"licence: {info['licence']}",
    ]
    for name, package in info.get("packages", {}).items():
        tried = "" if package["tested"] else ", a version that has not been tried"
        lines.append(f"package: {name} {package['version']}  {package['checksum']}{tried}")
    lines += [f"there: {folder / name}  {checksum}" for name, checksum in info["files"].items()]
    if left_out := info.get("left_out"):
        lines.append(f"left out: {left_out:,} pairs with an empty side")
    for name, shares in info["near_duplicates"].items():
        found = ", ".join(f"{100 * share:.1f}% at {index} or more" for index, share in shares.items())
        lines.append(f"near duplicates of training in {name}: {found} (Jaccard index of source trigrams)")
    return lines


# ---- teach ----


def _teach(options: argparse.Namespace) -> int:
    options.seeds = options.seeds or [0]  # as a default of the parser it would be one of those that are given
    with _asking():
        if options.task == TRANSLATION:
            lessons = _lessons_of_tokens(options)
        else:
            lessons = [_lesson(options, seed) for seed in dict.fromkeys(options.seeds)]
    if len(lessons) == 1:
        return _teach_one(lessons[0])
    return _teach_several(lessons, options.jobs)


class _Lesson(NamedTuple):
    """One run of `l2t teach`, complete and checked: what a process of its own needs to know."""

    task: str
    config: dict[str, Any]
    directory: Path
    resume: bool
    guard: bool
    quiet: bool


def _lesson(options: argparse.Namespace, seed: int) -> _Lesson:
    """Looks at everything that was asked for; raises a ValueError before any work is done."""
    from l2t import Recipe, tasks
    from l2t.teacher import AnyTeacher
    from l2t.weight_net import TRANSPOSING

    check.flags_without_meaning("a task", _given(options, _OF_TOKENS))
    task = tasks.get(options.task)
    task.require()
    regime = task.regimes[0] if options.regime is None else options.regime
    student = next(iter(task.students)) if options.student is None else options.student
    task.student(student)
    given = {"updates": options.updates, "students": options.students, "lr": options.lr}
    changes = {name: value for name, value in given.items() if value is not None}
    changes |= _settings(options.set, [field.name for field in dataclasses.fields(Recipe)])
    teacher, stem = _teacher(options, task.num_classes)
    if stem == "weight-net":
        changes = {"teacher_lr": WEIGHT_NET_LR, **changes}
    recipe = dataclasses.replace(task.recipe(regime), **changes)
    if teacher["class"] == DEFAULT:
        _starts(teacher, task.num_classes, seed)
    else:
        AnyTeacher.of(teacher, seed=seed)
    if stem == "weight-net":
        check.teach_transposes(recipe.curvature, TRANSPOSING)
    name = f"{stem}-{seed}"
    directory = _run_folder(options, f"{task.name}-{regime}", name)
    config = {
        "task": task.name,
        "regime": regime,
        "student": student,
        "seed": seed,
        "data_seed": options.data_seed or 0,
        "device": _device(options),
        "teacher": teacher,
        "recipe": recipe.to_json(),
        "guard": not options.no_guard,
        "versions": doctor.versions(),
    }
    if _is_begun(directory):
        check.is_the_same("teach", directory, _differing(directory / "config.json", config))
    return _Lesson(task.name, config, directory, options.resume, not options.no_guard, options.quiet)


def _differing(path: Path, config: Mapping[str, Any]) -> list[str]:
    """What is asked for otherwise than in the config.json of a begun run; devices of a kind do the same."""
    from l2t.teach import differing

    was = read_json(path) if path.is_file() else {}
    wanted = {name: value for name, value in config.items() if name in was}  # an older file says less
    return differing(was, {name: wanted[name] for name in wanted if name not in ("device", "versions")})


def _run_folder(options: argparse.Namespace, where: str, name: str) -> Path:
    """The folder of a run, in which one may be taught."""
    if options.out is None:
        directory = RUNS / where / name
    else:
        directory = options.out / name if len(options.seeds) > 1 else options.out
    if _is_begun(directory):
        check.may_start("teach", directory, options.resume)
    return directory


def _given(options: argparse.Namespace, flags: Sequence[str]) -> list[str]:
    """Those of the flags that are there, as they are written."""
    return [name.replace("_", "-") for name in flags if getattr(options, name) is not None]


def _lessons_of_tokens(options: argparse.Namespace) -> list[_Lesson]:
    """The runs of `l2t teach translation`, complete and checked; new ones get their vocabulary."""
    from l2t.translation import corpus, course, runs
    from l2t.translation.vocabulary import Vocabulary

    check.flags_without_meaning(
        TRANSLATION, _given(options, ("regime", "data_seed", "teacher", "rank", "device"))
    )
    names = ("weight", "slots", "link", "features", "smoothing")
    teacher = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    if teacher.get("features") == ["none"]:
        teacher = {"slots": 1, **teacher, "features": []}
    stem = "static" if teacher.get("slots") == 1 else "seed"
    named = {"run_steps": "steps", "steps": "window"}  # what a recipe of windows calls these flags
    named |= {name: name for name in ("updates", "students", "lr", "measure")}
    settings = {name: getattr(options, flag) for name, flag in named.items()}
    settings = {name: value for name, value in settings.items() if value is not None}
    settings |= _settings(options.set, runs.SETTINGS)
    folder = corpus.find() if options.data is None else options.data
    pairs, student = corpus.read_folder(folder), options.student or "lstm"
    lessons = []
    for seed in dict.fromkeys(options.seeds):
        config = runs.config_of(pairs, folder, options.pieces or 3000, student, seed, teacher, settings)
        config |= {"guard": not options.no_guard, "versions": doctor.versions()}
        directory = _run_folder(options, f"{TRANSLATION}-{student}", f"{stem}-{seed}")
        if course.is_settled(directory):
            check.may_start("teach", directory, False)
        if _is_begun(directory):
            runs.check_same(directory, config)
        lessons.append(
            _Lesson(TRANSLATION, config, directory, options.resume, not options.no_guard, options.quiet)
        )
    new = [lesson for lesson in lessons if not _is_begun(lesson.directory)]
    if new:
        vocabulary = Vocabulary.train(pairs, options.pieces or 3000)
        for lesson in new:
            vocabulary.save(lesson.directory / course.VOCABULARY)
            write_json(lesson.directory / "config.json", lesson.config)
    return lessons


def _teacher(options: argparse.Namespace, num_classes: int) -> tuple[dict[str, Any], str]:
    """The teacher that was asked for, and what folders of its runs begin with.

    It is settings that AnyTeacher.of takes, or of the class DEFAULT those that l2t.default_starts takes:
    where neither kind nor link is asked for, the dev set chooses them.
    """
    flags = ("weight", "link", "slots", "rank", "features")
    given = {name: getattr(options, name) for name in flags if getattr(options, name) is not None}
    if (
        check.known("cli", "kind of teacher", options.teacher or "loss", ("loss", "weight-net"))
        == "weight-net"
    ):
        check.weight_net_flags(list(given))
        return {"class": "WeightNet", "num_classes": num_classes}, "weight-net"
    if given.get("features") == ["none"]:  # a teacher that sees nothing has one loss
        given = {"slots": 1, **given, "features": []}
    stem = "static" if given.get("slots") == 1 else "seed"
    if not given.keys() & {"weight", "link", "rank"}:
        return {"class": DEFAULT, **given}, stem
    return {"class": "Teacher", "num_classes": num_classes, **given}, stem


def _starts(teacher: Mapping[str, Any], num_classes: int, seed: int, data: Data | None = None) -> Starts:
    """The starts of a teacher of class DEFAULT, by what is known of the training labels of ``data``."""
    import l2t

    settings = {name: value for name, value in teacher.items() if name != "class"}
    if data is not None:
        counts = data.train[1].bincount(minlength=num_classes).tolist()
        settings |= {"counts": counts, "noisy": data.noise is not None}
    return l2t.default_starts(num_classes, seed=seed, **settings)


def _is_begun(directory: Path) -> bool:
    """Whether there is a run in the folder: its checkpoint, or the runs of families that it chooses among."""
    return (directory / "checkpoint.json").exists() or (directory / "families").exists()


def _settings(pairs: Sequence[str], fields: Sequence[str]) -> dict[str, Any]:
    """Some of the fields from FIELD=VALUE; a value is JSON, or else a string."""
    found = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        check.setting_form(pair, bool(equals))
        try:
            found[check.known("cli", "field of --set", name, fields)] = json.loads(text)
        except json.JSONDecodeError:
            found[name] = text
    return found


def _teach_one(lesson: _Lesson) -> int:
    import l2t
    from l2t import tasks
    from l2t.teach import plan_episode
    from l2t.teacher import AnyTeacher

    if lesson.task == TRANSLATION:
        return _teach_tokens(lesson)
    task, config = tasks.get(lesson.task), lesson.config
    data = task.load(config["regime"], config["data_seed"]).to(config["device"])
    recipe = l2t.Recipe(**config["recipe"])
    with _asking():
        check.augments("teach", recipe.augment, data.train[0])
    began = time.perf_counter()
    if not lesson.quiet and not sys.stderr.isatty():  # a log file wants no moving bar
        print(f"teaching {lesson.directory}", flush=True)
    if not _is_begun(lesson.directory):
        write_json(lesson.directory / "config.json", config)
    student, starts = task.student(config["student"]), None
    teacher: AnyTeacher
    if config["teacher"]["class"] == DEFAULT:
        starts = _starts(config["teacher"], task.num_classes, config["seed"], data)
        teacher = starts.teachers[0]
    else:
        teacher = AnyTeacher.of(config["teacher"], seed=config["seed"])
    planned = recipe.memory is not None or recipe.schedule != "auto"
    if planned and not lesson.quiet and not (lesson.directory / "teacher.safetensors").exists():
        plan = plan_episode(teacher, student, data.train, data.dev, recipe=recipe)
        print(_plan_lines(plan, recipe), flush=True)
    course: dict[str, Any] = {
        "student": student,
        "train": data.train,
        "dev": data.dev,
        "recipe": recipe,
        "seed": config["seed"],
        "directory": lesson.directory,
        "resume": lesson.resume,
        "guard": lesson.guard,
        "progress": not lesson.quiet and sys.stderr.isatty(),
    }
    taught = l2t.teach(teacher, **course) if starts is None else l2t.teach_best(starts, **course)
    if not lesson.quiet:
        print(_taught_line(taught.history, lesson.directory, time.perf_counter() - began))
    return 0


def _teach_tokens(lesson: _Lesson) -> int:
    from l2t.translation import runs

    began = time.perf_counter()
    shown = not lesson.quiet and sys.stderr.isatty()
    if not lesson.quiet and not shown:
        print(f"teaching {lesson.directory}", flush=True)
    taught = runs.teach(lesson.directory, lesson.config, lesson.resume, shown)
    if not lesson.quiet:
        print(_taught_line(taught.history, lesson.directory, time.perf_counter() - began))
    return 0


def _plan_lines(plan: Plan, recipe: Recipe) -> str:
    """What the updates will cost, before them."""
    minutes = recipe.updates * plan.seconds / 60
    return (
        f"an update, {recipe.students} students side by side:\n{plan}\n"
        f"expected: {recipe.updates} updates in {minutes:.3g} minutes, beside the probe and the trial"
    )


def _taught_line(history: dict[str, Any], directory: Path, seconds: float) -> str:
    """What a teaching came to, in a line: means over its first and its last updates."""
    rows = history["updates"]
    few = max(1, len(rows) // 10)

    def ends(name: str) -> list[float]:
        parts = ([row[name] for row in part if row[name] is not None] for part in (rows[:few], rows[-few:]))
        return [statistics.fmean(part) if part else math.nan for part in parts]

    measure, error = ends("measure"), ends("dev_error")
    return (
        f"{directory}: {len(rows)} updates, {seconds:.0f} s; "
        f"dev measure {measure[0]:.3f} -> {measure[1]:.3f}, dev error {100 * error[0]:.1f}% -> "
        f"{100 * error[1]:.1f}%, agreement {ends('agreement')[1]:.2f}"
    )


def _teach_several(lessons: Sequence[_Lesson], jobs: int) -> int:
    """Teaches in processes, `jobs` at a time; returns the worst of their exit codes.

    Each child is a group of its own, so that Ctrl-C reaches it once, through here, and after its last update.
    """
    context = multiprocessing.get_context("spawn")
    waiting, codes = list(lessons), []
    running: dict[int, BaseProcess] = {}  # by the line of the screen that the child's progress is on
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                line = min(set(range(jobs)) - running.keys())
                os.environ["TQDM_POSITION"] = str(line)  # tqdm reads it when the child imports it
                lesson = waiting.pop(0)
                running[line] = context.Process(target=_child, args=(lesson,), name=str(lesson.directory))
                running[line].start()
            multiprocessing.connection.wait([child.sentinel for child in running.values()])
            for line, child in list(running.items()):
                if child.exitcode is not None:
                    codes.append(abs(child.exitcode))
                    if child.exitcode < 0:
                        said = check.process_killed(child.name, child.exitcode, makes_missing=False)
                        print(said, file=sys.stderr)
                    del running[line]
    except KeyboardInterrupt:
        for child in running.values():
            child.terminate()
        for child in running.values():
            child.join()
        raise
    finally:
        os.environ.pop("TQDM_POSITION", None)
    return max(codes)


def _child(lesson: _Lesson) -> None:
    """A teaching in a process of its own, which SIGTERM stops: in the background Ctrl-C may be ignored."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    os.setpgid(0, 0)
    try:
        sys.exit(_teach_one(lesson))
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        sys.exit(_failed(error))


# ---- translators ----


def _train(options: argparse.Namespace) -> int:
    from l2t.translation import corpus, course, runs, scores
    from l2t.translation.vocabulary import Vocabulary

    began = time.process_time()
    with _asking():
        how = course.Course(options.student, steps=options.steps, lr=options.lr, seed=options.seed)
        taught = None
        if options.loss not in course.LOSSES:
            names = [*course.LOSSES, "a folder of `l2t teach translation`"]
            if not Path(options.loss).is_dir():
                check.known("train", "loss", options.loss, names)
            check.flags_without_meaning("a taught loss", _given(options, ["pieces"]))
            taught = runs.load(Path(options.loss))
        pairs = corpus.read_folder(corpus.find() if options.data is None else options.data)
        scores.metric_of("BLEU", pairs.target)
        out = RUNS / f"{TRANSLATION}-{options.student}" if options.out is None else options.out
        if course.is_begun(out):
            check.may_start("translation", out, options.resume)
        pieces = options.pieces or 3000
        vocabulary = Vocabulary.train(pairs, pieces) if taught is None else taught.vocabulary
    trained = course.train(
        pairs,
        vocabulary,
        how,
        course.LOSSES[options.loss] if taught is None else taught.loss,
        name=options.loss if taught is None else taught.name,
        directory=out,
        resume=options.resume,
        progress=not options.quiet and sys.stderr.isatty(),
    )
    said = trained.translate([source for source, _ in pairs.test])
    wanted = [target for _, target in pairs.test]
    fit = scores.fit(trained.student, trained.vocabulary.encode_pairs(pairs.test))
    for name, score in (
        ("BLEU", scores.bleu(said, wanted, pairs.target)),
        ("chrF", scores.chrf(said, wanted)),
    ):
        print(f"test {name} {score.value:.2f}  {score.signature}")
    dev = scores.perplexity(trained.history[-1]["dev_loss"])
    print(f"test perplexity {fit.perplexity:.2f} a piece, dev {dev:.2f}")
    print(f"{out}: {how.steps} steps; {time.process_time() - began:.0f} s of CPU in this command")
    return 0


def _translate(options: argparse.Namespace) -> int:
    from l2t.translation import course

    with _asking():
        translator = course.load(options.directory)
        sentences = options.sentences
        if sentences in ([], ["-"]):
            sentences = _lines_to_translate()
        check.sentences(sentences)
    for text in translator.translate(sentences, options.beam):
        print(text)
    return 0


def _lines_to_translate() -> list[str]:
    """Lines of the standard input, which end in a newline and nothing else, as other tools count them."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(newline="\n", errors="strict")
    try:
        read = sys.stdin.read().removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise check.text_to_translate(error) from error
    return read.removesuffix("\n").split("\n") if read else []


# ---- compare, report, doctor ----


def _compare(options: argparse.Namespace) -> int:
    from l2t import contest, tasks
    from l2t.translation import runs

    with _asking():
        named = [where for where in options.where if where in tasks.names() and not Path(where).is_dir()]
        check.compare_one_task(options.where, named)
        if named:
            task = tasks.get(named[0])
            regime = task.regimes[0] if options.regime is None else options.regime
            task.setting(regime)
            folders = [RUNS / f"{task.name}-{regime}"]
        else:
            folders = [Path(where) for where in options.where]
            for folder in folders:
                if str(folder) == TRANSLATION and not folder.is_dir():
                    raise check.compare_folders_of_translators()
                check.task_or_folder(str(folder), folder.is_dir(), tasks.names())
        of_translators = runs.among(folders)
    if of_translators:
        return _compare_translators(folders, options)
    with _asking():
        if not named:
            check.flags_without_meaning("a comparison of folders", _given(options, ["regime"]))
        contests = contest.of_runs(folders, _budget(options))
        _say_what_is_left_out(folders)
    return _hold(contests, options)


def _compare_translators(folders: Sequence[Path], options: argparse.Namespace) -> int:
    from l2t import contest
    from l2t.translation import contest as token_contest
    from l2t.translation import course

    with _asking():
        check.flags_without_meaning("a comparison of translators", _given(options, ["regime", "device"]))
        budget = _budget(options)._replace(
            students=options.students or token_contest.STUDENTS,
            grid=tuple(options.grid or ()),
        )
        one = token_contest.of_runs(folders, budget)
        _say_what_is_left_out(folders)
        comparison = token_contest.set_up(one)
    if options.arms == ["list"]:
        print(" ".join(course.LOSSES))
        return 0
    with _asking():
        check.can_be_written("compare", one.folder)
    if options.again:
        comparison.forget()
    shown = not options.quiet and sys.stderr.isatty()
    if not contest.make([one], [comparison], options.jobs, shown, token_contest.set_up):
        return 1
    found = token_contest.write(one, comparison)
    print("\n".join(token_contest.table(f"translation, {comparison.course.student}", found)), flush=True)
    return 0


def _transfer(options: argparse.Namespace) -> int:
    from l2t import contest

    with _asking():
        one = contest.elsewhere(
            options.runs, options.to, options.regime, options.student, options.steps, _budget(options)
        )
        if options.out is not None:
            one = one._replace(folder=options.out, out=options.out)
        _say_what_is_left_out(options.runs)
    return _hold([one], options)


def _budget(options: argparse.Namespace) -> Budget:
    from l2t.compare import GRID
    from l2t.contest import Budget

    return Budget(
        students=options.students or 20,
        tuning_students=options.tuning_students,
        grid=tuple(options.grid or GRID),
        seed=options.seed,
        only=None if options.arms in (None, ["list"]) else tuple(options.arms),
    )


def _hold(contests: Sequence[Contest], options: argparse.Namespace) -> int:
    """Makes what is missing of the comparisons, writes them and prints their tables."""
    from l2t import contest
    from l2t.compare import slug

    with _asking():
        contests = [one._replace(device=_device(options)) for one in contests]
        comparisons = [contest.set_up(one) for one in contests]
    if options.arms == ["list"]:
        for one, comparison in zip(contests, comparisons, strict=True):
            names = [slug(name) for name in comparison.others if name not in comparison.also]
            print(f"{one.task}, {one.regime}: {' '.join(names)}")
        return 0
    with _asking():
        for one in contests:
            check.can_be_written("compare", one.folder)
            contest.look_at_place(one)
    if options.again:
        for comparison in comparisons:
            comparison.forget()
    shown = not options.quiet and sys.stderr.isatty()
    if not contest.make(contests, comparisons, options.jobs, shown):
        return 1
    for one, comparison in zip(contests, comparisons, strict=True):
        found = contest.write(one, comparison)
        print("\n".join(comparison_table(f"{one.task}, {one.regime}", found)), flush=True)
    return 0


def _say_what_is_left_out(folders: Sequence[Path]) -> None:
    """Tells of runs in the folders that were broken off."""
    inside = [path for folder in folders for path in (folder, *sorted(folder.glob("*/")))]
    begun = [path for path in inside if _is_begun(path)]
    unfinished = [path for path in begun if not (path / "teacher.safetensors").is_file()]
    if unfinished:
        print(check.runs_left_out(unfinished), file=sys.stderr)


def comparison_table(title: str, comparisons: Mapping[str, dict[str, Any]]) -> list[str]:
    """The lines of the table that `l2t compare` prints: arms by rows, for each teacher difference and p."""
    from l2t.compare import Against, rate_cell, table
    from l2t.report import verdict

    first = next(iter(comparisons.values()))

    def cells(comparison: dict[str, Any], arm: str) -> str:
        errors = [100 * error for error in comparison["test_error"][arm]]
        sd = statistics.stdev(errors) if len(errors) > 1 else math.nan
        return f"{statistics.fmean(errors):7.2f} ± {sd:4.2f}  {rate_cell(comparison['tuning'][arm]):>7}"

    def against(comparison: dict[str, Any], arm: str) -> Against:
        difference = 100 * comparison["summary"][arm]["difference"]
        return Against(difference, comparison["p_corrected"][arm], verdict(comparison, arm))

    others = [arm for arm in first["test_error"] if arm != "taught"]
    others.sort(key=lambda arm: first["summary"][arm]["mean"])
    students = len(first["test_error"]["taught"])
    return table(
        f"{title}: test error in percent, mean ± sd of {students} fresh students an arm",
        f"{'test error':>14}  {'rate':>6} ",
        {f"taught, {name}": cells(one, "taught") for name, one in comparisons.items()}
        | {arm: cells(first, arm) for arm in others},
        {f"taught, {name}": {arm: against(one, arm) for arm in others} for name, one in comparisons.items()},
        first["comparisons"],
    )


def _report(options: argparse.Namespace) -> int:
    from l2t import report

    with _asking():
        runs = report.find_runs(options.directory)
        report.kind_of(runs)
        _say_what_is_left_out([options.directory])
    print(report.write(options.directory, runs))
    return 0


def _doctor(options: argparse.Namespace) -> int:
    return doctor.main()


_COMMANDS = {
    "data": _data,
    "teach": _teach,
    "compare": _compare,
    "transfer": _transfer,
    "train": _train,
    "translate": _translate,
    "report": _report,
    "doctor": _doctor,
}

if __name__ == "__main__":
    sys.exit(main())
