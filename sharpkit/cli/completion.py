"""Completion scripts for bash, zsh and fish, read off the argparse tree: a new command or option is completed without a line here."""

from __future__ import annotations

import argparse
import re
import shlex
from collections.abc import Callable, Iterator
from dataclasses import dataclass

# What an argument's metavar says about its value, as the help shows it; any other value is a number or a text of the user's own.
_TARGETS, _FOLDERS, _FILES = {"TARGET", "FILE|TARGET"}, {"FOLDER"}, {"FILE", "OUT", "run.jsonl"}
# Names of the functions that take no arguments in the file of a TARGET: those can be its end. $1 is the file.
_FUNCTIONS = r"sed -n 's/^def \([A-Za-z_][A-Za-z_0-9]*\)() *\(->.*\)\{0,1\}:.*$/\1/p'"


@dataclass(frozen=True)
class _Argument:
    """What a shell must know of one argument."""

    options: tuple[str, ...]  # as they are typed; none of a positional one
    help: str
    takes: str  # "nothing", "choice", "target", "folder", "file" or "value"
    choices: tuple[str, ...]
    several: bool  # whether it takes more than one value
    metavar: str


@dataclass(frozen=True)
class _Command:
    name: str
    help: str
    arguments: tuple[_Argument, ...]

    @property
    def options(self) -> list[str]:
        """All of them, as they are typed."""
        return [option for each in self.arguments for option in each.options]

    @property
    def positional(self) -> list[_Argument]:
        """Those that are known by their place."""
        return [each for each in self.arguments if not each.options]


def completion_script(parser: argparse.ArgumentParser, shell: str) -> str:
    """The script that makes a shell complete a command line with subcommands.

    Args:
        parser: the whole tree; the commands are its subparsers.
        shell: one of ``SHELLS``.

    Returns:
        Text for ``eval`` or a file; it defines one function and registers it for ``parser.prog``.

    Example:
        >>> parser = argparse.ArgumentParser("walk")
        >>> go = parser.add_subparsers().add_parser("go", help="set off")
        >>> action = go.add_argument("--how", choices=("slow", "fast"))
        >>> print(completion_script(parser, "fish").splitlines()[-1])
        complete -c walk -n '__fish_seen_subcommand_from go' -l how -x -a 'slow fast'
    """
    return _WRITERS[shell](parser.prog, _commands(parser), [each for each in map(_argument, parser._actions) if each.options])


def _commands(parser: argparse.ArgumentParser) -> list[_Command]:
    trees = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    found = []
    for tree in trees:
        summaries = {each.dest: each.help or "" for each in tree._choices_actions}
        for name, sub in tree.choices.items():
            found.append(_Command(name, summaries.get(name, ""), tuple(map(_argument, sub._actions))))
    return found


def _argument(action: argparse.Action) -> _Argument:
    metavar = action.metavar if isinstance(action.metavar, str) else (action.metavar or (action.dest.upper(),))[0]
    if action.nargs == 0:
        takes = "nothing"
    elif action.choices is not None:
        takes = "choice"
    else:
        kinds = {"target": _TARGETS, "folder": _FOLDERS, "file": _FILES}
        takes = next((kind for kind, names in kinds.items() if metavar in names), "value")
    # helps hold %(default)s and the like, which a menu has no room for
    about = re.sub(r"\s*\(default: [^)]*\)(s\))?", "", action.help or "").strip()
    choices = tuple(map(str, action.choices or ())) if takes == "choice" else ()
    return _Argument(tuple(action.option_strings), about, takes, choices, action.nargs in ("+", "*"), metavar)


