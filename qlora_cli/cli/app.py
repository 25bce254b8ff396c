"""Command-line application: the five commands, and the only place where a `QloraError` is caught."""

import importlib
import os
import shlex
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import Field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_cli.artifacts import find_run_record, is_model, is_run, ways_to_use
from qlora_cli.cli.command_line.declared import Command, Positional, Typed, unknown_variables
from qlora_cli.cli.command_line.origins import name_variable, naming_file
from qlora_cli.cli.command_line.plain import given_again, read_plainly
from qlora_cli.cli.streams import UnwrittenOutput, open_log, open_standard_descriptors, tolerant_streams
from qlora_cli.cli.visible import visible
from qlora_cli.cli.waiting import FIRST_SIGN, LIBRARIES, LoadingSign, loading_sign, uncollected
from qlora_cli.config import GenerateConfig, InspectConfig, MergeConfig, PrepareConfig, TrainConfig
from qlora_cli.core.runs.validate import check, check_places, check_resumed
from qlora_cli.core.torchless import leave_torch_out
from qlora_cli.errors import DoesNotFit, Interrupted, QloraError, UsageError
from qlora_cli.events import Caution, Notice
from qlora_cli.frozen import frozen
from qlora_cli.interrupts import SENTENCE, Terminated, loading, take_signal, working
from qlora_cli.launch import is_silent_rank, launched_rank
from qlora_cli.settings.setting import flag_of

if TYPE_CHECKING:
    from qlora_cli.cli.console import Console

COMMANDS: dict[str, Command] = {}


class Ended(Exception):
    """A command has ended with an exit code, and has no result to show."""

    def __init__(self, exit_code: int) -> None:
        super().__init__(exit_code)
        self.exit_code = exit_code


@frozen
class Call:
    """Settings of one invocation, its console, and its positional arguments."""

    config: Any
    console: "Console"
    arguments: dict[str, Any]
    command_line: list[str]
    sign: LoadingSign

    def load(self, name: str) -> Any:
        """The module of a command, imported; until then a sign says so.

        Raises:
            UsageError: This Python leaves out what the libraries read of their own docstrings.
        """
        if sys.flags.optimize > 1:
            raise UsageError(
                "Python runs without docstrings (PYTHONOPTIMIZE=2, or -OO), of which transformers makes classes.",
                "Type: unset PYTHONOPTIMIZE, and the command again.",
            )
        with loading(), uncollected():
            module = importlib.import_module(f"qlora_cli.{name}")
        self.sign.stop()
        return module

    def run(self, body: "Callable[[Call], Any]") -> Any:
        """The result of a command, shown."""
        result = body(self)
        self.sign.stop()
        self.console.show_result(result)
        return result


def command(
    config_type: type, *positional: Positional, before: Callable[..., None] | None = None, **always: Any
) -> Callable[[Callable[[Call], Any]], Callable[[Call], Any]]:
    """Registers a function under its own name as a command with the options of `config_type`; its result is shown.

    Args:
        config_type: One of the dataclasses of `config.py`.
        positional: Arguments without a flag.
        before: Checks settings and positional arguments before anything is imported that takes time; by default `check`.
        always: Settings that the command has whatever is typed.
    """

    def register(body: Callable[[Call], Any]) -> Callable[[Call], Any]:
        def run(typed: Typed) -> int:
            if typed.flags.get("print_schema") or typed.flags.get("list_recipes"):
                from qlora_cli.cli.listings import print_listing

                print_listing(config_type, schema=typed.flags.get("print_schema", False))
                return 0
            try:
                with ExitStack() as stack:
                    stack.enter_context(working())
                    given = typed.settings | always
                    named = typed.flags.get("config_file")
                    settings_file = named.expanduser() if named else None
                    of_file = settings_of_file(settings_file, config_type)
                    replaced = displaced(of_file, given, config_type)
                    kept = {name: of_file[name] for name in of_file.keys() - given.keys() - replaced.keys()}
                    stack.enter_context(naming_file(settings_file, kept, config_type))
                    config = config_type(**kept | given)
                    (before or check)(config, **typed.positional)
                    if getattr(config, "resume", False) and "output" not in typed.settings:
                        check_resumed(settings_file, Path(config.output))
                    if launched_rank() is None:  # else each rank would say what is missing
                        with loading():
                            check_places(config)
                    call = begin(stack, COMMANDS[body.__name__], config, typed)
                    for name, other in replaced.items():
                        flag = flag_of(other).split("/")[0]
                        call.console.report(Notice(f"{flag} is taken in place of the {name!r} of --config."))
                    result = call.run(body)
            except Ended as ended:
                return ended.exit_code
            except (KeyboardInterrupt, Terminated, OSError) as error:
                raise _as_failure(error) from error  # Typer would end without a word
            if result is not None and result.get("fits") is False:
                return DoesNotFit.exit_code
            return QloraError.exit_code if result is not None and result.get("damaged") else 0

        COMMANDS[body.__name__] = Command(body.__name__, body.__doc__ or "", config_type, positional, run)
        return body

    return register


