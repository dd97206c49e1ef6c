"""Finds calls that could run what a file holds; it reads the syntax, so comments do not count."""

from __future__ import annotations

import ast
from collections.abc import Iterator

# what a name means, wherever it was imported from
_FORBIDDEN = {
    "eval": "runs data",
    "exec": "runs data",
    "builtins.eval": "runs data",
    "builtins.exec": "runs data",
    "compile": "compiles data",
    "os.system": "runs a shell",
    "os.popen": "runs a shell",
    "subprocess.getoutput": "runs a shell",
    "subprocess.getstatusoutput": "runs a shell",
    "yaml.load": "builds any object: use safe_load",
    "yaml.load_all": "builds any object: use safe_load_all",
    "yaml.unsafe_load": "builds any object",
    "yaml.full_load": "builds objects",
    "pickle.load": "unpickles",
    "pickle.loads": "unpickles",
    "pickle.Unpickler": "unpickles",
    "marshal.load": "unmarshals",
    "marshal.loads": "unmarshals",
    "shelve.open": "unpickles",
    "joblib.load": "unpickles",
    "pandas.read_pickle": "unpickles",
    "torch.hub.load": "runs a downloaded script",
    "torch.jit.load": "runs a downloaded program",
    "torch.package.PackageImporter": "runs a downloaded program",
    "torch.distributed.checkpoint.load": "unpickles its metadata",
    "torch.distributed.checkpoint.load_state_dict": "unpickles its metadata",
    "torch.distributed.checkpoint.FileSystemReader": "unpickles its metadata",
}
_PICKLES = {"dill", "cloudpickle", "_pickle", "cPickle", "pickle5"}
_SWITCHES = {
    "shell": "runs a shell",
    "trust_remote_code": "runs downloaded code",
    "allow_pickle": "unpickles",
}


def violations(source: str, name: str) -> list[str]:
    """One line ``name:line: call, why`` per forbidden call or import in ``source``."""
    tree = ast.parse(source, name)
    aliases = dict(_aliases(tree))
    own = {*_parameters(tree), *_fields(tree)}
    found = []
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            module = node.module if isinstance(node, ast.ImportFrom) else None
            roots = [module] if module else [alias.name for alias in node.names]
            wrong = [root for root in roots if root and root.partition(".")[0] in _PICKLES]
            found += [(node.lineno, f"import of {root}, unpickles") for root in wrong]
        elif isinstance(node, (ast.Name, ast.Attribute)) and node not in own:
            # a mention is enough: the function could be called under another name
            meaning = _meaning(node, aliases)
            if meaning in _FORBIDDEN:
                found.append((node.lineno, f"{meaning}, {_FORBIDDEN[meaning]}"))
        elif isinstance(node, ast.Call):
            found += [(node.lineno, why) for why in _bad_arguments(node, aliases)]
    return [f"{name}:{line}: {why}" for line, why in sorted(set(found))]


def _parameters(tree: ast.AST) -> Iterator[ast.Name]:
    """Mentions of a function's own parameters in its body, which stand for no builtin there."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            every = (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)
            names = {each.arg for each in every}
            inside = (each for statement in node.body for each in ast.walk(statement))
            yield from (each for each in inside if isinstance(each, ast.Name) and each.id in names)


def _fields(tree: ast.AST) -> Iterator[ast.Name]:
    """The names of the fields of a class where they are declared."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            declared = (each for each in node.body if isinstance(each, ast.AnnAssign))
            yield from (each.target for each in declared if isinstance(each.target, ast.Name))


def _bad_arguments(call: ast.Call, aliases: dict[str, str]) -> Iterator[str]:
    given = {each.arg: each.value for each in call.keywords if each.arg}
    for switch, why in _SWITCHES.items():
        if switch in given and not _is(given[switch], False):
            yield f"{switch}=, {why}"
    safe = "weights_only" in given and _is(given["weights_only"], True)
    if _meaning(call.func, aliases) == "torch.load" and not safe:
        yield "torch.load without weights_only=True, unpickles"
    elif "weights_only" in given and not safe:
        yield "weights_only other than True, unpickles"


def _is(value: ast.expr, wanted: bool) -> bool:
    return isinstance(value, ast.Constant) and value.value is wanted


def _aliases(tree: ast.AST) -> Iterator[tuple[str, str]]:
    """What each imported name stands for."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.asname:
                    yield alias.asname, alias.name
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            for alias in node.names:
                yield alias.asname or alias.name, f"{node.module}.{alias.name}"


def _meaning(node: ast.expr, aliases: dict[str, str]) -> str:
    """The dotted name an expression stands for, or an empty text."""
    if isinstance(node, ast.Name):
        return aliases.get(node.id, node.id)
    if isinstance(node, ast.Attribute):
        value = _meaning(node.value, aliases)
        return f"{value}.{node.attr}" if value else ""
    return ""