# -- bash --------------------------------------------------------------------------------------------------------------------------
# compgen alone, no mapfile and no associative array: macOS brings bash 3.2, where compopt is missing too
_BASH_HEAD = """\
# bash completion of {prog}; in ~/.bashrc: eval "$({prog} completion bash)"
_{prog}() {{
    local IFS=$'\\n' cur=${{COMP_WORDS[COMP_CWORD]}} prev=${{COMP_WORDS[COMP_CWORD-1]}} command=${{COMP_WORDS[1]}}
    COMPREPLY=()
    # bash takes "job.py:job" for three words, and "--kind=loop" too
    if [[ $cur == ":" || $prev == ":" ]]; then
        local file=$prev; [[ $prev == ":" ]] && file=${{COMP_WORDS[COMP_CWORD-2]}}
        [[ $file == *.py && -r $file ]] && COMPREPLY=($(compgen -W "$({functions} "$file")" -- "${{cur#:}}"))
        return
    fi
    if [[ $cur == "=" ]]; then cur=""; elif [[ $prev == "=" ]]; then prev=${{COMP_WORDS[COMP_CWORD-2]}}; fi
    if (( COMP_CWORD == 1 )); then
        COMPREPLY=($(compgen -W $'{words}' -- "$cur"))
        return
    fi
    case "$command $prev" in
"""
_BASH_VALUES = {
    "file": 'COMPREPLY=($(compgen -f -- "$cur"))',
    "folder": 'COMPREPLY=($(compgen -d -- "$cur"))',
    "target": 'COMPREPLY=($(compgen -f -X "!*.py" -- "$cur") $(compgen -d -- "$cur"))',
}
_BASH_NAMES = "compopt -o filenames 2>/dev/null; "
_BASH_TARGETS = "compopt -o filenames -o nospace 2>/dev/null; "  # no blank: the function follows


def _bash_words(words: list[str] | tuple[str, ...]) -> str:
    return r"\n".join(words)


def _bash_values(argument: _Argument) -> str:
    if argument.takes == "choice":
        return f"""COMPREPLY=($(compgen -W $'{_bash_words(argument.choices)}' -- "$cur"))"""
    named = {"target": _BASH_TARGETS, "file": _BASH_NAMES, "folder": _BASH_NAMES}.get(argument.takes, "")
    return named + _BASH_VALUES.get(argument.takes, ":")  # ":" does nothing: a number has no completion


def _bash(prog: str, commands: list[_Command], options: list[_Argument]) -> str:
    names = [command.name for command in commands] + [option for each in options for option in each.options]
    lines = [_BASH_HEAD.format(prog=prog, words=_bash_words(names), functions=_FUNCTIONS)]
    for command in commands:
        for each in command.arguments:
            if each.options and each.takes != "nothing":
                patterns = "|".join(f'"{command.name} {option}"' for option in each.options)
                lines.append(f"        {patterns}) {_bash_values(each)}; return;;\n")
    lines.append('    esac\n    case "$command $cur" in\n')
    for command in commands:
        lines.append(f"""        "{command.name} -"*) COMPREPLY=($(compgen -W $'{_bash_words(command.options)}' -- "$cur"));;\n""")
    for command in commands:
        if command.positional:
            lines.append(f'        "{command.name} "*) {_bash_values(command.positional[0])};;\n')
    return "".join([*lines, f"    esac\n}}\ncomplete -F _{prog} {prog}\n"])


# -- zsh ---------------------------------------------------------------------------------------------------------------------------
_ZSH_HEAD = """\
#compdef {prog}
# zsh completion of {prog}; in ~/.zshrc, after compinit: eval "$({prog} completion zsh)"
_{prog}_target() {{
    if compset -P '*.py:'; then
        local file=${{~${{IPREFIX%:}}}}
        [[ -r $file ]] && compadd -- ${{(f)"$({functions} $file)"}}
    else
        _files -S '' -g '*.py(-.)'
    fi
}}
_{prog}() {{
    local curcontext=$curcontext state line
    local -a commands
    commands=({commands})
    _arguments -C {options} '1:command:->command' '*::argument:->argument'
    case $state in
        command) _describe command commands;;
        argument)
            case $words[1] in
"""
_ZSH_VALUES = {"file": "_files", "folder": "_files -/", "value": " ", "nothing": ""}