def begin(stack: ExitStack, command: Command, config: Any, typed: Typed) -> Call:
    """A call of a command with its sign, log and console, open as long as the stack."""
    flags = typed.flags
    silent = is_silent_rank() or flags.get("quiet", False)
    log = stack.enter_context(open_log(flags.get("log_file")))
    libraries = libraries_of(config, typed.positional.get("runs"))
    sign = stack.enter_context(loading_sign(libraries, silent=silent))
    with loading():
        from qlora_cli.cli.console import Console
    console = Console(
        as_json=flags.get("as_json", False),
        quiet=flags.get("quiet", False),
        verbose=flags.get("verbose", False) or getattr(config, "verbose", False),
        log=log,
        markdown=getattr(config, "markdown", False),
        before=sign.stop,
    )  # its streams are those here
    if libraries and not flags.get("debug"):
        from qlora_cli.cli.quiet import quiet_libraries

        stack.enter_context(quiet_libraries())
    stack.enter_context(console)
    if "QLORA_LAUNCHER" not in os.environ:  # which has said it
        say_what_was_typed(console, command, typed)
    return Call(config, console, typed.positional, typed.arguments, sign)


def say_what_was_typed(console: "Console", command: Command, typed: Typed) -> None:
    """Reports settings of the environment, and what in it or on the command line is probably not meant."""
    if typed.variables:
        used = ", ".join(f"{name}={os.environ[name]}" for name in typed.variables)
        console.report(Notice(f"From the environment: {used}."))
    for name, meant in unknown_variables(COMMANDS.values()):
        console.report(Caution(f"{name} in the environment is no setting{f'; {meant} is one' if meant else ''}."))
    for flag, last in given_again(command, typed.arguments).items():
        console.report(Caution(f"{flag} was given several times, and the last one counts: {last}"))


def settings_of_file(path: Path | None, config_type: type) -> dict[str, Any]:
    """What a settings file says; nothing without one."""
    if path is None:
        return {}
    from qlora_cli.config_file import read_config_file

    return read_config_file(path, config_type)


def displaced(of_file: dict[str, Any], given: dict[str, Any], config_type: type) -> dict[str, Field]:
    """Settings of a file, by name, that one which was typed takes the place of, and which that is."""
    defaults = {field.name: field.default for field in fields(config_type)}
    return {
        other: field
        for field in fields(config_type)
        if given.get(field.name) is not None
        for other in field.metadata["instead_of"]
        if other not in given and of_file.get(other, defaults.get(other)) != defaults.get(other)
    }


def libraries_of(config: Any, runs: Sequence[str] | None) -> tuple[str, ...] | None:
    """What a command has to import before it begins, where that takes longer than anyone waits without a word."""
    if runs and not is_model(Path(runs[0])):
        return ("matplotlib",) if config.picture else None
    if (
        not runs
        and isinstance(config, InspectConfig)
        and (config.prepared or config.adapter or not config.model)
        and not (config.model and config.adapter)
    ):
        return None if config.prepared or is_run(Path(config.adapter or TrainConfig.output)) else LIBRARIES["inspect"]
    return LIBRARIES[type(config).__name__.removesuffix("Config").lower()]


@command(PrepareConfig)
def prepare(call: Call) -> Any:
    """Tokenise and mask a data set, and write it to disk."""
    begin_look_up(call.config.model, call.config.model_revision, call)
    stage = call.load("commands.prepare")
    summary = stage.prepare(call.config, call.console.report)
    model, rows = (shlex.quote(str(each)) for each in (call.config.model, call.config.output))
    call.console.suggest(f"qlora train --model {model} --prepared {rows}")
    return summary.to_dict() if call.console.as_json or call.config.verbose else stage.summarise(summary)


def begin_look_up(model: str | None, revision: str | None, call: Call) -> None:
    """Begins to fetch a hub model's small files, while the libraries are imported."""
    if model is not None and not (Path(model).expanduser() / "config.json").is_file():
        with loading():
            from qlora_cli.core.models.hub import look_up_early

        look_up_early(model, revision, call.console.report)


@command(TrainConfig)
def train(call: Call) -> Any:
    """Train an adapter on rows, into the directory --output."""
    if (call.config.gpus or 1) > 1 and launched_rank() is None:
        launcher = call.load("core.distributed.launcher")
        raise Ended(launcher.launch(call.config.gpus, call.command_line))
    begin_look_up(call.config.model, call.config.model_revision, call)
    result = call.load("commands.train").train(call.config, call.console.report)
    if not call.config.dry_run:
        for line in ways_to_use(Path(call.config.output)):
            call.console.suggest(line)
    return result.to_dict()


@command(MergeConfig)
def merge(call: Call) -> Any:
    """Write base and adapter as one plain transformers checkpoint."""
    begin_look_up(call.config.model, call.config.model_revision, call)
    result = call.load("commands.merge").merge(call.config, call.console.report)
    call.console.suggest(f'qlora generate --model {shlex.quote(str(call.config.output))} "Your question"')
    return result.to_dict()


PROMPT = Positional("prompt", "Text to answer; - reads it from stdin.")


def check_prompt(config: GenerateConfig, prompt: str | None = None) -> None:
    """Checks that there is a model, and one source of questions.

    Raises:
        UsageError: There is not.
    """
    sources = [prompt is not None, config.input is not None, config.chat]
    if sum(sources) < 2:
        check(config)
    if sum(sources) != 1:
        found = "more than one" if any(sources) else "none"
        raise UsageError(
            f"generate takes one of PROMPT, --input FILE and --chat; {found} was given.",
            'Type: qlora generate --adapter out "Your question"',
        )


@command(GenerateConfig, PROMPT, before=check_prompt)
def generate(call: Call) -> Any:
    """Answer a prompt, a file of prompts, or hold a conversation."""
    prompt = call.arguments.get("prompt")
    model, revision = call.config.model, call.config.model_revision
    if model is None and call.config.adapter is not None:
        recorded = find_run_record(Path(call.config.adapter)).get("base") or {}
        model, revision = recorded.get("model"), revision or recorded.get("revision")
        if not isinstance(model, str) or Path(model).is_absolute():  # a foreign record may hold anything
            model = None
    begin_look_up(model, revision, call)
    generation = call.load("commands.generate")
    if call.config.chat:
        result = generation.converse(call.config, call.console.report, call.console.read_line)
    else:
        # The newline that ends what echo and editors write is no part of the question.
        prompts = [] if prompt is None else [sys.stdin.read().removesuffix("\n") if prompt == "-" else prompt]
        result = generation.generate(call.config, prompts, call.console.report)
    return result.to_dict() if call.console.as_json and result is not None else None