def _zsh_text(text: str) -> str:
    r"""Text within a specification, where ``:`` parts and ``]`` ends."""
    return re.sub(r"([\\:\[\]])", r"\\\1", text)


def _zsh_spec(argument: _Argument, prog: str) -> Iterator[str]:
    values = f"({' '.join(argument.choices)})" if argument.takes == "choice" else _ZSH_VALUES.get(argument.takes, f"_{prog}_target")
    what = f":{_zsh_text(argument.metavar)}:{values}"
    if not argument.options:
        yield shlex.quote(("*" if argument.several else "") + (what if argument.several else f"1{what}"))
    for option in argument.options:
        yield shlex.quote(f"{option}[{_zsh_text(argument.help)}]" + ("" if argument.takes == "nothing" else what))


def _zsh(prog: str, commands: list[_Command], options: list[_Argument]) -> str:
    shown = " ".join(shlex.quote(f"{command.name}:{command.help}") for command in commands)
    own = " ".join(spec for each in options for spec in _zsh_spec(each, prog))
    lines = [_ZSH_HEAD.format(prog=prog, commands=shown, options=own, functions=_FUNCTIONS)]
    for command in commands:
        specs = "".join(f" \\\n                    {spec}" for each in command.arguments for spec in _zsh_spec(each, prog))
        lines.append(f"                {command.name}) _arguments{specs};;\n")
    lines.append("            esac;;\n    esac\n}\n")
    # the same text serves as a file in $fpath, where zsh runs it as the function, and in eval
    lines.append(f'if [[ $funcstack[1] == _{prog} ]]; then _{prog} "$@"; else compdef _{prog} {prog}; fi\n')
    return "".join(lines)


# -- fish --------------------------------------------------------------------------------------------------------------------------
_FISH_HEAD = """\
# fish completion of {prog}; in ~/.config/fish/config.fish: {prog} completion fish | source
function __{prog}_target
    set -l word (commandline -ct)
    if string match -q '*.py:*' -- $word
        set -l file (string replace -r ':[^:]*$' '' -- $word)
        test -r $file; and for name in ({functions} $file); echo $file:$name; end
    else
        __fish_complete_suffix .py
    end
end
complete -c {prog} -f
"""


def _fish_values(argument: _Argument, prog: str) -> str:
    if argument.takes == "choice":
        return " -x -a " + shlex.quote(" ".join(argument.choices))
    return {
        "file": " -r -F",
        "folder": " -x -a '(__fish_complete_directories)'",
        "target": f" -x -a '(__{prog}_target)'",
        "value": " -x",
        "nothing": "",
    }[argument.takes]


def _fish(prog: str, commands: list[_Command], options: list[_Argument]) -> str:
    lines = [_FISH_HEAD.format(prog=prog, functions=_FUNCTIONS)]

    def line(condition: str, argument: _Argument) -> str:
        names = "".join(f" -l {option[2:]}" if option.startswith("--") else f" -s {option[1:]}" for option in argument.options)
        values = _fish_values(argument, prog)
        if not argument.options:  # -x and -r are of options
            values = values.replace(" -x", "").replace(" -r", "")
        about = f" -d {shlex.quote(argument.help)}" if argument.help else ""
        return f"complete -c {prog} -n {condition}{names}{values}{about}\n"

    lines += [line("__fish_use_subcommand", each) for each in options]
    for command in commands:
        lines.append(f"complete -c {prog} -n __fish_use_subcommand -a {command.name} -d {shlex.quote(command.help)}\n")
        lines += [line(f"'__fish_seen_subcommand_from {command.name}'", each) for each in command.arguments]
    return "".join(lines)


_WRITERS: dict[str, Callable[[str, list[_Command], list[_Argument]], str]] = {"bash": _bash, "zsh": _zsh, "fish": _fish}
SHELLS = tuple(_WRITERS)