@command(GenerateConfig, chat=True)
def chat(call: Call) -> Any:
    """Hold a conversation: generate --chat."""
    return generate(call)


RUNS = Positional(
    "runs", "A run, a prepared set or a model by its directory; or several runs beside each other.", many=True
)


def check_runs(config: InspectConfig, runs: list[str] | None = None) -> None:
    """Checks that runs are all that is looked at, where they are.

    Raises:
        UsageError: They are not.
    """
    check(config)
    others = [name for name in ("model", "adapter", "prepared") if getattr(config, name)]
    if runs and others:
        raise UsageError(
            f"inspect looks at one thing at a time: {runs[0]} and --{others[0]} were given.",
            f"Type: qlora inspect {' '.join(map(shlex.quote, runs))}",
        )
    if config.picture and len(runs or ()) < 2:
        raise UsageError(
            "--picture is of several runs.", f"Type: qlora inspect RUN RUN --picture {shlex.quote(str(config.picture))}"
        )


@command(InspectConfig, RUNS, before=check_runs)
def inspect(call: Call) -> Any:
    """Describe a model, run or data set, and whether it fits.

    Without an argument: the run in out/ if there is one, else this machine. With several runs: one beside the other.
    """
    whole = call.console.as_json or call.console.verbose
    runs = call.arguments["runs"] or ()
    begin_look_up(call.config.model, call.config.model_revision, call)
    return call.load("commands.inspect").inspect(call.config, call.console.report, runs, whole=whole)


def main(arguments: list[str] | None = None) -> int:
    """Runs one command line and returns its exit code; every failure becomes one sentence on stderr.

    Args:
        arguments: What follows the program's name; by default this process's own.
    """
    FIRST_SIGN.clear()
    open_standard_descriptors()
    if arguments is None and sys.argv[1:2] == ["prepare"]:  # never in a process that goes on with something else
        leave_torch_out()
    with tolerant_streams() as results:
        code = _run(sys.argv[1:] if arguments is None else arguments)
        if results is not None:
            results.flush()
            if results.failure is not None and not code:
                return _show(UnwrittenOutput(results.failure))
    return code


def _run(arguments: list[str]) -> int:
    """The exit code of one command line, its failure shown."""
    found = COMMANDS.get(arguments[0]) if arguments else None
    try:
        if found is not None and (typed := read_plainly(found, arguments)) is not None:
            return found.run(typed)
        from qlora_cli.cli.command_line.program import run_program

        return run_program(COMMANDS, arguments)
    except (Exception, Terminated) as error:
        failure = _as_failure(error)
        if found is not None:
            failure.message += name_variable(failure, found, arguments)
        if "--debug" in arguments and _speaks(failure):
            import traceback

            print(visible("".join(traceback.format_exception(error))), end="", file=sys.stderr)
        return _show(failure, as_json="--json" in arguments)


def _speaks(failure: QloraError) -> bool:
    """Whether this process shows a failure, and no other rank."""
    return not failure.reported and (not isinstance(failure, UsageError) or not is_silent_rank())


def _show(failure: QloraError, *, as_json: bool = False) -> int:
    """Shows a failure unless another rank does, and returns its exit code."""
    if _speaks(failure):
        from qlora_cli.cli.console import show_error

        show_error(failure, as_json=as_json)
    return failure.exit_code


def _as_failure(error: BaseException) -> QloraError:
    """Whatever a command raised, as one sentence with its exit code."""
    if isinstance(error, QloraError):
        return error
    number = take_signal()  # a library may have made another error of the one it raised
    if number is not None or isinstance(error, KeyboardInterrupt):
        return Interrupted(SENTENCE, number or signal.SIGINT)
    from qlora_cli.core.storage.disk_space import describe_refusal

    if (refusal := describe_refusal(error)) is not None:
        return refusal
    sentence = " ".join(str(error).split()) or "no message"
    return QloraError(
        f"Unexpected {type(error).__name__}: {sentence[:300]}", "Run again with --debug for the traceback."
    )
